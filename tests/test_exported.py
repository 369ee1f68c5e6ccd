"""What becomes of exported programs: trained, compiled, differentiated twice, decomposed, compiled ahead of time."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from graphs import CASES, GELU, all_modules, call_of, draw, each_form
from support import assert_close, compressed_cases, each, flatten, grads, like, unflatten, with_others
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastbp
from fastbp.forms import FORMS, MLP
from fastbp.saving import POLICIES

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BATCH = {0: torch.export.Dim("batch")}
AUTO_CASES = [case for case in CASES if case[1:] == (GELU, "auto")]  # z is kept, by kernels of PyTorch's
POLICY_CASES = [*AUTO_CASES, *(case for case in CASES if case[2] != "auto")]


class Residual(nn.Module):
    """A call beside which the gradient has another way."""

    def __init__(self, form, **settings):
        super().__init__()
        self.form, self.call = form, call_of(form, **settings)
        _, weights, biases = draw(form, seed=3)
        self.weights, self.biases = nn.ParameterList(weights[form.inputs - 1 :]), nn.ParameterList(biases)

    def forward(self, x):
        return x.sum(-1, keepdim=True) + self.call(x, with_others(self.form, x, self.weights), [*self.biases])


def capture(model, x, **options):
    return torch.export.export(model, (x.detach(),), dynamic_shapes=(BATCH,), **options)


def ops_in(graph):
    return [node for node in graph.nodes if "fastbp" in str(node.target)]


def step(function, model, x):
    """Output and gradients, by name."""
    x = x.detach().requires_grad_()
    parameters = dict(model.named_parameters())
    y = function(x)
    found = torch.autograd.grad(y, [x, *parameters.values()], like(y, seed=1))
    return {"y": y, **dict(zip(("x", *parameters), found, strict=True))}


def assert_same(mine, expected):
    assert mine.keys() == expected.keys()
    for name in expected:
        assert_close(mine[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def dtype_for(save):
    return torch.float32 if save != "auto" and POLICIES[save].compressed else torch.float64


def close(dtype):
    return dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else {}


# Trained


@each(("form", "activation", "save"), POLICY_CASES)
@pytest.mark.filterwarnings("error:fastbp")  # torch warns where an op has no derivative
def test_a_program_trains(form, activation, save):
    """As the model does, and by the op backward of its policy, not through PyTorch's own operations."""
    model, x = Residual(form, activation=activation, save=save), draw(form)[0]
    program = capture(model, x, strict=activation is GELU).module()
    assert_same(step(program, program, x), step(model, model, x))
    assert "_Op" in program(x).grad_fn.next_functions[1][0].name()


@each_form
@pytest.mark.filterwarnings("error:fastbp")
def test_a_program_that_is_compiled_trains(form):
    model, x = Residual(form, activation=GELU), draw(form)[0]
    program = capture(model, x).module()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, program, x), step(model, model, x))


@each("form", [FORMS["linear_act"], FORMS["gated_mlp"]])
@each("frozen", [False, True])
def test_a_program_is_differentiated_twice(form, frozen):
    """Frozen weights read no x in backward; the second derivative does."""
    model, x = Residual(form, activation=GELU), draw(form)[0]
    program = capture(model, x).module()
    for module in (program, model):
        module.requires_grad_(not frozen)
    results = []
    for function in (program, model):
        (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.square().sum(), x)])
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected)


@each_form
def test_transforms_look_into_a_program(form):
    model, x = Residual(form, activation=GELU), draw(form)[0].detach()
    program = capture(model, x).module()

    def with_tangent(function):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, x.sin())))[1]

    transforms = {
        "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x.sin(),))[1],
        "forward mode": with_tangent,
    }
    for name, transform in transforms.items():
        assert_close(transform(program), transform(model), msg=lambda text, name=name: f"{name}: {text}")


# Decomposed


@each(("form", "activation", "save"), [*AUTO_CASES, *compressed_cases([GELU])])
def test_a_decomposed_program_has_no_op_and_equals_the_model(form, activation, save):
    """For any batch, also of more numbers than are worked on at a time."""
    dtype = dtype_for(save)
    model, x = Residual(form, activation=activation, save=save).to(dtype), draw(form, dtype=dtype)[0]
    program = capture(model, x).run_decompositions(fastbp.decompositions())
    assert not ops_in(program.graph)
    assert not any(node.target is torch.ops.aten.transpose.int for node in program.graph.nodes)
    for batch in (x, draw(form, 50_000, dtype=dtype)[0]):
        assert_close(program.module()(batch.detach()), model(batch.detach()), **close(dtype))


@each(
    ("form", "activation", "save"),
    [*POLICY_CASES[len(AUTO_CASES) :], *compressed_cases([GELU], [FORMS["linear_act"]])],
)
def test_decomposed_backward(form, activation, save):
    """In a graph of forward and backward, as AOTAutograd makes one, for other numbers of rows too."""
    dtype = dtype_for(save)
    tensors = draw(form, (2, 3), dtype=dtype)
    inputs = flatten(*tensors)
    op = getattr(torch.ops.fastbp, form.name).default
    settings = [activation.name, list(activation.params), save, "auto"]

    def packed(inputs):
        x, weights, biases = unflatten(form, inputs)
        return inputs if form.parts else (x, [*weights], [*biases])

    def forward_and_backward(dy, *inputs):
        y = op(*packed(inputs), *settings)[0]
        return [y, *grads(y, inputs, dy)]

    dy = like(op(*packed(inputs), *settings)[0], seed=1)
    symbolic = dict(tracing_mode="symbolic")
    whole = make_fx(forward_and_backward, **symbolic)(dy, *inputs)
    assert [node.target._opname for node in ops_in(whole.graph)] == [form.name, f"{form.name}_backward"]
    plain = make_fx(forward_and_backward, decomposition_table=fastbp.decompositions(), **symbolic)(dy, *inputs)
    assert not ops_in(plain.graph)
    more = [torch.cat([t, t.cos()]) for t in inputs[: form.inputs]] + inputs[form.inputs :]
    dy = torch.cat([dy, dy.sin()])
    for mine, expected in zip(plain(dy, *more), forward_and_backward(dy, *more), strict=True):
        assert_close(mine, expected, **close(dtype))


WITHOUT_FASTBP = """
import sys, torch
program, package, data = sys.argv[1:]
x, y = torch.load(data)
torch.testing.assert_close(torch.export.load(program).module()(x), y)
if package:
    try:
        torch._inductor.aoti_load_package(package)(x)
    except RuntimeError as refused:
        assert "fastbp::" in str(refused), refused
    else:
        raise AssertionError("it ran")
assert "fastbp" not in sys.modules
print("as it should be")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """An AOT Inductor package that holds ops of fastbp, and the model."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("AOT Inductor needs a C++ compiler")
    torch.manual_seed(0)
    model = nn.Sequential(fastbp.MLP(6, 8), fastbp.GatedMLP(6, 9))
    program = capture(model, torch.randn(4, 6))
    assert len(ops_in(program.graph)) == 2
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    path = str(tmp_path_factory.mktemp("package") / "model.pt2")
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick), model


def test_an_aoti_package_calls_the_ops(package):
    path, model = package
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))


def test_what_runs_without_fastbp(package, tmp_path):
    """A decomposed program does; a package that holds its ops says what it lacks."""
    model, x = all_modules(torch.float32), draw(MLP, dtype=torch.float32)[0].detach()
    program, data = tmp_path / "program.pt2", tmp_path / "data.pt"
    torch.export.save(capture(model, x).run_decompositions(fastbp.decompositions()), program)
    torch.save((x, model(x).detach()), data)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FASTBP, str(program), package[0], str(data)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.stdout.strip() == "as it should be", outcome.stderr
