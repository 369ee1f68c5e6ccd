"""Calls on DTensors, on two ranks: each is given all numbers, and compares with stock PyTorch on all of them."""

import contextlib
import itertools
import re
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from support import assert_close, call, eager, flatten, grads, like, on_flat, tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastbp
from fastbp import functional
from fastbp.activations import bind
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP

GELU, TANH, IDENTITY = bind("gelu"), bind("tanh"), bind("identity")
R, COLUMNS, ROWS = Replicate(), Shard(0), Shard(1)  # of a weight (N, K)
FEATURES = (6, 10, 8, 7)  # 7 does not divide by two


@contextlib.contextmanager
def fused_calls():
    """The forms of the fused calls meanwhile, in order."""
    calls, function = [], functional.call

    def noting(form, *args, **options):
        calls.append(form.name)
        return function(form, *args, **options)

    functional.call = noting
    try:
        yield calls
    finally:
        functional.call = function


class Graphs:
    """``aot_eager`` that notes which ops of fastbp its graphs hold."""

    def __init__(self):
        self.ops = []

    def backend(self, module, inputs):
        from torch._dynamo.backends.common import aot_autograd  # takes seconds to import

        return aot_autograd(fw_compiler=self.note, bw_compiler=self.note)(module, inputs)

    def note(self, module, inputs):
        module.graph.eliminate_dead_code()  # AOTAutograd leaves some where something is gathered
        targets = [str(node.target).split(".") for node in module.graph.nodes if node.op == "call_function"]
        self.ops += [name for space, name, *_ in (t for t in targets if len(t) > 1) if space == "fastbp"]
        from functorch.compile import make_boxed_func

        return make_boxed_func(module.forward)


@cache
def line():
    """One object: a second one makes AOTAutograd fail in PyTorch's own code."""
    return init_device_mesh("cpu", (2,))


def spread(tensor, mesh, *placements):
    """A leaf that lies like this; a sum as unequal summands."""
    if tensor is None:
        return None
    if not any(p.is_partial() for p in placements):
        return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_()
    share = tensor.detach() * (0.25 if dist.get_rank() == 0 else 0.75)
    return DTensor.from_local(share, mesh, placements).requires_grad_()


def whole(tensor):
    return None if tensor is None else tensor.full_tensor()


def assert_as_stock(form, all_numbers, lying, activation=GELU, **settings):
    """Output and every gradient of a call on DTensors are those of stock PyTorch on all numbers."""
    expected = eager(form, *all_numbers, activation)
    y = call(form, *lying, activation=activation, **settings)
    assert type(y) is DTensor, type(y)
    assert_close(whole(y), expected, msg=lambda text: f"y: {text}")
    dy = like(expected, seed=7)
    mine = grads(y, flatten(*lying), distribute_tensor(dy, lying[0].device_mesh, [R] * lying[0].device_mesh.ndim))
    for i, (g, e) in enumerate(zip(mine, grads(expected, flatten(*all_numbers), dy), strict=True)):
        assert (g is None) == (e is None), f"gradient {i}"
        if g is not None:
            assert_close(whole(g), e, msg=lambda text, i=i: f"gradient {i}: {text}")
    return y, mine


def every_layout(form_name):
    """However the tensors lie, the numbers are those of stock: what cannot be divided is gathered."""
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, seed=0, rows=(4, 6), features=FEATURES)
    count = len(numbers[2])
    of_x = [R, Shard(0), Shard(1), Shard(2), Partial()]
    of_weights = {p for p in itertools.product([R, COLUMNS, ROWS], repeat=count) if len(set(p[:-1])) <= 1}
    of_biases = itertools.cycle([R, Shard(0)])  # beside an odd number of others, so each of them meets both
    for pws, px in itertools.product(sorted(of_weights, key=str), of_x):
        pb = next(of_biases)
        lying = lying_as(mesh, (px,), [(p,) for p in pws], [(pb,)] * count, numbers)
        try:
            assert_as_stock(form, numbers, lying)
        except Exception as error:
            raise AssertionError(f"{form_name}: x {px}, weights {pws}, biases {pb}") from error


def lying_as(mesh, x, weights, biases, numbers):
    """The numbers on a mesh, a tuple of placements for each; what is given beside x lies as x does."""
    given, ws, bs = numbers
    weights = [x] * (len(ws) - len(bs)) + list(weights)
    return (
        spread(given, mesh, *x),
        [spread(w, mesh, *p) for w, p in zip(ws, weights, strict=True)],
        [spread(b, mesh, *p) for b, p in zip(bs, biases, strict=True)],
    )


# Form, how x and every weight and bias lie, how y does; "cut" is Shard(0), which needs no words on either side.
UNMOVED = {
    "rows": ("mlp", Shard(1), (R, R, R), (R, R, R), Shard(1)),
    "gated rows": ("gated_mlp", Shard(0), (R, R, R), (R, R, R), Shard(0)),
    "columns": ("linear_act", R, (COLUMNS,), (Shard(0),), Shard(2)),
    "gated columns": ("gated_linear_act", R, (COLUMNS, COLUMNS), (Shard(0), Shard(0)), Shard(2)),
    "columns, then rows of weights": ("mlp", R, (COLUMNS, ROWS), (Shard(0), R), Partial()),
    "gated columns, then rows of weights": (
        "gated_mlp",
        R,
        (COLUMNS, COLUMNS, ROWS),
        (Shard(0), Shard(0), R),
        Partial(),
    ),
    "rows of what is given": ("gated_act_linear", Shard(1), (R,), (R,), Shard(1)),
    "columns of what is given, then rows of weights": ("act_linear", Shard(2), (ROWS,), (R,), Partial()),
    "gated columns of what is given": ("gated_act_linear", Shard(2), (ROWS,), (R,), Partial()),
}


def nothing_moves(name):
    """In the layouts that trainers use no number goes over the wires, forward or backward, and the call is fused."""
    form_name, px, pws, pbs, py = UNMOVED[name]
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, seed=1, rows=(4, 6), features=(6, 10, 10, 6)[: len(pws) + 1] if form is MLP else FEATURES)
    lying = lying_as(mesh, (px,), [(p,) for p in pws], [(p,) for p in pbs], numbers)
    y, mine = assert_as_stock(form, numbers, lying)
    assert y.placements == (py,), y.placements
    for t, g in zip(flatten(*lying), mine, strict=True):
        (at,) = t.placements
        assert g.placements == (at if at.is_shard() else Partial(),), (at, g.placements)
    with CommDebugMode() as moved, fused_calls() as calls:
        y = call(form, *lying, activation=GELU)
        dy = y.detach().redistribute(placements=[R if py.is_partial() else py])
        grads(y, flatten(*lying), dy)
    assert moved.get_total_counts() == int(py.is_partial()), moved.get_comm_counts()  # which is dy made whole
    assert calls == [form_name] * 2, calls  # with the DTensors, and with what this rank has of them


def a_mesh_of_two_dimensions(shape, form_name):
    """Rows along one dimension, columns along the other, though one of them is of size one."""
    form, mesh = FORMS[form_name], init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
    numbers = tensors(form, seed=2, rows=(4, 6), features=(6, 10, 6) if form is MLP else FEATURES)
    pws = [(R, COLUMNS)] * len(numbers[2])
    pbs = [(R, Shard(0))] * len(numbers[2])
    if form.projected:
        pws[-1], pbs[-1] = (R, ROWS), (R, R)
    y, _ = assert_as_stock(form, numbers, lying_as(mesh, (Shard(0), R), pws, pbs, numbers))
    assert y.placements == (Shard(0), Partial() if form.projected else Shard(2)), y.placements


def parts_of_other_sizes(form_name, rows, hidden):
    """What does not divide by two, down to a rank that has nothing."""
    form, mesh = FORMS[form_name], line()
    features = (3, hidden, 2) if form.projected else (3, hidden)
    numbers = tensors(form, seed=3, rows=(rows, 2), features=features if form is not GATED_MLP else (*features, 2))
    for px, cut in ((Shard(0), False), (R, True)):
        pws = [(COLUMNS if cut else R,)] * len(numbers[2])
        if cut and form.projected:
            pws[-1] = (ROWS,)
        assert_as_stock(form, numbers, lying_as(mesh, (px,), pws, [(R,)] * len(pws), numbers))


def compressed(form_name, save):
    """What is kept of a part is of that part alone: the numbers are those of the same policy without a mesh."""
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, torch.float32, seed=4, rows=(4, 3), features=(32, 128, 32, 32))
    count = len(numbers[2])
    expected = call(form, *numbers, activation=GELU, save=save)
    dy = like(expected, seed=5)
    by_hand = [expected, *grads(expected, flatten(*numbers), dy)]
    for px, cut in ((Shard(0), False), (R, True)):
        pws = [(COLUMNS if cut else R,)] * count
        if cut and form.projected:
            pws[-1] = (ROWS if form.hidden(count) == 1 else R,)
        lying = lying_as(mesh, (px,), pws, [(R,)] * count, numbers)
        y = call(form, *lying, activation=GELU, save=save)
        mine = [y, *grads(y, flatten(*lying), distribute_tensor(dy, mesh, [R]))]
        for i, (m, e) in enumerate(zip(mine, by_hand, strict=True)):
            torch.testing.assert_close(whole(m), e, rtol=2e-5, atol=2e-6, msg=lambda text, i=i: f"{i}: {text}")


def higher_derivatives(form_name, order):
    """A gradient penalty, through the gradient of a gradient; or a penalty on that one's gradient."""
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, seed=6, rows=(4,), features=(6, 10, 6) if form is MLP else FEATURES)
    count = len(numbers[2])

    def penalty(function, x, weights, biases):
        y = function(form, x, weights, biases, activation=TANH)
        value = (y * y).sum()
        for _ in range(order - 1):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            value = (dx * dx).sum()
        return grads(value, flatten(x, weights, biases), None, allow_unused=True)

    expected = penalty(eager, *numbers)
    largest = max(e.abs().max() for e in expected if e is not None)
    for px, cut in ((Shard(0), False), (R, True), (Shard(1), True)):
        pws = [(COLUMNS if cut else R,)] * count
        if cut and form.projected:
            pws[-1] = (ROWS,)
        mine = penalty(call, *lying_as(mesh, (px,), pws, [(R,)] * count, numbers))
        for i, (m, e) in enumerate(zip(mine, expected, strict=True)):
            assert (m is None) == (e is None), i
            if e is not None:
                assert_close(whole(m) / largest, e / largest, msg=lambda text, i=i: f"gradient {i}: {text}")


def compiled(form_name):
    """One graph, whose ops are fastbp's, with stock's numbers though the gradient lies otherwise than y."""
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, seed=7, rows=(4, 6), features=(6, 10, 6) if form is MLP else FEATURES)

    def loss_of(function, probe, *arguments):
        return (function(form, *arguments, activation=GELU) @ probe).sum()

    probe = like(torch.empty(numbers[1][-1].shape[0], 6, dtype=torch.float64), seed=8)
    expected = loss_of(eager, probe, *numbers)
    for px, cut in ((Shard(1), False), (R, True)):
        pws = [(COLUMNS if cut else R,)] * len(numbers[2])
        if cut and form.projected:
            pws[-1] = (ROWS,)
        lying = lying_as(mesh, (px,), pws, [(R,)] * len(pws), numbers)
        torch._dynamo.reset()
        graphs = Graphs()
        function = torch.compile(partial(loss_of, call), backend=graphs.backend, fullgraph=True, dynamic=False)
        loss = function(distribute_tensor(probe, mesh, [COLUMNS]), *lying)
        assert_close(whole(loss), expected)
        mine = grads(loss, flatten(*lying), None)
        for m, e in zip(mine, grads(expected, flatten(*numbers), None, retain_graph=True), strict=True):
            assert_close(whole(m), e)
        assert graphs.ops == [form_name, f"{form_name}_backward"], graphs.ops


def transforms(form_name):
    """torch.func.grad hides the DTensors from the choice of a backend; then PyTorch's operations serve."""
    form, mesh = FORMS[form_name], line()
    numbers = tensors(form, seed=13, rows=(4,), features=FEATURES, requires_grad=False)
    lying = lying_as(mesh, (Shard(0),), [(R,)] * len(numbers[2]), [(R,)] * len(numbers[2]), numbers)
    flat = [t.detach() for t in flatten(*lying)]
    for wanted in (tuple(range(len(flat))), (0,), (1,)):

        def total(function, *arguments):
            return on_flat(function, form, activation=GELU)(*arguments).square().sum()

        mine = torch.func.grad(partial(total, call), wanted)(*flat)
        expected = torch.func.grad(partial(total, eager), wanted)(*flatten(*numbers))
        for i, m, e in zip(wanted, mine, expected, strict=True):
            assert_close(whole(m), e, msg=lambda text, i=i: f"gradient {i}: {text}")


def under_autocast():
    """The products in bfloat16, the gradients of float32 weights in float32."""
    mesh = line()
    numbers = tensors(MLP, torch.float32, seed=9, rows=(4,), features=(6, 10, 6))
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(MLP, *numbers, activation=GELU)
    lying = lying_as(mesh, (Shard(0),), [(R,)] * 2, [(R,)] * 2, numbers)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(MLP, *lying, activation=GELU)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(whole(y), expected, rtol=2e-2, atol=2e-2)
    dy = like(expected, seed=1)
    mine = grads(y, flatten(*lying), distribute_tensor(dy, mesh, [R]))
    for m, e in zip(mine, grads(expected, flatten(*numbers), dy), strict=True):
        assert m.dtype == torch.float32
        torch.testing.assert_close(whole(m), e, rtol=2e-2, atol=2e-2)


def refusals():
    """What is no call says so before anything moves; what is mixed PyTorch refuses in its own words."""
    mesh = line()
    x, (w,), (b,) = tensors(LINEAR_ACT, seed=10, rows=(4,), features=(6, 8))
    dx, dw = spread(x, mesh, R), spread(w, mesh, COLUMNS)
    with pytest.raises(ValueError, match=re.escape("weight must be (out_features, 6) to match x (4, 6), got (6, 8)")):
        fastbp.linear_act(dx, dw.t())
    with pytest.raises(ValueError, match="unknown activation"):
        fastbp.linear_act(dx, dw, activation="gelo")
    with pytest.raises(ValueError, match="gradient_accumulation_fusion takes plain tensors only, got a DTensor"):
        fastbp.linear_act(dx, dw, gradient_accumulation_fusion=True)
    for mixed in ((x, dw), (dx, w), (dx, dw, b)):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            fastbp.linear_act(*mixed)
    other = init_device_mesh("cpu", (1, 2))
    with pytest.raises(RuntimeError, match=r"(?i)cross.*mesh"):
        fastbp.linear_act(dx, spread(w, other, R, R))


def a_mesh_without_this_rank():
    """The other rank computes; this one has nothing of it, as everywhere in PyTorch."""
    mesh = DeviceMesh("cpu", [0])
    x, weights, _ = tensors(LINEAR_ACT, seed=11, rows=(4,), features=(6, 8), bias=False)
    y = fastbp.linear_act(spread(x, mesh, R), spread(weights[0], mesh, R))
    assert type(y) is DTensor and y.shape == (4, 8)
    if dist.get_rank() == 0:
        assert_close(y.to_local(), eager(LINEAR_ACT, x, weights, [None], GELU))
    else:
        assert y.to_local().numel() == 0


def row_parallel_needs_no_activation():
    """f(Σ) is not Σ f: with an activation the sum comes first, without one it is left to whoever reads y."""
    mesh = line()
    numbers = tensors(LINEAR_ACT, seed=12, rows=(4,), features=(6, 8))
    for activation, place in ((GELU, R), (IDENTITY, Partial())):
        lying = lying_as(mesh, (Shard(1),), [(ROWS,)], [(R,)], numbers)
        y, _ = assert_as_stock(LINEAR_ACT, numbers, lying, activation)
        assert y.placements[0].is_partial() == place.is_partial(), (activation, y.placements)
