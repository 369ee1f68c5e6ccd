"""plan_memory: what it predicts is what is measured, what it chooses is the cheapest, and nothing else changes."""

import copy
import itertools
import random
import time

import pytest
import torch
import torch.nn.functional as F
from planned_models import BERT, MODELS, Chain, Checkpointed, Llama, NoGradInside, Shared, kept_by, state_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbp
from fastbp.activations import bind
from fastbp.fusion.surgery import is_fused
from fastbp.planner import choice, costs
from fastbp.planner.choice import Option, choose
from fastbp.saving import POLICIES

EXACT = ("preact", "output", "recompute")


def least(model, sample, **options):
    """The plan that keeps least, not applied."""
    return fastbp.plan_memory(model, sample, 0, best_effort=True, apply=False, **options)


def budgets_of(model, sample, **options):
    """From what the layers keep at most down to the least there is."""
    most = fastbp.plan_memory(model, sample, 1.0, apply=False, **options).total_after
    low = least(model, sample, **options).total_after
    assert low < most
    return [most, (2 * most + low) // 3, (most + 2 * low) // 3, low]


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
        assert plan.total_after == kept_by(fresh, sample) <= budget == plan.budget and plan.met and plan.applied
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
    free = fastbp.plan_memory(model, sample, 1.0, apply=False)
    assert free.extra_time == 0 and set(free.policies.values()) == {"preact"}
    for saved, blocks in ((1, 1), (one, 1), (one + 1, 2), (3 * one, 3)):
        plan = fastbp.plan_memory(model, sample, free.total_after - saved, apply=False)
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


def brute_force(layers, sizes, base, budget):
    """Every combination, one by one: the least cost, and the least bytes."""
    costs, kept = [], []
    for options in itertools.product(*layers):
        total = (
            base + sum(o.own for o in options) + sum(sizes[k] for k in frozenset().union(*(o.shared for o in options)))
        )
        kept.append(total)
        if total <= budget:
            costs.append(tuple(map(sum, zip(*(o.cost for o in options), strict=True))))
    return min(costs, default=None), min(kept)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
    """Random layers that share storages with any other, against all combinations."""
    draw = random.Random(seed)
    sizes = {key: draw.randint(1, 50) for key in "abcde"}
    layers = []
    for _ in range(draw.randint(1, 6)):
        layers.append(
            [
                Option(
                    str(n), draw.randint(0, 60), frozenset(draw.sample("abcde", draw.randint(0, 2))),
                    (draw.choice([0, 0, draw.randint(1, 9)]), draw.randint(0, 9), draw.randint(0, 3)),
                )
                for n in range(draw.randint(1, 4))
            ]
        )  # fmt: skip
    for budget in range(0, 400, 25):
        cost, least_bytes = brute_force(layers, sizes, 10, budget)
        found = choose(layers, sizes, 10, budget)
        assert (found is None) == (cost is None)
        if found is not None:
            total, options = found
            assert total <= budget
            assert tuple(map(sum, zip(*(o.cost for o in options), strict=True))) == cost
            assert all(option in layer for option, layer in zip(options, layers, strict=True))
            shared = frozenset().union(*(o.shared for o in options))
            assert total == 10 + sum(o.own for o in options) + sum(sizes[key] for key in shared)
        assert choose(layers, sizes, 10, None)[0] == least_bytes


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("name", ["chain", "frozen chain"])
def test_plans_are_the_best_of_all(name, approximate):
    """The whole of it against every assignment of policies, measured one by one."""
    model, sample = MODELS[name]()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (fastbp.LinearAct, fastbp.MLP))}
    assert len(layers) <= 4
    allowed = POLICIES if approximate else EXACT
    # Of the hidden linear of each, since something beneath every slope is trained.
    products = {n: next(p.numel() for p in m.parameters() if p.dim() == 2) for n, m in layers.items()}
    step = 3 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    found = []
    for policies in itertools.product(allowed, repeat=len(layers)):
        other = copy.deepcopy(model)
        for layer, policy in zip(layers, policies, strict=True):
            other.get_submodule(layer).save = policy
        if all(_exact_enough(layer, p, approximate) for layer, p in zip(layers.values(), policies, strict=True)):
            cost = sum(products[layer] for layer, p in zip(layers, policies, strict=True) if p == "recompute") / step
            found.append((kept_by(other, sample), cost))
    low, high = min(found)[0], max(found)[0]
    for budget in range(low, high + 1, max((high - low) // 17, 1)):
        plan = fastbp.plan_memory(model, sample, budget, apply=False, allow_approximate=approximate)
        assert plan.extra_time == pytest.approx(min(cost for kept, cost in found if kept <= budget))
    with pytest.raises(ValueError, match=f"at least {low}|and {low} "):
        fastbp.plan_memory(model, sample, low - 1, allow_approximate=approximate)


def _exact_enough(layer, policy, approximate):
    reason = POLICIES[policy].illegal(layer.activation, layer.form)
    return reason is None and (approximate or policy != "output" or layer.activation.row.output_exact)


def test_two_hundred_layers_of_other_sizes_take_seconds():
    draw = random.Random(0)
    layers = []
    for _ in range(200):
        size = draw.randint(1000, 9000) * 64
        kept = (("preact", 2 * size, 0, 0), ("output_bits", size * 5 // 4, 0, 3), ("output_lsb", size, 0, 40))
        kept += (("fp8", size * 33 // 32, 0, 90), ("recompute", 0, 4096, 0))
        layers.append([Option(n, own, frozenset(), (size * t, size * e, i)) for i, (n, own, t, e) in enumerate(kept)])
    total = sum(options[0].own for options in layers)
    start = time.process_time()
    for share in (0.9, 0.3):
        kept, options = choose(layers, {}, 0, int(share * total))
        assert 0.99 * share * total < kept <= share * total and len(options) == 200
    assert choose(layers, {}, 0, 0)[0] == 0
    assert time.process_time() - start < 60


def test_thinned_out_the_choice_stays_near_the_best(monkeypatch):
    draw = random.Random(0)
    layers = [
        [Option("a", size, frozenset(), (0,)), Option("b", 0, frozenset(), (draw.randint(1, 999),))]
        for size in (draw.randint(1, 10**6) for _ in range(14))
    ]
    budget = sum(options[0].own for options in layers) // 2
    best = choose(layers, {}, 0, budget)
    assert (sum(o.cost[0] for o in best[1]),) == brute_force(layers, {}, 0, budget)[0]
    monkeypatch.setattr(choice, "LIMIT", 20)
    kept, options = choose(layers, {}, 0, budget)
    assert kept <= budget and sum(o.cost[0] for o in options) < 1.2 * sum(o.cost[0] for o in best[1])


def test_approximate_plans_take_time_first_and_the_smaller_error_then():
    model = nn.Sequential(fastbp.MLP(32, 64), fastbp.MLP(32, 64)).bfloat16()
    sample = torch.randn(20, 32, dtype=torch.bfloat16)
    hidden = 20 * 64
    free = fastbp.plan_memory(model, sample, 1.0, apply=False, allow_approximate=True)
    assert set(free.policies.values()) == {"preact"} and not free.approximate
    plan = fastbp.plan_memory(model, sample, free.total_after - 1, apply=False, allow_approximate=True)
    assert plan.extra_time == 0 and sorted(plan.policies.values()) == ["fp8", "preact"]
    assert len(plan.approximate) == 1 and plan.total_after == free.total_after - hidden + 40
    errors = {layer.after: layer.error for layer in plan.layers}
    assert errors["preact"] == 0 and 1e-3 < errors["fp8"] < 0.05


def test_errors_of_the_slope_are_those_of_the_table():
    """Of bits, next to nothing; of the lowest bit and of fp8, the factors of docs/design.md."""
    gelu, tanh = bind("gelu"), bind("elu")
    bits, lsb, fp8 = (costs.slope_error(False, gelu, p, torch.bfloat16) for p in ("output_bits", "output_lsb", "fp8"))
    assert bits < lsb < fp8 and bits < 2e-3 and 2e-3 < lsb < 1e-2 and 5e-3 < fp8 < 5e-2
    assert costs.slope_error(False, gelu, "output_lsb", torch.float16) < lsb / 2
    assert (
        costs.slope_error(False, tanh, "output", torch.float32)
        < 1e-6
        < 1e-4
        < costs.slope_error(False, tanh, "output", torch.bfloat16)
    )
    assert 5e-3 < costs.slope_error(True, gelu, "fp8", torch.bfloat16) < 5e-2


def test_a_layer_whose_output_the_next_one_keeps():
    """LinearAct with bits keeps y, which the next layer keeps anyway: only half a byte a number is its own."""
    model = nn.Sequential(fastbp.LinearAct(32, 64), nn.Linear(64, 8)).bfloat16()
    sample = torch.randn(10, 32, dtype=torch.bfloat16)
    assert fastbp.plan_memory(model, sample, 10 * 64 * 4, apply=False).policies == {"0": "preact"}
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
@pytest.mark.parametrize("apply", [True, False])
def test_planning_leaves_no_trace(name, apply):
    model, sample = MODELS[name]()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before, random_state = state_of(model), torch.get_rng_state()
    classes = {name: type(m) for name, m in model.named_modules()}
    budget = least(model, sample).total_after
    fastbp.plan_memory(model, sample, budget, apply=apply)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = state_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if not apply:
        assert {name: type(m) for name, m in model.named_modules()} == classes
    assert not any(type(getattr(m, "save", "")) is not str for m in model.modules())


def test_the_same_plan_twice():
    model, sample = MODELS["mixed"]()
    budget = budgets_of(model, sample)[1]
    first = fastbp.plan_memory(model, sample, budget)
    second = fastbp.plan_memory(model, sample, budget)
    assert first.policies == second.policies and first.total_after == second.total_after == second.total_before
    assert [layer.before for layer in second.layers] == [layer.after for layer in first.layers]


def test_out_of_reach_nothing_is_changed_unless_asked_for():
    model, sample = BERT(2), torch.randn(2, 8, 32)
    low, lossy = least(model, sample).total_after, least(model, sample, allow_approximate=True).total_after
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint") as error:
        fastbp.plan_memory(model, sample, low - 1)
    assert str(low) in str(error.value) and str(lossy) in str(error.value) and str(low - 1) in str(error.value)
    assert not any(is_fused(m) for m in model.modules())
    plan = fastbp.plan_memory(model, sample, low - 1, best_effort=True)
    assert not plan.met and "NOT MET" in str(plan) and plan.total_after == low == kept_by(model, sample)


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
    plan = fastbp.plan_memory(
        model, sample, 0, best_effort=True, filter_fn=lambda module, name: name != "1.mlp", backend="reference"
    )
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
    plan = fastbp.plan_memory(model, sample, 0.7, apply=False)
    with mode:
        inside = fastbp.plan_memory(model, {"input": sample}, 0.7)
    assert str(inside).replace("after;", "if applied;") == str(plan)
    x, z = 2048 * 4096 * 4, 2048 * 11008 * 4
    assert plan.policies == {"0.mlp": "recompute", "1.mlp": "preact"}
    assert plan.total_after == kept_by(model, sample)
    assert [layer.bytes_after for layer in plan.layers] == [x, x + 2 * z]


REFUSED = [
    (0.0, "fraction"), (1.5, "above 0 and at most 1"), (-0.5, "fraction"), (float("nan"), "fraction"),
    (-3, "0 bytes or more"),
]  # fmt: skip


@pytest.mark.parametrize(("budget", "words"), REFUSED)
def test_budgets_out_of_range(budget, words):
    with pytest.raises(ValueError, match=words):
        fastbp.plan_memory(fastbp.MLP(4, 8), torch.randn(2, 4), budget)


def test_refusals():
    model, x = fastbp.MLP(4, 8), torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastbp.plan_memory(F.gelu, x, 1.0)
    for budget in (True, "1 GiB", None):
        with pytest.raises(TypeError, match="bytes"):
            fastbp.plan_memory(model, x, budget)
    with pytest.raises(ValueError, match="nothing that fuse can fuse"):
        fastbp.plan_memory(nn.Linear(4, 4), x, 1.0)
    with pytest.raises(ValueError, match="does not run with sample_inputs"):
        fastbp.plan_memory(model, torch.randn(2, 5), 1.0)
    with pytest.raises(ValueError, match="does not run with sample_inputs"):
        fastbp.plan_memory(model, {"nonsense": x}, 1.0)
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        fastbp.plan_memory(model, x, 1.0)
    with pytest.raises(ValueError, match="no output of the model requires a gradient"):
        fastbp.plan_memory(fastbp.MLP(4, 8).requires_grad_(False), x, 1.0)
    with pytest.raises(ValueError, match="no output of the model requires a gradient"):
        fastbp.plan_memory(NoGradInside(), x, 1.0)
    with pytest.raises(ValueError, match="compile it then"):
        fastbp.plan_memory(torch.compile(model, backend="eager"), x, 1.0)
    assert model.save == "auto"


def test_what_left_the_reasons_of_fuse_are_passed_on():
    block = nn.Module()
    block.fc1, block.fc2, block.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.5)
    block.forward = lambda x: block.fc2(block.drop(F.gelu(block.fc1(x))))
    with pytest.raises(ValueError, match="drop drops"):
        fastbp.plan_memory(block, torch.randn(2, 4), 1.0)


def test_models_of_which_no_two_runs_are_equal():
    class Unsteady(Chain):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x).exp() if self.runs % 2 else super().forward(x)

    model = Unsteady()
    with pytest.raises(ValueError, match="something else in every run"):
        fastbp.plan_memory(model, torch.randn(4, 16), 1.0)
    assert [layer.save for layer in model.layers] == ["auto"] * len(model.layers)


def test_gradients_inside_the_forward():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = fastbp.MLP(4, 8)

        def forward(self, x):
            y = self.block(x.requires_grad_())
            return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    with pytest.raises(ValueError, match="takes gradients inside its forward"):
        fastbp.plan_memory(Inner(), torch.randn(2, 4), 1.0)


def test_a_plan_that_does_not_hold_is_never_handed_out():
    """What is kept beside the layers may not depend on their policies; here it does."""

    class Sly(Chain):
        def forward(self, x):
            y = super().forward(x)
            return y.exp() if self.layers[3].save == "recompute" else y

    model, sample = Sly(), torch.randn(4, 16)
    with pytest.raises(AssertionError, match=r"predicted .* measured"):
        least(model, sample)
    assert [layer.save for layer in model.layers] == ["auto"] * 4
