"""The modules against the PyTorch modules they replace, and under PyTorch's own checks for modules."""

import copy
import inspect
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
import support
import torch
import torch.nn.functional as F
from support import assert_close, each
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import make_tensor
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_dtype import floating_types_and
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    FunctionInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    modules,
)
from torch.testing._internal.common_utils import (
    TestCase,
    freeze_rng_state,
    gradcheck,
    gradgradcheck,
    noncontiguous_like,
)
from torch.testing._internal.two_tensor import TwoTensor

import fastbp
from fastbp.activations import ROWS, bind

K, H, OUT = 5, 7, 3


class StockLinearAct(nn.Linear):
    activation = nn.GELU()

    def forward(self, input):
        return self.activation(super().forward(input))


class StockGated(nn.Module):
    """gate and up, and down where ``out`` is given: the feed-forward block as Llama writes it."""

    def __init__(self, size, hidden, out=None, bias=True, device=None, dtype=None):
        super().__init__()
        options = dict(bias=bias, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(size, hidden, **options)
        self.up_proj = nn.Linear(size, hidden, **options)
        self.down_proj = nn.Identity() if out is None else nn.Linear(hidden, out, **options)

    def forward(self, input):
        return self.down_proj(F.silu(self.gate_proj(input)) * self.up_proj(input))


class StockMLP(nn.Module):
    def __init__(self, size, hidden, out, bias=True, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(size, hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, input):
        return self.fc2(F.gelu(self.fc1(input)))


# Each module with the one it replaces; both take nn.Linear's options.
PAIRS = {
    "Linear": (lambda **o: fastbp.Linear(K, OUT, **o), lambda **o: nn.Linear(K, OUT, **o)),
    "LinearAct": (lambda **o: fastbp.LinearAct(K, OUT, **o), lambda **o: StockLinearAct(K, OUT, **o)),
    "GatedLinear": (lambda **o: fastbp.GatedLinear(K, OUT, **o), lambda **o: StockGated(K, OUT, **o)),
    "MLP": (lambda **o: fastbp.MLP(K, H, OUT, **o), lambda **o: StockMLP(K, H, OUT, **o)),
    "GatedMLP": (
        lambda **o: fastbp.GatedMLP(K, H, OUT, **{"bias": True} | o),
        lambda **o: StockGated(K, H, OUT, **{"bias": True} | o),
    ),
}
BLOCKS = {name: PAIRS[name] for name in ("GatedLinear", "MLP", "GatedMLP")}
each_pair = each("name", PAIRS)


def make(name, **options):
    """Ours and the stock module, each made from the same seed."""
    made = []
    for constructor in PAIRS[name]:
        torch.manual_seed(3)
        made.append(constructor(**options))
    return made


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(module, x):
    """Output, and gradients of the input and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    parameters = dict(module.named_parameters())
    dy = draw(*y.shape, dtype=y.dtype, seed=1)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"y": y} | dict(zip(["x", *parameters], grads, strict=True))


def assert_same_run(ours, theirs, x):
    mine, expected = run(ours, x), run(theirs, x)
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(mine[key], value, msg=lambda text, key=key: f"{key}: {text}")


def assert_equal_states(mine, expected):
    """The same keys in the same order, the same bits."""
    assert list(mine) == list(expected)
    for key, value in expected.items():
        assert torch.equal(mine[key], value), key


# Made like the modules they replace


@each_pair
@each("bias", [True, False])
@each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameters_are_pytorchs_to_the_bit(name, bias, dtype):
    ours, stock = make(name, bias=bias, dtype=dtype)
    assert_equal_states(ours.state_dict(), stock.state_dict())
    assert all(type(p) is nn.Parameter and p.requires_grad and p.dtype == dtype for p in ours.parameters())
    assert len(list(ours.buffers())) == 0


@each_pair
@each("bias", [True, False])
def test_outputs_and_gradients_are_the_stock_modules(name, bias):
    ours, stock = make(name, bias=bias, dtype=torch.float64)
    for shape in [(4, K), (2, 3, K), (K,), (0, K)]:
        assert_same_run(ours, stock, draw(*shape))


@each_pair
def test_state_dicts_go_both_ways(name):
    ours, stock = make(name, dtype=torch.float64)
    with torch.no_grad():
        for i, (mine, theirs) in enumerate(zip(ours.parameters(), stock.parameters(), strict=True)):
            mine.copy_(draw(*mine.shape, seed=10 + i))
            theirs.copy_(draw(*theirs.shape, seed=20 + i))
    fresh_ours, fresh_stock = make(name, dtype=torch.float64)
    fresh_stock.load_state_dict(ours.state_dict(), strict=True)
    fresh_ours.load_state_dict(stock.state_dict(), strict=True)
    assert_same_run(fresh_stock, ours, draw(4, K))
    assert_same_run(fresh_ours, stock, draw(4, K))


@each_pair
def test_a_state_dict_that_does_not_fit_is_refused(name):
    ours, _ = make(name)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({key: torch.zeros(p.shape[0] + 1) for key, p in ours.named_parameters()})


SIGNATURES = {
    nn.Linear: "in_features, out_features, bias=True, device=None, dtype=None",
    fastbp.Linear: "in_features, out_features, bias=True, device=None, dtype=None",
    fastbp.LinearAct: "in_features, out_features, bias=True, device=None, dtype=None, *, activation='gelu'",
    fastbp.GatedLinear: "in_features, out_features, bias=True, device=None, dtype=None, *, activation='silu'",
    fastbp.MLP: "in_features, hidden_features, out_features=None, bias=True, device=None, dtype=None, *, "
    "activation='gelu'",
    fastbp.GatedMLP: "in_features, hidden_features, out_features=None, bias=False, device=None, dtype=None, *, "
    "activation='silu'",
}


@pytest.mark.parametrize("cls", SIGNATURES)
def test_signatures(cls):
    """The contract: nn.Linear's arguments by position, then the settings by keyword."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(cls).parameters.values()]
    settings = ", save='auto', backend=None" if "*" in SIGNATURES[cls] else ""
    assert str(inspect.Signature(parameters)) == f"({SIGNATURES[cls]}{settings})"
    assert list(inspect.signature(cls.forward).parameters) == ["self", "input"]


@each_pair
def test_forward_takes_input_by_name(name):
    ours, _ = make(name)
    x = draw(4, K, dtype=torch.float32)
    assert torch.equal(ours(input=x), ours(x))


def test_only_linear_is_an_nn_linear():
    """Tools that look for nn.Linear compute W x themselves, and would drop the activation."""
    assert issubclass(fastbp.Linear, nn.Linear)
    others = fastbp.LinearAct, fastbp.GatedLinear, fastbp.MLP, fastbp.GatedMLP
    assert not any(issubclass(cls, nn.Linear) for cls in others)


def test_linear_shows_as_nn_linear():
    ours, stock = make("Linear")
    assert repr(ours) == repr(stock)
    assert (ours.in_features, ours.out_features) == (K, OUT)


@each("hidden", [[8], (8, 6), [8, 6, 4], np.int64(8), torch.Size([8, 6])], ids=repr)
def test_mlp_sizes(hidden):
    module = fastbp.MLP(K, hidden, OUT, dtype=torch.float64, activation="tanh")
    sizes = [K, *(hidden if np.ndim(hidden) else [int(hidden)]), OUT]
    linears = [getattr(module, f"fc{i}") for i in range(1, len(sizes))]
    assert [(m.in_features, m.out_features) for m in linears] == list(pairwise(sizes))
    assert list(module.children()) == linears
    stock = nn.Sequential(*(layer for m in linears for layer in (m, nn.Tanh())))[:-1]
    x = draw(4, K)
    assert_close(module(x), stock(x))


def test_mlp_of_several_hidden_sizes_starts_as_linears_made_in_order():
    torch.manual_seed(3)
    module = fastbp.MLP(K, (8, 6), OUT)
    torch.manual_seed(3)
    linears = [nn.Linear(K, 8), nn.Linear(8, 6), nn.Linear(6, OUT)]
    expected = {f"fc{i}.{key}": p for i, m in enumerate(linears, start=1) for key, p in m.state_dict().items()}
    assert_equal_states(module.state_dict(), expected)


@pytest.mark.parametrize("cls", [fastbp.MLP, fastbp.GatedMLP])
def test_out_features_are_in_features_where_not_given(cls):
    assert cls(K, H)(draw(4, K, dtype=torch.float32)).shape == (4, K)


# Activations and settings


@each("activation", ROWS)
def test_activation_as_name_module_and_function(activation):
    expected = bind(activation)
    row = expected.row
    forms = [activation, expected, *row.functions] + ([support.stock_module(expected)] if row.module else [])
    for given in forms:
        assert fastbp.LinearAct(K, OUT, activation=given).activation == expected


def test_activation_parameters_come_with_the_module():
    module = fastbp.LinearAct(K, OUT, dtype=torch.float64, activation=nn.LeakyReLU(0.3))
    x = draw(4, K)
    assert_close(module(x), F.leaky_relu(F.linear(x, module.weight, module.bias), 0.3))


@each_pair
def test_settings_reach_the_call(name, monkeypatch):
    """Every module passes its activation, policy and backend on."""
    if name == "Linear":
        pytest.skip("it has none")
    seen = []
    forms = {"LinearAct": "linear_act", "GatedLinear": "gated_linear_act", "MLP": "mlp", "GatedMLP": "gated_mlp"}
    monkeypatch.setattr(fastbp.functional, "call", lambda form, *arguments: seen.append((form.name, *arguments[-3:])))
    module = PAIRS[name][0](activation="tanh", save="recompute", backend="reference")
    module(draw(4, K, dtype=torch.float32))
    assert seen == [(forms[name], bind("tanh"), "recompute", "reference")]


def test_repr_shows_what_is_not_default():
    leaky = nn.LeakyReLU(0.3)
    text = repr(fastbp.LinearAct(4, 3, False, activation=leaky, save="preact", backend="reference"))
    assert text == (
        "LinearAct(in_features=4, out_features=3, bias=False, activation=leaky_relu(negative_slope=0.3), "
        "save='preact', backend='reference')"
    )
    assert repr(fastbp.LinearAct(4, 3)) == "LinearAct(in_features=4, out_features=3, bias=True, activation=gelu)"
    assert repr(fastbp.MLP(4, 3, save="recompute")) == (
        "MLP(\n  activation=gelu, save='recompute'\n"
        "  (fc1): Linear(in_features=4, out_features=3, bias=True)\n"
        "  (fc2): Linear(in_features=3, out_features=4, bias=True)\n)"
    )
    for name, lines in {"GatedLinear": 4, "GatedMLP": 5}.items():
        shown = repr(PAIRS[name][0]()).splitlines()
        assert shown[:2] == [f"{name}(", "  activation=silu"]
        assert len(shown) == lines + 1


# Devices, copies, files


@each_pair
def test_meta_then_materialised(name):
    ours, stock = make(name, device="meta")
    assert all(p.is_meta for p in ours.parameters())
    y = ours(torch.empty(2, 3, K, device="meta"))
    assert (y.shape, y.device.type, y.dtype) == ((2, 3, OUT), "meta", torch.float32)
    ours.to_empty(device="cpu")
    ours.load_state_dict(make(name)[1].state_dict())
    torch.manual_seed(3)
    for module in ours.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_equal_states(ours.state_dict(), make(name)[0].state_dict())
    assert all(p.is_meta for p in stock.parameters())


@each_pair
def test_device_contexts_and_skip_init(name):
    with torch.device("meta"):
        ours = PAIRS[name][0]()
    assert all(p.is_meta for p in ours.parameters())
    if name in ("Linear", "LinearAct"):
        assert nn.utils.skip_init(type(ours), K, OUT).weight.device.type == "cpu"


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_pair
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies(name, copied):
    settings = {} if name == "Linear" else dict(activation=nn.ELU(0.7), save="recompute", backend="reference")
    module = PAIRS[name][0](dtype=torch.float64, **settings)
    twin = copied(module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert_same_run(twin, module, draw(4, K))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.count_nonzero() for parameter in module.parameters()), "a copy shares its parameters"


@each_pair
def test_state_dicts_load_as_weights_only(name):
    ours, _ = make(name)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    assert_equal_states(torch.load(file, weights_only=True), ours.state_dict())


@each_pair
def test_train_and_eval_do_not_differ(name):
    ours, _ = make(name)
    x = draw(4, K, dtype=torch.float32)
    y = ours(x)
    assert torch.equal(ours.eval()(x), y)
    assert not any(module.training for module in ours.modules())
    assert torch.equal(ours.train()(x), y)


@each_pair
def test_functional_call_and_ensembles(name):
    models = [PAIRS[name][0](dtype=torch.float64) for _ in range(3)]
    x = draw(4, K)
    states = [dict(model.named_parameters()) for model in models]
    for model, state in zip(models, states, strict=True):
        assert_close(torch.func.functional_call(models[0], state, x), model(x))
    stacked, _ = torch.func.stack_module_state(models)
    ensemble = torch.vmap(lambda state: torch.func.functional_call(models[0], state, x))(stacked)
    assert_close(ensemble, torch.stack([model(x) for model in models]))


@each("name", ["Linear", "LinearAct"])
def test_own_parameters_may_be_parametrised(name):
    ours, stock = make(name, dtype=torch.float64)
    for module in (ours, stock):
        parametrize.register_parametrization(module, "weight", Doubled())
    assert_same_run(ours, stock, draw(4, K))


# Blocks whose children are no longer plain call them as they are


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Lora(nn.Linear):
    """A low-rank update beside the frozen layer, as adapters add it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(draw(2, base.in_features))
        self.up = nn.Parameter(draw(base.out_features, 2))

    def forward(self, input):
        return super().forward(input) + input @ self.down.t() @ self.up.t()


class Wrapper(nn.Module):
    """Not an nn.Linear at all, and without a weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, input):
        return self.base(input).sin()


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output.sin())
    return linear


def pre_hooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return linear


def backward_hooked(linear):
    linear.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0].sin(),))
    return linear


def backward_pre_hooked(linear):
    linear.register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0].sin(),))
    return linear


def patched(linear):
    forward = linear.forward
    linear.forward = lambda input: forward(input).sin()
    return linear


def parametrised(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


CHANGES = {
    change.__name__: change
    for change in (hooked, pre_hooked, backward_hooked, backward_pre_hooked, patched, parametrised, Lora, Wrapper)
}
CHILDREN = [(name, child) for name in BLOCKS for child, _ in make(name)[0].named_children()]


@each(("name", "child"), CHILDREN)
@each("change", CHANGES)
def test_a_changed_child_is_called_as_it_is(name, child, change):
    ours, stock = make(name, dtype=torch.float64)
    plain = ours(draw(4, K))
    for block in (ours, stock):
        setattr(block, child, CHANGES[change](getattr(block, child)))
    assert_same_run(ours, stock, draw(4, K))
    if "backward" not in change:
        assert not torch.equal(ours(draw(4, K)), plain), "the change had no effect, so this shows nothing"


@each(("name", "child"), CHILDREN)
def test_hooks_that_only_look_are_run(name, child):
    ours, _ = make(name)
    seen = []
    handles = [
        getattr(ours, child).register_forward_hook(lambda *_: seen.append("forward")),
        getattr(ours, child).register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    ours(draw(4, K, dtype=torch.float32).requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    ours(draw(4, K, dtype=torch.float32).requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


@each("name", BLOCKS)
def test_global_hooks_see_the_children(name):
    ours, _ = make(name)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(draw(4, K, dtype=torch.float32))
    finally:
        handle.remove()
    assert {id(m) for m in seen} == {id(m) for m in ours.modules()}


@each(("name", "child"), CHILDREN)
@each("part", ["weight", "bias"])
def test_tensor_subclasses_as_parameters(name, child, part, monkeypatch):
    """As sharded and quantised weights are; TwoTensor computes everything on two tensors at once."""
    ours, stock = make(name, dtype=torch.float64)
    for block in (ours, stock):
        tensor = getattr(getattr(block, child), part).detach()
        setattr(getattr(block, child), part, nn.Parameter(TwoTensor(tensor.clone(), 2 * tensor)))
    x, called, forward = draw(4, K), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: called.append(self) or forward(self, input))
    mine, expected = ours(x), stock(x)
    assert part == "bias" or getattr(ours, child) in called, "a sharded weight is its own module's to use"
    for half in ("a", "b"):
        assert_close(getattr(mine, half), getattr(expected, half))
    mine.sum().backward()
    expected.sum().backward()
    grads = [getattr(getattr(block, child), part).grad for block in (ours, stock)]
    for half in ("a", "b"):
        assert_close(getattr(grads[0], half), getattr(grads[1], half))


def test_what_is_still_plain_is_still_fused(monkeypatch):
    block, stock = make("GatedMLP", dtype=torch.float64)
    calls = []
    call = fastbp.functional.call
    monkeypatch.setattr(fastbp.functional, "call", lambda form, *a: calls.append(form.name) or call(form, *a))
    for module in (block, stock):
        hooked(module.down_proj)
    assert_same_run(block, stock, draw(4, K))
    assert calls == ["gated_linear_act"]


@each("name", BLOCKS)
@each("part", ["weight", "bias"])
def test_parts_that_are_attributes_and_no_parameters_are_used(name, part):
    """As wrappers do that keep the parameters elsewhere and lend the module its tensors."""
    ours, stock = make(name, dtype=torch.float64)
    for block in (ours, stock):
        for child in block.children():
            if isinstance(child, nn.Linear):
                lent = getattr(child, part).detach() * 2
                delattr(child, part)
                setattr(child, part, lent)
    x = draw(4, K)
    assert_close(ours(x), stock(x))


@each("name", BLOCKS)
def test_children_replaced_by_fastbp_linear_stay_fused(name, monkeypatch):
    ours, stock = make(name, dtype=torch.float64)
    for child, linear in list(ours.named_children()):
        new = fastbp.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
        new.load_state_dict(linear.state_dict())
        setattr(ours, child, new)
    expected = run(stock, draw(4, K))
    monkeypatch.setattr(fastbp.Linear, "forward", None)
    assert_close(run(ours, draw(4, K))["y"], expected["y"])


# PyTorch's own checks for modules, from its description of a module's inputs


def reference_of(stock):
    """A reference_fn: the stock module with the parameters of the module under test."""

    def reference(module, parameters, *args, **kwargs):
        twin = stock(bias="bias" in str(list(module.state_dict())), dtype=parameters[0].dtype)
        twin.load_state_dict(module.state_dict())
        return twin.to(parameters[0].device)(*args, **kwargs)

    return reference


CONSTRUCTORS = {
    fastbp.Linear: (K, OUT),
    fastbp.LinearAct: (K, OUT),
    fastbp.GatedLinear: (K, OUT),
    fastbp.MLP: (K, H, OUT),
    fastbp.GatedMLP: (K, H, OUT),
}


def module_inputs(module_info, device, dtype, requires_grad, training, **_):
    cls = module_info.module_cls
    sizes, reference = CONSTRUCTORS[cls], reference_of(PAIRS[cls.__name__][1])

    def tensor(*shape):
        return make_tensor(shape, device=device, dtype=dtype, requires_grad=requires_grad)

    def sample(*forward_args, desc, bias=True, **forward_kwargs):
        constructor = FunctionInput(*sizes, bias=bias)
        forward = FunctionInput(*forward_args, **forward_kwargs)
        return ModuleInput(constructor, forward, desc=desc, reference_fn=reference)

    return [
        sample(input=tensor(4, K), desc="by_name"),
        sample(tensor(4, K), bias=False, desc="no_bias"),
        sample(tensor(K), desc="no_batch_dim"),
        sample(tensor(2, 2, K), desc="leading_sizes"),
        sample(tensor(0, K), desc="empty"),
    ]


def module_error_inputs(module_info, device, dtype, requires_grad, training, **_):
    sizes = CONSTRUCTORS[module_info.module_cls]

    def error(shape, error_type, error_regex):
        module_input = ModuleInput(FunctionInput(*sizes), FunctionInput(make_tensor(shape, device=device, dtype=dtype)))
        on = ModuleErrorEnum.FORWARD_ERROR
        return ErrorModuleInput(module_input, error_on=on, error_type=error_type, error_regex=error_regex)

    return [
        error((4, K + 1), ValueError, r"to match x \(4, 6\)"),
        error((), ValueError, "x must have at least one dimension"),
    ]


INFOS = [
    ModuleInfo(
        cls,
        module_inputs_func=module_inputs,
        module_error_inputs_func=module_error_inputs,
        dtypes=floating_types_and(torch.bfloat16, torch.float16),
    )
    for cls in CONSTRUCTORS
]


# Two ways to the same number agree in these; how exact the narrower dtypes are is the subject of test_accuracy.py.
WIDE = [torch.float32, torch.float64]


class TestModules(TestCase):
    """The checks of PyTorch's test_modules.py; its in-place ones have no object in modules like these."""

    def samples(self, module_info, device, dtype, training, requires_grad=False):
        """Each sample input with a module made and placed for it."""
        for sample in module_info.module_inputs_func(module_info, device, dtype, requires_grad, training):
            with freeze_rng_state():
                constructor = sample.constructor_input
                module = module_info.module_cls(*constructor.args, **constructor.kwargs)
                yield sample, module.to(device, dtype).train(training)

    def call(self, sample, module, transform=lambda t: t):
        args = [transform(t) for t in sample.forward_input.args]
        return module(*args, **{key: transform(t) for key, t in sample.forward_input.kwargs.items()})

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_forward(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
            self.assertEqual(self.call(sample, module), expected)

    @modules(INFOS)
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for sample, _ in self.samples(module_info, device, dtype, training):
            constructor = sample.constructor_input
            module = module_info.module_cls(*constructor.args, device=device, dtype=dtype, **constructor.kwargs)
            for parameter in module.parameters():
                self.assertEqual((str(parameter.device), parameter.dtype), (device, dtype))

    @modules(INFOS)
    def test_pickle_deepcopy_repr(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            expected = self.call(sample, module)
            for twin in (through_pickle(module), copy.deepcopy(module)):
                self.assertEqual(self.call(sample, twin), expected, atol=0, rtol=0)
                self.assertEqual(repr(twin), repr(module))

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training, requires_grad=True):
            found = []
            for transform in (torch.clone, noncontiguous_like):
                inputs = []

                def leaf(t, transform=transform, inputs=inputs):
                    inputs.append(transform(t.detach()).requires_grad_())
                    return inputs[-1]

                y = self.call(sample, module, leaf)
                dy = transform(torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view_as(y))
                found.append([y, *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)])
            self.assertEqual(*found)

    @modules(INFOS)
    def test_to_and_save_load(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            there_and_back = copy.deepcopy(module).to(torch.float64).to(dtype)
            self.assertEqual(self.call(sample, there_and_back), self.call(sample, module), atol=0, rtol=0)
            self.assertEqual(self.call(sample, through_file(module)), self.call(sample, module), atol=0, rtol=0)

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_memory_format(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            if sample.desc == "leading_sizes":
                x = make_tensor((2, 3, 2, K), device=device, dtype=dtype)
                expected = module(x)
                module.to(memory_format=torch.channels_last)
                self.assertEqual(module(x.to(memory_format=torch.channels_last)), expected)

    @modules(INFOS)
    def test_if_train_and_eval_modes_differ(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            differ = not torch.equal(self.call(sample, module.train()), self.call(sample, module.eval()))
            self.assertEqual(differ, module_info.train_and_eval_differ)

    @modules(INFOS)
    def test_errors(self, device, dtype, module_info, training):
        for error in module_info.module_error_inputs_func(module_info, device, dtype, False, training):
            sample = error.module_error_input
            constructor = sample.constructor_input
            module = module_info.module_cls(*constructor.args, **constructor.kwargs).to(device, dtype)
            with self.assertRaisesRegex(error.error_type, error.error_regex):
                self.call(sample, module)

    def check_gradients(self, check, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training, requires_grad=True):
            names = [name for name, _ in module.named_parameters()]
            inputs = [*sample.forward_input.args, *sample.forward_input.kwargs.values()]

            def function(x, *parameters, module=module, names=names):
                return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

            arguments = (*inputs, *(p.detach().requires_grad_() for p in module.parameters()))
            self.assertTrue(check(function, arguments))

    @modules(INFOS, allowed_dtypes=[torch.float64])
    def test_grad(self, device, dtype, module_info, training):
        def check(function, arguments):
            return gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)

        self.check_gradients(check, device, dtype, module_info, training)

    @modules(INFOS, allowed_dtypes=[torch.float64])
    def test_gradgrad(self, device, dtype, module_info, training):
        self.check_gradients(gradgradcheck, device, dtype, module_info, training)


instantiate_device_type_tests(TestModules, globals(), only_for="cpu")
