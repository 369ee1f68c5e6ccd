"""Calls of the CUDA kernels, csrc/cuda/calls.cpp and layers.cpp, with the host in the GPU's place (cuda_standin.cpp).

What is launched, on which tensors, and what PyTorch computes itself: all but the kernels.
"""

import functools
import itertools
import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import FEW, assert_accurate, call, cases, each, eager, flatten, grads, like, stock, tensors

from fastbp.activations import bind
from fastbp.backends import native, reference
from fastbp.compression import DTYPES as COMPRESSED
from fastbp.forms import FORMS, LINEAR_ACT, MLP
from fastbp.problem import DTYPES, configure
from fastbp.residuals import read_kept
from fastbp.saving import POLICIES, find_kept, find_residuals

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
SOURCES = [
    "csrc/cuda/calls.cpp",
    "csrc/cuda/layers.cpp",
    "csrc/cuda/route.cpp",
    "csrc/cpu/call.cpp",
    "csrc/cpu/checks.cpp",
]
pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
SIXTEEN = [dtype for dtype in DTYPES if dtype.itemsize == 2]
GELU = bind("gelu")
each_way = each(("dtype", "route"), [*((d, "library") for d in DTYPES), *((d, "fused") for d in SIXTEEN)])
accurate = functools.partial(assert_accurate, backend="native")
EXACT = [case for case in cases(FEW) if not POLICIES[case[2]].compressed]
SIDES = [case for case in cases([*FEW, bind("mish"), bind("gelu_tanh")]) if POLICIES[case[2]].compressed]
each_side = each(("form", "activation", "save"), SIDES)
each_short_way = each(
    ("dtype", "route"), [(d, r) for d in COMPRESSED for r in ("library", "fused") if d in SIXTEEN or r == "library"]
)
# What a gradient may be off, of the largest: the roundings of some layers.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    try:
        cxx, (nvcc, _) = SETUP["compiler"](), SETUP["nvcc"]()
        include, _ = SETUP["toolkit_folders"](nvcc)
        folders, libraries = SETUP["torch_folders"]()
    except SETUP["Unable"] as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("cuda")
    flags = ["-c", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-isystem", include]
    flags += [f"-DTORCH_TARGET_VERSION={SETUP['ABI']}", "-DTORCH_STABLE_ONLY", *SETUP["QUIET"]]
    flags += [flag for path in folders for flag in ("-isystem", str(path))]

    def compile_one(source):
        to = folder / f"{source.replace('/', '_')}.o"
        subprocess.run([*cxx, *flags, str(ROOT / source), "-o", str(to)], check=True)
        return str(to)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, ["tests/cuda_standin.cpp", *SOURCES]))
    to, link = folder / "standin.so", [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*cxx, "-shared", "-Wl,--no-as-needed", *objects, *link, "-o", str(to)], check=True)
    torch.ops.load_library(to)
    beneath = torch.library.Library("fastbp_standin", "IMPL", "Autograd")
    for op in ("forward", "backward"):
        beneath.impl(op, torch.library.fallthrough_kernel)
    yield torch.ops.fastbp_standin
    beneath._destroy()


@pytest.fixture
def on_gpu(standin, monkeypatch):
    """Calls of backend native go to the stand-in, by a route; fresh memory holds NaN."""
    monkeypatch.setattr(native, "_forward", standin.forward.default._op)
    monkeypatch.setattr(native, "_backward", standin.backward.default._op)
    monkeypatch.setattr(native, "_ABSENT", standin.absent())
    standin.set_debug(True)
    yield standin.set_cuda_route
    standin.set_cuda_route("")
    standin.set_debug(False)


@each_way
@each("bias", [True, False])
@each(("form", "activation", "save"), EXACT)
def test_values_and_gradients(on_gpu, form, activation, save, bias, dtype, route):
    on_gpu(route)
    accurate(form, activation, save, tensors(form, dtype, seed=91, bias=bias))


def test_the_fused_route_fuses(on_gpu, standin):
    """Forward and backward of each layer below the last product, and nothing on the other route."""
    inputs = flatten(*tensors(MLP, torch.bfloat16, seed=92))
    counts = []
    for route in ("library", "fused"):
        on_gpu(route)
        before = standin.fused_products()
        y = call(MLP, inputs[0], inputs[1:4], inputs[4:], activation=GELU, backend="native")
        grads(y, inputs, like(y, 93))
        counts.append(standin.fused_products() - before)
    assert counts == [0, 4]


@each(("dtype", "route"), [(torch.float32, "library"), (torch.float16, "library"), (torch.float16, "fused")])
@each("save", ["preact", "output", "recompute"])
@each("form", FORMS.values())
def test_every_choice_of_what_is_needed(on_gpu, form, save, dtype, route):
    """Every set of inputs that take a gradient: each gradient as if all were asked for, and no other."""
    on_gpu(route)
    activation = bind("tanh") if save == "output" else GELU
    if (form, activation, save) not in cases([activation]):
        pytest.skip(f"{save} does not serve {form.name}")
    inputs = flatten(*tensors(form, dtype, seed=94))
    half = 1 + len(inputs) // 2

    def step(needs):
        given = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        y = call(form, given[0], given[1:half], given[half:], activation=activation, save=save, backend="native")
        return grads(y, [t for t, need in zip(given, needs, strict=True) if need], like(y, 95))

    complete = step([True] * len(inputs))
    for needs in itertools.product([False, True], repeat=len(inputs)):
        if any(needs):
            expected = [g for g, need in zip(complete, needs, strict=True) if need]
            for got, want in zip(step(needs), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@each("dtype", SIXTEEN)
@each("save", ["preact", "recompute"])
@each("activation", [bind("gelu_tanh"), GELU])
@each("form", FORMS.values())
def test_epilogues_of_the_library(on_gpu, form, activation, save, dtype):
    """Where cuBLASLt has one, where it has none, and where it turns out not to know a product (one in three)."""
    on_gpu("cublaslt")
    for rows in ((2, 3, 5), (41,), (7, 2)):
        accurate(form, activation, save, tensors(form, dtype, seed=90, rows=rows))


def both_forwards(form, activation, save, dtype, **options):
    """A config, its tensors of few digits, so that z of the first layer is exact, and what both ways return."""
    config = configure(form.name, activation.name, activation.params, save, "native")
    options = {"rows": (2, 3, 7), "features": (19, 71, 40, 11), **options}
    x, weights, biases = tensors(form, torch.float64, seed=88, requires_grad=False, **options)
    given = [x.mul(2).round() / 4, *(t.mul(16).round() / 16 for t in weights), *(t.mul(2).round() / 8 for t in biases)]
    given = [t.to(dtype) for t in given]
    return config, given, native.forward(config, given[0], given[1:]), reference.forward(config, given[0], given[1:])


@each_short_way
@each_side
def test_what_is_kept_short(on_gpu, form, activation, save, dtype, route):
    """The bytes of the first layer as the reference has them, and what the others stand for; nothing is left out."""
    on_gpu(route)
    config, given, ours, theirs = both_forwards(form, activation, save, dtype)
    kinds = find_residuals(form, save, len(given) // 2)
    assert len(ours) == len(theirs) == 1 + len(kinds)
    for (kind, linear), mine, its in zip(kinds, ours[1:], theirs[1:], strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape) and mine.is_contiguous()
        if kind == "bits":
            apart = (mine & 7).int() - (its & 7).int(), (mine >> 4 & 7).int() - (its >> 4 & 7).int()
            beside = [part.abs() <= (1 if route == "library" or linear == 0 else 7) for part in apart]
            # f(z) of 16 bits is good to a fraction of float16's unit, of which the bits have more digits
            assert all(part.float().mean() > 0.95 for part in beside)
            assert its.shape[-1] * 2 == given[1 + linear].shape[0] or (mine[..., -1] < 16).all()
        wrong = ((mine ^ its) & 0x88 if kind == "bits" else mine != its).bool() if mine.dtype == torch.uint8 else None
        if wrong is not None:
            assert not wrong.any() if linear < form.width else wrong.float().mean() < 0.05, (kind, linear)
    for mine, its in zip(*(read_kept(config, r[0], r[1:], dtype)[0] for r in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0.13 if save == "fp8" else NEAR[dtype], atol=NEAR[dtype])
    torch.testing.assert_close(ours[0], theirs[0], rtol=NEAR[dtype], atol=NEAR[dtype])


def assert_same_gradients(config, given, results, needs, view=lambda t: t):
    """From what the reference kept, by both ways."""
    form, linears = config.form, len(given) // 2
    keep = find_kept(form, config.save, config.row.grad_reads_output, needs)
    row = [given[0], results[0], *given[1:], *results[1:]]
    saved = [view(t) if k else None for t, k in zip(row, keep, strict=True)]
    dy = view(like(results[0], seed=89))
    before = [None if t is None else t.clone() for t in saved]
    ours, theirs = (backend.backward(config, dy, saved, needs) for backend in (native, reference))
    for need, mine, its in zip(needs, ours, theirs, strict=True):
        assert (mine is not None) == need
        if need:
            assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
            torch.testing.assert_close(mine, its, rtol=0, atol=NEAR[mine.dtype] * its.abs().max().item())
    assert all(t is None or torch.equal(t, b) for t, b in zip(saved, before, strict=True)), linears


@each_short_way
@each_side
def test_gradients_from_what_is_kept_short(on_gpu, form, activation, save, dtype, route):
    """Every set of gradients that may be asked for."""
    on_gpu(route)
    config, given, _, theirs = both_forwards(form, activation, save, dtype)
    sets = itertools.product([False, True], repeat=len(given))
    for needs in sets if activation == GELU else [(True,) * len(given)]:
        if any(needs):
            assert_same_gradients(config, given, theirs, needs)


def test_no_epilogue_of_the_library_keeps_short(on_gpu, standin):
    on_gpu("cublaslt")
    for save in ("output_bits", "output_lsb", "fp8"):
        before = standin.fused_products()
        config, given, ours, theirs = both_forwards(MLP, bind("gelu_tanh"), save, torch.bfloat16)
        assert_same_gradients(config, given, theirs, (True,) * len(given))
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.03, atol=0.03)
        assert standin.fused_products() == before


def anywhere(tensor):
    """The same numbers, from an address that no access of 4, 8 or 16 bytes may have."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "outer gap": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@each(("dtype", "route"), [(torch.float64, "library"), (torch.bfloat16, "library"), (torch.bfloat16, "fused")])
@each("view", VIEWS)
@each("form", FORMS.values())
def test_strides(on_gpu, form, view, dtype, route):
    def viewed(tensor):
        return VIEWS[view](tensor.detach()).requires_grad_()

    on_gpu(route)
    x, weights, biases = tensors(form, dtype, seed=96)
    strided = viewed(x), [viewed(w) for w in weights], [viewed(b) for b in biases]
    accurate(form, GELU, "preact", strided, view=lambda dy: viewed(dy).detach())


@each_short_way
@each("view", {**VIEWS, "anywhere": anywhere})
@each(("form", "save"), [(form, save) for form, activation, save in SIDES if activation == GELU])
def test_strides_of_what_is_kept_short(on_gpu, form, save, view, dtype, route):
    on_gpu(route)
    for features in (24, 40, 32, 16), (19, 71, 40, 11):
        config, given, _, theirs = both_forwards(form, GELU, save, dtype, rows=6, features=features)
        seen = {**VIEWS, "anywhere": anywhere}[view]
        assert_same_gradients(config, given, theirs, (True,) * len(given), seen)


@each_short_way
@each("empty", ["rows", "in", "hidden"])
@each(("form", "save"), [(form, save) for form, activation, save in SIDES if activation == GELU])
def test_sizes_of_zero_kept_short(on_gpu, form, save, empty, dtype, route):
    on_gpu(route)
    features = tuple(0 if empty == name else 5 for name in ("in", "hidden", "hidden", "out"))
    config, given, ours, theirs = both_forwards(
        form, GELU, save, dtype, rows=0 if empty == "rows" else 3, features=features
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
    saved = [given[0], theirs[0], *given[1:], *theirs[1:]]
    needs = (True,) * len(given)
    dy = torch.ones_like(theirs[0])
    found = (backend.backward(config, dy, saved, needs) for backend in (native, reference))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=NEAR[dtype], atol=NEAR[dtype])


@each_way
@each("form", FORMS.values())
def test_two_backward_calls_and_the_last_one(on_gpu, form, dtype, route):
    """With the graph kept nothing saved is written over; the last call may, and finds the same."""
    on_gpu(route)
    inputs = flatten(*tensors(form, dtype, seed=97, rows=(64, 16)))
    half = 1 + len(inputs) // 2
    y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=GELU, save="preact", backend="native")
    dy = like(y, 98)
    first, second, last = (torch.autograd.grad(y, inputs, dy, retain_graph=keep) for keep in (True, True, False))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@each_way
@each("empty", ["rows", "in", "hidden", "out"])
@each("form", FORMS.values())
def test_sizes_of_zero(on_gpu, form, empty, dtype, route):
    on_gpu(route)
    features = [0 if empty == name else 5 for name in ("in", "hidden", "hidden", "out")]
    given = tensors(form, dtype, seed=99, rows=0 if empty == "rows" else 3, features=tuple(features))
    inputs = flatten(*given)
    half = 1 + len(inputs) // 2
    y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=GELU, backend="native")
    expected = eager(form, *given, stock(GELU))
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        grads(y, inputs, torch.ones_like(y)), grads(expected, inputs, torch.ones_like(y)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_route_that_is_not_there(on_gpu):
    with pytest.raises(RuntimeError, match="routes on a GPU are library, fused and cublaslt"):
        on_gpu("quick")


def test_wrong_tensors_are_refused(on_gpu):
    x, weights, biases = tensors(LINEAR_ACT, torch.float32, seed=90)
    with pytest.raises(ValueError, match=r"did you mean weight\.T"):
        call(LINEAR_ACT, x, [weights[0].detach().T], biases, activation=GELU, backend="native")
