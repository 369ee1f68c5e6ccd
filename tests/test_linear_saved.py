"""fastbp.Linear: what is kept, in bytes; under saved-tensor hooks and checkpoints."""

import functools

import pytest
import torch
import torch.nn.functional as F
from linear_twins import MAKERS, assert_as_stock, assert_close, assert_equal, run, twice
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fastbp

ROWS, WIDTH = 64, 32  # so that codes and scales of fp8 are whole blocks
SIZES = {"rows": ROWS, "width": WIDTH}


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


def mlp(fc: list[nn.Linear], x: Tensor) -> Tensor:
    return fc[2](F.gelu(fc[0](x)))


def gated(fc: list[nn.Linear], x: Tensor) -> Tensor:
    return fc[2](F.silu(fc[0](x)) * fc[1](x))


def dropped(fc: list[nn.Linear], x: Tensor) -> Tensor:
    return fc[2](F.dropout(F.gelu(fc[0](x)), 0.3))


def adapted(fc: list[nn.Linear], x: Tensor) -> Tensor:
    h = F.silu(fc[0](x)) * fc[1](x)
    return fc[2](h) + fc[3](h)


def masked(fc: list[nn.Linear], x: Tensor) -> Tensor:
    return fc[2](F.gelu(fc[0](x)) * 0.5)


# Bytes a hidden element in bfloat16: of SavedBytes, of a counter that somebody wrote, and of PyTorch.
KEPT = {
    "mlp": (mlp, 2, 2, 4),
    "gated": (gated, 4, 6, 8),
    "dropout": (dropped, 4, 4, 6),
    "adapter": (adapted, 4, 6, 8),
    "factor": (masked, 2, 2, 4),
}


class Counter:
    """What people write to count bytes."""

    def __init__(self, exclude):
        self.kept, self.exclude = {}, {t.untyped_storage().data_ptr() for t in exclude}

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() not in self.exclude:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def unpack(self, packed):
        return packed


@pytest.mark.parametrize("name", KEPT)
def test_bytes(name):
    program, ours, counted, stock = KEPT[name]
    for kind, expected in ((fastbp.Linear, (ours, counted)), (nn.Linear, (stock, stock))):

        def kept(fc, x, seen):
            parameters = [p for linear in fc for p in linear.parameters()]
            with fastbp.SavedBytes(exclude=[x, *fc]) as saved:
                y = program(fc, x)
            seen.append(saved.total / (ROWS * WIDTH))
            counter = Counter([x, *parameters])
            with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
                program(fc, x)
            seen.append(sum(counter.kept.values()) / (ROWS * WIDTH))
            return y

        assert tuple(run(kind, kept, **SIZES, dtype=torch.bfloat16).seen) == expected


@pytest.mark.parametrize("part", ["weight", "all"])
def test_bytes_of_a_frozen_gate(part):
    """A frozen linear keeps no input, and f(g) is not kept all the same."""

    def kept(fc, x, seen):
        for linear in fc[2:] if part == "weight" else fc:
            linear.requires_grad_(False)
        with fastbp.SavedBytes(exclude=[x, *fc]) as saved:
            y = gated(fc, x)
        seen.append(torch.tensor(saved.total / (ROWS * WIDTH)))
        return y

    found = [run(kind, kept, **SIZES, dtype=torch.bfloat16).seen for kind in (fastbp.Linear, nn.Linear)]
    assert found == [[4], [6]]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("unpack", ["argument", "method", "lambda", "SavedBytes"])
def test_hooks_that_return_what_they_got(name, unpack):
    program = KEPT[name][0]
    counter = Counter([])

    def hooked(fc, x, seen):
        pack = counter.pack
        plain = {"argument": function_unpack, "method": counter.unpack, "lambda": lambda packed: packed}
        if unpack == "SavedBytes":
            with fastbp.SavedBytes():
                return program(fc, x)
        with torch.autograd.graph.saved_tensors_hooks(pack, plain[unpack]):
            return program(fc, x)

    way = {"mlp": "act_linear", "gated": "gated_act_linear", "adapter": "gated_act_linear"}.get(name)
    what = way if way and unpack == "SavedBytes" else "linear of gelu" if name == "mlp" else "linear of mul"
    what = way if way and unpack == "SavedBytes" else what
    assert_as_stock(hooked, fused=what, **SIZES)
    assert_as_stock(hooked, fused=what, after=twice, **SIZES, tolerance=1e-9)


def function_unpack(packed):
    return packed


@pytest.mark.parametrize("name", KEPT)
def test_save_on_cpu(name):
    def offloaded(fc, x, seen):
        with torch.autograd.graph.save_on_cpu():
            return KEPT[name][0](fc, x)

    assert_as_stock(offloaded, fused="linear of gelu" if name == "mlp" else "linear of mul", **SIZES)


@pytest.mark.parametrize("name", KEPT)
def test_hooks_that_may_be_asked_once(name):
    """A strangers' unpack is called as often as by PyTorch: once for each that was packed."""

    def once(fc, x, seen):
        with hooks_once():
            return KEPT[name][0](fc, x)

    assert_as_stock(once, left="there are saved-tensor hooks", **SIZES)


def hooks_once() -> torch.autograd.graph.saved_tensors_hooks:
    """Saved-tensor hooks that give back what they packed once only."""
    packed: dict[int, torch.Tensor] = {}

    def pack(tensor):
        packed[len(packed)] = tensor
        return len(packed) - 1

    return torch.autograd.graph.saved_tensors_hooks(pack, packed.pop)


# What was made under the hooks, and what is made of that outside of them, before the linear.
PACKED_BEFORE = {
    "an activation": (F.gelu, lambda a, u: a),
    "a product over it": (F.silu, lambda a, u: a * u),
    "a dropout of an output that is kept": (torch.relu, lambda a, u: F.dropout(a, 0.3)),
    "casts": (F.silu, lambda a, u: a.float().double()),
}


@pytest.mark.parametrize("case", PACKED_BEFORE)
def test_hooks_are_those_of_each_node(case):
    """What is read under hooks of others was packed by them, whenever it was."""
    activation, between = PACKED_BEFORE[case]

    def program(fc, x, seen):
        g, u = fc[0](x), fc[1](x)
        with hooks_once():
            a = activation(g)
        return fc[2](between(a, u))

    assert_as_stock(program, left="there are saved-tensor hooks")


def save_products(ctx, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "non-reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "nested": lambda f, x: checkpoint(lambda y: checkpoint(f, y, use_reentrant=False) + y, x, use_reentrant=False),
    "twice": lambda f, x: checkpoint(f, checkpoint(f, x, use_reentrant=False), use_reentrant=False),
    "selective": lambda f, x: checkpoint(
        f, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, save_products)
    ),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints(how, name, early_stop):
    """Recomputation must keep as many tensors as the first run did, or PyTorch raises."""

    def program(fc, x, seen):
        return CHECKPOINTS[how](lambda x: KEPT[name][0](fc, x), x)

    def backward(y, x, parameters, result):
        with set_checkpoint_early_stop(early_stop):
            y.square().sum().backward()
        return [p.grad for p in (x, *parameters)]

    stock, ours = (run(kind, program, after=backward, **SIZES) for kind in (nn.Linear, fastbp.Linear))
    assert_equal([ours.y, ours.random], [stock.y, stock.random])
    assert_close(ours.grads, stock.grads, 1e-10)


def test_a_checkpoint_keeps_what_its_author_chose():
    """A block that checkpoints itself keeps its input alone."""
    kept = []
    for kind in (nn.Linear, fastbp.Linear):

        def program(fc, x, seen):
            with fastbp.SavedBytes(exclude=[x, *fc]) as saved:
                y = checkpoint(lambda x: mlp(fc, x), x, use_reentrant=False)
            kept.append(saved.total)
            return y

        run(kind, program, **SIZES)
    assert kept == [0, 0]
