"""The race of ``fastbp.tune``: who takes part, who is refused, and whether the fastest is found."""

import random
from math import exp, sin

import pytest
import torch
from support import each
from tuning_cases import CPU, KEYS, with_native

from fastbp import backends
from fastbp.backends import native
from fastbp.backends.measured import EAGER, Choice
from fastbp.forms import FORMS
from fastbp.tuning import race
from fastbp.tuning.jobs import parse
from fastbp.tuning.race import Outcome, candidates, run_off


class Fake:
    """Steps that take given milliseconds by a clock of its own, times the machine's pace and the noise of a burst."""

    def __init__(self, milliseconds, noise=0.0, pace=lambda now: 1.0, seed=0):
        self.milliseconds = milliseconds
        self.calls = dict.fromkeys(milliseconds, 0)
        self.bursts = dict.fromkeys(milliseconds, 0)
        self.steps = {name: name for name in milliseconds}
        self.now = 0.0
        self.pace = pace
        self.noise = noise
        self.random = random.Random(seed)

    def clock(self, name, calls):
        self.calls[name] += calls
        self.bursts[name] += 1
        took = calls * self.milliseconds[name] / 1e3 * self.pace(self.now) * exp(self.random.gauss(0, self.noise))
        self.now += took
        return took

    def turns(self, name):
        return self.bursts[name] - 2  # one warms up, and one tells how many calls make a burst


@each("form", FORMS)
def test_every_candidate_is_measured_or_refused_and_the_fastest_is_taken(form):
    job = parse("x", KEYS[form], CPU)
    before = torch.random.get_rng_state()
    outcome = race.run_race(job, 0.001)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = [choice.name for choice in candidates(job)]
    assert set(outcome.milliseconds) | set(outcome.refused) == set(names) and outcome.unmeasured == names[0]
    assert outcome.fastest in outcome.milliseconds and all(ms > 0 for ms in outcome.milliseconds.values())
    # What eager keeps is more than a block's policy, but for ReLU, where both keep the output.
    assert (EAGER in outcome.refused) is (form not in ("linear_act", "mlp")), outcome.refused


@with_native
def test_the_candidates_on_a_cpu():
    found = {choice.name for choice in candidates(parse("x", "linear_act 1x8x8 gelu float32 auto", CPU))}
    ways = {"native", "native narrow", "native wide", "native library"}
    assert found == ways | {"native row", "reference", EAGER}
    two = {choice.name for choice in candidates(parse("x", "linear_act 2x8x8 gelu bfloat16 auto", CPU))}
    pairs = {"native narrow_pairs"} if native.capability() == "avx512_bf16" else set()
    assert two == ways | pairs | {"reference", EAGER}


def test_a_wrong_candidate_and_one_that_raises_are_refused(monkeypatch):
    def wrong(config, x, tensors):
        y, *kept = backends.reference.forward(config, x, tensors)
        return [y * 1.001, *kept]

    broken = type(backends)("broken")
    broken.__dict__.update(vars(backends.reference), forward=wrong)
    raising = type(backends)("raising")
    raising.__dict__.update(vars(backends.reference), forward=lambda *arguments: 1 / 0)
    nan = type(backends)("nan")
    nan.__dict__.update(
        vars(backends.reference),
        backward=lambda *a, **k: [g if g is None else g * float("nan") for g in backends.reference.backward(*a, **k)],
    )
    for name, module in {"broken": broken, "raising": raising, "nan": nan}.items():
        monkeypatch.setitem(backends.BACKENDS, name, module)
    outcome = race.run_race(parse("x", KEYS["linear_act"], CPU), 0.001)
    assert "error 0.001 against float64 of y" in outcome.refused["broken"]
    assert outcome.refused["raising"] == "ZeroDivisionError: division by zero"
    assert outcome.refused["nan"].startswith("the gradient of x has nan at row 0, column 0, instead of")
    assert "reference" in outcome.milliseconds


def test_a_call_that_no_candidate_serves_keeps_what_it_takes_and_says_why(monkeypatch):
    monkeypatch.setattr(race, "candidates", lambda job: [Choice("nobody")])
    outcome = race.run_race(parse("x", KEYS["linear_act"], CPU), 0.001)
    assert outcome.milliseconds == {} and outcome.unmeasured == "nobody" and "nobody" in outcome.refused["nobody"]


def test_losers_drop_out_and_winners_get_their_time():
    fake = Fake({"best": 1.0, "near": 1.03, "far": 1.2, "lost": 3.0})
    times = run_off(fake.steps, 1.0, fake.clock)
    assert times == pytest.approx({"best": 1.0, "near": 1.03, "far": 1.2, "lost": 3.0})
    assert fake.turns("lost") == race.GLANCE and fake.turns("near") == fake.turns("far") == race.TURNS
    assert fake.calls["best"] >= 900  # a second


def test_slow_steps_get_few_turns():
    """But for noise that leaves open who leads, and then ten times their seconds."""
    for milliseconds in (100.0, 5000.0):
        fake = Fake({"one": milliseconds, "other": 1.001 * milliseconds})
        run_off(fake.steps, 0.3, fake.clock)
        assert fake.turns("one") == race.FEW_TURNS
    fake = Fake({"one": 20.0, "other": 20.0}, noise=0.2, seed=1)
    run_off(fake.steps, 0.3, fake.clock)
    assert fake.now == pytest.approx(2 * race.PATIENCE * 0.3, rel=0.05)


def test_a_machine_that_slows_down_does_not_favour_who_dropped_out_before():
    """Their times are those of a fast machine, and are compared with those of the others at the same time."""
    for slower in (1.5, 1 / 1.5):
        fake = Fake({"best": 1.0, "far": 1.2, "lost": 3.0}, pace=lambda now, slower=slower: slower**now)
        times = run_off(fake.steps, 1.0, fake.clock)
        ratios = {name: ms / times["best"] for name, ms in times.items()}
        assert ratios == pytest.approx({"best": 1.0, "far": 1.2, "lost": 3.0}, rel=0.03)


def test_the_best_is_found_in_noise():
    """Of thirty races with an eighth more or less in every burst, on a machine whose pace drifts."""
    lost = []
    for seed in range(30):
        fake = Fake({"c": 1.03, "a": 1.0, "d": 1.2, "b": 1.01}, 0.12, lambda now: 1 + 0.4 * sin(3 * now), seed)
        times = run_off(fake.steps, 0.3, fake.clock)
        lost.append(fake.milliseconds[min(times, key=times.__getitem__)] - 1)
    assert sum(lost) / len(lost) < 0.005 and max(lost) < 0.05


def test_of_equals_the_written_rule_stays():
    def fastest(**times):
        return Outcome(times, {}, "rule").fastest

    assert fastest(other=1.0, rule=1.004) == "rule"
    assert fastest(other=1.0, rule=1.01) == "other"
    assert fastest(other=1.0) == "other"
