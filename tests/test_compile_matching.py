"""Which parts of a captured graph torch.compile(backend="fastbp") takes for blocks, and which it leaves."""

import random

import pytest
import torch
import torch.nn.functional as F
from captured import HIDDEN, ROWS, WIDTH, Block, assert_as_uncompiled, backend_that, compiled, inputs, step
from support import assert_close, each
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbp.activations import TABLE
from fastbp.compiler.matching import find_matches
from fastbp.recognition import recognise

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GELU, RELU = "mlp, gelu, 2 linears", "mlp, relu, 2 linears"
SILU, PACKED = "gated_mlp, silu, 3 linears", "gated_mlp, silu, 2 linears"


def halves(packed):
    g, u = packed.chunk(2, dim=-1)
    return F.silu(g) * u


def gate_last(packed):
    u, g = torch.split(packed, HIDDEN, dim=1)
    return u * F.silu(g)


def sliced(packed):
    return packed[:, HIDDEN:] * F.silu(packed[..., :HIDDEN])


def spelled_gate(m, x):
    g = m.one(x)
    return g * torch.sigmoid(1.702 * g) * m.other(x)


FOUND = {
    "no bias": (lambda m, x: F.linear(F.gelu(F.linear(x, m.one.weight)), m.last.weight), [GELU]),
    "keywords": (lambda m, x: F.linear(weight=m.last.weight, input=F.gelu(m.one(x))), [GELU]),
    "leading sizes": (lambda m, x: m.last(F.gelu(m.one(x.view(2, 3, 4, WIDTH)))), [GELU]),
    "one row": (lambda m, x: m.last(F.gelu(m.one(x[0]))), [GELU]),
    "transposed input": (lambda m, x: m.last(F.gelu(m.one(x.view(4, 6, WIDTH).transpose(0, 1)))), [GELU]),
    "a method": (lambda m, x: m.last(m.one(x).relu()), [RELU]),
    "in place": (lambda m, x: m.last(F.relu(m.one(x), inplace=True)), [RELU]),
    "dropouts that do nothing": (
        lambda m, x: m.last(F.dropout(F.gelu(F.dropout(m.one(x), 0.5, False)), p=0.0, training=True)), [GELU],
    ),
    "a chain": (lambda m, x: m.last(F.gelu(m.square(F.gelu(m.one(x))))), ["mlp, gelu, 3 linears"]),
    "two activations": (lambda m, x: m.last(F.relu(m.square(F.gelu(m.one(x))))), [RELU]),
    "two parameters": (
        lambda m, x: m.last(F.leaky_relu(m.square(F.leaky_relu(m.one(x), 0.1)), 0.2)),
        ["mlp, leaky_relu(negative_slope=0.2), 2 linears"],
    ),
    "block after block": (lambda m, x: m.last(halves(m.packed(m.last(F.gelu(m.one(x)))))), [PACKED, GELU]),
    "a residual": (lambda m, x: x + m.last(F.gelu(m.one(x))), [GELU]),
    "one weight for both": (lambda m, x: m.small(F.gelu(m.small(x))), [GELU]),
    "side by side": (
        lambda m, x: (lambda a, b: m.last(F.gelu(a)) + m.last(F.gelu(b)))(m.one(x), m.other(x)), [GELU, GELU],
    ),
    "the output is written to": (lambda m, x: m.last(F.gelu(m.one(x))).mul_(2), [GELU]),
    "gate, up": (lambda m, x: m.last(F.silu(m.one(x)) * m.other(x)), [SILU]),
    "up, gate": (lambda m, x: m.last(m.other(x) * F.silu(m.one(x))), [SILU]),
    "one weight for gate and up": (lambda m, x: m.last(F.silu(m.one(x)) * m.one(x)), [SILU]),
    "torch.mul": (lambda m, x: m.last(torch.mul(m.other(x), m.one(x).sigmoid())), ["gated_mlp, sigmoid, 3 linears"]),
    "a gate written out": (lambda m, x: m.last(spelled_gate(m, x)), ["gated_mlp, quick_gelu, 3 linears"]),
    "packed": (lambda m, x: m.last(halves(m.packed(x))), [PACKED]),
    "packed, no bias": (lambda m, x: m.last(halves(F.linear(x, m.packed.weight))), [PACKED]),
    "packed, gate last": (lambda m, x: m.last(gate_last(m.packed(x))), [PACKED]),
    "packed, slices": (lambda m, x: m.last(sliced(m.packed(x))), [PACKED]),
    "GLU": (lambda m, x: m.last(F.glu(m.packed(x))), ["gated_mlp, sigmoid, 2 linears"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    assert_as_uncompiled(*FOUND[case])


def two_uses(m, x):
    h = F.gelu(m.one(x))
    return m.last(h) + m.last(h + 1)


def returned(m, x):
    h = F.gelu(m.one(x))
    return m.last(h), h


def z_returned(m, x):
    z = m.one(x)
    return m.last(F.gelu(z)), z


def written_to(m, x):
    h = F.gelu(m.one(x))
    h.mul_(2)
    return m.last(h)


def z_written_to(m, x):
    z = m.one(x)
    z[:, 0] = 0
    return m.last(F.gelu(z))


def a_view_of_z_written_to(m, x):
    z = m.one(x)
    z[0].add_(1)
    return m.last(F.relu(z))


def input_written_to(m, x):
    x = x * 1
    z = F.linear(x, m.one.weight.detach(), m.one.bias)
    x.add_(1)
    return m.last(F.gelu(z)), x


def weight_written_to(m, x):
    w = m.last.weight * 1
    h = F.gelu(m.one(x))
    w.detach().mul_(2)
    return F.linear(h, w)


def gate_read_twice(m, x):
    g = m.one(x)
    return m.last(F.silu(g) * g)


def up_read_twice(m, x):
    u = m.other(x)
    return m.last(F.silu(m.one(x)) * u) + u[:, :WIDTH]


def adapter(m, x):
    h = F.silu(m.one(x)) * m.other(x)
    return m.last(h) + F.linear(F.linear(h, m.square.weight[:2]), m.small.weight[:, :2])


def one_half_twice(m, x):
    g, u = m.packed(x).chunk(2, dim=-1)
    return m.last(F.silu(g) * g) + 0 * u[:, :WIDTH]


def one_half_alone(m, x):
    p = m.packed(x)
    return m.last(F.silu(p[:, :HIDDEN]) * p[:, :HIDDEN])


def halves_of_rows(m, x):
    g, u = m.packed(x).chunk(2, dim=0)
    return m.last((F.silu(g) * u)[:, :HIDDEN])


def three_parts(m, x):
    g, u, _ = F.linear(x, torch.cat([m.packed.weight, m.one.weight])).chunk(3, dim=-1)
    return m.last(F.silu(g) * u)


def with_autocast_inside(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = F.gelu(m.one(x))
    return m.last(h)


def without_gradient_between(m, x):
    h = F.gelu(m.one(x))
    with torch.no_grad():
        m.small(x)
    return m.last(h)


LEFT = {
    "used twice": two_uses,
    "returned": returned,
    "z is returned": z_returned,
    "z is the weight": lambda m, x: (lambda h: F.linear(h, h))(F.gelu(m.small(x))),
    "written to": written_to,
    "z is written to": z_written_to,
    "a view of z is written to": a_view_of_z_written_to,
    "the input is written to": input_written_to,
    "the weight is written to": weight_written_to,
    "a dropout that acts": lambda m, x: m.last(F.dropout(F.gelu(m.one(x)), 0.5)),
    "a clamp": lambda m, x: m.last(F.gelu(m.one(x)).clamp(-1, 1)),
    "a clamp before": lambda m, x: m.last(F.gelu(m.one(x).clamp(max=1))),
    "a scale": lambda m, x: m.last(F.gelu(m.one(x)) * 2),
    "a cast": lambda m, x: m.last(F.gelu(m.one(x).float()).double()),
    "a shift": lambda m, x: m.last(F.gelu(m.one(x)) + 1),
    "a view": lambda m, x: m.small(F.gelu(m.one(x)).view(-1, WIDTH)),
    "a sum": lambda m, x: m.last(F.gelu(m.one(x) + m.other(x))),
    "no activation": lambda m, x: m.last(m.one(x)),
    "no linear before": lambda m, x: m.small(F.gelu(x)),
    "no linear after": lambda m, x: F.gelu(m.one(x)) * 2,
    "a function of no row": lambda m, x: m.last(m.one(x).exp()),
    "softmax": lambda m, x: m.last(m.one(x).softmax(-1)),
    "noise": lambda m, x: m.last(F.rrelu(m.one(x), training=True)),
    "a slope that is a tensor": lambda m, x: m.last(F.prelu(m.one(x), m.small.bias[:1])),
    "another constant": lambda m, x: (lambda z: m.last(z * torch.sigmoid(1.7 * z)))(m.one(x)),
    "another power": lambda m, x: m.last(F.relu(m.one(x)) ** 4),
    "constants that cancel": lambda m, x: (lambda z: m.last(z * 1e3 * torch.sigmoid(z) * 1e-3))(m.one(x)),
    "an alpha": lambda m, x: (lambda z: m.last(z * torch.add(torch.erf(z), 1.0, alpha=2)))(m.one(x)),
    "gate read twice": gate_read_twice,
    "up read twice": up_read_twice,
    "up is activated too": lambda m, x: m.last(F.silu(m.one(x)) * F.silu(m.other(x))),
    "no gate is activated": lambda m, x: m.last(m.one(x) * m.other(x)),
    "gate and up of two inputs": lambda m, x: m.last(F.silu(m.one(x)) * m.other(x + 1)),
    "up of one feature": lambda m, x: m.last(F.silu(m.one(x)) * F.linear(x, m.other.weight[:1])),
    "an adapter beside down": adapter,
    "one half twice": one_half_twice,
    "one half alone": one_half_alone,
    "halves of the rows": halves_of_rows,
    "halves of an adapter's sum": lambda m, x: (lambda p: m.last(F.silu(p[:, :32]) * p[:, 32:]))(m.packed(x) + 1),
    "another rounding of a constant": lambda m, x: (lambda z: m.last(z * torch.sigmoid(1.7020001 * z)))(m.one(x)),
    "two of three parts": three_parts,
    "every other feature": lambda m, x: (lambda p: m.last(F.silu(p[..., ::2]) * p[..., 1::2]))(m.packed(x)),
    "parts that overlap": lambda m, x: (lambda p: m.last(F.silu(p[:, :32]) * p[:, 16:48]))(m.packed(x)),
    "rows of the halves": lambda m, x: (lambda p: m.last(F.silu(p[:4, :32]) * p[:4, 32:]))(m.packed(x)),
    "another mode of gradients between": without_gradient_between,
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case):
    assert_as_uncompiled(LEFT[case], [])


def test_left_where_autocast_begins_or_ends_inside():
    """All of it bfloat16, so that dtypes alone do not tell."""
    model, x, puts = Block(with_autocast_inside, torch.bfloat16), inputs(torch.bfloat16), []
    ours, stock = step(compiled(model, puts), model, x), step(model, model, x)
    assert puts == []
    assert_close(ours[0], stock[0], rtol=2e-2, atol=2e-2)


@each("h", [torch.bfloat16, torch.float32])
def test_left_where_autocast_computes_the_activation_in_float32(h):
    """As it does softplus on a GPU: then h is no function of this row in bfloat16."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        sizes = {"x": (ROWS, WIDTH), "one": (HIDDEN, WIDTH), "last": (WIDTH, HIDDEN)}
        for name, size in sizes.items():
            graph.placeholder(name).meta["example_value"] = torch.empty(size, requires_grad=True)
        x, one, last = graph.nodes
        steps = [
            (F.linear, (x, one), HIDDEN, torch.bfloat16),
            (F.softplus, (), HIDDEN, h),
            (F.linear, (last,), WIDTH, torch.bfloat16),
        ]
        for function, args, width, dtype in steps:
            node = graph.call_function(function, args if args[:1] == (x,) else (node, *args))  # noqa: F821
            node.meta["example_value"] = torch.empty(ROWS, width, dtype=dtype, requires_grad=True)
        graph.output(node)
        matches, left = find_matches(graph)
    assert len(matches) == (h is torch.bfloat16) and len(left) == (h is torch.float32)


def test_left_where_no_gradient_flows():
    """Nothing is kept there, so there is nothing to gain."""
    model, x, puts = Block(lambda m, x: m.last(F.gelu(m.one(x)))), inputs(), []
    with torch.no_grad():
        assert_close(compiled(model, puts)(x), model(x))
    assert_close(compiled(model.requires_grad_(False), puts)(x), model(x))
    assert puts == []
    compiled(model, puts)(x.requires_grad_())
    assert puts == [GELU]


def value_and_slope(function, z):
    y = function(z)
    return y, torch.autograd.grad(y.sum(), z)[0]


@each("row", [row for row in TABLE if row.spelled])
def test_what_the_table_spells_out_is_its_row(row):
    z = torch.linspace(-9.01, 9.02, 300, dtype=torch.float64, requires_grad=True)
    for spelled in row.spelled:
        for mine, expected in zip(value_and_slope(spelled, z), value_and_slope(row.value, z), strict=True):
            assert_close(mine, expected)
        assert_as_uncompiled(lambda m, x, f=spelled: m.last(f(m.one(x))), [f"mlp, {row.name}, 2 linears"])


ORDERS = {
    "silu": (lambda z: torch.sigmoid(z) * z, lambda z: torch.mul(z, z.sigmoid())),
    "quick_gelu": (lambda z: torch.sigmoid(z * 1.702) * z,),
    "relu2": (lambda z: z.relu().pow(2), lambda z: F.relu(z) ** 2.0, lambda z: F.relu(z) * F.relu(z)),
    "gelu": (
        lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
        lambda z: z * (torch.erf(z / 2**0.5) + 1) / 2,
    ),
    "gelu_tanh": (
        lambda z: z * (0.5 * (torch.tanh((2 / torch.pi) ** 0.5 * (0.044715 * z * z * z + z)) + 1)),
        lambda z: z * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * z * (1 + 0.044715 * z**2))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order_and_kind_of_operations_do_not_count(name):
    for spelled in ORDERS[name]:
        assert_as_uncompiled(lambda m, x, f=spelled: m.last(f(m.one(x))), [f"mlp, {name}, 2 linears"])


def test_a_constant_counts_as_the_dtype_has_it():
    """Megatron's and FastGELU's is √(2/π) to ten digits: the same number in float32, another one in float64."""

    def fast(m, x):
        z = m.one(x)
        return m.last(0.5 * z * (1.0 + torch.tanh(z * 0.7978845608 * (1.0 + 0.044715 * z * z))))

    for dtype, expected in ((torch.float32, ["mlp, gelu_tanh, 2 linears"]), (torch.float64, [])):
        puts = []
        compiled(Block(fast, dtype), puts)(inputs(dtype))
        assert puts == expected


def test_activations_of_transformers_are_found_as_their_values_say():
    """Modules and formulas, however they are written; one that is not found is left."""
    functions = pytest.importorskip("transformers.activations").ACT2FN
    found = {}
    for name in functions:
        function, puts = functions[name], []
        if list(getattr(function, "parameters", list)()):
            continue
        torch._dynamo.reset()
        model = Block(lambda m, x, f=function: m.last(f(m.one(x))), torch.float32)
        torch.compile(model, backend=backend_that(puts))(inputs(torch.float32))
        same = {"relu6": "hardtanh(min_val=0, max_val=6)"}  # as Dynamo has it
        bound = str(recognise(function))
        found[name] = [line.removeprefix("mlp, ").removesuffix(", 2 linears") for line in puts]
        assert found[name] in ([], [same.get(bound, bound)]), name
    assert sum(map(len, found.values())) >= 16
    expected = {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu", "quick_gelu": "quick_gelu"}
    expected |= {"relu2": "relu2", "mish": "mish", "gelu_pytorch_tanh": "gelu_tanh"}
    assert {name: found[name] for name in expected} == {name: [row] for name, row in expected.items()}
    assert found["gelu_10"] == found["linear"] == []


ACTIVATIONS = (F.gelu, F.silu, torch.relu, torch.tanh, lambda z: F.leaky_relu(z, 0.2), lambda z: F.relu(z).square())
ODD = (
    lambda v: v.clamp(-1, 1),
    lambda v: v.clone().mul_(0.5),
    lambda v: v.mul_(0.5),
    lambda v: v.view(-1, WIDTH) + 1,
    lambda v: v.float().double(),
    lambda v: v.t().contiguous().t(),
)


def random_program(seed):
    """A sequence of steps on values of one width, of which blocks and near misses of blocks are likely."""
    draw = random.Random(seed)
    steps = []
    for number in range(draw.randrange(3, 7)):
        a, b, c = (draw.choice(("small", "small", "again")) for _ in range(3))
        f, odd, idle = draw.choice(ACTIVATIONS), draw.choice(ODD), draw.choice((True, False))
        source = number if draw.random() < 0.7 else draw.randrange(number + 1)
        steps.append((draw.randrange(8), source, a, b, c, f, odd, idle))
    results = {number + 1, *draw.sample(range(number + 1), draw.randrange(2))}

    def program(m, x):
        values = [m.small(x)]
        for kind, source, a, b, c, f, odd, idle in steps:
            v, a, b, c = values[source], getattr(m, a), getattr(m, b), getattr(m, c)
            if idle:
                v = F.dropout(v, 0.5, training=False)
            if kind < 2:
                v = b(f(a(v)))
            elif kind == 2:
                v = c(f(a(v)) * b(v))
            elif kind == 3:
                v = b(odd(f(a(v))))
            elif kind == 4:
                v = b(f(odd(a(v))))
            elif kind == 5:
                v = v + b(f(v))
            elif kind == 6:
                g, u = F.linear(v, torch.cat([a.weight, b.weight])).chunk(2, -1)
                v = c(f(g) * u)
            else:
                z = a(v)
                v = b(f(z)) + c(z)
            values.append(v)
        return tuple(values[i] for i in results)

    return program


def test_random_programs():
    """What is put computes what stood there, and no program is changed otherwise."""
    puts = []
    for seed in range(40):
        torch._dynamo.reset()
        model, x = Block(random_program(seed)), inputs(rows=5, seed=seed)
        model.again = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        try:
            stock = step(model, model, x)
        except RuntimeError:  # autograd needs what the program wrote over
            continue
        for mine, theirs in zip(step(compiled(model, puts), model, x), stock, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert len(puts) >= 40 and {line.split(",")[0] for line in puts} == {"mlp", "gated_mlp"}
