"""TorchScript is refused, with what to use instead: a trace would hold numbers of this process."""

import pytest
import torch
from graphs import all_modules, call_of, draw, each_form
from support import each
from torch import Tensor, nn

import fastbp
from fastbp.forms import MLP

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return fastbp.linear_act(x, weight)


FUNCTIONS = [scripted, fastbp.linear_act, fastbp.gated_linear_act, fastbp.mlp, fastbp.gated_mlp]
MODULES = [module for module in all_modules() if not isinstance(module, fastbp.Linear)]


INSIDE = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), fastbp.MLP(6, 8))


@pytest.mark.parametrize(
    "what", [*FUNCTIONS, *MODULES, INSIDE], ids=lambda what: getattr(what, "__name__", type(what).__name__)
)
def test_scripting_is_refused(what):
    match = r"fastbp\.\w+: torch\.jit\.script cannot capture this call.* use torch\.export\.export"
    with pytest.raises(RuntimeError, match=match):
        torch.jit.script(what)


@each_form
@each("mode", [torch.enable_grad, torch.no_grad])
def test_tracing_is_refused(form, mode):
    x, weights, biases = draw(form)

    def call(x):
        return call_of(form, activation="gelu")(x, weights, biases)

    with mode(), pytest.raises(RuntimeError, match=rf"fastbp\.{form.name}: torch\.jit\.trace cannot capture"):
        torch.jit.trace(call, (x,))


@each("index", range(len(MODULES)))
def test_tracing_a_module_is_refused(index):
    module = MODULES[index]
    features = next(module.parameters()).shape[1]
    with pytest.raises(RuntimeError, match=r"fastbp\.\w+: torch\.jit\.trace cannot capture .*torch\.onnx\.export"):
        torch.jit.trace(module, (draw(MLP, (4,))[0][:, :1].expand(4, features),))


@each("capture", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(3, 4))])
def test_a_linear_is_captured_as_the_stock_one(capture):
    torch.manual_seed(0)
    module, x = fastbp.Linear(4, 6), torch.randn(3, 4)
    captured = capture(module)
    assert torch.equal(captured(x), module(x))
    captured(x).sum().backward()
    assert torch.equal(module.weight.grad, x.sum(0).expand(6, 4))
