"""plan_memory: what it predicts is what is measured, what it chooses is the cheapest, and nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from planned_models import (
    BERT,
    EXACT,
    MODELS,
    Checkpointed,
    Llama,
    Shared,
    budgets_of,
    kept_by,
    least,
    state_of,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbp
from fastbp.fusion.surgery import is_fused


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_what_is_measured(name, approximate):
    model, sample = MODELS[name]()
    before = kept_by(model, sample)
    fits = 0
    for budget in budgets_of(model, sample, allow_approximate=approximate):
        fresh = copy.deepcopy(model)
        plan = fastbp.plan_memory(fresh, sample, budget, allow_approximate=approximate)
        assert plan.total_before == before
        assert plan.total_after == kept_by(fresh, sample) <= budget == plan.budget and plan.applied
        fits += plan.total_after == budget
        elsewhere = plan.total_after - sum(layer.bytes_after for layer in plan.layers)
        assert elsewhere >= 0 and str(plan).count("\n") == len(plan.layers) + 4 + bool(plan.approximate)
        if not approximate:
            assert set(plan.policies.values()) <= {*EXACT} and not plan.approximate
    assert fits >= 2, "most and least are kept to the byte"


@pytest.mark.parametrize("name", ["bert", "llama", "chain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model, sample = MODELS[name]()
    with torch.autocast("cpu", dtype):
        low = budgets_of(model, sample, allow_approximate=True)[-1]
        plan = fastbp.plan_memory(model, sample, low, allow_approximate=True)
    with torch.autocast("cpu", dtype):
        assert kept_by(model, sample) == plan.total_after == low < plan.total_before


def test_fractions_are_of_what_the_model_keeps_as_it_is():
    model, sample = BERT(2), torch.randn(2, 8, 32)
    before = kept_by(model, sample)
    plan = fastbp.plan_memory(model, sample, 0.7)
    assert plan.budget == int(0.7 * before) >= plan.total_after
    assert set(plan.policies) == {"0.mlp", "1.mlp"}
    assert [layer.before for layer in plan.layers] == ["eager", "eager"]
    again = fastbp.plan_memory(model, sample, 1.0)  # now nothing has to be recomputed that fits
    assert again.budget == again.total_before == plan.total_after


def test_a_budget_in_reach_costs_nothing_and_the_rest_as_little_as_it_must():
    model, sample = BERT(4), torch.randn(2, 8, 32)
    one = 2 * 8 * 128 * 4  # z of a block
    free = fastbp.plan_memory(model, sample, 1.0, dry_run=True)
    assert free.extra_time == 0 and set(free.policies.values()) == {"preact"}
    for saved, blocks in ((1, 1), (one, 1), (one + 1, 2), (3 * one, 3)):
        plan = fastbp.plan_memory(model, sample, free.total_after - saved, dry_run=True)
        assert list(plan.policies.values()).count("recompute") == blocks
        assert plan.total_after == free.total_after - blocks * one


def test_extra_time_is_the_share_of_the_products_by_count():
    model = nn.Sequential(fastbp.MLP(16, 64), fastbp.LinearAct(16, 32), nn.Linear(32, 8))
    plan = least(model, torch.randn(10, 16))
    sizes = 16 * 64 + 64 * 16, 16 * 32, 32 * 8
    assert plan.policies == {"0": "recompute", "1": "recompute"}
    assert [layer.extra_time for layer in plan.layers] == pytest.approx(
        [16 * 64 / (3 * sum(sizes)), 16 * 32 / (3 * sum(sizes))]
    )
    assert plan.extra_time == pytest.approx(sum(layer.extra_time for layer in plan.layers))


def test_attention_counts_as_a_product():
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(Attention(), fastbp.MLP(16, 64))
    plan = least(model, torch.randn(2, 4, 10, 16))
    rows, attention = 80, 2 * 4 * 2 * 2 * 10 * 10 * 16
    assert plan.extra_time == pytest.approx(2 * rows * 16 * 64 / (3 * (attention + 2 * rows * 2 * 16 * 64)))


def test_approximate_plans_take_time_first_and_the_smaller_error_then():
    model = nn.Sequential(fastbp.MLP(32, 64), fastbp.MLP(32, 64)).bfloat16()
    sample = torch.randn(20, 32, dtype=torch.bfloat16)
    hidden = 20 * 64
    free = fastbp.plan_memory(model, sample, 1.0, dry_run=True, allow_approximate=True)
    assert set(free.policies.values()) == {"preact"} and not free.approximate
    plan = fastbp.plan_memory(model, sample, free.total_after - 1, dry_run=True, allow_approximate=True)
    assert plan.extra_time == 0 and sorted(plan.policies.values()) == ["fp8", "preact"]
    assert len(plan.approximate) == 1 and plan.total_after == free.total_after - hidden + 40
    errors = {layer.after: layer.error for layer in plan.layers}
    assert errors["preact"] == 0 and 1e-3 < errors["fp8"] < 0.05


def test_a_layer_whose_output_the_next_one_keeps():
    """LinearAct with bits keeps y, which the next layer keeps anyway: only half a byte a number is its own."""
    model = nn.Sequential(fastbp.LinearAct(32, 64), nn.Linear(64, 8)).bfloat16()
    sample = torch.randn(10, 32, dtype=torch.bfloat16)
    assert fastbp.plan_memory(model, sample, 10 * 64 * 4, dry_run=True).policies == {"0": "preact"}
    plan = fastbp.plan_memory(model, sample, 10 * 64 * 4 - 1, allow_approximate=True)
    assert plan.policies == {"0": "output_bits"}
    assert plan.total_after == 10 * 64 * 2 + 10 * 32 == kept_by(model, sample)
    assert model[0].save == "output_bits"


def test_checkpoints_are_left_alone_and_named():
    model, sample = Checkpointed(), torch.randn(3, 4, 16)
    plan = least(model, sample)
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["open"] == "" and "checkpoint" in reasons["closed"] and "reentrant" in reasons["old"]
    assert "never" in reasons and "does not run" in reasons["never"]
    plan = fastbp.plan_memory(model, sample, plan.total_after)
    assert plan.total_after == kept_by(model, sample)
    assert is_fused(model.open) and not any(is_fused(m) for m in (model.closed, model.old, model.never))
    assert "left alone because" in str(plan) and plan.policies == {"open": "recompute"}


def test_a_layer_inside_and_outside_a_checkpoint_pays_for_both():
    model, sample = Checkpointed(twice=True), torch.randn(3, 4, 16)
    both = next(layer for layer in least(model, sample).layers if layer.name == "open")
    assert both.reason == "" and both.extra_time == pytest.approx(2 / (3 * 8))  # products
    plan = fastbp.plan_memory(model, sample, least(model, sample).total_after)
    assert plan.total_after == kept_by(model, sample)


def test_shared_layers_have_one_policy_for_all_their_calls():
    model, sample = Shared(), torch.randn(6, 16)
    plan = fastbp.plan_memory(model, sample, least(model, sample).total_after)
    assert plan.policies == {"block": "recompute"} and plan.total_after == kept_by(model, sample)
    assert "mlp, gelu" in str(plan) and plan.layers[0].calls == "mlp, gelu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["bert", "llama", "chain"])
def test_gradients_stay_what_they_were(name, dtype):
    model, sample = MODELS[name]()
    if sample is not None and all(t.is_floating_point() for t in sample):
        model, sample = model.to(dtype), tuple(t.to(dtype) for t in sample)

    def step(model):
        model.zero_grad()
        y = model(*sample)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    before = step(copy.deepcopy(model))
    plan = fastbp.plan_memory(model, sample, least(model, sample).total_after)
    assert "recompute" in plan.policies.values()
    for mine, stock in zip(step(model), before, strict=True):
        torch.testing.assert_close(mine, stock)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dry_run", [False, True])
def test_planning_leaves_no_trace(name, dry_run):
    model, sample = MODELS[name]()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before, random_state = state_of(model), torch.get_rng_state()
    classes = {name: type(m) for name, m in model.named_modules()}
    budget = least(model, sample).total_after
    fastbp.plan_memory(model, sample, budget, dry_run=dry_run)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = state_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if dry_run:
        assert {name: type(m) for name, m in model.named_modules()} == classes
    assert not any(type(getattr(m, "save", "")) is not str for m in model.modules())


def test_the_same_plan_twice():
    model, sample = MODELS["mixed"]()
    budget = budgets_of(model, sample)[1]
    first = fastbp.plan_memory(model, sample, budget)
    second = fastbp.plan_memory(model, sample, budget)
    assert first.policies == second.policies and first.total_after == second.total_after == second.total_before
    assert [layer.before for layer in second.layers] == [layer.after for layer in first.layers]


def test_out_of_reach_nothing_is_changed_and_the_least_is_named():
    model, sample = BERT(2), torch.randn(2, 8, 32)
    low, lossy = least(model, sample).total_after, least(model, sample, allow_approximate=True).total_after
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint") as error:
        fastbp.plan_memory(model, sample, low - 1)
    assert str(low) in str(error.value) and str(lossy) in str(error.value) and str(low - 1) in str(error.value)
    assert not any(is_fused(m) for m in model.modules())
    assert fastbp.plan_memory(model, sample, low).total_after == low == kept_by(model, sample)


def test_where_approximate_policies_keep_less_they_are_proposed():
    """Beneath is something to train and the layer is frozen: its input, larger than its output, is kept for nothing."""
    model = nn.Sequential(nn.Linear(8, 64), fastbp.LinearAct(64, 32).requires_grad_(False), nn.Linear(32, 8))
    sample = torch.randn(10, 8)
    y = 10 * 32 * 4
    assert fastbp.plan_memory(model, sample, 2 * y).policies == {"1": "preact"}
    with pytest.raises(ValueError, match=rf"at least {2 * y} .* and {y} .* try allow_approximate=True"):
        fastbp.plan_memory(model, sample, 2 * y - 1)
    assert model[1].save == "preact"
    assert fastbp.plan_memory(model, sample, y, allow_approximate=True).policies == {"1": "output_lsb"}


def test_the_modules_of_fastbp_are_told_and_not_fused_again():
    model, sample = MODELS["modules"]()
    plan = fastbp.plan_memory(model, sample, least(model, sample).total_after)
    assert not any(is_fused(m) for m in model.modules())
    assert plan.policies == {"1": "recompute", "2": "recompute"} == {n: model[int(n)].save for n in "12"}
    assert [layer.before for layer in plan.layers] == ["preact", "output"]


def test_filter_fn_and_backend():
    model, sample = BERT(2), torch.randn(2, 8, 32)
    options = dict(filter_fn=lambda module, name: name != "1.mlp", backend="reference")
    plan = fastbp.plan_memory(model, sample, least(model, sample, **options).total_after, **options)
    assert plan.policies == {"0.mlp": "recompute"} and not is_fused(model[1].mlp)
    assert model[0].mlp.__dict__["_fastbp_plan"].backend == "reference"


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_large_models_without_memory(kind):
    """A block of Llama-7B: 11008 hidden, 2048 tokens."""

    def make():
        model = Llama(2, 4096, 11008)
        return model, torch.empty(1, 2048, 4096)

    mode = FakeTensorMode() if kind == "fake" else torch.device("meta")
    with mode:
        model, sample = make()
    plan = fastbp.plan_memory(model, sample, 0.7, dry_run=True)
    with mode:
        inside = fastbp.plan_memory(model, {"input": sample}, 0.7)
    assert str(inside).replace("after;", "if applied;") == str(plan)
    x, z = 2048 * 4096 * 4, 2048 * 11008 * 4
    assert plan.policies == {"0.mlp": "recompute", "1.mlp": "preact"}
    assert plan.total_after == kept_by(model, sample)
    assert [layer.bytes_after for layer in plan.layers] == [x, x + 2 * z]
