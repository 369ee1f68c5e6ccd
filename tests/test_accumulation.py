"""gradient_accumulation_fusion: weight gradients added in float32 to main_grad or .grad, and what it refuses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import support
import torch
from routes import TRITON_DEVICE, each_triton_route
from support import FEW, assert_close, cases, each, eager, flatten, formula, like, widened, with_others
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp import accumulation
from fastbp.backends import choose_accumulating, triton
from fastbp.forms import FORMS, LINEAR_ACT, MLP
from fastbp.problem import configure

BF16, F32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
CASES = cases(FEW)
FORM_CASES = cases(FEW[3:4])
needs_triton = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")


def tensors(form, *arguments, **options):
    """x, the weights and the biases of a call, without the inputs after x, which ``call`` makes."""
    x, weights, biases = support.tensors(form, *arguments, **options)
    return x, weights[form.inputs - 1 :], biases


def call(form, x, weights, biases, *, activation="gelu", flag=True, **settings):
    weights = with_others(form, x.detach(), weights)
    arguments = (*weights, *biases) if form.parts else (weights, biases)
    settings |= dict(activation=activation, gradient_accumulation_fusion=flag)
    return getattr(fastbp, form.name)(x, *arguments, **settings)


def attach(weights, seed=80):
    """Random main_grads, and what they were: what is there must stay."""
    for i, weight in enumerate(weights):
        weight.main_grad = like(weight.detach().float(), seed + i)
    return [weight.main_grad.clone() for weight in weights]


def assert_added(form, activation, save, dtype, backend, device="cpu", features=(24, 40, 32, 16)):
    """To what was there, dW as the same backend returns it but not rounded; all else to the bit."""
    x, weights, biases = tensors(form, dtype, seed=81, features=features, device=device)
    settings = dict(activation=activation, save=save, backend=backend)
    plain = call(form, x, weights, biases, flag=False, **settings)
    dy = like(plain, 82)
    expected = torch.autograd.grad(plain, flatten(x, weights, biases), dy)
    before = attach(weights)
    y = call(form, x, weights, biases, **settings)
    y.backward(dy)
    assert torch.equal(y, plain)
    assert torch.equal(x.grad, expected[0])
    for bias, grad in zip(biases, expected[1 + len(weights) :], strict=True):
        assert torch.equal(bias.grad, grad)
    finest = 2.0**-22 if dtype is F32 else torch.finfo(dtype).eps
    for weight, was, grad in zip(weights, before, expected[1:], strict=False):
        assert weight.grad is None
        gap = weight.main_grad - was - grad.float()
        assert (gap.abs() <= finest * (grad.abs() + 1)).all()
        assert dtype is F32 or gap.abs().max() > 2e-5, "dW was rounded to 16 bits"


@each("backend", [None, "reference"])
@each("dtype", accumulation.ADDED_TO)
@each(("form", "activation", "save"), CASES)
def test_adds_what_is_returned_otherwise(form, activation, save, dtype, backend):
    backend = backend or choose_accumulating(configure(form.name, "relu", (), save, "auto"), CPU, dtype).backend
    assert_added(form, activation, save, dtype, backend)


@needs_triton
@each_triton_route("library", "fused", dtypes=accumulation.ADDED_TO)
@each(("form", "activation", "save"), cases(FEW[1:4]))
def test_adds_by_triton(form, activation, save, dtype, triton_route):
    assert_added(form, activation, save, dtype, "triton", TRITON_DEVICE)


@each("dtype", [BF16, torch.float16])
@each("chunk", [1, 300, 1 << 22])
def test_sum_over_micro_batches(dtype, chunk, monkeypatch):
    """Within twice float32's own rounding of the float64 sum; summed in 16 bits it is a hundred times off."""
    monkeypatch.setattr(accumulation, "_CHUNK", chunk)
    x, (weight,), _ = tensors(LINEAR_ACT, dtype, seed=83, bias=False)
    weight.main_grad = torch.zeros(weight.shape)
    rounded, floats = torch.zeros_like(weight.main_grad), torch.zeros(weight.shape)
    exact, narrow = torch.zeros(weight.shape, dtype=torch.float64), torch.zeros_like(weight)
    for step in range(16):
        xs = like(x, 100 + step)
        y = call(LINEAR_ACT, xs, (weight,), (None,), activation="identity")
        dy = like(y, 200 + step)
        y.backward(dy)
        exact += dy.double().T @ xs.double()
        floats.addmm_(dy.float().T, xs.float())
        narrow += dy.T @ xs
        rounded += (dy.T @ xs).float()
    mine, f32, f16, products = ((g.double() - exact).abs().max() for g in (weight.main_grad, floats, narrow, rounded))
    assert mine <= 2 * f32 + 1e-6 * exact.abs().max()
    assert f16 > 100 * mine and products > 100 * mine


class Seen(TorchDispatchMode):
    """Every operation by name, with the sizes of what it returns."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.operations.append((func.__name__, result.numel() if isinstance(result, torch.Tensor) else 0))
        return result


def test_operands_are_widened_in_pieces(monkeypatch):
    monkeypatch.setattr(accumulation, "_CHUNK", 300)
    d, h = like(torch.empty(64, 7, dtype=BF16), 98), like(torch.empty(64, 5, dtype=BF16), 99)
    with Seen() as seen:
        accumulation.add_product(torch.zeros(7, 5), d, h)
    assert max(count for name, count in seen.operations if name.startswith("_to_copy")) == 25 * 7


def test_a_weight_that_is_not_asked_for_costs_nothing():
    x, weights, biases = tensors(LINEAR_ACT, F32, seed=79)
    y = call(LINEAR_ACT, x, weights, biases).sum()
    with Seen() as seen:
        torch.autograd.grad(y, x)
    assert [name for name, _ in seen.operations if "mm" in name] == ["mm.default"]


@each("attach_it", [True, False])
def test_threads_that_train_one_weight(attach_it):
    weight = nn.Parameter(torch.zeros(2048, 1024))
    if attach_it:
        weight.main_grad = torch.zeros(2048, 1024)
    x = torch.ones(4, 1024)

    def train(_):
        call(LINEAR_ACT, x, (weight,), (None,), activation="identity").sum().backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(40)))
    assert ((weight.main_grad if attach_it else weight.grad) == 4 * 40).all()


@each("form", FORMS.values())
def test_one_weight_used_often(form):
    """In one call, in one graph, and in a backward over the same graph twice."""
    square, x = (like(torch.empty(5, 5), 84) / 3).requires_grad_(), like(torch.empty(7, 5), 85)
    weights, biases = [square] * len(tensors(form, seed=0)[1]), [None] * len(tensors(form, seed=0)[1])

    def twice(flag):
        return call(form, call(form, x, weights, biases, flag=flag), weights, biases, flag=flag).sum()

    (grad,) = torch.autograd.grad(twice(False), square)
    square.main_grad = torch.zeros(5, 5)
    loss = twice(True)
    for times in (1, 2):
        version = square.main_grad._version
        loss.backward(retain_graph=True)
        torch.testing.assert_close(square.main_grad, times * grad, rtol=1e-5, atol=1e-5)
        assert square.main_grad._version > version, "autograd has to see that it changed"


@each(("form", "activation", "save"), FORM_CASES)
def test_frozen_weights_are_left_alone(form, activation, save):
    x, weights, biases = tensors(form, F32, seed=86)
    expected = torch.autograd.grad(call(form, x, weights, biases, flag=False).sum(), weights)
    for frozen in range(len(weights)):
        before = attach(weights)
        del weights[frozen].main_grad
        weights[frozen].requires_grad_(False)
        call(form, x, weights, biases, activation=activation, save=save).sum().backward()
        weights[frozen].requires_grad_()
        for i, weight in enumerate(weights):
            if i != frozen:
                torch.testing.assert_close(weight.main_grad, before[i] + expected[i])


def test_without_gradients_the_flag_has_no_effect():
    x, weights, biases = tensors(MLP, seed=87)
    with torch.no_grad():
        assert_close(call(MLP, x, weights, biases), call(MLP, x, weights, biases, flag=False))
    frozen = [w.detach() for w in weights]
    (mine,) = torch.autograd.grad(call(MLP, x, frozen, biases).sum(), x, create_graph=True)
    assert mine.requires_grad


@each("zeros", [None, False, True])
@each("autocast", [False, True])
def test_megatrons_attributes(zeros, autocast):
    """A dummy gradient runs the hooks where the trainer asks for it; nothing is added to .grad otherwise."""
    module = fastbp.LinearAct(6, 8, dtype=F32 if autocast else BF16, gradient_accumulation_fusion=True)
    seen = []
    attach([module.weight])
    module.weight.grad_added_to_main_grad = False
    module.weight.register_hook(lambda grad: seen.append(grad))
    if zeros is not None:
        module.weight.zero_out_wgrad = zeros
    with torch.autocast("cpu", enabled=autocast):
        y = module(torch.randn(3, 6, dtype=module.weight.dtype))
    y.sum().backward()
    assert module.weight.grad_added_to_main_grad is True
    assert [(g.shape, g.dtype) for g in seen] == [(module.weight.shape, module.weight.dtype)]
    assert not zeros or not seen[0].any()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="PyTorch has no grad_dtype here")
@each("allowed", [F32, None])
def test_grad_in_float32_of_a_weight_in_16_bits(allowed):
    x, (weight,), _ = tensors(LINEAR_ACT, BF16, seed=88)
    weight.grad_dtype = allowed
    if allowed is None:
        weight.grad = torch.zeros(weight.shape)
    for times in (1, 2):
        y = call(LINEAR_ACT, x, (weight,), (None,), activation="identity")
        y.backward(like(y, 89))
        assert weight.grad.dtype == F32
        torch.testing.assert_close(weight.grad, times * (like(y, 89).float().T @ x.float()).detach())


def test_grad_of_a_weight_in_float32():
    x, weights, biases = tensors(MLP, F32, seed=90)
    expected = torch.autograd.grad(call(MLP, x, weights, biases, flag=False).sum(), weights)
    call(MLP, x, weights, biases).sum().backward()
    for weight, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, grad)


@each(("form", "activation", "save"), FORM_CASES)
def test_gradients_that_are_asked_for_are_returned_and_not_added(form, activation, save):
    x, weights, biases = tensors(form, F32, seed=91)
    expected = torch.autograd.grad(call(form, x, weights, biases, flag=False).sum(), [x, *weights])
    before = attach(weights)

    def loss():
        return call(form, x, weights, biases, activation=activation, save=save).sum()

    for i, tensor in enumerate([x, *weights]):
        torch.testing.assert_close(torch.autograd.grad(loss(), tensor)[0], expected[i])
    loss().backward(inputs=[x])
    assert all(torch.equal(w.main_grad, was) for w, was in zip(weights, before, strict=True))
    loss().backward(inputs=weights[:1])
    changed = [not torch.equal(w.main_grad, was) for w, was in zip(weights, before, strict=True)]
    assert changed == [True] + [False] * (len(weights) - 1)


@each("reentrant", [False, True])
@each(("form", "activation", "save"), FORM_CASES)
def test_checkpoint(form, activation, save, reentrant):
    x, weights, biases = tensors(form, F32, seed=92)
    expected = torch.autograd.grad(call(form, x, weights, biases, flag=False).sum(), weights)
    before = attach(weights)

    def block(x):
        return call(form, x, weights, biases, activation=activation, save=save)

    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    for weight, was, grad in zip(weights, before, expected, strict=True):
        torch.testing.assert_close(weight.main_grad, was + grad)


@each("form", FORMS.values())
def test_autocast_adds_to_the_weights_that_were_cast(form):
    """Nearer to the float64 gradient of the same numbers than what autocast rounds, or as near."""
    x, weights, biases = tensors(form, F32, seed=93)
    wide = widened([t.to(BF16) for t in flatten(x, weights, biases)])
    count = len(weights)
    y = eager(
        form, wide[0], with_others(form, wide[0].detach(), wide[1 : 1 + count]), wide[1 + count :], formula(FEW[3])
    )
    exact = torch.autograd.grad(y.sum(), wide[1 : 1 + count])
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape)
    for flag in (False, True):
        with torch.autocast("cpu", BF16):
            call(form, x, weights, biases, flag=flag).sum().backward()
    for weight, truth in zip(weights, exact, strict=True):
        mine, theirs = ((g.double() - truth).norm() for g in (weight.main_grad, weight.grad))
        assert 0 < mine <= theirs, "two gradients, each in its place"
