"""The C++ kernels: every way they compute, with poisoned memory; determinism; what the ops refuse."""

import contextlib
import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from routes import ROWS, each_route
from support import (
    FEW,
    assert_accurate,
    call,
    cases,
    each,
    flatten,
    grads,
    like,
    tensors,
    unflatten,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastbp
from fastbp.activations import bind
from fastbp.backends import native
from fastbp.forms import FORMS, LINEAR_ACT, MLP

ROOT = Path(fastbp.__file__).parents[1]
pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
ops = torch.ops.fastbp_native

GELU = bind("gelu")


accurate = functools.partial(assert_accurate, backend="native")


@each_route
@each(("form", "activation", "save"), cases(FEW))
def test_every_route(form, activation, save, dtype, route):
    # One row has few errors, all of one z: more features, so that neither eager nor we are lucky.
    sizes = {"rows": ROWS[route], "features": (130, 170, 150, 140)} if route in ROWS else {}
    accurate(form, activation, save, tensors(form, dtype, seed=11, **sizes))


@each_route
@each("rows", [1, 5, 96, 97, 1025])
@each("form", FORMS.values())
def test_sizes_around_every_edge(form, rows, dtype, route):
    """One row, less and more than a tile, a panel, a group of rows; features at and around a register and a tile."""
    for features in ((16, 32, 33, 48), (31, 130, 17, 65)):
        accurate(form, GELU, "preact", tensors(form, dtype, seed=12, rows=rows, features=features))


@each("dtype", [torch.float32, torch.bfloat16])
@each("form", FORMS.values())
def test_sizes_beyond_every_block(form, dtype):
    """More features than a step of the reduction and a strip of columns have."""
    accurate(form, GELU, "preact", tensors(form, dtype, seed=13, rows=300, features=(300, 1100, 310, 290)))


# Views of other strides with the same numbers: x, dy, weights and biases as they may come.
VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "reversed rows": lambda t: t.flip(0).flip(0) if t.dim() == 1 else t.flip(-1).contiguous().flip(-1),
    "outer gap": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@each_route
@each("view", VIEWS)
@each("form", FORMS.values())
def test_strides(form, view, dtype, route):
    def viewed(tensor):
        return VIEWS[view](tensor.detach()).requires_grad_()

    x, weights, biases = tensors(form, dtype, seed=14, rows=(1, 1, ROWS[route]) if route in ROWS else (3, 2, 5))
    strided = viewed(x), [viewed(w) for w in weights], [viewed(b) for b in biases]
    assert torch.equal(strided[0], x)
    accurate(form, GELU, "preact", strided, view=lambda dy: viewed(dy).detach())


@each_route
@each("view", VIEWS)
@each("form", [form for form in FORMS.values() if form.given])
def test_strides_of_one_alone(form, view, dtype, route):
    """Of gate, up and dy one may lie in one piece where another does not."""
    rows = (1, 1, ROWS[route]) if route in ROWS else (3, 2, 5)
    flat = [t.detach() for t in flatten(*tensors(form, dtype, seed=14, rows=rows))]
    for i in range(len(flat) + 1):  # the last time it is dy
        one = [(VIEWS[view](t) if at == i else t).requires_grad_() for at, t in enumerate(t.clone() for t in flat)]
        dy_view = VIEWS[view] if i == len(flat) else lambda dy: dy
        accurate(form, GELU, "preact", unflatten(form, one), view=dy_view)


def test_rows_that_no_single_stride_reaches():
    x, weights, biases = tensors(LINEAR_ACT, torch.float32, seed=15, rows=(4, 3, 5))
    turned = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    results = [call(LINEAR_ACT, t, weights, biases, activation=GELU, backend="native") for t in (x, turned)]
    assert torch.equal(*results)
    dys = [torch.ones(()).expand_as(results[0]), torch.ones_like(results[0])]
    assert torch.equal(*(grads(y, [t], dy)[0] for y, t, dy in zip(results, (x, turned), dys, strict=True)))


@each_route
@each(("form", "activation", "save"), cases([GELU, bind("tanh")], [form for form in FORMS.values() if form.given]))
def test_every_choice_of_what_is_needed(form, activation, save, dtype, route):
    """One of two slopes alone has memory and loops of its own, and the weight is asked for beside it or not."""
    inputs = tensors(form, dtype, seed=20, rows=ROWS.get(route, 37))
    flat = flatten(*inputs)
    for some in range(1, 2 ** len(flat)):
        for i, tensor in enumerate(flat):
            tensor.requires_grad_(bool(some >> i & 1))
        accurate(form, activation, save, inputs)


def step(form, rows, features, dtype):
    inputs = flatten(*tensors(form, dtype, seed=16, rows=rows, features=features))
    y = call(form, *unflatten(form, inputs), activation=GELU, backend="native")
    return [y, *grads(y, inputs, like(y, 17))]


@each("features", [(64, 64, 64, 64), (300, 400, 300, 290)])
@each("dtype", [torch.float32, torch.bfloat16])
@each("form", FORMS.values())
def test_repeats_to_the_bit_and_does_not_depend_on_the_threads_beyond_rounding(form, dtype, features):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, again = (step(form, 1000, features, dtype) for _ in range(2))
        torch.set_num_threads(1)
        alone = step(form, 1000, features, dtype)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        scale = c.abs().max().item()
        assert (a - c).abs().max().item() <= 8 * torch.finfo(dtype).eps * scale


def test_a_second_backward_gives_the_same_bits():
    inputs = flatten(*tensors(MLP, torch.float32, seed=18, rows=200))
    y = call(MLP, inputs[0], inputs[1:4], inputs[4:], activation=GELU, backend="native")
    dy = like(y, 19)
    for a, b in zip(*(grads(y, inputs, dy, retain_graph=True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def raw(**changes):
    """A good forward and the arguments of its backward, by the ops alone, with some changed."""
    t = dict(x=torch.randn(3, 4), weight=torch.randn(5, 4), bias=torch.randn(5), settings=32 * 13, params=[])
    t |= {k: v for k, v in changes.items() if k in t}
    y, z = ops.forward(t["x"], [t["weight"], t["bias"]], t["settings"], t["params"])
    t |= dict(dy=torch.randn_like(y), y=ops.absent(), z=z, needs=[True] * 3) | changes
    saved = [t["x"], t["y"], t["weight"], t["bias"], t["z"]]
    return ops.backward(t["dy"], saved, t["settings"], t["params"], t["needs"])


BAD = {
    "weight of other columns": dict(weight=torch.randn(5, 3)),
    "weight on another device": dict(weight=torch.randn(5, 4, device="meta")),
    "bias on another device": dict(bias=torch.randn(5, device="meta")),
    "bias of one number on another device": dict(
        weight=torch.randn(1, 4), bias=torch.randn(1, device="meta"), z=torch.randn(3, 1), dy=torch.randn(3, 1)
    ),
    "residual on another device": dict(z=torch.randn(3, 5, device="meta")),
    "weight of another dtype": dict(weight=torch.randn(5, 4).double()),
    "weight of three dimensions": dict(weight=torch.randn(5, 4, 1)),
    "weight absent": dict(weight=None),
    "bias too short": dict(bias=torch.randn(4)),
    "bias of no dimension": dict(bias=torch.randn(())),
    "x of no dimension": dict(x=torch.randn(())),
    "x of integers": dict(x=torch.ones(3, 4, dtype=torch.int64)),
    "no such activation": dict(settings=32 * 63),
    "no such policy": dict(settings=32 * 13 + 4 * 6),
    "a policy that does not serve the activation": dict(settings=4 * 4),
    "negative settings": dict(settings=-1),
    "a gated form with one weight": dict(settings=1),
    "too many parameters": dict(params=[1.0, 2.0, 3.0]),
    "dy of other columns": dict(dy=torch.randn(3, 6)),
    "dy of other rows": dict(dy=torch.randn(2, 5)),
    "dy of another dtype": dict(dy=torch.randn(3, 5).double()),
    "residual of other rows": dict(z=torch.randn(2, 5)),
    "residual of other columns": dict(z=torch.randn(3, 4)),
    "residual absent": dict(z=None),
    "needs too many": dict(needs=[True] * 5),
    "needs of an even number": dict(needs=[True] * 2),
}


@each("case", BAD)
def test_the_ops_refuse_by_themselves(case):
    """No tensor reaches a pointer unchecked, whoever calls."""
    raw()
    with pytest.raises((RuntimeError, ValueError)):  # the fake, where a tensor has no memory, in the words of a call
        raw(**{k: ops.absent() if v is None else v for k, v in BAD[case].items()})


def raw_given(**changes):
    """The same of a call that is given gate and up."""
    t = dict(gate=torch.randn(3, 4), up=torch.randn(3, 4), weight=torch.randn(5, 4), bias=torch.randn(5))
    t |= dict(settings=3 + 32 * 13 + (1 << 15)) | {k: v for k, v in changes.items() if k in (*t, "settings")}
    (y,) = ops.forward(t["gate"], [t["up"], t["weight"], t["bias"]], t["settings"], [])
    t |= dict(dy=torch.randn_like(y), kept_gate=t["gate"], kept_up=t["up"], needs=[True] * 4) | changes
    saved = [t["kept_gate"], t["kept_up"], ops.absent(), t["weight"], t["bias"]]
    return ops.backward(t["dy"], saved, t["settings"], [], t["needs"])


BAD_GIVEN = {
    "up of other columns": dict(up=torch.randn(3, 5)),
    "up of other rows": dict(up=torch.randn(2, 4)),
    "up of another shape": dict(up=torch.randn(3, 1, 4)),
    "up that broadcasts": dict(up=torch.randn(4)),
    "up of another dtype": dict(up=torch.randn(3, 4).double()),
    "up on another device": dict(up=torch.randn(3, 4, device="meta")),
    "weight of other columns": dict(weight=torch.randn(5, 3)),
    "kept gate of other rows": dict(kept_gate=torch.randn(2, 4)),
    "kept gate on another device": dict(kept_gate=torch.randn(3, 4, device="meta")),
    "kept up of other columns": dict(kept_up=torch.randn(3, 5)),
    "kept up absent": dict(kept_up=None),
    "kept gate absent": dict(kept_gate=None),
    "weight absent": dict(weight=None),
    "recompute": dict(settings=3 + 4 * 2 + 32 * 13 + (1 << 15)),
    "written over": dict(settings=3 + 2048 + 32 * 13 + (1 << 15)),
    "no linear after it": dict(settings=1 + 32 * 13 + (1 << 15)),
    "needs too few": dict(needs=[True] * 3),
}


@each("case", BAD_GIVEN)
def test_the_ops_refuse_what_does_not_fit_what_is_given(case):
    raw_given()
    with pytest.raises((RuntimeError, ValueError)):  # as above
        raw_given(**{k: ops.absent() if v is None else v for k, v in BAD_GIVEN[case].items()})


CAPABILITIES = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")["CAPABILITIES"]


@each("capability", CAPABILITIES)
def test_every_capability(capability):
    """The tests of errors again, in a process that may use no more than this."""
    program = "from fastbp.backends import native; print(native.unavailable or native.capability())"
    environment = {"FASTBP_CPU_CAPABILITY": capability, "PATH": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    if capability == native.capability():
        pytest.skip("the tests of errors run with it as they are")
    if found.stdout.strip() != capability:
        assert "is not a capability of this CPU" in found.stdout
        pytest.skip(f"this CPU has no {capability}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests"), "-k"]
    chosen = "(test_accuracy and test_values_and_gradients) or (test_native and test_sizes)"
    outcome = subprocess.run(
        [*command, chosen], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:]


class Cloning(TorchDispatchMode):
    """Every op gets copies of its tensors, as sanitizers and opcheck give them."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*tree_map_only(torch.Tensor, torch.clone, args), **(kwargs or {}))


@each("form", FORMS.values(), ids=str)
def test_what_stands_for_none_is_known_from_its_copies_too(form):
    """Of one output in float32, beside which a copy of it once looked like a bias."""
    features = (4, 1, 1) if form.projected or form.given else (4, 1)
    x, weights, biases = tensors(form, torch.float32, seed=0, rows=3, features=features, bias=False)
    found = []
    for mode in (contextlib.nullcontext(), Cloning()):
        with mode:
            y = call(form, x, weights, biases, activation=GELU, backend="native")
            found.append([y, *grads(y, flatten(x, weights, biases), torch.ones_like(y))])
    for plain, copied in zip(*found, strict=True):
        assert plain is copied is None or torch.equal(plain, copied)
