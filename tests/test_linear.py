"""fastbp.Linear: which inputs it reads from autograd's graph, and what it keeps of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from linear_twins import MAKERS, ROWS, WIDTH, assert_as_stock, assert_equal, outcome, run, twice
from torch import Tensor, nn

import fastbp
from fastbp import linear, producers
from fastbp.activations import TABLE, Activation, Bound
from fastbp.linear import of_any_size

WITH_NODES = [row for row in TABLE if row.node]


def call(row: Activation, z: Tensor) -> tuple[Tensor, Bound]:
    """PyTorch's own spelling of a row, with parameters other than the defaults."""
    params = tuple(1.5 * default for _, default in row.params)
    if row.module_attributes:
        return row.module(**dict(row.module_attributes))(z), Bound(row, params)
    return row.functions[0](z, *params), Bound(row, params)


@pytest.mark.parametrize("row", WITH_NODES, ids=lambda row: row.name)
@pytest.mark.parametrize("after", ["once", "twice"])
def test_activations_are_read_from_their_nodes(row, after):
    def program(fc, x, seen):
        return fc[2](call(row, fc[0](x))[0])

    _, bound = call(row, torch.zeros(1))
    options = {"after": twice} if after == "twice" else {}
    assert_as_stock(program, fused=f"act_linear, {bound!r}", **options)
    z = torch.randn(99, 97, requires_grad=True)  # smaller ones have a kernel of their own for gelu
    h, _ = call(row, z * 3)
    found = producers.read_whole(h, h.grad_fn)
    assert (found.bound, found.form.name) == (bound, "act_linear")
    assert_equal([found.bound(*found.inputs), producers.rebuild(h.grad_fn)], [h, h])


def test_rows_with_nodes_are_all_there():
    """Each of PyTorch's activations that keeps its input, and is in the table, has its node there."""
    z, missing = torch.randn(4, requires_grad=True), []
    for row in TABLE:
        if not row.node and row.functions:
            node = row.functions[0](z).grad_fn
            if hasattr(node, "_saved_self") and not hasattr(node, "_saved_result"):
                missing.append((row.name, type(node).__name__))
    # PyTorch's gradients of celu and hardsigmoid have a number in float32; relu6 is read as a hardtanh.
    others = [("relu6", "HardtanhBackward0"), ("celu", "CeluBackward0"), ("softsign", "DivBackward0")]
    assert missing == [*others, ("hardsigmoid", "HardsigmoidBackward0")]


GATES = {
    "gate first": (lambda g, u: F.silu(g) * u, "silu"),
    "gate second": (lambda g, u: u * F.silu(g), "silu"),
    "gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu_tanh": (lambda g, u: u * F.gelu(g, approximate="tanh"), "gelu_tanh"),
    "parameters": (lambda g, u: F.leaky_relu(g, 0.3) * u, "leaky_relu(negative_slope=0.3)"),
    "two activations": (lambda g, u: F.silu(g) * F.gelu(u), "silu"),
    "one tensor twice": (lambda g, u: F.silu(g) * g, "silu"),
    "one result twice": (lambda g, u: (lambda a: a * a)(F.silu(g)), "silu"),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("after", ["once", "twice"])
def test_gates_are_read(gate, after):
    make, name = GATES[gate]
    options = {"after": twice} if after == "twice" else {}
    assert_as_stock(lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))), fused=f"gated_act_linear, {name}", **options)


MADE_AGAIN = {
    "celu": (lambda g, u: F.celu(g, 1.3), "celu"),
    "hardsigmoid": (lambda g, u: F.hardsigmoid(g), "hardsigmoid"),
    "gate of hardsigmoid": (lambda g, u: F.hardsigmoid(g) * u, "mul"),
    "elu with scales": (lambda g, u: torch.ops.aten.elu(g, 0.7, 1.1, 1.2), "elu"),
    "square of relu": (lambda g, u: F.relu(g) ** 2, "act_linear, relu2"),
    "torch.square of relu": (lambda g, u: torch.square(F.relu(g)), "act_linear, relu2"),
    "cube of relu": (lambda g, u: F.relu(g) ** 3, "pow"),
    "square": (lambda g, u: g**2, "pow"),
    "square of silu": (lambda g, u: F.silu(g) ** 2, "pow"),
    "glu": (lambda g, u: F.glu(torch.cat((g, u), -1)), "glu"),
    "glu of another dimension": (lambda g, u: F.glu(torch.cat((g, u), 0), 0), "glu"),
    "swish by hand": (lambda g, u: g * torch.sigmoid(g), "mul"),
    "quick_gelu by hand": (lambda g, u: g * torch.sigmoid(1.702 * g), "mul"),
    "sigmoid gate": (lambda g, u: u * torch.sigmoid(g), "mul"),
    "old tanh-GELU": (
        lambda g, u: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0)))),
        "mul",
    ),
    "broadcast up": (lambda g, u: F.silu(g) * u[:1], "mul"),
    "broadcast gate": (lambda g, u: F.silu(g[:1]) * u, "mul"),
    "number": (lambda g, u: F.silu(g) * 0.7, "mul"),
    "number before": (lambda g, u: -0.7 * F.silu(g), "mul"),
    "mask": (lambda g, u: F.silu(g) * (u.detach() > 0), "mul"),
    "mask before": (lambda g, u: (u.detach() > 0).double() * F.silu(g), "mul"),
    "gate, then mask": (lambda g, u: F.silu(g) * u * (u.detach() > 0), "mul"),
    "constant by a sum": (lambda g, u: (u.detach() + 9) / (F.relu(g) + 1), "div"),
    "quotient by a number": (lambda g, u: F.silu(g) / 0.7, "div"),
    "quotient by a constant": (lambda g, u: F.silu(g) / (u.detach() + 9), "div"),
    "quotient": (lambda g, u: F.silu(g) / (u + 9), "div"),
    "constant by an activation": (lambda g, u: (u.detach() + 9) / F.softplus(g), "div"),
    "float64 and back": (lambda g, u: F.silu(g).float().double(), "to_copy"),
    "gate in float32": (lambda g, u: (F.silu(g.float()) * u.float()).double(), "to_copy"),
    "one operand in float32": (lambda g, u: F.silu(g.float()) * u, "mul"),
    "dropout": (lambda g, u: F.dropout(F.silu(g), 0.4), "mul"),
    "dropout of a gate": (lambda g, u: F.dropout(F.silu(g) * u, 0.4), "mul"),
    "dropout as on a GPU": (lambda g, u: torch.native_dropout(F.silu(g), 0.4, True)[0], "native_dropout"),
    "dropout of all": (lambda g, u: torch.native_dropout(F.silu(g), 1.0, True)[0], "native_dropout"),
    "two factors": (lambda g, u: 2.0 * (F.silu(g) / 3.0), "mul"),
    "gate of a mask": (lambda g, u: (F.silu(g) * 0.7) * u, "mul"),
}


@pytest.mark.parametrize("name", MADE_AGAIN)
@pytest.mark.parametrize("after", ["once", "twice"])
def test_inputs_are_made_again_by_their_nodes(name, after):
    make, what = MADE_AGAIN[name]
    what = what if "," in what else f"linear of {what}"
    options = {"after": twice} if after == "twice" and "hardsigmoid" not in name else {}  # PyTorch has no second one
    assert_as_stock(lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))), fused=what, **options)


def test_halves_of_a_packed_linear_are_a_gate():
    def program(fc, x, seen):
        g, u = torch.cat((fc[0](x), fc[1](x)), -1).chunk(2, dim=-1)
        return fc[2](F.silu(g) * u)

    assert_as_stock(program, fused="gated_act_linear, silu")


LEFT = {
    "relu": (lambda g, u: F.relu(g), "relu keeps its output"),
    "sigmoid": (lambda g, u: torch.sigmoid(g), "sigmoid keeps its output"),
    "clamp": (lambda g, u: F.silu(g).clamp(max=0.5), "between silu and this linear there is clamp"),
    "added number": (lambda g, u: F.silu(g) + 1.0, "there is add"),
    "view": (lambda g, u: F.silu(g).view(-1).view(ROWS, WIDTH), "there is view, view"),
    "rounded quotient": (lambda g, u: torch.div(F.silu(g), 0.5, rounding_mode=None).floor(), None),
    "nothing": (lambda g, u: g, None),
    "no activation": (lambda g, u: g * u, None),
    "detached": (lambda g, u: F.silu(g).detach(), None),
    "three factors": (lambda g, u: 2.0 * (F.dropout(F.silu(g), 0.2) / 3.0), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_read_is_computed_by_pytorch(name):
    make, reason = LEFT[name]
    assert_as_stock(lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))), left=reason)


def test_the_product_of_a_norm_is_not_made_again():
    """Nothing is gained by it for each of the readers of a norm."""
    assert_as_stock(lambda fc, x, seen: fc[2](fc[1].weight[0] * (fc[0](x) / fc[0](x).square().mean())))


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 3, WIDTH), (1, WIDTH)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_shapes(shape, gated):
    def program(fc, x, seen):
        x = x.flatten().repeat(2)[: math.prod(shape)].view(shape)
        return fc[2](F.gelu(fc[0](x)) * fc[1](x) if gated else F.gelu(fc[0](x)))

    assert_as_stock(program, fused="gated_act_linear, gelu" if gated else "act_linear, gelu")
    assert_as_stock(program, fused="gated_act_linear, gelu" if gated else "act_linear, gelu", bias=False)


LAYOUTS = {
    "transposed": lambda z: z[:WIDTH, :WIDTH].t(),
    "every second": lambda z: torch.cat((z, z), -1)[:, ::2],
    "expanded": lambda z: z[:1].expand(ROWS, WIDTH),
    "three dimensions": lambda z: z.expand(3, 2 * ROWS, WIDTH).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True])
def test_layouts(layout, gated):
    """Of z, and so of h, which an elementwise kernel lays out alike."""
    of = LAYOUTS[layout]

    def program(fc, x, seen):
        z = of(torch.cat((fc[0](x), fc[0](x))))
        return fc[2](F.silu(z) * of(torch.cat((fc[1](x), x))) if gated else F.silu(z))

    assert_as_stock(program, fused="gated_act_linear, silu" if gated else "act_linear, silu")


def test_an_expanded_h_is_no_output_of_an_activation():
    assert_as_stock(lambda fc, x, seen: fc[2](F.silu(fc[0](x))[:1].expand(ROWS, WIDTH)))


def test_h_may_be_a_parameter():
    """It has no node to read."""

    def program(fc, x, seen):
        h = nn.Parameter(F.silu(fc[0](x)).detach())
        y = fc[2](h)
        seen.append(torch.autograd.grad(y.sum(), h, retain_graph=True)[0])
        return y + x.sum() * 0

    assert_as_stock(program)


def test_z_may_be_a_leaf():
    def program(fc, x, seen):
        return fc[2](F.silu(x)) + fc[3](F.silu(x) * fc[0].weight[:ROWS])

    ours = assert_as_stock(program, fused="act_linear, silu")
    assert outcome(ours.linears[3]) == ("fused", "gated_act_linear, silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_dtypes(dtype, gated):
    def program(fc, x, seen):
        return fc[2](F.silu(fc[0](x)) * fc[1](x) if gated else F.silu(fc[0](x)))

    options = {"rows": 40, "width": 32, "tolerance": 1e-5 if dtype is torch.float32 else 3e-2}
    assert_as_stock(program, fused="gated_act_linear" if gated else "act_linear", dtype=dtype, **options)


def test_float32_adapters_on_a_16_bit_layer():
    """The adapter casts what the base layer reads, and both make it again."""

    def program(fc, x, seen):
        h = F.silu(fc[0](x)) * fc[1](x)
        return fc[2](h) + fc[3](h.float()).to(h.dtype)

    def prepare(linears):
        linears[3].float()

    options = {"prepare": prepare, "dtype": torch.bfloat16, "tolerance": 3e-2}
    ours = assert_as_stock(program, fused="gated_act_linear", **options)
    assert outcome(ours.linears[3]) == ("fused", "linear of to_copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_calls_are_left_to_pytorch(dtype):
    """By the bytes of h, unless somebody names a policy."""
    layer = fastbp.Linear(64, 64, dtype=dtype)
    rows = (2 << 20) // (64 * dtype.itemsize)

    def call(rows):
        layer(F.silu(torch.randn(rows, 64, dtype=dtype, requires_grad=True)))
        return outcome(layer)

    assert call(rows)[0] == "fused" and call(rows - 1)[0] == "left" and call(rows)[0] == "fused"
    assert "has less than 2 MiB" in call(2)[1] and call(2)[0] == "left"
    for how in (of_any_size(), fastbp.use(save="preact")):
        with how:
            assert call(2)[0] == "fused"
    assert call(2)[0] == "left"
    layer(torch.randn(2, 64, dtype=dtype, requires_grad=True))
    layer.__dict__[linear.SETTINGS] = ("preact", None)
    assert call(2)[0] == "fused"


def test_a_small_call_behind_nothing_has_no_row():
    model = nn.Sequential(fastbp.Linear(8, 8))
    for _ in range(2):
        model(torch.randn(2, 8, requires_grad=True) * 2)
    assert fastbp.report(model).sites == []
    model(torch.randn(2, 8, requires_grad=True))  # a leaf settles nothing of what comes
    small = F.silu(torch.randn(2, 8, requires_grad=True))
    model(small)
    assert [s.status for s in fastbp.report(model).sites] == ["left"]
    with torch.no_grad():
        model(small.detach())
    assert fastbp.report(model).sites == []
    model(F.silu(torch.randn(1 << 17, 8, requires_grad=True)))
    assert [s.status for s in fastbp.report(model).sites] == ["fused"]


def test_wrong_shapes_are_refused_in_the_words_of_pytorch():
    h = F.silu(torch.randn(3, 7, dtype=torch.float64, requires_grad=True))
    texts = []
    for kind in (nn.Linear, fastbp.Linear):
        with of_any_size(), pytest.raises(RuntimeError) as refused:
            kind(WIDTH, WIDTH, dtype=torch.float64)(h)
        texts.append(str(refused.value))
    assert texts[0] == texts[1]


FROZEN = {"activation": None, "gate": "gated_act_linear, silu; the weight is frozen", "dropout": None}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("part", ["weight", "bias", "before", "all but x"])
def test_frozen(part, maker):
    """What takes no gradient gets none, and the rest is the same."""
    make, what = MAKERS[maker]

    def program(fc, x, seen):
        return fc[2](make(fc[0](x), fc[1](x)))

    def prepare(linears):
        for i, each in enumerate(linears):
            frozen = {"weight": i == 2, "bias": i == 2, "before": i < 2, "all but x": True}[part]
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(not frozen or (part in ("weight", "bias") and name != part))

    expected = FROZEN[maker] if part in ("weight", "all but x") else what
    assert_as_stock(program, fused=expected, prepare=prepare)
    assert run(fastbp.Linear, program, prepare=prepare).y.requires_grad


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh], ids=["relu", "tanh"])
def test_what_a_dropout_made_of_an_output_that_is_kept(activation):
    """The activation keeps its output, and the dropout its mask: the product of the two is not kept beside them."""

    def program(linears, x, seen):
        return linears[2](F.dropout(activation(linears[0](x)), 0.3))

    assert_as_stock(program, fused="linear of mul")
