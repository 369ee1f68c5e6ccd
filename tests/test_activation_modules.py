"""Activation modules whose kernel ``fuse`` exchanges, where our pass over z takes less time than PyTorch's."""

import copy
import functools
import math
import pickle
import warnings
from abc import ABC

import pytest
import torch
import torch.nn.functional as F
from known_cases import activations_of_transformers
from reading import act_module
from support import ACTIVATIONS, assert_as_good_as_eager, each, stock, stock_module
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp import known
from fastbp.activations import ROWS, bind
from fastbp.backends import native
from fastbp.copies import base_of, can_derive
from fastbp.elementwise import is_faster
from fastbp.linear import of_any_size, size
from fastbp.problem import DTYPES, configure

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}"),
]
PASSES = [a for a in ACTIVATIONS if a.row.cpu_pass]
MODULES = [a for a in PASSES if a.row.module is not None]
GELU, TANH = bind("gelu"), bind("tanh")
ops = torch.ops.fastbp_native


@pytest.fixture(autouse=True)
def any_size():
    with of_any_size():
        yield


def exchanged(act):
    model = nn.Sequential(act)
    fastbp.fuse(model)
    return model


def is_exchanged(y):
    return type(y.grad_fn).__name__ == "ActivatedBackward"


def faster(activation):
    """Whether this CPU has the pass: GELU's takes AVX-512."""
    return is_faster(activation, None, torch.ones(3))


def numbers(dtype=torch.float32, *shape):
    """More than two pieces of a pass, and no multiple of a register."""
    return (4 * torch.randn(shape or (83, 241), dtype=torch.float64)).to(dtype)


def value_and_gradient(act, z):
    given = z.clone().requires_grad_()
    y = act(given)
    return [y, *torch.autograd.grad(y, given, torch.linspace(-2, 2, y.numel()).to(y).view_as(y))]


def settings_of(activation):
    return native.library.codes(
        configure("linear_act", activation.name, activation.params, "preact", "native"), torch.float64, False
    )


@each("dtype", DTYPES)
@each("activation", PASSES)
@pytest.mark.parametrize("route", ["library"], indirect=True)  # for the NaN in what nobody wrote
def test_a_pass_is_as_good_as_eager(activation, dtype, route):
    z = numbers(dtype)
    dy = torch.linspace(-2, 2, z.numel()).to(dtype).view_as(z)
    mine = [ops.activate(z, *settings_of(activation)), ops.activate_backward(dy, z, *settings_of(activation))]
    f = stock(activation)
    if dtype is torch.float64:  # of which there is no more exact one
        return assert_close(mine, value_and_gradient(f, z), rtol=1e-12, atol=1e-13)
    assert_as_good_as_eager(mine, value_and_gradient(f, z), value_and_gradient(f, z.double()), spare_units=2)
    return None


@each("shape", [(0,), (1,), (8192,), (8193,), (3, 0, 5), (2, 3, 5461)])
def test_a_pass_of_any_shape(shape):
    z = numbers(torch.float64, *shape)
    assert_close(ops.activate(z, *settings_of(GELU)), F.gelu(z), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(F.gelu(z := z.requires_grad_()), z, torch.ones_like(z))
    assert_close(ops.activate_backward(torch.ones_like(z), z.detach(), *settings_of(GELU)), expected)


REFUSED = {
    "z by columns": (lambda z: (z.mT, z.mT), "must be contiguous"),
    "dy by columns": (lambda z: (torch.ones(6, 6).mT, torch.ones(6, 6)), "must be contiguous"),
    "another shape": (lambda z: (z.view(-1), z), "must have one shape"),
    "another dtype": (lambda z: (z.double(), z), "must have the dtype of the other tensors"),
    "integers": (lambda z: (z.int(), z.int()), "must be float64, float32, bfloat16 or float16"),
    "no dimension": (lambda z: (z.sum(), z.sum()), "must have a dimension"),
}


@each("case", REFUSED)
def test_what_a_pass_cannot_serve_is_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(RuntimeError, match=words):
        ops.activate_backward(*make(torch.ones(6, 5)), *settings_of(GELU))


@each("settings", [32 * len(ROWS), -32, 1, 2, 32768])
def test_what_is_no_activation_is_refused(settings):
    with pytest.raises(RuntimeError, match=r"no such call|does not have|has no linear|has one linear"):
        ops.activate(torch.ones(3), settings, [])


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("activation", MODULES)
def test_modules_of_pytorch_are_as_good_as_stock(activation, dtype):
    act, z = stock_module(activation), numbers(dtype)
    fused = exchanged(copy.deepcopy(act))
    found = [value_and_gradient(fused, z), value_and_gradient(act, z), value_and_gradient(act, z.double())]
    assert is_exchanged(found[0][0]) == faster(activation)
    assert_as_good_as_eager(*found, spare_units=2)
    with torch.no_grad():
        assert torch.equal(fused(z), found[0][0])
    with torch.inference_mode():
        assert torch.equal(fused(z), found[0][0])


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("name", ["gelu_new", "gelu_fast", "quick_gelu", "relu2"])
def test_modules_of_transformers_are_as_good_as_stock(name, dtype):
    act = activations_of_transformers().ACT2FN[name]
    fused = exchanged(activations_of_transformers().ACT2FN[name])
    z = 2 * numbers(dtype, 500)
    if name == "quick_gelu":  # gelu_new overflows in its cube
        z = torch.cat([z, torch.tensor([3e4, -3e4, math.inf, -math.inf, math.nan, 0.0, -0.0]).to(dtype)])
    found = [value_and_gradient(fused, z), value_and_gradient(act, z), value_and_gradient(act, z.double())]
    assert is_exchanged(found[0][0])
    assert_as_good_as_eager(*found)


@each("activation", MODULES)
def test_derivatives_of_every_order(activation):
    act = stock_module(activation)
    fused = exchanged(copy.deepcopy(act))
    z = (numbers(torch.float64, 4, 3) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(fused, z) and torch.autograd.gradgradcheck(fused, z)
    assert torch.autograd.gradcheck(fused, z, check_forward_ad=True, check_batched_grad=True, check_backward_ad=True)
    both = [
        torch.autograd.functional.hvp(lambda z, f=f: f(z).square().sum(), z, torch.ones_like(z)) for f in (fused, act)
    ]
    assert_close(*both, rtol=1e-10, atol=1e-10)


@each("activation", [GELU, bind("softplus"), bind("mish"), TANH])
def test_what_is_kept(activation):
    """z, or of an activation that PyTorch takes the slope of from y, y alone; and it may be written to as in stock."""
    act = stock_module(activation)
    fused, z = exchanged(copy.deepcopy(act)), numbers().requires_grad_()
    with fastbp.SavedBytes() as saved:
        y = fused(z)
    assert saved.total == y.numel() * y.element_size()
    y = fused(z).mul_(2)
    if activation is TANH:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return
    (mine,) = torch.autograd.grad(y.sum(), z)
    assert_close(mine, torch.autograd.grad(act(z).mul(2).sum(), z)[0])


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


def test_gradients_of_any_layout():
    """As those of a sum, which are one number in many places, and batched ones."""
    act, fused, z = nn.Mish(), exchanged(nn.Mish()), numbers(torch.float64, 7, 5).requires_grad_()
    for dy in (torch.ones(1, 1, dtype=torch.float64).expand(7, 5), numbers(torch.float64, 5, 7).mT):
        assert_close(*(torch.autograd.grad(f(z), z, dy) for f in (fused, act)))
    many = numbers(torch.float64, 3, 7, 5)
    assert_close(*(torch.autograd.grad(f(z), z, many, is_grads_batched=True) for f in (fused, act)))
    assert_close(*(torch.func.vmap(torch.func.grad(lambda z, f=f: f(z).sum()))(z.detach()) for f in (fused, act)))


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


class Behind(nn.Module):
    """A block that is not known as one, for it takes a second argument."""

    def __init__(self, act):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(24, 96), act, nn.Linear(96, 24)

    def forward(self, x, drop=0.0):
        h = self.act(self.first(x))
        return self.last(F.dropout(h, drop) if drop else h)


@each("activation", [a for a in MODULES if a.params == bind(a.name).params])
def test_a_linear_behind_reads_it(activation):
    stock = Behind(stock_module(activation)).double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model)
    with fastbp.SavedBytes(exclude=[model, x]) as saved:
        y = model(x)
    assert saved.total == 50 * 96 * 8, "z, or what tanh keeps, and nothing else"
    (site,) = fastbp.report(model).sites
    if activation.row.torch_keeps_output:
        assert site.reason == f"{activation!r} keeps its output, which is this linear's input, and it is kept once"
    else:
        assert site.what == f"act_linear, {activation!r}"
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (model, stock))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert_close(y, stock(x), rtol=1e-12, atol=1e-12)


def test_a_gate_is_read():
    """g and u are kept, and f(g) not, although the node of f is ours."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.act = nn.Linear(24, 96), nn.Linear(24, 96), nn.SiLU()
            self.down = nn.Linear(96, 24)

        def forward(self, x, scale=None):
            return self.down(self.act(self.gate(x)) * self.up(x))

    stock = Gated().double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model, filter_fn=lambda module, name: name != "")
    with fastbp.SavedBytes(exclude=[model, x]) as saved:
        y = model(x)
    assert saved.total == 2 * 50 * 96 * 8
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (model, stock))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert_close(y, stock(x), rtol=1e-12, atol=1e-12)


@each("name", ["gelu", "tanh"])
def test_a_linear_behind_a_dropout_reads_it(name):
    stock = Behind(stock_module(bind(name))).double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model)
    found = []
    for f in (model, stock):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(f(x, 0.3).square().sum(), list(f.parameters())))
    assert_close(*found, rtol=1e-10, atol=1e-10)
    assert "linear of mul" in str(fastbp.report(model))


@each("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    act, fused, z = nn.GELU(), exchanged(nn.GELU()), numbers(torch.float64, 9, 7).requires_grad_()
    y = checkpoint(fused, z, use_reentrant=reentrant)
    assert_close(
        torch.autograd.grad(y.sum(), z) if not reentrant else _accumulated(y, z), torch.autograd.grad(act(z).sum(), z)
    )


def _accumulated(y, z):
    y.sum().backward()
    return (z.grad,)


def test_copies_pickles_and_the_way_back():
    model = exchanged(nn.Softplus(beta=2.0))
    kind, z = type(model[0]), numbers().requires_grad_()
    assert isinstance(model[0], nn.Softplus) and kind is not nn.Softplus
    for copied in (copy.copy(model[0]), copy.deepcopy(model)[0]):
        assert type(copied) is kind and is_exchanged(copied(z))
    assert type(pickle.loads(pickle.dumps(model))[0]) is nn.Softplus
    assert fastbp.unfuse(model) == ["0"] and type(model[0]) is nn.Softplus
    assert set(vars(model[0])) == set(vars(nn.Softplus()))


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
