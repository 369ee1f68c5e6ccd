"""Precision as trainers set it: GradScaler, main_grad under autocast, the switch of float32 products."""

import pytest
import torch
from precision_cases import Twin, batch, flagged_model, fused_model, stock_model
from routes import TRITON_DEVICE
from support import assert_accurate, assert_as_good_as_eager, call, each, eager, flatten, grads, like, tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbp
from fastbp import casts
from fastbp.activations import bind
from fastbp.backends import native, triton
from fastbp.forms import GATED_MLP, LINEAR_ACT, MLP

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GELU = bind("gelu")
needs_native = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
needs_triton = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")


def owners(model):
    """The weights whose gradients go to main_grad."""
    flagged = [m for m in model.modules() if getattr(m, "gradient_accumulation_fusion", False)]
    return [w for m in flagged for w in m.parameters() if w.dim() == 2]


def train(model, dtype, *, steps=6, micro=1, scale=2.0**8, backoff=0.5, overflow_at=(), factor=float("inf"), clip=None):
    """Losses and norms, the weights at the end, and the scale after each step; float64 without autocast or scaler."""
    wide = dtype is F64
    model = model.double() if wide else model
    weights, apart = list(model.parameters()), owners(model)
    for w in apart:
        w.main_grad = torch.zeros_like(w)
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2, backoff_factor=backoff, enabled=not wide)
    losses, norms, scales = [], [], []
    for step in range(steps):
        overflows = step in overflow_at
        if wide and overflows:
            continue
        with torch.autocast("cpu", F16 if wide else dtype, enabled=not wide):
            for part in range(micro):
                x, target = batch(step * micro + part, F64 if wide else F32)
                loss = (model(x).to(x.dtype) - target).square().mean()
                losses += [] if overflows else [loss.detach()]
                scaler.scale(loss * (factor if overflows else 1.0)).backward()
        for w in apart:
            assert w.grad is None
            w.grad = w.main_grad
        if clip is not None:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(weights, clip)
            norms += [] if overflows else [norm]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for w in apart:
            w.main_grad.zero_()
        scales.append(scaler.get_scale())
    return [torch.stack(n) for n in (losses, norms) if n] + [w.detach() for w in weights], scales


SETTINGS = {
    "plain": dict(),
    "overflow": dict(overflow_at=(2, 3)),
    "clipped": dict(clip=0.5),
    "clipped, overflow": dict(clip=0.5, overflow_at=(0, 4)),
    "micro-batches": dict(micro=3, overflow_at=(1,), clip=0.5),
}


def assert_trains_as_stock(mine, stock, dtype, **settings):
    (found, my_scales), (theirs, scales), (truth, _) = (
        train(model(), dtype, **settings) for model, dtype in ((mine, dtype), (stock, dtype), (stock, F64))
    )
    assert my_scales == scales
    assert len(set(scales)) > 1, "the scale never changed"
    assert_as_good_as_eager(found, theirs, truth)


@each("dtype", [BF16, F16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fused_model_trains_with_grad_scaler_as_stock_does(dtype, settings):
    """Losses, norms and weights; steps whose gradients are not finite are skipped."""
    assert_trains_as_stock(fused_model, stock_model, dtype, **SETTINGS[settings])


def test_a_scale_that_overflows_float16_skips_the_step():
    """In the backward of the blocks, and not only in the loss."""
    assert_trains_as_stock(fused_model, stock_model, F16, scale=2.0**60, backoff=2.0**-50, overflow_at=(0,), factor=1.0)


@each("dtype", [BF16, F16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_main_grad_under_autocast_with_grad_scaler(dtype, settings):
    """Beside fused blocks whose gradients go to .grad."""
    assert_trains_as_stock(flagged_model, Twin, dtype, **SETTINGS[settings])


def test_main_grad_from_casts_that_are_kept():
    """Micro-batches in one region share the casts, and add to the bit what they add with casts of their own."""

    def add(**options):
        model = flagged_model()
        for w in owners(model):
            w.main_grad = torch.zeros_like(w)
        with torch.autocast("cpu", **options):
            for part in range(3):
                model(batch(part, BF16)[0]).float().square().sum().backward()
            kept = len(casts._current() or ())
        return [w.main_grad for w in owners(model)], [w.grad for w in model.parameters()], kept

    mine, rest, kept = add()
    theirs, others, none = add(cache_enabled=False)
    assert (len(mine), kept, none) == (6, len(rest), 0)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(mine, theirs, strict=True))
    for a, b in zip(rest, others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


# The switch of float32 products: TF32 on a GPU, bfloat16 on a CPU that multiplies it.


@pytest.fixture(params=["highest", "high", "medium"])
def switch(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("switch")
@each("backend", [pytest.param("native", marks=needs_native), "reference"])
@each("dtype", [F32, F16])
@each(("rows", "features"), [(37, (19, 23, 17, 11)), (96, (256, 272, 256, 256)), (1, (128, 256, 128, 64))])
@each("form", [LINEAR_ACT, MLP, GATED_MLP])
def test_the_switch_costs_no_more_digits_than_eager(form, rows, features, dtype, backend):
    drawn = tensors(form, dtype, seed=14, rows=rows, features=features)
    assert_accurate(form, GELU, "auto", drawn, backend=backend)


@each("dtype", [BF16, F16])
def test_the_switch_does_not_reach_main_grad(switch, dtype):
    """Whose products are of 16 bits, and are widened on a CPU only so that their sum is not rounded."""
    x, (weight,), _ = tensors(LINEAR_ACT, dtype, seed=15, rows=128, features=(64, 96))
    weight.main_grad = torch.zeros(96, 64)
    y = fastbp.linear_act(x, weight, activation="identity", gradient_accumulation_fusion=True)
    dy = like(y, 16)
    y.backward(dy)
    exact = dy.double().mT @ x.detach().double()
    assert (weight.main_grad - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_a_call_reads_the_switch_when_it_runs():
    """As eager does, which this CPU has to have a use for."""
    x, weights, biases = tensors(LINEAR_ACT, F32, seed=17, rows=64, features=(256, 256))
    found = {f: [] for f in (call, eager)}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            for f in found:
                options = dict(backend="reference") if f is call else {}
                y = f(LINEAR_ACT, x, weights, biases, activation=GELU, **options)
                found[f].append([y, *grads(y, flatten(x, weights, biases), like(y, 18))])
    finally:
        torch.set_float32_matmul_precision(before)
    if torch.equal(found[eager][0][0], found[eager][1][0]):
        pytest.skip("this CPU makes float32 products of float32 by every setting")
    for first, _, third in zip(*found[call], strict=True):
        assert torch.equal(first, third)
    for first, second in list(zip(*found[call][:2], strict=True))[:3]:  # not the gradient of the bias
        assert not torch.equal(first, second)


class Products(TorchDispatchMode):
    """How many of PyTorch's there were."""

    NAMES = "mm.default", "addmm.default", "addmm_.default", "linear.default"

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__ in self.NAMES
        return func(*args, **kwargs or {})


@needs_triton
@each("form", [LINEAR_ACT, GATED_MLP])
def test_every_float32_product_of_triton_is_pytorchs(form):
    """So the switch of TF32 reaches it, on every route: kernels of fastbp's own multiply 16 bits only."""
    from fastbp.backends.triton import choice

    drawn = tensors(form, F32, seed=19, features=(24, 40, 32, 16), device=TRITON_DEVICE)
    inputs, counts = flatten(*drawn), []
    for route in ("library", "fused"):
        with choice.forced(route), Products() as seen:
            y = call(form, *drawn, activation=GELU, backend="triton")
            grads(y, inputs, like(y, 20))
        counts.append(seen.count)
    assert counts == [3 * len(drawn[1])] * 2  # forward, dgrad, wgrad
