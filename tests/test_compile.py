"""Graphs: the ops under torch.library's checks, torch.compile, torch.export, torch.fx, fake tensors; and autocast."""

import contextlib
import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import support
import torch
import torch.nn.functional as F
from support import assert_close, each, flatten, like
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.forms import FORMS, MLP
from fastbp.saving import find_kept, legal_policies

SIZES = (6, 8, 7, 5)
IDENTITY, TANH, GELU, LEAKY = bind("identity"), bind("tanh"), bind("gelu"), bind("leaky_relu", (0.2,))
CASES = [(form, TANH, save) for form in FORMS.values() for save in legal_policies(TANH, form)]
CASES += [(form, activation, "auto") for form in FORMS.values() for activation in (GELU, LEAKY)]
each_form = each("form", FORMS.values())
each_case = each(("form", "activation", "save"), CASES)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def draw(form, rows=4, seed=0, dtype=torch.float64, **options):
    return support.tensors(form, dtype, seed=seed, rows=rows, features=SIZES, **options)


def run(function, tensors, **settings):
    """Output, and gradients of all that takes one."""
    inputs = flatten(*tensors)
    y = function(*tensors, **settings)
    return [y, *support.grads(y, inputs, like(y, seed=1))]


def call_of(form, **settings):
    def call(x, weights, biases):
        return support.call(form, x, weights, biases, **settings)

    return call


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


# The ops


def op_case(form, activation, save, tensors, needs=None):
    """Arguments of a form's forward op, and those of its backward op as a graph would hold them."""
    x, weights, biases = tensors
    packed = [*weights, *biases] if form.parts else [weights, biases]
    settings = [activation.name, list(activation.params), save, "auto"]
    forward = [x, *packed, *settings]
    y, residuals = getattr(torch.ops.fastbp, form.name)(*forward)
    needs = [t is not None for t in flatten(*tensors)] if needs is None else needs
    kept = find_kept(form, save, activation.row.grad_reads_output, tuple(needs))
    residuals = [r if k else None for r, k in zip(residuals, kept[2 + 2 * len(weights) :], strict=True)]
    dy = like(y, seed=1)
    backward = [dy, x if kept[0] else None, y if kept[1] else None, *packed, residuals, *settings, needs]
    return forward, backward


def check_ops(form, forward, backward):
    torch.library.opcheck(getattr(torch.ops.fastbp, form.name).default, forward)
    torch.library.opcheck(getattr(torch.ops.fastbp, f"{form.name}_backward").default, backward)


OP_CASES = [(form, TANH, save) for form, activation, save in CASES if activation is TANH]
OP_CASES += [(form, activation, "preact") for form in FORMS.values() for activation in (IDENTITY, LEAKY)]
OP_CASES += [(FORMS["linear_act"], IDENTITY, "output"), (MLP, IDENTITY, "output")]


@each(("form", "activation", "save"), OP_CASES)
@each("bias", [True, False])
def test_opcheck(form, activation, save, bias):
    check_ops(form, *op_case(form, activation, save, draw(form, bias=bias, requires_grad=False)))


@each_form
@each("rows", [(), (2, 3), (0,), (2, 0, 3), (1,)])
def test_opcheck_of_other_shapes(form, rows):
    for save in legal_policies(TANH, form):
        check_ops(form, *op_case(form, TANH, save, draw(form, rows, requires_grad=False)))


@each_form
def test_opcheck_of_other_strides(form):
    """A transposed x, weights that are slices, a dy of stride zero."""
    x, weights, biases = draw(form, (3, 4), requires_grad=False)
    weights = [torch.stack([w, w], -1)[..., 0] for w in weights]
    for activation in (TANH, GELU, IDENTITY):
        forward, backward = op_case(form, activation, "preact", (x.transpose(0, 1), weights, biases))
        check_ops(form, forward, backward)
        check_ops(form, forward, [torch.ones((), dtype=x.dtype).expand_as(backward[0]), *backward[1:]])


@each_form
def test_opcheck_of_partial_needs(form):
    """Each input alone, and all but each, with what backward then reads and nothing else."""
    tensors = draw(form, requires_grad=False)
    count = len(flatten(*tensors))
    op = getattr(torch.ops.fastbp, f"{form.name}_backward").default
    for save in legal_policies(TANH, form):
        for wanted in range(count):
            for needs in ([i == wanted for i in range(count)], [i != wanted for i in range(count)]):
                _, backward = op_case(form, TANH, save, tensors, needs)
                torch.library.opcheck(op, backward, test_utils=("test_schema", "test_faketensor"))


# torch.compile


@each_case
@each("dynamic", [False, True])
def test_compiled_equals_eager(form, activation, save, dynamic):
    call = call_of(form, activation=activation, save=save)
    tensors = draw(form, (2, 3) if dynamic else (4,))
    for mine, expected in zip(run(compiled(call, dynamic=dynamic), tensors), run(call, tensors), strict=True):
        assert_close(mine, expected)


def test_compiled_equals_eager_for_every_activation():
    def every(x, weights, biases):
        outputs = [fastbp.linear_act(x, weights[0], biases[0], activation=name) for name in ROWS]
        outputs += [fastbp.gated_linear_act(x, weights[0], weights[0].sin(), activation=name) for name in ROWS]
        return torch.stack(outputs)

    tensors = draw(FORMS["linear_act"])
    for mine, expected in zip(run(compiled(every), tensors), run(every, tensors), strict=True):
        assert_close(mine, expected)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@each("form", [FORMS["mlp"], FORMS["gated_mlp"]])
def test_inductor_equals_eager(form):
    call = call_of(form, activation="gelu")
    tensors = draw(form)

    def step(x, weights, biases):  # something to fuse on both sides
        return call(x.sin(), weights, biases).cos()

    for mine, expected in zip(run(compiled(step, "inductor"), tensors), run(step, tensors), strict=True):
        assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@each_form
@pytest.mark.parametrize(
    ("mode", "requires_grad"), [(torch.no_grad, True), (torch.inference_mode, True), (torch.enable_grad, False)]
)
def test_compiled_where_no_gradient_is_wanted(form, mode, requires_grad):
    """In inference and for a frozen model: one graph all the same, and nothing kept."""
    call = call_of(form, activation=GELU)
    tensors = draw(form, requires_grad=requires_grad)
    with mode(), fastbp.SavedBytes() as saved:
        y = compiled(call)(*tensors)
        expected = call(*tensors)
    assert not y.requires_grad
    assert_close(y, expected)
    assert saved.total == 0


@each_form
def test_compiled_with_frozen_inputs(form):
    """Whatever one of the inputs takes a gradient alone: the same gradient, and no more bytes kept than eager."""
    call = call_of(form, activation=GELU)
    for wanted in range(len(flatten(*draw(form)))):
        x, weights, biases = draw(form, requires_grad=False)
        inputs = flatten(x, weights, biases)
        inputs[wanted].requires_grad_()
        counts, results = [], []
        for function in (call, compiled(call)):
            with fastbp.SavedBytes(exclude=inputs) as saved:
                y = function(x, weights, biases)
            counts.append(saved.total)
            results.append([y, *torch.autograd.grad(y, inputs[wanted], like(y, seed=1))])
        assert counts[0] == counts[1]
        for mine, expected in zip(*results, strict=True):
            assert_close(mine, expected)


def all_modules(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(
        fastbp.Linear(6, 8, dtype=dtype),
        fastbp.LinearAct(8, 8, dtype=dtype, activation=nn.LeakyReLU(0.3)),
        fastbp.LinearAct(8, 8, dtype=dtype, activation=nn.LeakyReLU(0.2), save="recompute"),
        fastbp.GatedLinear(8, 8, dtype=dtype),
        fastbp.MLP(8, (8, 9), 8, dtype=dtype, activation="relu"),
        fastbp.GatedMLP(8, 16, dtype=dtype),
    )


@each("dynamic", [None, True])
def test_a_varying_batch_does_not_compile_for_ever(dynamic):
    model, counter = all_modules(), CompileCounterWithBackend("aot_eager")
    step = compiled(model, counter, dynamic=dynamic)
    for rows in (4, 5, 6, 7, 9, 12, 33):
        x = draw(MLP, rows)[0]
        assert_close(step(x), model(x))
    assert counter.frame_count == (1 if dynamic else 2)


def test_modules_compiled_one_by_one_keep_their_own_parameters():
    """They share the code that is compiled, so a slope of one must not become the slope of the next."""
    x = draw(MLP)[0]
    for slope in (0.1, 0.2, 0.3, -0.4):
        module = fastbp.LinearAct(6, 5, dtype=torch.float64, activation=nn.LeakyReLU(slope))
        expected = F.leaky_relu(F.linear(x, module.weight, module.bias), slope)
        assert_close(compiled(module)(x), expected)


@pytest.mark.parametrize(
    "given", [nn.LeakyReLU(0.3), F.leaky_relu, "leaky_relu", bind("leaky_relu", (0.3,))], ids=lambda g: type(g).__name__
)
def test_activation_objects_in_a_compiled_region(given):
    x, (weight, *_), (bias, *_) = draw(FORMS["linear_act"])

    def call():
        return fastbp.linear_act(x, weight, bias, activation=given)

    assert_close(compiled(call)(), call())


def test_bad_input_is_refused_in_a_compiled_region():
    x, (weight, *_), _ = draw(FORMS["linear_act"])
    with pytest.raises(ValueError, match=r"fastbp\.linear_act: weight must be .*did you mean weight\.T\?"):
        torch.compile(fastbp.linear_act, backend="aot_eager")(x, weight.t())


def kept_by(function, tensors):
    with fastbp.SavedBytes(exclude=[t for t in flatten(*tensors) if t is not None]) as saved:
        function(*tensors)
    return saved.total


def test_use_around_a_compiled_call_is_respected():
    counter = CompileCounterWithBackend("aot_eager")
    form = FORMS["linear_act"]
    step, tensors = compiled(call_of(form, activation=GELU), counter), draw(form)
    z = tensors[0].shape[0] * tensors[1][0].shape[0] * 8  # bytes of float64
    assert kept_by(step, tensors) == z
    with fastbp.use(save="recompute"):
        assert kept_by(step, tensors) == 0
    assert kept_by(step, tensors) == z
    with fastbp.use(save="recompute", backend="reference"):
        assert kept_by(step, tensors) == 0
    assert kept_by(step, tensors) == z
    assert counter.frame_count == 3


def test_use_inside_a_compiled_region_is_respected_and_ends():
    form = FORMS["linear_act"]
    call, tensors = call_of(form, activation=GELU), draw(form)

    def region(*tensors):
        with fastbp.use(save="recompute"):
            return call(*tensors)

    assert kept_by(compiled(region), tensors) == 0
    assert kept_by(call, tensors) > 0
    assert kept_by(compiled(call), tensors) > 0


def test_use_in_one_thread_does_not_reach_the_compiled_calls_of_another():
    form = FORMS["linear_act"]
    step, tensors = compiled(call_of(form, activation=GELU)), draw(form)
    with ThreadPoolExecutor(1) as other, fastbp.use(save="recompute"):
        assert kept_by(step, tensors) == 0
        assert other.submit(kept_by, step, tensors).result() > 0
        assert kept_by(step, tensors) == 0


@each("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("cls", [fastbp.MLP, fastbp.GatedMLP])
@each("save", ["auto", "recompute"])
def test_bytes_kept_by_compiled_blocks(cls, activation, save):
    """The promise: 2 bytes per hidden element in bf16, 4 with a gate, 0 with recompute; as in eager mode."""
    rows, hidden = 24, 32
    model = cls(6, hidden, dtype=torch.bfloat16, activation=activation, save=save)
    x = draw(MLP, rows, dtype=torch.bfloat16)[0]
    promised = {"auto": 4 if cls is fastbp.GatedMLP else 2, "recompute": 0}[save]
    for function in (model, compiled(model)):
        with fastbp.SavedBytes(exclude=[model, x]) as saved:
            function(x)
        assert saved.total == promised * rows * hidden


@each_form
@each("save", ["auto", "recompute"])
def test_double_backward_under_compile_raises(form, save):
    """AOTAutograd cannot do it; what must not happen is a number."""
    tensors = draw(form)
    y = compiled(call_of(form, activation=GELU, save=save))(*tensors)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dx.square().sum(), tensors[0])


@each_form
@each("outside", [True, False])
def test_transforms_in_a_compiled_region(form, outside):
    """torch.func inside torch.compile, with parameters that take gradients outside too, and that do not."""
    x, weights, biases = draw(form, requires_grad=outside)
    x = x.detach()

    def y(x):
        return support.call(form, x, weights, biases, activation=GELU)

    transformed = {
        "grad": torch.func.grad(lambda x: y(x).square().sum()),
        "vmap": torch.vmap(y),
        "jvp": lambda x: torch.func.jvp(y, (x,), (x.sin(),))[1],
    }
    if outside:
        transformed["hessian"] = lambda x: torch.func.hessian(lambda row: y(row).sum())(x[0])
    for name, function in transformed.items():
        assert_close(compiled(function)(x), function(x), msg=lambda text, name=name: f"{name}: {text}")


# torch.export and torch.fx


@each("dynamic", [False, True])
def test_export(dynamic):
    model, x = all_modules(), draw(MLP)[0].detach()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    ops = [str(node.target) for node in program.graph.nodes if "fastbp" in str(node.target)]
    assert ops == [f"fastbp.{form}.default" for form in ("linear_act",) * 3 + ("gated_linear_act", "mlp", "gated_mlp")]
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
    fastbp.Linear: fastbp.linear_act,
    fastbp.LinearAct: fastbp.linear_act,
    fastbp.GatedLinear: fastbp.gated_linear_act,
    fastbp.MLP: fastbp.mlp,
    fastbp.GatedMLP: fastbp.gated_mlp,
}


@pytest.mark.parametrize("cls", FUNCTION_OF)
@each("activation", ["gelu", "silu", nn.LeakyReLU(0.3)])
def test_symbolic_trace_goes_through_the_modules(cls, activation):
    """Each is one call of its function, with its own parameters and settings."""
    settings = {} if cls is fastbp.Linear else dict(activation=activation, save="recompute")
    model = nn.Sequential(cls(6, 8, dtype=torch.float64, **settings))
    x = draw(MLP)[0].detach()
    traced = torch.fx.symbolic_trace(model)
    called = [node for node in traced.graph.nodes if node.target in FUNCTION_OF.values()]
    assert [node.target for node in called] == [FUNCTION_OF[cls]]
    assert called[0].kwargs["save"] == settings.get("save", "auto")
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
        half = len(inputs) // 2
        y = support.call(form, inputs[0], inputs[1 : 1 + half], inputs[1 + half :], activation=GELU)
        gradients = torch.autograd.grad(y.sum(), inputs)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, tensors[1][-1].shape[0]), dtype, device)
    assert [(g.shape, g.dtype, g.device) for g in gradients] == [(t.shape, t.dtype, t.device) for t in inputs]


@each_form
@each("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(form, tracing_mode):
    def step(x, *rest):
        half = len(rest) // 2
        y = support.call(form, x, rest[:half], rest[half:], activation=GELU)
        return y, *torch.autograd.grad(y.square().sum(), (x, *rest))

    inputs = flatten(*draw(form))
    graph = make_fx(step, tracing_mode=tracing_mode)(*inputs)
    others = flatten(*draw(form, rows=9 if tracing_mode == "symbolic" else 4, seed=5))
    for mine, expected in zip(graph(*others), step(*others), strict=True):
        assert_close(mine, expected)


# Autocast, as F.linear behaves under it


AUTOCAST = [torch.bfloat16, torch.float16]


@each_form
@each("dtype", AUTOCAST)
@each("how", ["eager", "compiled"])
def test_autocast_casts_inputs_and_returns_float32_gradients(form, dtype, how):
    call = call_of(form, activation=GELU)
    function = call if how == "eager" else compiled(call)
    tensors = draw(form, dtype=torch.float32)
    x, weights, biases = tensors
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(x, weights[0], biases[0]).dtype == dtype
        y = function(*tensors)
    gradients = torch.autograd.grad(y, flatten(*tensors), like(y, seed=1))
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [torch.float32] * len(gradients)

    narrow = [t.detach().to(dtype).requires_grad_() for t in flatten(*tensors)]
    expected = call(narrow[0], narrow[1 : 1 + len(weights)], narrow[1 + len(weights) :])
    assert torch.equal(y, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, narrow, like(y, seed=1)), strict=True):
        assert torch.equal(mine, theirs.float())


@each_form
@each("dtype", AUTOCAST)
@each("how", ["eager", "compiled"])
def test_autocast_off_inside_autocast(form, dtype, how):
    call = call_of(form, activation=GELU)

    def region(*tensors):
        with torch.autocast("cpu", enabled=False):
            return call(*tensors)

    tensors = draw(form, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = (region if how == "eager" else compiled(region))(*tensors)
    assert y.dtype == torch.float32
    assert torch.equal(y, call(*tensors))


@each_form
@each("how", ["eager", "compiled"])
def test_autocast_leaves_float64_alone(form, how):
    call = call_of(form, activation=GELU)
    tensors = draw(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(tensors[0], tensors[1][0]).dtype == torch.float64
        mine = run(call if how == "eager" else compiled(call), tensors)
    for found, expected in zip(mine, run(call, tensors), strict=True):
        assert found.dtype == torch.float64
        assert_close(found, expected)


@each_form
def test_autocast_takes_mixed_inputs(form):
    """A narrow x with float32 weights, which is what the layer before it hands over."""
    call = call_of(form, activation=GELU)
    x, weights, biases = draw(form, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, plain = call(x.bfloat16(), weights, biases), call(x, weights, biases)
    assert torch.equal(mixed, plain)


def test_autocast_does_not_reach_backward_or_what_comes_after():
    call = call_of(MLP, activation=GELU)
    tensors = draw(MLP, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*tensors)
        inside = torch.autograd.grad(y.float().sum(), flatten(*tensors), retain_graph=True)
        assert torch.is_autocast_enabled("cpu")
    outside = torch.autograd.grad(y.float().sum(), flatten(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert call(*tensors).dtype == torch.float32
