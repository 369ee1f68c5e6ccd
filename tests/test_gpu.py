"""What only a GPU can show: real shapes, every shipped tile, CUDA graphs, streams, devices, sizes beyond 2³¹."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import DTYPES, assert_accurate, call, each, flatten, grads, like
from support import tensors as draw
from torch.autograd import gradcheck, gradgradcheck

import fastbp
from fastbp.activations import bind
from fastbp.backends import triton
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="no NVIDIA GPU that torch can use"),
    pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}"),
]
GELU = bind("gelu")
tensors = functools.partial(draw, device="cuda")
accurate = functools.partial(assert_accurate, backend="triton")
ROOT = Path(fastbp.__file__).parents[1]


@pytest.fixture(params=["library", "fused"])
def forced(request):
    from fastbp.backends.triton import choice

    with choice.forced(request.param):
        yield request.param


@each("dtype", DTYPES)
@each("features", [(768, 3072, 3072, 768), (1000, 1001, 77, 130)])
@each("form", FORMS.values())
def test_model_shapes(form, features, dtype, forced):
    accurate(form, GELU, "preact", tensors(form, dtype, seed=51, rows=(3, 347), features=features))


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


def step(form, inputs, backend="triton", activation=GELU):
    half = 1 + len(inputs) // 2
    y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=activation, backend=backend)
    return [y, *grads(y, inputs, like(y, 52))]


def equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


BLOCKS = [LINEAR_ACT, MLP, GATED_MLP]


@each("form", BLOCKS)
def test_cuda_graph(form, forced):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=53, rows=256, features=(128, 512, 512, 128)))
    expected = step(form, inputs)
    half = 1 + len(inputs) // 2
    dy = like(expected[0], 52)

    def run():
        y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=GELU, backend="triton")
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
    half = 1 + len(inputs) // 2
    dy = like(step(form, inputs)[0], 52)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=GELU, backend="triton")
        grads(y, inputs, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each("form", BLOCKS)
def test_side_stream(form, forced):
    """A call waits for what its own stream has still to do, and for no other's."""
    inputs = flatten(*tensors(form, torch.bfloat16, seed=55, rows=512, features=(128, 512, 512, 128)))
    expected = step(form, inputs)
    source = inputs[0].detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with torch.no_grad():
            inputs[0].zero_()
            torch.cuda._sleep(50_000_000)
            inputs[0].copy_(source)
        found = step(form, inputs)
    side.synchronize()
    equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU; this needs two")
@each("form", BLOCKS)
def test_second_device(form, forced):
    first = step(form, flatten(*tensors(form, torch.bfloat16, seed=56, rows=256, features=(128, 512, 512, 128))))
    others = draw(form, torch.bfloat16, seed=56, rows=256, features=(128, 512, 512, 128), device="cuda:1")
    assert torch.cuda.current_device() == 0
    equal([t.cuda(0) for t in step(form, flatten(*others))], first)


@each("form", BLOCKS)
def test_deterministic_mode(form, forced):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=57, rows=300, features=(128, 512, 512, 128)))
    torch.use_deterministic_algorithms(True)
    try:
        equal(step(form, inputs), step(form, inputs))
    finally:
        torch.use_deterministic_algorithms(False)


@each("form", FORMS.values())
def test_compiled(form, forced, fresh_dynamo):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=58, rows=256, features=(128, 512, 512, 128)))
    half = 1 + len(inputs) // 2

    def function(x, *rest):
        return call(form, x, rest[: half - 1], rest[half - 1 :], activation="gelu", backend="triton")

    y = torch.compile(function, fullgraph=True)(*inputs)
    equal([y, *grads(y, inputs, like(y, 52))], step(form, inputs))


@each("form", FORMS.values())
def test_gradients_of_gradients(form, forced):
    inputs = flatten(*tensors(form, torch.float64, seed=59, rows=3, features=(4, 5, 3, 2)))
    half = 1 + len(inputs) // 2

    def function(*args):
        return call(form, args[0], args[1:half], args[half:], activation="gelu", backend="triton")

    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


def test_auto_is_right_at_every_size():
    for rows, features in ((1, (8, 8)), (64, (512, 2048)), (8192, (1024, 4096))):
        x, weights, biases = tensors(LINEAR_ACT, torch.bfloat16, seed=60, rows=rows, features=(*features, 8, 8))
        assert_accurate(LINEAR_ACT, GELU, "auto", (x, weights[:1], biases[:1]))


@each("kind", ["library", "fused"])
def test_more_than_two_to_the_31_numbers(kind):
    """The last rows of matrices with 64-bit offsets, against the same rows alone."""
    from fastbp.backends.triton import choice

    rows, k, n = 2**19 + 64, 64, 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = (torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / 8).requires_grad_()
    tail = x.detach()[-64:].clone().requires_grad_()
    with choice.forced(kind):
        y = fastbp.linear_act(x, weight, activation="gelu", backend="triton")
        short = fastbp.linear_act(tail, weight, activation="gelu", backend="triton")
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
