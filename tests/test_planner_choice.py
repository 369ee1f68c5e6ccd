"""The choice behind plan_memory, against every other choice; and the errors that it weighs."""

import copy
import itertools
import random
import time

import pytest
import torch
from planned_models import EXACT, MODELS, kept_by

import fastbp
from fastbp.activations import bind
from fastbp.planner import choice, costs
from fastbp.planner.choice import Option, choose
from fastbp.saving import POLICIES


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
        plan = fastbp.plan_memory(model, sample, budget, dry_run=True, allow_approximate=approximate)
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
