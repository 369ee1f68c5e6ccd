"""What only a GPU can show: real shapes, every shipped tile, CUDA graphs, streams, devices, sizes beyond 2³¹."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import DTYPES, FEW, assert_accurate, call, cases, compressed_cases, each, flatten, grads, like, unflatten
from support import tensors as draw
from torch.autograd import gradcheck, gradgradcheck

import fastbp
from fastbp import compression
from fastbp.activations import bind
from fastbp.backends import native, triton
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP
from fastbp.problem import Problem, configure

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="no NVIDIA GPU that torch can use"),
    pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}"),
]
GELU = bind("gelu")
tensors = functools.partial(draw, device="cuda")
ROOT = Path(fastbp.__file__).parents[1]


NATIVE_FUSED = """
import torch
import fastbp
torch.ops.fastbp_native.set_cuda_route("fused")
for m, n, k in ((128, 128, 64), (1, 8, 8), (1000, 328, 200), (8192, 3072, 768), (16384, 4096, 1024)):
    for dtype in (torch.bfloat16, torch.float16):
        x, w, v = (torch.randn(*s, device="cuda", dtype=dtype) / s[1] ** 0.5 for s in ((m, k), (n, k), (k, n)))
        given = [t.requires_grad_() for t in (x, w, v)]
        for f in (fastbp.mlp, lambda x, ws, **k: fastbp.gated_mlp(x, ws[0], ws[0], ws[1], **k)):
            found = []
            for backend in ("native", "reference"):
                y = f(x, [w, v], activation="gelu", backend=backend)
                found.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
            for ours, other in zip(*found):
                scale = other.abs().max().item()
                torch.testing.assert_close(ours, other, rtol=0.05, atol=0.02 * scale)
torch.cuda.synchronize()
"""


@pytest.fixture(scope="session")
def native_fused():
    """Warps of these kernels wait for each other: should one wait for ever, a process of its own is ended."""
    done = subprocess.run([sys.executable, "-c", NATIVE_FUSED], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(params=["triton library", "triton fused", "native library", "native fused", "native cublaslt"])
def forced(request):
    """A backend by one of its routes; its name."""
    backend, route = request.param.split()
    if backend == "triton":
        from fastbp.backends.triton import choice

        with choice.forced(route):
            yield backend
        return
    config = configure("mlp", "gelu", (), "preact", "native")
    reason = native.unavailable or native.supports(Problem(config, torch.device("cuda", 0), torch.float32))
    if reason:
        pytest.skip(f"native: {reason}")
    if route == "fused":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the fused products of the native library are for Hopper")
        request.getfixturevalue("native_fused")
    torch.ops.fastbp_native.set_debug(True, "")
    with native.forced(route):
        yield backend
    torch.ops.fastbp_native.set_debug(False, "")


@each("dtype", DTYPES)
@each("features", [(768, 3072, 3072, 768), (1000, 1001, 77, 130)])
@each("form", FORMS.values())
def test_model_shapes(form, features, dtype, forced):
    assert_accurate(
        form, GELU, "preact", tensors(form, dtype, seed=51, rows=(3, 347), features=features), backend=forced
    )


def shipped():
    from fastbp.backends.triton import configs

    return [(kind, tile) for kind in configs.KINDS for tile in configs.every_tile(kind) if not tile.pingpong]


@each(("kind", "tile"), shipped() if CUDA else [("none", None)])
@each("dtype", [torch.bfloat16, torch.float16])
@each("sizes", [(512, 512, 256), (1000, 328, 200), (8192, 3072, 768)])
def test_every_tile_of_this_architecture(kind, tile, dtype, sizes):
    """Checked against float64 beside PyTorch's own product, as a tuning run does."""
    from fastbp.backends.triton import autotune, choice, configs

    device = torch.device("cuda")
    if tile not in configs.tiles(kind, choice.device_of(device).family):
        pytest.skip("a tile of another architecture")
    for activation in ("gelu", "mish", "hardtanh"):
        found = autotune.tune(kind, activation, dtype, sizes, device, lambda steps: dict.fromkeys(steps, 1.0), False)
        assert tile.name in found.milliseconds, found.refused.get(tile.name)


def step(form, inputs, backend, activation=GELU):
    y = call(form, *unflatten(form, inputs), activation=activation, backend=backend)
    return [y, *grads(y, inputs, like(y, 52))]


def equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


BLOCKS = [LINEAR_ACT, MLP, GATED_MLP]


@each("form", BLOCKS)
def test_cuda_graph(form, forced):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=53, rows=256, features=(128, 512, 512, 128)))
    expected = step(form, inputs, forced)
    dy = like(expected[0], 52)

    def run():
        y = call(form, *unflatten(form, inputs), activation=GELU, backend=forced)
        return [y, *grads(y, inputs, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    equal(captured, run())
    assert not torch.equal(captured[0], expected[0])


@each("form", BLOCKS)
def test_nothing_waits_for_the_gpu(form, forced):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=54, rows=256, features=(128, 512, 512, 128)))
    dy = like(step(form, inputs, forced)[0], 52)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = call(form, *unflatten(form, inputs), activation=GELU, backend=forced)
        grads(y, inputs, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each("form", BLOCKS)
def test_side_stream(form, forced):
    """A call waits for what its own stream has still to do, and for no other's."""
    inputs = flatten(*tensors(form, torch.bfloat16, seed=55, rows=512, features=(128, 512, 512, 128)))
    expected = step(form, inputs, forced)
    source = inputs[0].detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with torch.no_grad():
            inputs[0].zero_()
            torch.cuda._sleep(50_000_000)
            inputs[0].copy_(source)
        found = step(form, inputs, forced)
    side.synchronize()
    equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU; this needs two")
@each("form", BLOCKS)
def test_second_device(form, forced):
    first = step(
        form, flatten(*tensors(form, torch.bfloat16, seed=56, rows=256, features=(128, 512, 512, 128))), forced
    )
    others = draw(form, torch.bfloat16, seed=56, rows=256, features=(128, 512, 512, 128), device="cuda:1")
    assert torch.cuda.current_device() == 0
    equal([t.cuda(0) for t in step(form, flatten(*others), forced)], first)


@each("form", BLOCKS)
def test_deterministic_mode(form, forced):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=57, rows=300, features=(128, 512, 512, 128)))
    torch.use_deterministic_algorithms(True)
    try:
        equal(step(form, inputs, forced), step(form, inputs, forced))
    finally:
        torch.use_deterministic_algorithms(False)


@each("form", FORMS.values())
def test_compiled(form, forced, fresh_dynamo):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=58, rows=256, features=(128, 512, 512, 128)))

    def function(*inputs):
        return call(form, *unflatten(form, inputs), activation="gelu", backend=forced)

    y = torch.compile(function, fullgraph=True)(*inputs)
    equal([y, *grads(y, inputs, like(y, 52))], step(form, inputs, forced))


@each("form", FORMS.values())
def test_gradients_of_gradients(form, forced):
    inputs = flatten(*tensors(form, torch.float64, seed=59, rows=3, features=(4, 5, 3, 2)))

    def function(*inputs):
        return call(form, *unflatten(form, inputs), activation="gelu", backend=forced)

    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


SIZES = [((5,), (8, 8, 8, 8)), ((129,), (72, 136, 264, 40)), ((3000,), (512, 1032, 1032, 520))]


@each("dtype", [torch.bfloat16, torch.float16])
@each(("rows", "features"), SIZES)
@each(("form", "activation", "save"), cases([*FEW, bind("gelu_tanh")]))
def test_every_policy(form, activation, save, rows, features, dtype, forced):
    """Sizes that 16 bytes divide, of less than a tile, of a part of one, and of more than there are blocks."""
    assert_accurate(form, activation, save, tensors(form, dtype, seed=61, rows=rows, features=features), backend=forced)


@each("dtype", compression.DTYPES)
@each(("rows", "features"), SIZES)
@each(("form", "activation", "save"), compressed_cases([*FEW, bind("gelu_tanh")]))
def test_every_compressed_policy(form, activation, save, rows, features, dtype, forced):
    """The gradients are those of the reference with the same policy, but for roundings and what they do to a code."""
    inputs = flatten(*tensors(form, dtype, seed=62, rows=rows, features=features))

    def run(backend):
        y = call(form, *unflatten(form, inputs), activation=activation, save=save, backend=backend)
        return [y, *grads(y, inputs, like(y, 63))]

    near = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype] * (3 if save == "fp8" else 1)
    for mine, its in zip(run(forced), run("reference"), strict=True):
        assert (mine.double() - its.double()).norm() <= near * its.double().norm()


def test_auto_is_right_at_every_size():
    for rows, features in ((1, (8, 8)), (64, (512, 2048)), (8192, (1024, 4096))):
        x, weights, biases = tensors(LINEAR_ACT, torch.bfloat16, seed=60, rows=rows, features=(*features, 8, 8))
        assert_accurate(LINEAR_ACT, GELU, "auto", (x, weights[:1], biases[:1]))


def test_more_than_two_to_the_31_numbers(forced):
    """The last rows of matrices with 64-bit offsets, against the same rows alone."""
    rows, k, n = 2**19 + 64, 64, 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = (torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 8).requires_grad_()
    tail = x.detach()[-64:].clone().requires_grad_()
    y = fastbp.linear_act(x, weight, activation="gelu", backend=forced)
    short = fastbp.linear_act(tail, weight, activation="gelu", backend=forced)
    assert torch.equal(y[-64:], short)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype, device="cuda").expand_as(y))
    (dtail,) = torch.autograd.grad(short, tail, torch.ones_like(short))
    torch.testing.assert_close(dx[-64:], dtail, rtol=2**-7, atol=2**-7)


PINGPONG = """
import torch
from fastbp.backends.triton import autotune, configs
for sizes in ((128, 128, 64), (512, 512, 256), (1000, 328, 200), (8192, 3072, 768), (16384, 4096, 1024)):
    for dtype in (torch.bfloat16, torch.float16):
        for activation in ("gelu", "mish", "hardtanh"):
            clock = lambda steps: dict.fromkeys(steps, 1.0)
            found = autotune.tune(
                "forward", activation, dtype, sizes, torch.device("cuda"), clock, remember=False, pingpong=True
            )
            names = [tile.name for tile in configs.tiles("forward", "sm_90") if tile.pingpong]
            assert set(names) <= set(found.milliseconds), (sizes, dtype, activation, found.refused)
"""


@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() != (9, 0), reason="the ping-pong kernel is for Hopper"
)
def test_pingpong_in_a_process_of_its_own():
    """Its warps wait for each other: should one wait for ever, the process is ended, and this test fails."""
    done = subprocess.run([sys.executable, "-c", PINGPONG], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("out", [256, 1])
def test_main_grad(dtype, out):
    """Added in float32: nearer to the float64 sum than one product rounded to 16 bits is."""
    x, (weight,), _ = tensors(LINEAR_ACT, dtype, seed=71, rows=4096, features=(512, out), bias=False)
    weight.main_grad = torch.ones(weight.shape, device="cuda")
    exact = weight.main_grad.double()
    for step in range(4):
        y = fastbp.linear_act(x, weight, activation="identity", gradient_accumulation_fusion=True)
        dy = like(y, step)
        y.backward(dy)
        exact += dy.double().mT @ x.detach().double()
    assert (weight.main_grad - exact).abs().max() < 1e-3 * exact.abs().max() / (1 if dtype == torch.float32 else 10)
    assert weight.grad is None
