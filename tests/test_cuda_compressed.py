"""The compressed save policies in calls of the CUDA kernels, with the host in the GPU's place (cuda_standin.cpp)."""

import itertools

import pytest
import torch
from standin import VIEWS
from support import compressed_cases, each, like, saved_row, tensors

from fastbp.activations import bind
from fastbp.backends import native, reference
from fastbp.compression import DTYPES as COMPRESSED
from fastbp.forms import MLP
from fastbp.problem import Problem, configure
from fastbp.residuals import read_kept
from fastbp.saving import find_kept, find_residuals

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
GELU = bind("gelu")
CASES = compressed_cases([GELU, bind("mish"), bind("softplus", (2.0, 20.0))])
each_case = each(("form", "activation", "save"), CASES)
each_way = each(
    ("dtype", "route"), [(d, r) for d in COMPRESSED for r in ("library", "fused") if d.itemsize == 2 or r == "library"]
)
# What a gradient may be off, of the largest: the roundings of some layers.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def both_forwards(form, activation, save, dtype, **options):
    """A config, its tensors of few digits, so that z of the first layer is exact, and what both ways return."""
    config = configure(form.name, activation.name, activation.params, save, "native")
    options = {"rows": (2, 3, 7), "features": (19, 71, 40, 11), **options}
    x, weights, biases = tensors(form, torch.float64, seed=88, requires_grad=False, **options)
    given = [x.mul(2).round() / 4, *(t.mul(16).round() / 16 for t in weights), *(t.mul(2).round() / 8 for t in biases)]
    given = [t.to(dtype) for t in given]
    return config, given, native.forward(config, given[0], given[1:]), reference.forward(config, given[0], given[1:])


def unlike(kind, mine, its):
    """The share of bytes that differ: of bits in a side of the minimum, or by more than one in what comes next."""
    if kind != "bits":
        return (mine != its).float().mean().item()
    steps = [((mine >> shift & 7).int() - (its >> shift & 7).int()).abs() > 1 for shift in (0, 4)]
    # f(z) of 16 bits is good to a fraction of float16's unit, of which the bits have more digits
    assert max(step.float().mean() for step in steps) < 0.05
    return ((mine ^ its) & 0x88).bool().float().mean().item()


@each_way
@each_case
def test_what_is_kept(on_gpu, form, activation, save, dtype, route):
    """The bytes of the first layer as the reference has them, and what the others stand for; nothing is left out."""
    on_gpu(route)
    config, given, ours, theirs = both_forwards(form, activation, save, dtype)
    kinds = find_residuals(form, save, form.linears(len(given)))
    assert len(ours) == len(theirs) == 1 + len(kinds)
    for (kind, linear), mine, its in zip(kinds, ours[1:], theirs[1:], strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape) and mine.is_contiguous()
        if linear < form.width and kind != "h":
            assert unlike(kind, mine, its) == 0, (kind, linear)
        features = given[linear].shape[-1] if form.given else given[1 + linear].shape[0]
        if kind == "bits" and features % 2:
            assert (mine[..., -1] < 16).all()
    for mine, its in zip(*(read_kept(config, r[0], r[1:], dtype)[0] for r in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0.13 if save == "fp8" else NEAR[dtype], atol=NEAR[dtype])
    torch.testing.assert_close(ours[0], theirs[0], rtol=NEAR[dtype], atol=NEAR[dtype])


def assert_same_gradients(config, given, results, needs, view=lambda t: t):
    """From what the reference kept, by both ways."""
    keep = find_kept(config.form, config.save, config.row.grad_reads_output, needs)
    row = saved_row(config.form, given, results[0], results[1:])
    saved = [view(t) if k else None for t, k in zip(row, keep, strict=True)]
    dy = view(like(results[0], seed=89))
    before = [None if t is None else t.clone() for t in saved]
    ours, theirs = (backend.backward(config, dy, saved, needs) for backend in (native, reference))
    for need, mine, its in zip(needs, ours, theirs, strict=True):
        assert (mine is not None) == need
        if need:
            assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
            torch.testing.assert_close(mine, its, rtol=0, atol=NEAR[mine.dtype] * its.abs().max().item())
    assert all(t is None or torch.equal(t, b) for t, b in zip(saved, before, strict=True))


@each_way
@each_case
def test_gradients_from_what_is_kept(on_gpu, form, activation, save, dtype, route):
    """Every set of gradients that may be asked for."""
    on_gpu(route)
    config, given, _, theirs = both_forwards(form, activation, save, dtype)
    sets = itertools.product([False, True], repeat=len(given))
    for needs in sets if activation == GELU else [(True,) * len(given)]:
        if any(needs):
            assert_same_gradients(config, given, theirs, needs)


def test_no_epilogue_of_the_library_compresses(on_gpu, standin):
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


@each("save", ["output_bits", "output_lsb", "fp8"])
def test_a_gpu_is_served(monkeypatch, save):
    """By the policy nothing is refused, only by what the machine and the library have."""
    monkeypatch.setattr(native, "cuda_architectures", lambda: "sm_90a")
    monkeypatch.setattr(native, "cuda_refusal", lambda index: f"not GPU {index}")
    monkeypatch.setattr(torch.version, "hip", None)
    config = configure("mlp", "gelu", (), save, "native")
    assert native.supports(Problem(config, torch.device("cuda", 3), torch.bfloat16)) == "not GPU 3"


ALL_VIEWS = {**VIEWS, "anywhere": anywhere}


@each_way
@each("view", ALL_VIEWS)
@each(("form", "save"), [(form, save) for form, activation, save in CASES if activation == GELU])
def test_strides_of_what_is_kept(on_gpu, form, save, view, dtype, route):
    on_gpu(route)
    for features in (24, 40, 32, 16), (19, 71, 40, 11):
        config, given, _, theirs = both_forwards(form, GELU, save, dtype, rows=6, features=features)
        seen = ALL_VIEWS[view]
        assert_same_gradients(config, given, theirs, (True,) * len(given), seen)


@each_way
@each("empty", ["rows", "in", "hidden"])
@each(("form", "save"), [(form, save) for form, activation, save in CASES if activation == GELU])
def test_sizes_of_zero_kept(on_gpu, form, save, empty, dtype, route):
    on_gpu(route)
    features = tuple(0 if empty == name else 5 for name in ("in", "hidden", "hidden", "out"))
    config, given, ours, theirs = both_forwards(
        form, GELU, save, dtype, rows=0 if empty == "rows" else 3, features=features
    )
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
    saved = saved_row(form, given, theirs[0], theirs[1:])
    needs = (True,) * len(given)
    dy = torch.ones_like(theirs[0])
    found = (backend.backward(config, dy, saved, needs) for backend in (native, reference))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=NEAR[dtype], atol=NEAR[dtype])
