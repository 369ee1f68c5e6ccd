"""Fused models in graphs: torch.compile, torch.export, torch.fx; TorchScript is refused."""

import copy
import shutil

import pytest
import torch
import torchvision_ops
from fusible import WIDTH, Gated, TwoLinears, sequential
from support import assert_close, each, like
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastbp

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "seeded")

BATCH = {0: torch.export.Dim("batch")}


class Layers(nn.Module):
    """Two layers of a norm and a block, each with a residual, and a Sequential behind them."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList((TwoLinears(nn.GELU()), Gated()))
        self.head = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 5))

    def between(self):
        pass

    def forward(self, x):
        x = x + self.blocks[0](self.norms[0](x))
        self.between()
        return self.head(x + self.blocks[1](self.norms[1](x)))


class Broken(Layers):
    """A model that is more than one graph by itself."""

    def between(self):
        torch._dynamo.graph_break()


MODELS = {
    "block": lambda: TwoLinears(nn.GELU()),
    "gated": Gated,
    "sequential": sequential,
    "layers": Layers,
}
each_model = each("name", MODELS)


def pair(name, **settings):
    """A stock model, its fused copy and an input."""
    stock = MODELS[name]().double()
    fused = copy.deepcopy(stock)
    assert fastbp.fuse(fused, **settings).fused
    return stock, fused, draw(3)


def draw(rows, seed=1):
    return torch.randn(rows, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counting():
    return CompileCounterWithBackend("aot_eager")


def ops_in(graph):
    return [str(node.target) for node in graph.nodes if "fastbp" in str(node.target)]


def gradients(model, x):
    """Output, and the gradients of x and, by name, of every parameter."""
    x = x.clone().requires_grad_()
    y, parameters = model(x), dict(model.named_parameters())
    dx, *rest = torch.autograd.grad(y, [x, *parameters.values()], like(y, seed=2))
    return {"y": y, "dx": dx, **{name.removeprefix("_orig_mod."): g for name, g in zip(parameters, rest, strict=True)}}


def assert_same_step(model, stock, x, **tolerances):
    ours, theirs = gradients(model, x), gradients(stock, x)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# torch.compile


@each(("name", "dynamic"), [*((name, True) for name in MODELS), ("layers", False)])
def test_a_compiled_model_is_one_graph_and_equals_the_stock_one(name, dynamic):
    stock, fused, x = pair(name)
    counter = counting()
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=dynamic)
    assert_same_step(compiled, stock, x)
    frames = counter.frame_count
    for rows in (3, 5, 7) if dynamic else (3, 3):
        assert_same_step(compiled, stock, draw(rows))
    assert counter.frame_count == frames  # nothing is compiled again
    assert ops_in(counter.graphs[-1].graph)


def test_linears_alone_compile_and_export_as_pytorchs():
    """A block that fuse does not know whole: the same graph as the stock model's."""
    stock = nn.TransformerEncoderLayer(WIDTH, 2, 20, 0.0, "gelu", batch_first=True).double()
    fused, x = copy.deepcopy(stock), draw(3)
    report = fastbp.fuse(fused, sample_inputs=x)
    assert [(site.name, site.status) for site in report.sites] == [("linear2", "fused")]
    counters = [counting() for _ in "12"]
    for model, counter in zip((stock, fused), counters, strict=True):
        assert_same_step(torch.compile(model, backend=counter, fullgraph=True, dynamic=True), stock, x)
    targets = [[str(n.target) for n in c.graphs[-1].graph.nodes if n.op == "call_function"] for c in counters]
    assert targets[0] == targets[1]
    programs = [torch.export.export(model, (x,), dynamic_shapes=(BATCH,)) for model in (stock, fused)]
    assert [str(n.target) for n in programs[0].graph.nodes] == [str(n.target) for n in programs[1].graph.nodes]
    assert_same_step(programs[1].module(), stock, draw(5))


def test_a_model_that_breaks_the_graph_itself_has_no_more_breaks():
    stock = Broken().double()
    fused = copy.deepcopy(stock)
    assert len(fastbp.fuse(fused).fused) == 3
    breaks = [torch._dynamo.explain(model)(draw(3)).graph_break_count for model in (stock, fused)]
    assert breaks == [1, 1]


def test_fuse_and_unfuse_after_compiling_are_seen():
    """By guards on what modules are: the next call compiles anew, and the one after does not."""
    stock, fused, x = pair("layers")
    fastbp.unfuse(fused)
    counter = counting()
    compiled = torch.compile(fused, backend=counter, fullgraph=True)
    policies = {"none": None, "auto": "preact", "recompute": "recompute"}
    for times, (save, policy) in enumerate(policies.items(), 1):
        if policy:
            fastbp.unfuse(fused)
            fastbp.fuse(fused, save=save)
        for _ in range(2):
            assert_same_step(compiled, stock, x)
        assert counter.frame_count == times
        calls = [node for node in counter.graphs[-1].graph.nodes if "fastbp.gated_mlp" in str(node.target)]
        assert [node.args[-2] for node in calls] == ([policy] if policy else [])
    fastbp.unfuse(fused)
    assert_same_step(compiled, stock, x)
    assert counter.frame_count <= 4


def test_fusing_through_the_compiled_model():
    model = Layers().double()
    stock, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
    assert len(fastbp.fuse(compiled).fused) == 3
    assert_same_step(compiled, stock, draw(3))
    assert {"blocks.0", "blocks.1", "head"} <= set(fastbp.unfuse(model))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_equals_the_stock_model():
    stock, fused, x = pair("gated")
    compiled = torch.compile(fused, fullgraph=True)
    assert_same_step(compiled, stock, x, rtol=1e-9, atol=1e-9)


def test_a_llama_is_one_graph(monkeypatch):
    torchvision_ops.declare()
    transformers = pytest.importorskip("transformers", reason="the model of its test is transformers'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config = transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=16, **sizes)
    stock = transformers.LlamaForCausalLM(config).double()
    fused = copy.deepcopy(stock)
    assert [site.name for site in fastbp.fuse(fused).fused] == ["model.layers.0.mlp"]
    tokens = torch.randint(50, (2, 7))
    results = []
    for model in (stock, torch.compile(fused, backend="aot_eager", fullgraph=True)):
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        results.append([output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))])
    for mine, expected in zip(*reversed(results), strict=True):
        assert_close(mine, expected, rtol=1e-5, atol=1e-7)  # the norms and the rotation are in float32


# torch.export


@each_model
@each("strict", [False, True])
def test_an_exported_model_runs_and_trains(name, strict):
    stock, fused, x = pair(name)
    program = torch.export.export(fused, (x,), dynamic_shapes=(BATCH,), strict=strict)
    assert ops_in(program.graph)
    assert_same_step(program.module(), stock, draw(5))


def test_an_exported_model_that_is_compiled_trains():
    stock, fused, x = pair("layers")
    program = torch.export.export(fused, (x,), dynamic_shapes=(BATCH,))
    assert_same_step(torch.compile(program.module(), backend="aot_eager", dynamic=True), stock, draw(5))


def test_a_model_exported_for_inference_keeps_nothing():
    """Under no_grad, so that the ops write nothing for a backward that never comes."""
    _, fused, x = pair("layers")
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
    policies = {node.args[-2] for node in program.graph.nodes if "fastbp" in str(node.target)}
    assert policies == {"recompute"}
    assert_close(program.module()(x), fused(x))


def test_an_unfused_model_exports_no_op():
    stock, fused, x = pair("layers")
    fastbp.unfuse(fused)
    program = torch.export.export(fused, (x,))
    assert not ops_in(program.graph)
    assert torch.equal(program.module()(x), stock(x))


# torch.fx


@each("name", ["block", "gated", "sequential", "layers"])
def test_symbolic_trace(name):
    """The fused calls stand in the graph, with the model's own parameters, and are differentiated."""
    stock, fused, x = pair(name)
    traced = torch.fx.symbolic_trace(fused)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert called & {fastbp.linear_act, fastbp.mlp, fastbp.gated_mlp}
    assert len(traced.graph.find_nodes(op="placeholder")) == 1
    for batch in (x, draw(5)):
        assert_same_step(traced, stock, batch)


# TorchScript


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each("name", ["block", "sequential", "layers"])
def test_torchscript_is_refused_until_the_model_is_unfused(name):
    stock, fused, x = pair(name)
    captures = {"script": torch.jit.script, "trace": lambda model: torch.jit.trace(model, (x,))}
    for what in captures:
        with pytest.raises(
            RuntimeError, match=r"fastbp.*(fastbp\.unfuse.*torch\.export|torch\.export.*fastbp\.unfuse)"
        ):
            captures[what](fused)
    fastbp.unfuse(fused)
    assert_close(captures["trace"](fused)(x), stock(x))
