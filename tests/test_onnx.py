"""ONNX: graphs of standard operators, which onnxruntime computes as eager PyTorch does."""

import copy

import pytest
import torch
from fusible import WIDTH, Gated, TwoLinears, sequential
from graphs import all_modules
from support import ACTIVATIONS, call, each, eager, tensors, with_others
from torch import nn

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.forms import FORMS, LINEAR_ACT

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs what is exported")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BATCH = {0: "batch"}
EVERY = [bind(name) for name in ROWS]
IN_FORM = {form: ACTIVATIONS if form is LINEAR_ACT else EVERY for form in FORMS.values()}  # there with parameters too


class Everything(nn.Module):
    """A call of one form with every activation."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        _, weights, biases = tensors(form, torch.float32, seed=3)
        self.weights, self.biases = nn.ParameterList(weights[form.inputs - 1 :]), nn.ParameterList(biases)

    def forward(self, x):
        weights = with_others(self.form, x, self.weights)
        return [call(self.form, x, weights, [*self.biases], activation=f) for f in IN_FORM[self.form]]


def draw(rows, features):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)) * 2


def run(program, x):
    """The outputs of an exported program, which holds standard operators alone."""
    model = program.model_proto
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert nodes
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}, {(node.domain, node.op_type) for node in nodes}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]


def export(model, x):
    return torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)


@pytest.fixture(scope="module")
def exported():
    """Of each form: what onnxruntime gives for a batch of another size than the one exported, and the model."""
    found = {}

    def of(form):
        if form not in found:
            torch.manual_seed(0)
            model = Everything(form).eval()
            features = model.weights[0].shape[1]
            program = export(model, draw(3, features))
            x = draw(7, features)
            found[form] = model, x, run(program, x)
        return found[form]

    return of


@each(("form", "activation"), [(form, f) for form, activations in IN_FORM.items() for f in activations])
def test_every_activation_in_every_form(exported, form, activation):
    model, x, outputs = exported(form)
    y = dict(zip(IN_FORM[form], outputs, strict=True))[activation]
    expected = eager(form, x, with_others(form, x, model.weights), [*model.biases], activation).detach()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = TwoLinears(nn.GELU()), Gated(), sequential()

    def forward(self, x):
        return self.c(x + self.b(x + self.a(x)))


def test_a_fused_model(seeded):
    stock = Fused().eval()
    fused = copy.deepcopy(stock)
    assert not fastbp.fuse(fused).left
    program = export(fused, draw(3, WIDTH))
    x = draw(7, WIDTH)
    torch.testing.assert_close(run(program, x)[0], stock(x).detach(), rtol=1e-5, atol=1e-5)


def test_modules_by_way_of_an_exported_program(seeded):
    """A program that holds ops of fastbp is refused by torch.onnx, and decomposed it is not."""
    model, x = all_modules(torch.float32), draw(3, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as refused:
        torch.onnx.export(program, dynamo=True, verbose=False)
    assert "fastbp.linear_act" in str(refused.value.__cause__)
    plain = torch.onnx.export(program.run_decompositions(fastbp.decompositions()), dynamo=True, verbose=False)
    batch = draw(7, 6)
    torch.testing.assert_close(run(plain, batch)[0], model(batch).detach(), rtol=1e-5, atol=1e-5)


def test_the_exporter_before_it_is_refused(seeded):
    """It traces for TorchScript."""
    kept = torch.is_autocast_cache_enabled()
    try:
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.trace cannot capture .*torch\.onnx\.export\(.*dynamo=True"
        ):
            torch.onnx.export(fastbp.MLP(6, 8), (draw(3, 6),), dynamo=False)
    finally:
        torch.set_autocast_cache_enabled(kept)  # this exporter of PyTorch's leaves it off where the model raises
