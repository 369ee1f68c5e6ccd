"""What is around a call of a block that runs whole: hooks, modes, inputs, autocast, checkpoints, graphs, transforms."""

import pytest
import torch
import torch.nn.functional as F
from known_cases import FUNCTION, GATED, PATCHES, PLAIN, draw, stack
from reading import WIDTH, Written, act_module, assert_same, count_calls, pair, swap, written
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import fastbp
from fastbp import known
from fastbp.fusion.surgery import set_save

pytestmark = pytest.mark.usefixtures("seeded")


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
