"""A block that runs whole looks up every name at each call: where one has changed, its own forward runs."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from reading import WIDTH, Written, act_module, assert_same, count_calls, differ, pair, step, swap, written
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import fastbp
from fastbp import known
from fastbp.fusion.surgery import base_of, set_save

pytestmark = pytest.mark.usefixtures("seeded")

PLAIN = "return self.fc2(self.drop(self.act(self.idle(self.fc1(x)))))"
FUNCTION = "return self.fc2(F.gelu(self.fc1(x)))"
ATTRIBUTE = "return self.fc2(self.fn(self.fc1(x)))"
GATED = "return self.fc2(self.act(self.fc1(x)) * self.up(x))"


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def twice(module, args, output):
    return 2 * output


def old_gelu(self, x):
    return 2 * F.gelu(x)


def dropping(model, p):
    model.drop.p = p


def partially(model):
    """In place: the attribute stays the same object."""
    model.fn.keywords["negative_slope"] = 0.5


def parametrized(model):
    parametrize.register_parametrization(model.fc1, "weight", nn.Softsign())


def with_bias(model):
    model.up.bias = nn.Parameter(torch.ones(20, dtype=torch.float64))


def in_dict(model):
    model.__dict__["act"] = torch.tanh


def in_buffers(model):
    """Where nn.Module looks before it looks among the children."""
    model._buffers["act"] = Callable()


class Callable(torch.Tensor):
    """A buffer that can be called."""

    def __new__(cls):
        return torch.Tensor._make_subclass(cls, torch.zeros(1))

    def __call__(self, x):
        return torch.tanh(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def halved(model):
    model.fc2.__class__ = Halved


# by name: the forward, the activation, what changes of a model
OF_A_MODEL = {
    "activation replaced": (PLAIN, nn.GELU, lambda m: setattr(m, "act", nn.Tanh())),
    "activation of the same attributes": (PLAIN, nn.SiLU, lambda m: setattr(m, "act", nn.Mish())),
    "activation of the same class": (PLAIN, nn.GELU, lambda m: setattr(m, "act", nn.GELU("tanh"))),
    "activation without a module": (PLAIN, nn.GELU, lambda m: m.__setattr__("act", nn.Softmax(-1))),
    "linear of a subclass": (PLAIN, nn.GELU, halved),
    "linear parametrized": (PLAIN, nn.GELU, parametrized),
    "linear with a hook": (PLAIN, nn.GELU, lambda m: m.fc1.register_forward_hook(twice)),
    "linear with a hook before": (PLAIN, nn.GELU, lambda m: m.fc2.register_forward_pre_hook(lambda m, a: a[0] * 2)),
    "linear with a hook in backward": (
        PLAIN,
        nn.GELU,
        lambda m: m.fc2.register_full_backward_hook(lambda m, i, o: (i[0] * 3,)),
    ),
    "activation with a hook": (PLAIN, nn.GELU, lambda m: m.act.register_forward_hook(twice)),
    "idle child with a hook": (PLAIN, nn.GELU, lambda m: m.idle.register_forward_hook(twice)),
    "idle dropout with a hook": (PLAIN, nn.GELU, lambda m: m.drop.register_forward_hook(twice)),
    "forward of a linear": (PLAIN, nn.GELU, lambda m: setattr(m.fc1, "forward", lambda x: x @ m.fc1.weight.T)),
    "forward of the activation": (PLAIN, nn.GELU, lambda m: setattr(m.act, "forward", torch.tanh)),
    "forward of an idle child": (PLAIN, nn.GELU, lambda m: setattr(m.idle, "forward", torch.tanh)),
    "forward of the module": (PLAIN, nn.GELU, lambda m: setattr(m, "forward", m.norm.weight[:12].mul)),
    "idle child replaced": (PLAIN, nn.GELU, lambda m: setattr(m, "idle", m.norm)),
    "dropout drops": (PLAIN, nn.GELU, lambda m: dropping(m, 0.5)),
    "approximate": (PLAIN, nn.GELU, lambda m: setattr(m.act, "approximate", "tanh")),
    "slope": (PLAIN, nn.LeakyReLU, lambda m: setattr(m.act, "negative_slope", 0.5)),
    "function": (ATTRIBUTE, nn.GELU, lambda m: setattr(m, "fn", torch.tanh)),
    "function becomes a module": (ATTRIBUTE, nn.GELU, lambda m: delattr(m, "fn") or setattr(m, "fn", nn.Tanh())),
    "shadow in __dict__": (PLAIN, nn.GELU, in_dict),
    "shadow among buffers": (PLAIN, nn.GELU, in_buffers),
}


@pytest.mark.parametrize("change", [with_bias, lambda m: setattr(m, "up", m.layers[0])], ids=["bias", "linear"])
def test_another_plain_linear_is_taken(change, monkeypatch):
    """A bias where there was None, a linear in another's place: still one call, with the new parameters."""
    assert_seen(written(GATED), [change], monkeypatch, calls_after=1)


@pytest.mark.parametrize("what", OF_A_MODEL)
def test_changes_of_a_model(what, monkeypatch):
    text, act, change = OF_A_MODEL[what]
    assert_seen(written(text, act()), [change], monkeypatch)


def assert_seen(model, changes, monkeypatch, calls_after=0):
    """The block is one call; with the changes it is none, computes what stock computes, and no longer what it did."""
    stock, fused = pair(model)
    calls, x = count_calls(monkeypatch), draw(5, WIDTH)
    assert_same(fused, stock, x)
    assert len(calls) == 1
    before = step(stock, x)[:2]
    for change in changes:
        change(stock)
        change(fused)
    after = step(stock, x)[:2]
    assert differ(before, after)
    assert_same(fused, stock, x)
    assert len(calls) == 1 + calls_after
    return stock, fused


def test_contents_of_a_partial(monkeypatch):
    model = written(ATTRIBUTE)
    model.fn = functools.partial(F.leaky_relu, negative_slope=0.1)
    assert_seen(model, [partially], monkeypatch)


def test_copies_of_a_partial_run_whole(monkeypatch):
    model = written(ATTRIBUTE)
    model.fn = functools.partial(F.leaky_relu, negative_slope=0.1)
    stock, fused = pair(model)
    calls = count_calls(monkeypatch)
    assert_same(copy.deepcopy(fused), stock, draw(3, WIDTH))
    assert len(calls) == 1


PATCHES = {
    "class's forward": (PLAIN, lambda m: (type(m), "forward", lambda self, x: self.norm.weight[:12] * x)),
    "class attribute": (PLAIN, lambda m: (type(m), "act", staticmethod(torch.tanh))),
    "class attribute of a function": (ATTRIBUTE, lambda m: (type(m), "fn", property(lambda self: torch.tanh))),
    "class finds attributes": (
        PLAIN,
        lambda m: (
            type(m),
            "__getattr__",
            lambda self, name: torch.tanh if name == "act" else nn.Module.__getattr__(self, name),
        ),
    ),
    "activation's __call__": (PLAIN, lambda m: (nn.GELU, "__call__", lambda self, x: 2 * x)),
    "everybody's __call__": (PLAIN, lambda m: (nn.Module, "__call__", lambda self, x: 2 * self.forward(x))),
    "activation's forward": (PLAIN, lambda m: (nn.GELU, "forward", old_gelu)),
    "function of the activation": (PLAIN, lambda m: (F, "gelu", lambda x, approximate: torch.tanh(x))),
    "function in the forward": (FUNCTION, lambda m: (F, "gelu", torch.tanh)),
    "nn.Linear.forward": (PLAIN, lambda m: (nn.Linear, "forward", lambda self, x: x @ self.weight.T)),
    "F.linear": (PLAIN, lambda m: (F, "linear", lambda x, w, b: x @ w.T)),
    "nn.Identity.forward": (PLAIN, lambda m: (nn.Identity, "forward", lambda self, x: 2 * x)),
    "nn.Dropout.forward": (PLAIN, lambda m: (nn.Dropout, "forward", lambda self, x: 2 * x)),
    "F.dropout": (PLAIN, lambda m: (F, "dropout", lambda x, *_: 2 * x)),
}


@pytest.mark.parametrize("what", PATCHES)
def test_patches(what, monkeypatch):
    text, patch = PATCHES[what]
    stock = written(text)
    with pytest.MonkeyPatch.context() as patched:
        assert_seen(stock, [lambda m: patched.setattr(*patch(m), raising=False)], monkeypatch)


def test_a_global_that_is_bound_again(monkeypatch):
    stock = written(FUNCTION)
    names = type(stock).forward.__globals__
    _, fused = assert_seen(stock, [lambda m: names.update(F=types.SimpleNamespace(gelu=torch.tanh))], monkeypatch)
    del names["F"]
    with pytest.raises(NameError, match="F"):
        fused(draw(2, WIDTH))


def test_the_code_of_a_forward_is_exchanged(monkeypatch):
    stock = written(PLAIN)
    code = written("return self.fc2(self.act(self.act(self.fc1(x))))")
    assert_seen(stock, [lambda m: setattr(type(stock).forward, "__code__", type(code).forward.__code__)], monkeypatch)


OTHER = {"F": types.SimpleNamespace(gelu=torch.tanh)}


def with_other_globals(kind):
    """The forward of a class, of the very same code, finds other functions."""
    kind.forward = types.FunctionType(kind.forward.__code__, OTHER, "forward")


def with_other_code(kind):
    kind.forward.__code__ = (lambda self, x: x * 2).__code__


@pytest.mark.parametrize("change", [with_other_globals, with_other_code])
def test_the_forward_of_an_activation_is_exchanged(change, monkeypatch):
    act = act_module("return F.gelu(x)")
    assert_seen(
        written(PLAIN, act),
        [lambda m: change(type(act)) if type(act).forward.__globals__ is not OTHER else None],
        monkeypatch,
    )


def test_a_forward_of_the_same_code_and_other_globals(monkeypatch):
    assert_seen(written(FUNCTION), [lambda m: with_other_globals(base_of(m))], monkeypatch)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules_run(register, monkeypatch):
    seen = []
    stock, fused = pair(written(PLAIN))
    calls = count_calls(monkeypatch)
    with register(lambda module, *_: seen.append(type(module).__name__)):
        fused(x := draw(3, WIDTH))
        mine, seen[:] = list(seen), []
        stock(x)
    assert mine == seen and "GELU" in seen and not calls


class Doubling(TorchFunctionMode):
    """Looks at every function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) * (2 if func is F.linear else 1)


def test_a_mode_sees_the_functions_of_the_forward(monkeypatch):
    stock, fused = pair(written(PLAIN))
    x, calls = draw(3, WIDTH), count_calls(monkeypatch)
    with Doubling():
        assert torch.equal(fused(x), stock(x)) and not calls
    with torch.device("cpu"):
        assert torch.allclose(fused(x), stock(x)) and len(calls) >= 1


class Marked(torch.Tensor):
    """Looks at every function too."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y * 2 if func is F.linear else y


INPUTS = {
    "float32": lambda: torch.randn(3, WIDTH),
    "integers": lambda: torch.ones(3, WIDTH, dtype=torch.long),
    "complex": lambda: draw(3, WIDTH).to(torch.complex128),
    "sparse": lambda: draw(3, WIDTH).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([draw(3, WIDTH), draw(2, WIDTH)], layout=torch.jagged),
    "subclass": lambda: draw(3, WIDTH).as_subclass(Marked),
    "meta": lambda: draw(3, WIDTH).to("meta"),
    "a number": lambda: draw(()).reshape(()),
    "another width": lambda: draw(3, 5),
    "no tensor": lambda: [1.0],
    "None": lambda: None,
}


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize(
    "make", [lambda: written(PLAIN), lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh()).double()]
)
def test_inputs_that_only_pytorch_takes_or_refuses(what, make):
    stock, fused = pair(make())
    x = INPUTS[what]()
    outcomes = []
    for model in (stock, fused):
        try:
            outcomes.append(model(x))
        except Exception as error:
            outcomes.append(error)
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], Exception):
        assert str(outcomes[0]) == str(outcomes[1])
    elif what not in ("meta", "nested"):
        assert torch.equal(*outcomes)
    else:
        assert outcomes[0].shape == outcomes[1].shape or what == "nested"


def test_other_arguments_are_those_of_the_forward():
    stock, fused = pair(written(PLAIN))
    for args, kwargs in (((), {}), ((1, 2), {}), ((), {"y": 1}), ((1,), {"x": 1})):
        errors = []
        for model in (stock, fused):
            with pytest.raises(TypeError) as caught:
                model(*args, **kwargs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_a_setting_that_is_refused_is_not_swallowed():
    _, fused = pair(written(PLAIN))
    with fastbp.use(save="output"), pytest.raises(ValueError, match="cannot serve gelu"):
        fused(draw(3, WIDTH))


# nn.Sequential


def stack(*more):
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Dropout(0.0), nn.Linear(20, WIDTH), *more).double()


OF_A_SEQUENTIAL = {
    "appended": lambda m: m.append(nn.Tanh()),
    "replaced": lambda m: m.__setitem__(1, nn.Tanh()),
    "deleted": lambda m: m.__delitem__(1),
    "inserted": lambda m: m.insert(1, nn.Tanh()),
    "hook": lambda m: m[0].register_forward_hook(twice),
    "dropout": lambda m: setattr(m[2], "p", 0.5),
    "attribute": lambda m: setattr(m[1], "approximate", "tanh"),
    "linear": lambda m: setattr(m[3], "__class__", Halved),
    "shadow": lambda m: m.__dict__.update({"1": nn.Tanh()}) or setattr(m[1], "approximate", "tanh"),
}


@pytest.mark.parametrize("what", OF_A_SEQUENTIAL)
def test_changes_of_a_sequential(what, monkeypatch):
    assert_seen(stack(), [OF_A_SEQUENTIAL[what]], monkeypatch)


@pytest.mark.parametrize("name", ["forward", "__iter__"])
def test_patches_of_sequential(name, monkeypatch):
    other = {"forward": lambda self, x: 2 * x, "__iter__": lambda self: iter(list(self._modules.values())[:1] * 1)}[
        name
    ]
    stock, fused = pair(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()).double())
    calls, x = count_calls(monkeypatch), draw(3, WIDTH)
    monkeypatch.setattr(nn.Sequential, name, other)
    assert torch.equal(fused(x), stock(x)) and not calls


def test_a_run_that_is_not_plain_leaves_the_others(monkeypatch):
    stock, fused = pair(stack(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 5)).double())
    calls = count_calls(monkeypatch)
    for m in (stock, fused):
        m[0].register_forward_hook(twice)
    assert_same(fused, stock, draw(4, WIDTH))
    assert calls == ["mlp"]


# Surroundings


@pytest.mark.parametrize("text", [PLAIN, GATED, "return self.act(self.fc1(x))"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [nn.GELU, nn.Softplus])
def test_autocast(text, dtype, act):
    stock, fused = pair(written(text, act()).float())
    x = torch.randn(64, WIDTH)
    exact = stock(x)
    with torch.autocast("cpu", dtype):
        theirs, mine = stock(x), fused(x)
    assert mine.dtype is theirs.dtype
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "act", [act_module("return x * torch.sigmoid(1.702 * x)"), nn.Softplus()], ids=["spelled", "softplus"]
)
def test_activations_that_autocast_widens_are_pytorchs_where_no_linear_follows(act, monkeypatch):
    """It computes pow and softplus in float32 on some devices."""
    stock, fused = pair(written("return self.act(self.fc1(x))", act).float())
    calls, x = count_calls(monkeypatch), torch.randn(4, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), stock(x)) and not calls
    fused(x)
    assert calls == ["linear_act"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, monkeypatch):
    stock, fused = pair(written(PLAIN))
    calls = count_calls(monkeypatch)

    def checkpointed(model):
        def run(x):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

        return run

    x = draw(4, WIDTH).requires_grad_()
    results = [torch.autograd.grad(checkpointed(m)(x).sin().sum(), [x]) for m in ()] if reentrant else []
    for m in (fused, stock):
        m.zero_grad()
        leaf = x.detach().requires_grad_()
        checkpointed(m)(leaf).sin().sum().backward()
        results.append([leaf.grad, m.fc1.weight.grad, m.fc2.weight.grad])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert calls == ["mlp", "mlp"]


def test_bytes_kept():
    """z alone, and of a gated block g and u."""
    for text, kept in ((PLAIN, 20), (GATED, 40), (FUNCTION, 20)):
        _, fused = pair(written(text))
        x = draw(50, WIDTH)
        with fastbp.SavedBytes(exclude=[x, fused]) as saved:
            fused(x)
        assert saved.total == 50 * kept * 8


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_block_sees_changes():
    changes = [OF_A_MODEL[what][2] for what in ("approximate", "activation replaced", "dropout drops")]
    stock, fused = pair(written(PLAIN))
    compiled, x = torch.compile(fused, backend="aot_eager"), draw(4, WIDTH)
    assert_same(compiled, stock, x)
    for change in changes:
        change(stock)
        change(fused)
        assert_same(compiled, stock, x)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("what", [what for what in PATCHES if what != "everybody's __call__"])  # Dynamo sees it nowhere
def test_a_compiled_block_sees_patches(what):
    text, patch = PATCHES[what]
    stock, fused = pair(written(text))
    compiled, x = torch.compile(fused, backend="aot_eager"), draw(4, WIDTH)
    assert_same(compiled, stock, x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(*patch(stock), raising=False)
        assert_same(compiled, stock, x)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["compile", "export", "strict export", "fx"])
@pytest.mark.parametrize("make", [lambda: written(PLAIN), lambda: written(FUNCTION), lambda: written(GATED), stack])
def test_graphs_hold_the_call(make, how):
    stock, fused = pair(make())
    x, seen = draw(4, WIDTH), []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    if how == "compile":
        model = torch.compile(fused, backend=backend, fullgraph=True)
        model(x)
    elif how == "fx":
        model = torch.fx.symbolic_trace(fused)
        seen.append(model)
    else:
        model = torch.export.export(fused, (x,), strict=how == "strict export").module()
        seen.append(model)
    assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)
    assert sum("mlp" in str(node.target) for node in seen[0].graph.nodes) == 1


def test_transforms():
    stock, fused = pair(written(GATED))
    x = draw(3, WIDTH)
    for transform in (torch.func.vmap, torch.func.jacrev, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]):
        assert_close(transform(fused)(x), transform(stock)(x), rtol=1e-10, atol=1e-12)


def test_functional_call_uses_the_parameters_given():
    stock, fused = pair(written(GATED))
    given = {name: torch.randn_like(p) for name, p in stock.named_parameters()}
    x = draw(3, WIDTH)
    mine, theirs = (torch.func.functional_call(m, given, (x,)) for m in (fused, stock))
    assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_plan_of_another_policy_and_backend():
    model = written(PLAIN)
    plan = known.read(model)
    assert (plan.save, plan.backend) == ("auto", None)
    swap(model)
    set_save(model, "recompute")
    with fastbp.SavedBytes(exclude=[x := draw(9, WIDTH), model]) as saved:
        model(x)
    assert saved.total == 0 and isinstance(model, Written)
