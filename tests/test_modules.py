"""The modules against the PyTorch modules they replace: construction, results, settings, copies, files."""

import copy
import inspect
import io
from itertools import pairwise

import numpy as np
import pytest
import support
import torch
import torch.nn.functional as F
from module_pairs import (
    OUT,
    PAIRS,
    Doubled,
    H,
    K,
    assert_equal_states,
    assert_same_run,
    draw,
    each_pair,
    make,
    through_file,
    through_pickle,
)
from support import assert_close, each
from torch import nn
from torch.nn.utils import parametrize

import fastbp
from fastbp.activations import ROWS, bind

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
    settings = ", save='auto', backend=None, gradient_accumulation_fusion=False" if "*" in SIGNATURES[cls] else ""
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
    """Every module passes its activation, policy, backend and flag on."""
    if name == "Linear":
        pytest.skip("a Linear has neither activation, policy nor backend")
    seen = []
    forms = {"LinearAct": "linear_act", "GatedLinear": "gated_linear_act", "MLP": "mlp", "GatedMLP": "gated_mlp"}
    monkeypatch.setattr(fastbp.functional, "call", lambda form, *arguments: seen.append((form.name, *arguments[-4:])))
    settings = dict(activation="tanh", save="recompute", backend="reference", gradient_accumulation_fusion=True)
    module = PAIRS[name][0](**settings)
    module(draw(4, K, dtype=torch.float32))
    assert seen == [(forms[name], bind("tanh"), "recompute", "reference", True)]


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
