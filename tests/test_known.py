"""Forwards that are read from their source: which are known, and what each call looks up again."""

import functools
import re
import types

import pytest
import torch
import torch.nn.functional as F
from future_annotations import Block
from known_cases import activations_of_transformers
from reading import WIDTH, Written, act_module, assert_same, count_calls, draw, method, pair, written
from torch import nn

from fastbp import known
from fastbp.activations import TABLE
from fastbp.known_acts import KnownAct, read_act
from fastbp.saving import POLICIES

pytestmark = pytest.mark.usefixtures("seeded")

PLAIN = "return self.fc2(self.act(self.fc1(x)))"
IDLE = "return self.fc2(self.drop(self.act(self.idle(self.fc1(x)))))"


# What is known

KNOWN = {
    PLAIN: "mlp, gelu",
    "x = self.fc1(x)\nx = self.act(x)\nx = self.fc2(x)\nreturn x": "mlp, gelu",
    "'''Words.'''\nh: torch.Tensor = self.fc1(x)\nh = self.act(h)\nreturn self.fc2(h)": "mlp, gelu",
    "residual = x\nreturn self.fc2(self.act(self.fc1(x)))": "mlp, gelu",
    "return self.fc2(self.drop(self.act(self.idle(self.fc1(self.drop(x))))))": "mlp, gelu",
    "return self.drop(self.idle(self.fc2(self.act(self.fc1(x)))))": "mlp, gelu",
    "return self.fc2(self.act(self.narrow(self.act(self.fc1(x)))))": "mlp, gelu",
    "return self.act(self.fc1(x))": "linear_act, gelu",
    "act = self.act\nreturn act(self.fc1(x))": "linear_act, gelu",
    "return self.fc2(F.gelu(self.fc1(x)))": "mlp, gelu",
    "return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))": "mlp, gelu_tanh",
    "return self.fc2(F.leaky_relu(self.fc1(x), negative_slope=0.3))": "mlp, leaky_relu(negative_slope=0.3)",
    "return self.fc2(nn.functional.relu(self.fc1(x), inplace=True))": "mlp, relu",
    "return self.fc2(torch.nn.functional.mish(self.fc1(x)))": "mlp, mish",
    "return self.fc2(torch.tanh(self.fc1(x)))": "mlp, tanh",
    "return self.fc2(self.fn(self.fc1(x)))": "mlp, silu",
    "return self.act(self.fc1(x)) * self.up(x)": "gated_linear_act, gelu",
    "return self.up(x) * self.fn(self.fc1(x))": "gated_linear_act, silu",
    "g = self.act(self.fc1(x))\nu = self.up(x)\nreturn self.fc2(g * u)": "gated_mlp, gelu",
    "return self.fc2(self.drop(self.idle(self.up(x)) * F.silu(self.fc1(x))))": "gated_mlp, silu",
    # What comes behind the call is called child by child.
    "return self.fc2(self.norm(self.act(self.fc1(x))))": "linear_act, gelu",
    "return self.fc2(self.norm(self.drop(F.silu(self.fc1(x)) * self.up(x))))": "gated_linear_act, silu",
    "return self.fc2(self.act(self.act(self.fc1(x))))": "linear_act, gelu",
    "return self.act(self.fc2(self.act(self.fc1(x))))": "mlp, gelu",
    "return self.narrow(self.act(self.narrow(self.act(self.fc1(x)))))": "mlp, gelu",
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_forwards_run_as_one_call_and_agree(text, monkeypatch):
    stock, fused = pair(written(text))
    assert [call for _, call in known.read(stock).calls] == [KNOWN[text]]
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, x := draw(3, 5, WIDTH))
    assert calls == [KNOWN[text].split(",")[0]]
    for m in (fused, stock):
        m.drop.p = 0.4
    assert_same(fused, stock, x)


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.module and row.name != "identity"], ids=lambda row: row.name
)
def test_modules_of_torch_are_known(row, monkeypatch):
    act = row.module(*(value for _, value in row.module_attributes))
    stock, fused = pair(written(PLAIN, act))
    assert [call for _, call in known.read(stock).calls] == [f"mlp, {row.name}"]
    calls = count_calls(monkeypatch)
    # PyTorch takes 1/6 in float32 even there
    assert_same(fused, stock, draw(4, WIDTH), tolerance=1e-7 if row.name == "hardsigmoid" else 1e-12)
    assert calls == ["mlp"]


THEIRS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu2": "relu2",
    "silu": "silu",
    "mish": "mish",
    "gelu_10": None,  # clips
    "gelu_accurate": None,  # reads a constant from its attributes
    "gelu_python": None,  # its function is a method
    "laplace": None,
    "linear": None,
    "prelu": None,
}


@pytest.mark.parametrize("name", THEIRS)
def test_modules_of_transformers_are_known_by_their_source(name, monkeypatch):
    act = activations_of_transformers().ACT2FN[name].double()
    found = read_act(act)
    if THEIRS[name] is None:
        assert isinstance(found, str)
        return
    assert found.activation.name == THEIRS[name]
    stock, fused = pair(written(PLAIN, act))
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, draw(4, WIDTH))
    # transformers' FastGELU has ten digits of its constant: another number in float64, the row's in float32
    assert calls == ([] if name == "gelu_fast" else ["mlp"])
    if name == "gelu_fast":
        fused.float()(draw(4, WIDTH).float())
        assert calls == ["mlp"]


def called_by_itself():
    act = act_module("return F.gelu(x)")
    type(act).__call__ = lambda self, x: 2 * self.forward(x)
    return act


@pytest.mark.parametrize(
    "act",
    [
        act_module("return F.gelu(F.relu(x))"),
        act_module("return F.gelu(x + 1)"),
        act_module("return F.gelu(x, approximate=self.approximate)", approximate="tanh"),
        act_module("return torch.relu(x, inplace=True)"),  # raises
        act_module("return F.relu6(x, min_val=1.0)"),  # raises
        act_module("return x * torch.sigmoid(1.7 * x)"),
        act_module("return x / torch.sigmoid(1.702 * x)"),
        act_module(
            "return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 2.0))))"
        ),
        act_module("return self.act(x)", act=F.dropout),
        called_by_itself(),
        act_module("return self.act(x)", act=functools.partial(F.leaky_relu, negative_slope=torch.tensor(0.1))),
        act_module("return self.act(x)", act=functools.partial(F.gelu, torch.zeros(3))),
        nn.LeakyReLU(torch.tensor(0.1)),
        nn.Softmax(-1),
        nn.PReLU(),
    ],
    ids=range(15),
)
def test_other_activations_are_not_known(act):
    assert isinstance(read_act(act), str)


@pytest.mark.parametrize("text", [PLAIN, "return self.fc2(F.gelu(self.fc1(x)))"])
def test_functions_patched_before_are_not_believed(text, monkeypatch):
    assert not isinstance(known.read(written(text)), str)
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": torch.tanh(x))
    assert isinstance(known.read(written(text)), str)


def test_spellings_look_at_what_names_stand_for():
    text = "return x * torch.sigmoid(1.702 * x)"
    assert isinstance(read_act(act_module(text)), KnownAct)
    other = types.SimpleNamespace(sigmoid=torch.tanh)
    assert isinstance(read_act(type("Act", (nn.Module,), {"forward": method(text, names={"torch": other})})()), str)


# What is not

UNKNOWN = {
    "return x + self.fc2(self.act(self.fc1(x)))": r"has `\+`",
    "return 2 * self.fc2(self.act(self.fc1(x)))": "has 2",
    "return self.fc2(self.act(2 * self.fc1(x)))": "has 2",
    "return self.scale * self.fc2(self.act(self.fc1(x)))": "reads scale",
    "return self.fc2(self.act(self.fc1(x)).clamp(max=3))": r"`self.act\(self.fc1\(x\)\).clamp`",
    "return self.fc2(torch.clamp(self.act(self.fc1(x)), max=3))": "has clamp",
    "return self.fc2(F.dropout(self.act(self.fc1(x)), 0.1, self.training))": "has dropout",
    "return self.fc2(self.act(F.linear(x, self.fc1.weight)))": "self.fc1.weight",
    "return self.fc2(self.act(self.fc1(x) @ self.narrow.weight))": "@",
    "return self.fc2(self.act(self.fc1(input=x)))": "another way",
    "return self.fc2(F.leaky_relu(self.fc1(x), 0.2))": "has leaky_relu",
    "return self.fc2(F.leaky_relu(self.fc1(x), negative_slope=self.scale))": "has leaky_relu",
    "return self.fc2(torch.relu(self.fc1(x), inplace=True))": "has relu",
    "return self.fc2(F.celu(self.fc1(x), alpha=0.0))": "has celu",
    "return self.fc2(self.fn(self.act(self.fc1(x))))": "another way",
    "return self.fc2(self.fn(self.narrow(self.act(self.fc1(x)))))": "another way",
    "return self.fc2(self.fc1(x))": "another way",
    "return self.fc1(x)": "another way",
    "return self.act(x)": "another way",
    "return x": "another way",
    "return self.act(self.fc1(x)) * self.fc1(x)": "another way",
    "h = self.act(self.fc1(x))\nreturn h * h": "another way",
    "return self.act(self.fc1(x)) * self.act(self.up(x))": "another way",
    "return self.act(self.fc1(x)) * x": "another way",
    "h = self.fc1(x)\nreturn self.act(h) * self.narrow(h)": "another way",
    "h = self.up(x)\nreturn self.act(self.narrow(h)) * self.layer(h)": "another way",
    "return self.act(self.fc1(x)) * self.narrow(self.up(x))": "another way",
    "return self.act(self.fc1(x)) * self.up(x) * self.up(x)": "another way",
    "return self.fc2(self.act(self.layers[0](x)))": r"self.layers\[0\]",
    "g, u = self.fc1(x).chunk(2, dim=-1)\nreturn self.act(g) * u": "g, u =",
    "return self.fc2(*[self.act(self.fc1(x))])": r"\*\[",
    "return self.fc2(self.act(self.fc1(x)), **{})": r"\*\*",
    "if x.numel():\n    x = self.idle(x)\nreturn self.fc2(self.act(self.fc1(x)))": "if x.numel",
    "return self.fc2(self.act(self.fc1(x))) if self.scale else x": "if self.scale",
    "for _ in range(1):\n    x = self.idle(x)\nreturn self.fc2(self.act(self.fc1(x)))": "for _ in",
    "with torch.no_grad():\n    return self.fc2(self.act(self.fc1(x)))": "with torch.no_grad",
    "try:\n    return self.fc2(self.act(self.fc1(x)))\nfinally:\n    pass": "try:",
    "assert x.dim()\nreturn self.fc2(self.act(self.fc1(x)))": "assert",
    "h = self.act(self.fc1(x))\nself.seen = h\nreturn self.fc2(h)": "self.seen = h",
    "self = self.layers\nreturn self.fc2(self.act(self.fc1(x)))": "self = self.layers",
    "h = self.fc1(x)\nh += 1\nreturn self.fc2(self.act(h))": r"h \+= 1",
    "h = self.fc1(x)\nh[0] = 1\nreturn self.fc2(self.act(h))": r"h\[0\] = 1",
    "h = k = self.fc1(x)\nreturn self.fc2(self.act(h))": "h = k =",
    "self.up(x)\nreturn self.fc2(self.act(self.fc1(x)))": r"self.up\(x\)",
    "u = self.up(x)\nreturn self.fc2(self.act(self.fc1(x)))": "u = self.up",
    "h = self.up(x)\nh = self.fc1(x)\nreturn self.fc2(self.act(h))": "h = self.up",
    "u = self.up(x)\nk = self.drop(u)\nreturn self.fc2(self.act(self.fc1(x)))": "k = self.drop",
    "return self.fc2(self.act((h := self.fc1(x))))": ":=",
    "return self.fc2((lambda t: t)(self.act(self.fc1(x))))": "lambda",
    "return self.fc2([self.act(h) for h in (self.fc1(x),)][0])": "for h in",
    "print(f'{x.shape}')\nreturn self.fc2(self.act(self.fc1(x)))": "print",
    "return self.fc2(getattr(self, 'act')(self.fc1(x)))": "`self`",
    "return self.fc2(self.act.forward(self.fc1(x)))": "self.act.forward",
    "return self.missing(self.act(self.fc1(x)))": "missing",
    "return self.fc2(missing(self.fc1(x)))": "missing",
    "return self.fc2(float(self.fc1(x)))": "float",
    "global F\nF = F\nreturn self.fc2(F.gelu(self.fc1(x)))": "global F",
    "import math\nreturn self.fc2(self.act(self.fc1(x)))": "import math",
    "def g(t):\n    return t\nreturn self.fc2(g(self.act(self.fc1(x))))": "def g",
    "yield self.fc2(self.act(self.fc1(x)))": "yield",
    "return self.fc2(self.act(self.fc1(x)))\nreturn x": "return self.fc2",
    "self.fc2(self.act(self.fc1(x)))": r"self.fc2\(self.act",
    "pass": "pass",
    "return": "return",
    "h = self.fc2(self.act(self.fc1(x)))": "return at its end",
    "if 0: F = 1\nreturn self.fc2(F.gelu(self.fc1(x)))": "if 0",
    "\n".join(["x = x * x"] * 60) + "\nreturn self.fc2(self.act(self.fc1(x)))": r"x = x \* x",
    "return self.drop.p * self.fc2(self.act(self.fc1(x)))": "self.drop.p",
    "return self._parameters(self.fc1(x))": "_parameters",
    "return self.eval(self.fc1(x))": "reads eval",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_other_forwards_are_not_known(text):
    reason = known.read(written(text))
    assert isinstance(reason, str)
    assert re.search(UNKNOWN[text], reason), reason


HEADS = {
    "def forward(self, x, y):": r"takes \(self, x, y\)",
    "def forward(self, x, *, y):": "y",
    "def forward(self, *args):\n    x, = args": "arguments",
    "def forward(self, x, **more):": "arguments",
    "def forward(self):\n    x = self": "takes",
    "def forward(x, self=None):\n    x, self = self, x": "x, self =",
    "def forward(self, x, /):": "takes",
    "def forward(self, /, x, y=None):": "takes",
    "async def forward(self, x):": "await",
    "@torch.no_grad()\ndef forward(self, x):": "decorated",
    "@(lambda f: f)\ndef forward(self, x):": "lambda",
    "@staticmethod\ndef forward(self, x):": "no plain function",
}


@pytest.mark.parametrize("head", HEADS)
def test_other_signatures_are_not_known(head):
    reason = known.read(written(PLAIN, head=head))
    assert isinstance(reason, str) and re.search(HEADS[head], reason), reason


def test_an_argument_with_a_default_is_known_while_it_is_not_given(monkeypatch):
    stock, fused = pair(written(PLAIN, head="def forward(self, x, y=torch.ones(3), *, z: int = 1) -> torch.Tensor:"))
    calls, x = count_calls(monkeypatch), draw(4, WIDTH)
    assert_same(fused, stock, x)
    assert torch.allclose(fused(x=x), stock(x)) and len(calls) == 2
    assert torch.equal(fused(x, None), stock(x)) and torch.equal(fused(x, z=2), stock(x)) and len(calls) == 2
    used = written("return self.fc2(self.act(self.fc1(x + y)))", head="def forward(self, x, y=0):")
    assert "`y`" in known.read(used)


def test_the_source_must_be_what_runs():
    """A function made of another's code, a file that was edited, code without a file."""
    module = written(PLAIN)
    kind = type(module)
    assert not isinstance(known.read(module), str)
    kind.forward.__code__ = kind.forward.__code__.replace(
        co_names=tuple({"act": "fn"}.get(name, name) for name in kind.forward.__code__.co_names)
    )
    assert "not what its source says" in known.read(module)
    space = {}
    exec("def forward(self, x):\n    return self.fc2(self.act(self.fc1(x)))", space)
    kind.forward = space["forward"]
    assert "source of its forward is not there" in known.read(module)
    kind.forward = functools.partial(space["forward"], module)
    assert "no plain function" in known.read(module)
    kind.forward = lambda self, x: self.fc2(self.act(self.fc1(x)))
    assert isinstance(known.read(module), str)


@pytest.mark.parametrize("constant", ["'tanh'", "'none'"])
def test_constants_of_the_code_are_compared(constant):
    module = written("return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))")
    code = type(module).forward.__code__
    swapped = tuple(eval(constant) if c == "tanh" else c for c in code.co_consts)
    type(module).forward.__code__ = code.replace(co_consts=swapped)
    assert isinstance(known.read(module), str) == (constant == "'none'")


def test_one_forward_of_two_classes_is_bound_to_each():
    forward = method("return self.fc2(self.act(self.fc1(x)))")
    first, second = (
        type(name, (Written,), {"forward": forward})(act) for name, act in (("A", nn.ReLU()), ("B", nn.GELU()))
    )
    assert [known.read(m).calls[0][1] for m in (first, second)] == ["mlp, relu", "mlp, gelu"]
    second.fc1 = nn.Bilinear(1, 1, 1)
    assert isinstance(known.read(second), str) and not isinstance(known.read(first), str)


def test_an_inherited_forward_looks_into_its_own_globals():
    """Not into those of the class that inherits it."""
    base = type(
        "Base", (Written,), {"forward": method("return self.fc2(F.gelu(self.fc1(x)))", names={"F": nn.functional})}
    )
    space = {"Base": base, "F": types.SimpleNamespace(gelu=torch.tanh)}
    exec("class Made(Base):\n    pass", space)
    assert known.read(space["Made"]()).calls[0][1] == "mlp, gelu"


def test_future_annotations_do_not_matter():
    assert known.read(Block()).calls[0][1] == "mlp, silu"


def test_members_that_are_no_children():
    """A property, a parameter, a buffer, and a class that finds attributes by itself."""
    kind = type(written(PLAIN))
    assert "reads act" in known.read(type("Made", (kind,), {"act": property(lambda self: nn.GELU())})())
    for name in ("register_parameter", "register_buffer"):
        module = kind()
        del module.act
        getattr(module, name)("act", nn.Parameter(torch.ones(2)))
        assert "no child" in known.read(module)
    finding = type("Made", (kind,), {"__getattr__": lambda self, name: nn.Module.__getattr__(self, name)})
    assert "way of its own" in known.read(finding())


def _changed(change):
    module = written(PLAIN)
    change(module)
    return module


UNFIT = {
    "complex": lambda m: m.to(torch.complex128),
    "several dtypes": lambda m: setattr(m.fc1, "bias", nn.Parameter(m.fc1.bias.detach().float())),
    "several devices": lambda m: setattr(m.fc1, "bias", nn.Parameter(m.fc1.bias.detach().to("meta"))),
    "sparse": lambda m: setattr(m.fc1, "weight", nn.Parameter(m.fc1.weight.detach().to_sparse(), requires_grad=False)),
    "another class": lambda m: setattr(m, "fc1", nn.LazyLinear(20)),
    "a hook": lambda m: m.fc1.register_forward_hook(lambda *_: None),
    "a hook of the activation": lambda m: m.act.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
}


@pytest.mark.parametrize("what", UNFIT)
def test_unfit_children_are_left(what):
    assert isinstance(known.read(_changed(UNFIT[what])), str)


def test_children_behind_a_call_are_what_they_are_in_each_call(monkeypatch):
    """Hooked, replaced, gone, or of another dtype: as in the module's own forward."""
    stock, fused = pair(written("return self.fc2(self.norm(self.act(self.fc1(x))))"))
    calls, x = count_calls(monkeypatch), draw(4, WIDTH)
    for change in (
        lambda m: m.norm.register_forward_hook(lambda module, inputs, y: 2 * y),
        lambda m: setattr(m, "norm", nn.Dropout(0.3)),
        lambda m: setattr(m, "norm", nn.Sequential(nn.Tanh(), m.narrow)),
    ):
        for m in (stock, fused):
            change(m)
        assert_same(fused, stock, x)
    assert calls == ["linear_act"] * 3
    for change, error in ((lambda m: m.fc2.float(), RuntimeError), (lambda m: delattr(m, "norm"), AttributeError)):
        words = []
        for m in (stock, fused):
            change(m)
            with pytest.raises(error) as caught:
                m(x)
            words.append(str(caught.value))
        assert words[0] == words[1]


def test_reading_needs_no_data_and_draws_nothing():
    with torch.device("meta"):
        model = nn.Sequential(written(PLAIN), nn.Sequential(nn.Linear(3, 4), nn.GELU()))
    state = torch.get_rng_state()
    assert [type(known.read(m)) for m in model] == [known.BlockPlan, known.SequentialPlan]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("save", POLICIES)
def test_policies_are_refused_as_their_form_refuses_them(save):
    for text in (PLAIN, "return self.act(self.fc1(x)) * self.up(x)", "return self.fc2(torch.tanh(self.fc1(x)))"):
        plan = known.read(written(text))
        assert plan.refuses(save) == POLICIES[save].illegal(plan.call.activation, plan.call.form)
        assert plan.refuses("auto") is None


# nn.Sequential


def linear(a=WIDTH, b=WIDTH):
    return nn.Linear(a, b)


class Stack(nn.Sequential):
    """A subclass that says nothing about forward."""


RUNS = {
    "one": (lambda: nn.Sequential(linear(), nn.GELU()), ["linear_act, gelu"]),
    "two": (lambda: nn.Sequential(linear(), nn.GELU(), linear()), ["mlp, gelu"]),
    "behind": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU()), ["mlp, relu"]),
    "deep": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear()), ["mlp, relu"]),
    "others": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh(), linear()), ["mlp, relu"]),
    "around": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), linear(), nn.Tanh(), nn.LayerNorm(WIDTH)),
        ["linear_act, tanh"],
    ),
    "idle": (lambda: nn.Sequential(linear(), nn.GELU(), nn.Dropout(0.0), nn.Identity(), linear()), ["mlp, gelu"]),
    "twice": (lambda: nn.Sequential(a := linear(), nn.Tanh(), a), ["mlp, tanh"]),
    "subclass": (lambda: Stack(linear(), nn.GELU(), linear()), ["mlp, gelu"]),
    "inside": (lambda: nn.Sequential(linear(), nn.GELU(), nn.Sequential(linear(), nn.GELU())), ["linear_act, gelu"]),
    "slopes": (
        lambda: nn.Sequential(linear(), nn.LeakyReLU(0.1), linear(), nn.LeakyReLU(0.2), linear()),
        ["mlp, leaky_relu(negative_slope=0.1)"],
    ),
}


@pytest.mark.parametrize("what", RUNS)
def test_runs_of_a_sequential(what, monkeypatch):
    make, words = RUNS[what]
    stock, fused = pair(make().double())
    assert [call for _, call in known.read(stock).calls] == words
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, draw(4, 3, WIDTH))
    assert calls[: len(words)] == [word.split(",")[0] for word in words]
    assert torch.equal(fused(input=draw(1, WIDTH) * 0), fused(torch.zeros(1, WIDTH, dtype=torch.float64)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(),
        lambda: nn.Sequential(linear(), linear()),
        lambda: nn.Sequential(nn.GELU(), linear()),
        lambda: nn.Sequential(linear(), nn.Softmax(-1), linear()),
        lambda: nn.Sequential(linear(), nn.Identity(), nn.GELU()),
        lambda: type("Own", (nn.Sequential,), {"__iter__": lambda self: iter([])})(linear(), nn.GELU()),
        lambda: type("Own", (nn.Sequential,), {"forward": lambda self, x: x})(linear(), nn.GELU()),
    ],
    ids=range(7),
)
def test_sequentials_without_a_run(make):
    assert isinstance(known.read(make()), str)


def test_weights_kept_as_in_out(monkeypatch):
    """transformers' Conv1D, by its class."""
    activations_of_transformers()
    from transformers.pytorch_utils import Conv1D

    model = written(PLAIN)
    model.fc1, model.fc2 = Conv1D(20, WIDTH).double(), Conv1D(WIDTH, 20).double()
    stock, fused = pair(model)
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, draw(4, WIDTH))
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: x @ self.weight)
    assert_same(fused, stock, draw(4, WIDTH))
    assert calls == ["mlp"]
    assert isinstance(known.read(stock), str)
