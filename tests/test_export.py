"""torch.export, torch.fx, fake and meta tensors."""

import contextlib
import io

import pytest
import support
import torch
from graphs import GELU, all_modules, draw, each_form
from support import assert_close, each, flatten, like
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastbp
from fastbp.forms import MLP

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# torch.export and torch.fx


@each("dynamic", [False, True])
def test_export(dynamic):
    model, x = all_modules(), draw(MLP)[0].detach()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    ops = [str(node.target) for node in program.graph.nodes if "fastbp" in str(node.target)]
    assert ops == [f"fastbp.{form}.default" for form in ("linear_act",) * 2 + ("gated_linear_act", "mlp", "gated_mlp")]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        for batch in (x, torch.cat([x, x.sin()])) if dynamic else (x,):
            assert_close(exported.module()(batch), model(batch))


@pytest.mark.filterwarnings("ignore:fastbp.*an autograd kernel was not registered")
def test_an_exported_program_can_be_trained():
    model, x = all_modules(), draw(MLP)[0]
    exported = torch.export.export(model, (x.detach(),)).module()
    y = exported(x)
    mine = torch.autograd.grad(y, [x, *exported.parameters()], like(y, seed=1))
    expected = torch.autograd.grad(model(x), [x, *model.parameters()], like(y, seed=1))
    for found, wanted in zip(mine, expected, strict=True):
        assert_close(found, wanted)


class Calls(nn.Module):
    """A model that calls the functions itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        a, b = self.first, self.second
        h = fastbp.linear_act(x, a.weight, a.bias, activation="relu")
        h = fastbp.gated_linear_act(h, b.weight, b.weight, activation="sigmoid")
        h = fastbp.gated_mlp(h, a.weight, a.weight, b.weight)
        return fastbp.mlp(h, [a.weight, b.weight], [a.bias, b.bias], save="recompute")


def test_symbolic_trace_records_the_calls():
    model, x = Calls(), draw(MLP, dtype=torch.float32)[0]
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [fastbp.linear_act, fastbp.gated_linear_act, fastbp.gated_mlp, fastbp.mlp]
    assert torch.equal(traced(x), model(x))


FUNCTION_OF = {
    fastbp.LinearAct: fastbp.linear_act,
    fastbp.GatedLinear: fastbp.gated_linear_act,
    fastbp.MLP: fastbp.mlp,
    fastbp.GatedMLP: fastbp.gated_mlp,
}


@pytest.mark.parametrize("cls", FUNCTION_OF)
@each("activation", ["gelu", "silu", nn.LeakyReLU(0.3)])
def test_symbolic_trace_goes_through_the_modules(cls, activation):
    """Each is one call of its function, with its own parameters and settings."""
    model = nn.Sequential(cls(6, 8, dtype=torch.float64, activation=activation, save="recompute"))
    x = draw(MLP)[0].detach()
    traced = torch.fx.symbolic_trace(model)
    called = [node for node in traced.graph.nodes if node.target in FUNCTION_OF.values()]
    assert [node.target for node in called] == [FUNCTION_OF[cls]]
    assert called[0].kwargs["save"] == "recompute"
    assert not [node for node in traced.graph.nodes if node.op == "call_module"]
    assert_close(traced(x), model(x))


# Without data


@each_form
@each("dtype", support.DTYPES)
@each("where", ["fake", "meta"])
def test_shapes_and_dtypes_without_data(form, dtype, where):
    device = "meta" if where == "meta" else "cpu"
    tensors = draw(form, (2, 3), dtype=dtype)
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext():
        inputs = [torch.empty(t.shape, dtype=dtype, device=device, requires_grad=True) for t in flatten(*tensors)]
        y = support.call(form, *support.unflatten(form, inputs), activation=GELU)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, tensors[1][-1].shape[0]), dtype, device)
    assert [(g.shape, g.dtype, g.device) for g in gradients] == [(t.shape, t.dtype, t.device) for t in inputs]


@each_form
@each("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(form, tracing_mode):
    def step(*inputs):
        y = support.call(form, *support.unflatten(form, inputs), activation=GELU)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    inputs = flatten(*draw(form))
    graph = make_fx(step, tracing_mode=tracing_mode)(*inputs)
    others = flatten(*draw(form, rows=9 if tracing_mode == "symbolic" else 4, seed=5))
    for mine, expected in zip(graph(*others), step(*others), strict=True):
        assert_close(mine, expected)
