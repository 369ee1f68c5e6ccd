"""torch.compile: one graph, the results of eager calls, settings, bytes kept."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import support
import torch
import torch.nn.functional as F
from graphs import GELU, all_modules, call_of, compiled, draw, each_case, each_form, run
from support import assert_close, each, flatten, like
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.forms import FORMS, MLP
from fastbp.saving import leanest

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@each(("form", "save"), [(form, save) for form in FORMS.values() for save in ("auto", leanest(form))])
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

    own = weights[form.inputs - 1 :]

    def y(x):
        return support.call(form, x, support.with_others(form, x, own), biases, activation=GELU)

    transformed = {
        "grad": torch.func.grad(lambda x: y(x).square().sum()),
        "vmap": torch.vmap(y),
        "jvp": lambda x: torch.func.jvp(y, (x,), (x.sin(),))[1],
    }
    if outside:
        transformed["hessian"] = lambda x: torch.func.hessian(lambda row: y(row).sum())(x[0])
    for name, function in transformed.items():
        assert_close(compiled(function)(x), function(x), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore")  # of Dynamo, about what it traces through
@each("form", FORMS.values())
def test_compiled_autograd_of_an_eager_call(form):
    """Backward is traced through the formulas, whichever backend ran forward."""
    call = call_of(form, activation="gelu")
    tensors = draw(form)
    expected = run(call, tensors)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        found = run(call, tensors)
    for mine, eager in zip(found, expected, strict=True):
        assert_close(mine, eager)
