"""What of activation modules is left to PyTorch, what changes later, and who looks on."""

import copy
import functools
import warnings
from abc import ABC

import pytest
import torch
import torch.nn.functional as F
from exchanged import GELU, exchanged, faster, is_exchanged, numbers
from reading import act_module
from support import each
from torch import nn
from torch.testing import assert_close

import fastbp
from fastbp import known
from fastbp.backends import native
from fastbp.copies import base_of, can_derive
from fastbp.linear import of_any_size, size

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}"),
]


@pytest.fixture(autouse=True)
def any_size():
    with of_any_size():
        yield


LEFT = {
    "in place": (nn.SiLU(inplace=True), lambda z: z.clone()),
    "by columns": (nn.SiLU(), lambda z: z.mT),
    "no dimension": (nn.SiLU(), lambda z: z.sum()),
    "a sparse one": (nn.Tanh(), lambda z: z.to_sparse()),
    "no faster": (nn.ReLU(), lambda z: z),
    "a gradient of its own in float32": (nn.CELU(), lambda z: z),
    "softplus under autocast": (nn.Softplus(), lambda z: z.bfloat16()),
}


@each("case", LEFT)
def test_what_is_left_to_pytorch(case):
    act, make = LEFT[case]
    fused, z = exchanged(copy.deepcopy(act)), numbers().requires_grad_()
    with torch.autocast("cpu", enabled="autocast" in case):
        mine, theirs = fused(make(z)), act(make(z))
    assert not is_exchanged(mine)
    assert torch.equal(*(y.to_dense() if y.is_sparse else y for y in (mine, theirs))) and mine.dtype is theirs.dtype


def test_under_autocast_the_dtype_is_stock_s():
    act, z = nn.SiLU(), numbers(torch.bfloat16).requires_grad_()
    fused = exchanged(nn.SiLU())
    with torch.autocast("cpu"):
        mine, theirs = fused(z), act(z)
    assert is_exchanged(mine) and mine.dtype is theirs.dtype is torch.bfloat16
    assert_close(mine, theirs)


CHANGES = {
    "an attribute": lambda act, patch: setattr(act, "approximate", "tanh"),
    "the function": lambda act, patch: patch.setattr(F, "gelu", lambda z, approximate: z * 3),
    "the class's forward": lambda act, patch: patch.setattr(nn.GELU, "forward", lambda self, z: z * 3),
    "its own forward": lambda act, patch: setattr(act, "forward", lambda z: z * 3),
    "a hook": lambda act, patch: act.register_forward_hook(lambda module, args, y: y * 3),
}


class Writing(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x)


def over_its_input(x):
    return F.silu(x, inplace=True)


WRITING = {
    "the keyword": act_module("return F.silu(x, inplace=True)"),
    "the function": act_module("return F.elu_(x)"),
    "a spelling": act_module("return torch.square(F.relu(x, inplace=True))"),
    "an attribute": Writing(torch.selu_),
    "a partial": Writing(functools.partial(F.mish, inplace=True)),
    "a function by its source": Writing(over_its_input),
}


@each("case", WRITING)
def test_a_module_that_writes_over_its_input_goes_on_to(case):
    act = WRITING[case]
    fused, z = exchanged(copy.deepcopy(act)), numbers()
    found = []
    for f in (fused, act):
        h = z * 1.0
        found += [f(h), h]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[1], z)


def test_batched_gradients_of_what_is_spelled():
    act, z = act_module("return x * torch.sigmoid(1.702 * x)"), numbers(torch.float64, 5, 4).requires_grad_()
    many = numbers(torch.float64, 3, 5, 4)
    assert_close(
        *(torch.autograd.grad(f(z), z, many, is_grads_batched=True) for f in (exchanged(copy.deepcopy(act)), act))
    )


def test_gradients_that_are_not_as_z_is():
    """Of another dtype than what a hook hands back; one number in many places; zeros without memory."""
    act, fused, z = nn.GELU(), exchanged(nn.GELU()), numbers().requires_grad_()
    found = []
    for f in (fused, act):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t):
            y = f(z)
        found.append(torch.autograd.grad(y, z, torch.ones_like(y)))  # one that lies as z does
    assert_close(*found)
    zeros = torch._efficientzerotensor((83, 241))
    assert_close(*(f(zeros) for f in (fused, act)))
    assert_close(*(torch.autograd.grad(f(z), z, zeros) for f in (fused, act)))
    with torch.inference_mode():
        made = torch.ones(5, requires_grad=True)
    assert not fused(made).requires_grad and not act(made).requires_grad


class Keyed(nn.Module):
    def __init_subclass__(cls, *, key):
        super().__init_subclass__()


class Registered(Keyed, key="a"):
    def forward(self, x):
        return F.gelu(x)


def test_nobody_s_code_runs_when_a_class_is_made():
    model = exchanged(Registered())
    assert type(model[0]) is Registered
    assert "whenever a class is made of it" in known.read(Registered())

    class Abstract(nn.GELU, ABC):
        """A metaclass of Python's own is nobody's code."""

    assert can_derive(Abstract)


def test_torchscript_compiles_the_module_as_it_came():
    """Which has names of its own file; and tracing warns as little as with stock."""
    model = exchanged(act_module("return F.gelu(x)"))
    assert is_exchanged(model(numbers().requires_grad_()))
    assert type(model[0].__prepare_scriptable__()) is base_of(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.ones(4))
    assert_close(traced(torch.ones(3)), F.gelu(torch.ones(3)))


@each("change", CHANGES)
def test_what_is_changed_later_counts(change, monkeypatch):
    act, z = nn.GELU(), numbers().requires_grad_()
    fused = exchanged(copy.deepcopy(act))
    before = fused(z)
    for module in (act, fused[0]):
        CHANGES[change](module, monkeypatch)
    assert_close(fused(z), act(z))
    assert (fused(z) - before).abs().max() > 1e-4  # else it would not be seen


def test_another_backend_leaves_it_to_pytorch():
    act, z = nn.GELU(), numbers().requires_grad_()
    fused = exchanged(nn.GELU())
    with fastbp.use(backend="reference"):
        assert torch.equal(fused(z), act(z)) and not is_exchanged(fused(z))
    fastbp.fuse(fused, backend="reference")
    assert not is_exchanged(fused(z))
    fastbp.fuse(fused, backend="native")
    assert is_exchanged(fused(z)) == faster(GELU)


def test_a_module_that_stands_in_two_places():
    """The second block is read when the first has changed the class of what they share."""

    class Block(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), act, nn.Linear(16, 8)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    act = nn.GELU()
    model, x = nn.Sequential(Block(act), Block(act)), torch.randn(5, 8)
    expected = model(x)
    for _ in range(2):
        assert [site.what for site in fastbp.fuse(model).fused] == ["mlp, gelu"] * 2
    assert_close(model(x), expected)
    assert repr(fastbp.LinearAct(8, 8, activation=act)) == repr(fastbp.LinearAct(8, 8, activation=nn.GELU()))


def test_small_ones_are_pytorch_s():
    fused, z = exchanged(nn.GELU()), torch.randn(64, 64, requires_grad=True)
    with torch.no_grad():
        expected = F.gelu(z)
    size.fewest = 1 << 18
    assert torch.equal(fused(z), expected) and not is_exchanged(fused(z))
    assert is_exchanged(fused(torch.randn(512, 512, requires_grad=True)))


@each("policy", [None, "preact"])
def test_small_dropouts_are_pytorch_s_unless_a_policy_is_named(policy):
    size.smallest = 2 << 20
    model = nn.Sequential(nn.Dropout(0.5))
    fastbp.fuse(model, save=policy or "auto")
    for rows, ours in ((8, policy is not None), (1024, True)):
        y = model(torch.randn(rows, 1024, requires_grad=True))
        assert (type(y.grad_fn).__name__ == "DropoutBackward") == ours
