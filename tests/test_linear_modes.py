"""fastbp.Linear under transforms, modes and tracers: PyTorch computes, or ours as PyTorch would."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from linear_twins import MAKERS, ROWS, WIDTH, assert_as_stock, assert_close, outcome, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastbp
from fastbp.linear import of_any_size


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


class Net(nn.Module):
    """An MLP, or a gated one, of linears of a class."""

    def __init__(self, kind, gated, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (kind(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
        self.gated = gated

    def forward(self, x):
        h = F.silu(self.gate(x))
        return self.down(h * self.up(x) if self.gated else h)


def nets(gated, dtype=torch.float64):
    return Net(nn.Linear, gated, dtype), Net(fastbp.Linear, gated, dtype)


TRANSFORMS = {
    "grad": lambda net, x: grad(lambda x: net(x).square().sum())(x),
    "per sample": lambda net, x: vmap(
        grad(lambda p, x: functional_call(net, p, (x,)).square().sum()), (None, 0), randomness="same"
    )(dict(net.named_parameters()), x)["down.weight"],
    "vmap": lambda net, x: vmap(net)(x.expand(3, *x.shape)),
    "jvp": lambda net, x: jvp(net, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda net, x: jacrev(lambda x: net(x).sum(0))(x),
    "hessian": lambda net, x: hessian(lambda x: net(x).square().sum())(x[0]),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x, vectorize=True),
    "batched": lambda net, x: torch.autograd.grad(
        net(x), list(net.parameters()), torch.stack([torch.ones(ROWS, WIDTH).double()] * 3), is_grads_batched=True,
        allow_unused=True,
    )[-2],
}  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, gated):
    stock, ours = nets(gated)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    with of_any_size():
        assert_close([TRANSFORMS[transform](ours, x)], [TRANSFORMS[transform](stock, x)], 1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_forward_mode(gated):
    """Also of what was made under a graph before."""
    tangents = []
    for net in nets(gated):
        x = torch.linspace(-1, 1, ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH).requires_grad_()
        with of_any_size(), forward_ad.dual_level():
            y = net(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
        assert outcome(net.down)[0] != "fused"
    assert_close(tangents[1:], tangents[:1], 1e-10)


class Other(TorchFunctionMode):
    """Somebody's mode that has a linear of its own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            return torch.matmul(args[0], args[1].t()) * 3.0
        return function(*args, **(kwargs or {}))


def test_function_modes_are_obeyed(maker):
    make, _ = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        with Other():
            return fc[2](h)

    assert_as_stock(program, left="a TorchFunctionMode is active")


def test_a_default_device_is_no_mode_that_looks(maker):
    make, what = maker

    def program(fc, x, seen):
        with torch.device("cpu"):
            return fc[2](make(fc[0](x), fc[1](x)))

    assert_as_stock(program, fused=what)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_pytorchs_operations(maker):
    """None of ours, in either direction."""
    make, _ = maker
    mode = Watching()

    def program(fc, x, seen):
        with mode:
            return fc[2](make(fc[0](x), fc[1](x)))

    def backward(y, x, parameters, result):
        with mode:
            return torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)

    assert_as_stock(program, fused="linear of", after=backward)
    assert not [name for name in mode.names if "fastbp" in name]


def test_flops_are_pytorchs(maker):
    make, _ = maker
    flops = []
    for kind in (nn.Linear, fastbp.Linear):
        counter = FlopCounterMode(display=False)

        def program(fc, x, seen, counter=counter):
            with counter:
                return fc[2](make(fc[0](x), fc[1](x)))

        def backward(y, x, parameters, result, counter=counter):
            flops.append(counter.get_total_flops())
            with counter:
                y.sum().backward()
            flops.append(counter.get_total_flops())
            return []

        run(kind, program, after=backward)
    assert flops[:2] == flops[2:] and 0 < flops[0] < flops[1]


@pytest.mark.parametrize("gated", [False, True])
def test_fake_tensors(gated):
    """As the planner counts: y has the shape, and h is not kept."""
    kept = []
    for kind in (nn.Linear, fastbp.Linear):
        with FakeTensorMode(), of_any_size():
            net = Net(kind, gated, torch.float32)
            x = torch.empty(1000, WIDTH, requires_grad=True)
            with fastbp.SavedBytes(exclude=[x, net]) as saved:
                y = net(x)
            y.sum().backward()
            assert y.shape == (1000, WIDTH) and net.down.weight.grad.shape == (WIDTH, WIDTH)
        kept.append(saved.total)
    assert kept[0] - kept[1] == 4 * 1000 * WIDTH


@pytest.mark.parametrize("gated", [False, True])
def test_meta_tensors(gated):
    net = Net(fastbp.Linear, gated).to("meta")
    with of_any_size():
        y = net(torch.empty(ROWS, WIDTH, dtype=torch.float64, device="meta"))
        y.sum().backward()
    assert outcome(net.down)[0] == "fused" and net.gate.weight.grad.is_meta


@pytest.mark.parametrize("gated", [False, True])
def test_tracers_see_a_plain_linear(gated):
    """torch.jit.trace, torch.fx, and torch.export with stock's operations."""
    stock, ours = nets(gated)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    with of_any_size():
        traced = torch.jit.trace(ours, x)
        assert "PythonOp" not in str(traced.inlined_graph)
        assert_close([traced(x)], [stock(x)], 1e-12)
        assert_close([torch.fx.symbolic_trace(ours)(x)], [stock(x)], 1e-12)
        fused = copy.deepcopy(stock)
        fastbp.fuse(fused.down)
        graphs = [torch.fx.symbolic_trace(net).graph for net in (stock, fused)]
        assert [n.target for n in graphs[0].nodes] == [n.target for n in graphs[1].nodes]
        programs = [torch.export.export(net, (x,)) for net in (stock, ours)]
        targets = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert targets[0] == targets[1]
    scripted = torch.jit.script(fastbp.Linear(WIDTH, WIDTH))
    assert scripted(x.float()).shape == x.shape


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_linears_are_plain(gated, fresh_dynamo):
    """One graph, as of PyTorch's linears, and gradients within rounding."""
    results = []
    for net in nets(gated):
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
            return graph

        x = torch.ones(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        with of_any_size():
            y = torch.compile(net, backend=backend, fullgraph=True)(x)
        results.append((y, torch.autograd.grad(y.square().sum(), [x, net.down.weight]), graphs))
        torch._dynamo.reset()
    assert_close([results[1][0], *results[1][1]], [results[0][0], *results[0][1]], 1e-10)
    assert results[0][2] == results[1][2] and len(results[0][2]) == 1


@pytest.mark.parametrize("how", ["batched", "penalty"])
def test_dropout_between_under_batched_gradients_and_a_penalty(how):
    """Gradients of a batch of dy; and of gradients alone, where nothing reaches the linear's own output."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 6)).double()
        model[0].register_forward_hook(lambda *_: None)  # so that no block runs whole
        if fused:
            fastbp.fuse(model)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        with of_any_size():
            y = model(x)
        wanted = [x, *model.parameters()]
        if how == "batched":
            found.append(torch.autograd.grad(y, wanted, torch.eye(24).double().view(24, 4, 6), is_grads_batched=True))
        else:
            (dw,) = torch.autograd.grad(y.sum(), model[3].weight, create_graph=True)
            found.append(torch.autograd.grad(dw.square().sum(), [x, *model[0].parameters()]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
