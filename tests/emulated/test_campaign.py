"""The campaign's order, seeds and results; what it runs is tested by itself."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
from ptxsim import Fault

from benchmarks import records
from emulated import campaign
from emulated.jobs import Job, Verdict


def test_every_case_has_seeds_of_its_own():
    todo = [SimpleNamespace(share=share) for share in (1.0, 0.5, 0.0, 0.1)]
    asked = campaign.schedules(todo, Namespace(seeds=8, seed=None, minutes=math.inf))
    assert sorted((number, len(seeds)) for number, seeds, _ in asked) == [(0, 8), (1, 4), (2, 1), (3, 1)]
    every = [seed for _, seeds, _ in asked for seed in seeds]
    assert len(set(every)) == len(every) and min(every) == campaign.FIRST_SEED
    again = campaign.schedules(todo, Namespace(seeds=8, seed=1005, minutes=math.inf))
    assert [list(seeds) for _, seeds, _ in again] == [[1005]] * 4


def faulty(seed):
    raise Fault("race", "here") if seed % 2 else ValueError("the case is at fault")


@pytest.mark.parametrize(("run", "kinds"), [(lambda seed: Verdict(), ["", ""]), (faulty, ["ValueError", "race"])])
def test_what_goes_wrong_is_counted_by_its_kind(monkeypatch, run, kinds):
    job = Job("kernel", "sm_90a", "label", "gelu", "bfloat16", "fp8", "1x8x8", run, ())
    monkeypatch.setattr(campaign, "_jobs", [job])
    outcome = campaign._work((0, (2, 3), math.inf))
    assert [found.fault for found in outcome.runs] == kinds
    line = campaign.Line(of=2)
    line.add(job, outcome)
    row = line.row("kernel", "sm_90a")
    assert (row["cases"], row["of"], row["runs"]) == (1, 2, 2) and sum(row["faults"].values()) == 2 - kinds.count("")
    assert campaign._work((0, (2, 3), 0.0)).runs == []  # its time is over


@pytest.mark.parametrize(
    ("errors", "fault"),
    [
        ([("dz", 0.2), ("dz", 1.0)], ""),
        ([("dz", 3.0), ("dz", 0.1)], "wrong numbers"),  # of the gate, and then of up
        ([("dz", math.nan), ("dz", 0.1)], "wrong numbers"),
        ([("dz", 0.1), ("h", math.nan)], "wrong numbers"),
    ],
)
def test_a_verdict_forgets_no_error(errors, fault):
    assert Verdict.of("a case", errors, 1).fault == fault
    assert Verdict.of("a case", errors, 1, whole=False).fault == "out of bounds"


def test_results_of_other_kernels_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "emulated.jsonl")
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    first, second, again = ({"kernel": k, "family": "sm_90", "runs": n} for k, n in (("a", 1), ("b", 2), ("a", 3)))
    campaign.remember([first, second], [])
    campaign.remember([again], ["--kernel", "a"])
    rows = records.read(campaign.RESULTS).rows
    assert [(row["kernel"], row["runs"]) for row in rows] == [("a", 3), ("b", 2)]
    assert rows[0]["command"] == 'make emulate ARGS="--kernel a"' and rows[1]["command"] == "make emulate"
