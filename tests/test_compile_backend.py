"""torch.compile(backend="fastbp"): what compiled models compute and keep, options, registration, what is logged."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
import torch.nn.functional as F
from captured import HIDDEN, ROWS, WIDTH, Block, backend_that, compiled, inputs, step
from graphs import draw, run
from known_models import KNOWN
from support import (
    ACTIVATIONS,
    assert_as_good_as_eager,
    assert_close,
    each,
    exact,
    flatten,
    formula,
    grads,
    like,
    widened,
)
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import fastbp
from fastbp.activations import bind
from fastbp.compiler import compile_graph
from fastbp.forms import GATED_MLP, MLP

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ROOT = Path(fastbp.__file__).parents[1]


def truth_of(form, tensors, activation, dy):
    """Output and gradients in float64."""
    wide = widened(flatten(*tensors))
    half = 1 + len(wide) // 2
    y = exact(form, wide[0], wide[1:half], wide[half:], formula(activation))
    return [y, *grads(y, wide, dy.double())]


def eager_of(form, activation):
    def call(x, weights, biases):
        return support.eager(form, x, weights, biases, activation)

    return call


@each("activation", [a for a in ACTIVATIONS if a.name != "identity"])
@each("form", [MLP, GATED_MLP])
def test_every_activation(form, activation):
    """As PyTorch's modules compute it, parameters and all; a chain of three linears is one op."""
    tensors, puts, call = draw(form), [], eager_of(form, activation)
    ours, theirs = run(compiled(call, puts), tensors), run(call, tensors)
    known = {"relu6": bind("hardtanh", (0.0, 6.0))}  # as Dynamo has it
    assert puts == [f"{form.name}, {known.get(activation.name, activation)!r}, 3 linears"]
    assert_as_good_as_eager(ours, theirs, truth_of(form, tensors, activation, like(theirs[0], seed=1)))


@each("activation", [bind("relu"), bind("gelu"), bind("quick_gelu")])
@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("form", [MLP, GATED_MLP])
def test_values_and_gradients(form, dtype, activation):
    tensors, puts, call = support.tensors(form, dtype, seed=1), [], eager_of(form, activation)
    ours, theirs = run(compiled(call, puts), tensors), run(call, tensors)
    assert len(puts) == 1
    assert_as_good_as_eager(ours, theirs, truth_of(form, tensors, activation, like(theirs[0], seed=1)))


def kept(function, *tensors):
    """Bytes kept beyond the inputs, for each hidden element."""
    with fastbp.SavedBytes(exclude=[t for t in tensors if t is not None]) as saved:
        function()
    return saved.total / (ROWS * HIDDEN)


@pytest.mark.parametrize(
    ("form", "activation", "ours", "inductors"), [(MLP, bind("gelu"), 2, 4), (GATED_MLP, bind("silu"), 4, 6)]
)
def test_bytes_kept_in_bfloat16(form, activation, ours, inductors):
    """Through Inductor, beside Inductor alone; and values and gradients as good as eager's."""
    tensors = support.tensors(form, torch.bfloat16, seed=0, rows=ROWS, features=(WIDTH, HIDDEN, WIDTH))
    call = eager_of(form, activation)
    for backend, expected in (("inductor", inductors), ("fastbp", ours)):
        torch._dynamo.reset()
        function = torch.compile(call, backend=backend, fullgraph=True)
        assert kept(lambda: function(*tensors), *flatten(*tensors)) == expected, backend  # noqa: B023
    theirs = run(call, tensors)
    assert_as_good_as_eager(
        run(function, tensors), theirs, truth_of(form, tensors, activation, like(theirs[0], seed=1))
    )


def packed(m, x):
    g, u = m.packed(x).chunk(2, dim=-1)
    return m.last(F.silu(g) * u)


ALL = {
    "mlp": (lambda m, x: m.last(F.gelu(m.one(x))), 2),
    "output": (lambda m, x: m.last(F.relu(m.one(x))), 2),
    "a chain": (lambda m, x: m.last(F.gelu(m.square(F.gelu(m.one(x))))), 4),
    "gated_mlp": (lambda m, x: m.last(F.silu(m.one(x)) * m.other(x)), 4),
    "packed": (packed, 4),
}


@pytest.mark.parametrize("block", ALL)
def test_bytes_kept_by_the_pass(block):
    compute, expected = ALL[block]
    model, x = Block(compute, torch.bfloat16), inputs(torch.bfloat16)
    function = compiled(model, [])
    assert kept(lambda: function(x), model, x) == expected


@pytest.mark.parametrize("block", ALL)
@each("outside", [True, False])
def test_autocast(block, outside):
    """Around the compiled model and inside it: the weights are cast as F.linear casts them, and z is bfloat16."""
    compute, expected = ALL[block]
    inside = lambda m, x: compute(m, x) + 0  # noqa: E731
    model, x, puts = Block(inside, torch.float32), inputs(torch.float32), []

    def stock(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    function = compiled(model if outside else stock, puts)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        ours = step(function, model, x)
        with fastbp.SavedBytes(exclude=[model, x]) as saved:
            function(x.requires_grad_())
    casts = sum(p.numel() for p in model.parameters() if p.dim() > 1) + x.numel()
    assert len(puts) == 1
    assert expected * ROWS * HIDDEN <= saved.total <= expected * ROWS * HIDDEN + 2 * casts
    theirs = step(stock, model, x)
    wide = Block(compute)
    wide.load_state_dict(model.state_dict())
    assert_as_good_as_eager(ours, theirs, step(wide, wide, x.double()))


@each("dynamic", [None, True])
def test_a_varying_batch(dynamic):
    puts = []
    counter = CompileCounterWithBackend("eager")
    inner = backend_that(puts)

    def backend(graph_module, example_inputs):
        counter.frame_count += 1
        return inner(graph_module, example_inputs)

    model = Block(lambda m, x: m.last(F.gelu(m.one(x))) + packed(m, x))
    step_of = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for rows in (4, 5, 6, 7, 12, 33):
        x = inputs(rows=rows)
        for mine, theirs in zip(step(step_of, model, x), step(model, model, x), strict=True):
            assert (mine is None) == (theirs is None)
            assert theirs is None or assert_close(mine, theirs) is None
    assert counter.frame_count == (1 if dynamic else 2)
    assert len(puts) == 2 * counter.frame_count


def test_graphs_break_where_they_do_without():
    def compute(m, x):
        h = m.last(F.gelu(m.one(x)))
        torch._dynamo.graph_break()
        return m.last(F.gelu(m.one(h)))

    model, x, graphs = Block(compute), inputs(), {"eager": 0, "fastbp": 0}
    for name in graphs:
        puts = []
        inner = backend_that(puts) if name == "fastbp" else lookup_backend("eager")

        def backend(graph_module, example_inputs, name=name, inner=inner):
            graphs[name] += 1
            return inner(graph_module, example_inputs)

        torch._dynamo.reset()
        y = torch.compile(model, backend=backend)(x)
    assert graphs == {"eager": 2, "fastbp": 2} and len(puts) == 2
    assert_close(y, model(x))


def test_a_block_in_a_checkpoint_is_left():
    """Its graph is one of its own, and keeps nothing."""
    model, x, puts = Block(lambda m, x: m.last(F.gelu(m.one(x)))), inputs(), []

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    for mine, theirs in zip(step(compiled(checkpointed, puts), model, x), step(model, model, x), strict=True):
        assert theirs is None or assert_close(mine, theirs) is None
    assert puts == []


def test_transforms_in_the_graph():
    model, x, puts = Block(lambda m, x: m.last(F.gelu(m.one(x)))), inputs(), []
    for transformed in (torch.vmap(model), lambda x: torch.func.jvp(model, (x,), (x.sin(),))[1]):
        torch._dynamo.reset()
        for mine, theirs in zip(step(compiled(transformed, puts), model, x), step(transformed, model, x), strict=True):
            assert theirs is None or assert_close(mine, theirs) is None


def graph_given_to_inductor(monkeypatch, **settings):
    """What the backend makes of a block, and what it hands to Inductor."""
    handed = {}

    class Inductor:
        def __init__(self, mode, options, dynamic):
            handed.update(mode=mode, options=options)

        def __call__(self, graph_module, example_inputs):
            handed["code"] = graph_module.code
            return lookup_backend("aot_eager")(graph_module, example_inputs)

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Inductor)
    model, x = settings.pop("model", Block(lambda m, x: m.last(F.gelu(m.one(x))))), inputs()
    function = torch.compile(model, backend=compile_graph, **settings)
    handed["bytes"] = kept(lambda: function(x), model, x) / 4  # of float64, as of bfloat16
    return handed


def test_options(monkeypatch):
    options = {"fastbp.save": "recompute", "fastbp.backend": "reference", "max_autotune": False}
    handed = graph_given_to_inductor(monkeypatch, options=options)
    assert handed["options"] == {"max_autotune": False} and handed["bytes"] == 0
    assert "torch.ops.fastbp.mlp" in handed["code"] and "'recompute', 'reference'" in handed["code"]
    handed = graph_given_to_inductor(monkeypatch, mode="reduce-overhead")
    assert handed["mode"] == "reduce-overhead" and handed["bytes"] == 2


def test_a_graph_in_which_nothing_is_found_is_not_changed(monkeypatch):
    graphs = []
    model = Block(lambda m, x: m.last(F.gelu(m.one(x)).clamp(-1, 1)))
    handed = graph_given_to_inductor(monkeypatch, model=model)

    def see(graph_module, example_inputs):
        graphs.append(graph_module.code)
        return graph_module

    torch._dynamo.reset()
    torch.compile(model, backend=see)(inputs())
    assert graphs == [handed["code"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fastbp.sav": "auto"}, "unknown option 'fastbp.sav'; there are fastbp.save, fastbp.backend, and Inductor's"),
        ({"fastbp.save": "nothing"}, "unknown save policy 'nothing'"),
        ({"fastbp.save": "output"}, "save='output' cannot serve gelu"),
        ({"fastbp.save": "fp8"}, "save='fp8' is for .*, got torch.float64"),
        ({"fastbp.backend": "nobody"}, "unknown backend 'nobody'"),
        ({"no_option": True}, "Unexpected optimization option no_option"),
    ],
)
def test_options_that_are_refused(options, message):
    model = Block(lambda m, x: m.last(F.gelu(m.one(x))))
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(model, backend=compile_graph, options=options)(inputs())
    assert "no_option" in options or re.search(r"torch\.compile\(backend='fastbp'\)", str(raised.value))


def test_use_warns_that_it_has_no_effect():
    model, x = Block(lambda m, x: m.last(F.gelu(m.one(x)))), inputs()
    with fastbp.use(save="recompute"), pytest.warns(UserWarning, match=r'options=\{"fastbp.save"'):
        assert kept(lambda: compiled(model, [])(x), model, x) == 8


def put_and_left(m, x):
    y = m.last(F.gelu(m.one(x)))
    h = F.gelu(m.other(x))
    return y + m.last(h) + h[:, :WIDTH]


def test_what_was_put_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, "fastbp.compiler"):
        compiled(Block(put_and_left), [])(inputs())
    left, put = (record.getMessage() for record in caplog.records if record.name == "fastbp.compiler")
    line = put_and_left.__code__.co_firstlineno + 1
    assert put == f'compiled: mlp, gelu, 2 linears, at File "{__file__}", line {line}, in put_and_left'
    assert re.fullmatch("left: .*: its hidden values are used elsewhere too", left)


FIND = """
import importlib.metadata, sys, torch
{before}
from torch._dynamo.backends.registry import list_backends, lookup_backend
assert "fastbp" in list_backends(), list_backends()
found = lookup_backend("fastbp")
import fastbp.compiler
assert found is fastbp.compiler.compile_graph
from torch import compile
print(type(compile(torch.nn.Linear(2, 2), backend="fastbp")).__name__)
"""
NO_ENTRY_POINTS = "importlib.metadata.entry_points = lambda **_: importlib.metadata.EntryPoints()"


@pytest.mark.parametrize(
    "before",
    [
        "assert 'fastbp' not in sys.modules",
        f"{NO_ENTRY_POINTS}; import fastbp; assert 'torch._dynamo' not in sys.modules",
        f"{NO_ENTRY_POINTS}; import torch._dynamo; import fastbp",
        "import fastbp",
    ],
    ids=["installed", "imported first", "imported after Dynamo", "both"],
)
def test_the_name_is_known(before, tmp_path):
    """By the entry point of an installed fastbp, which only torch need be imported for; else as fastbp is imported."""
    import tomllib

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "fastbp-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: fastbp\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in entries.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    program = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}\n{FIND.format(before=before)}"
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (outcome.returncode, outcome.stdout.strip()) == (0, "OptimizedModule"), outcome.stderr


MODELS = {
    "LlamaForCausalLM": "gated_mlp, silu, 3 linears",
    "Phi3ForCausalLM": "gated_mlp, silu, 2 linears",
    "NemotronForCausalLM": "mlp, relu2, 2 linears",
    "CLIPModel": "mlp, quick_gelu, 2 linears",
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers(kind):
    pytest.importorskip("transformers")
    known = next(known for known in KNOWN.values() if known.kind == kind)
    model, tensors, puts = known.model(), known.inputs(), []
    results = []
    for function in (compiled(model, puts), model):
        outputs = [t for t in tree_leaves(dict(function(**tensors))) if isinstance(t, torch.Tensor) and t.requires_grad]
        loss = sum((t * like(t, seed=1)).sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert set(puts) == {MODELS[kind]} and len(puts) >= 2
    for mine, theirs in zip(*results, strict=True):
        assert theirs is None or assert_close(mine, theirs, rtol=1e-9, atol=1e-11) is None
