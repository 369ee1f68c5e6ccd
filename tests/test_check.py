"""The regression guard: two versions beside each other, what counts as slower, and what cannot be compared."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import each

from benchmarks import check, models, version_worker, versions
from benchmarks.cases import Case, Model
from benchmarks.check import Fault, Verdict
from benchmarks.suites import SUITES, TINY
from benchmarks.versions import Unusable, Worker

FLAT = (0.99, 1.0, 1.01)
GELU, RELU, SILU = (Case("layer", 4, (8, 8), name) for name in ("gelu", "relu", "silu"))

# Of each activation how long a call takes, and by what its result is wrong; by 0 the process dies instead.
VERSION = """
import os, time
import torch.nn.functional as F
from torch import nn

BEHAVIOUR = {behaviour}

def available_backends():
    print("what a version prints is no answer")
    return {{"native": {native!r}}}

class LinearAct(nn.Linear):
    def __init__(self, *sizes, activation, **options):
        super().__init__(*sizes, **options)
        self.activation = activation

    def forward(self, x):
        seconds, factor = BEHAVIOUR[self.activation]
        time.sleep(seconds)
        if not factor:
            os._exit(11)
        return factor * getattr(F, self.activation)(super().forward(x))
"""
RIGHT = {name: (0.004, 1) for name in ("gelu", "relu", "silu")}


def tree(folder, native="available", **behaviour):
    """A version of fastbp that has single layers alone."""
    package = folder / "fastbp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VERSION.format(behaviour=RIGHT | behaviour, native=native))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two of one process wait for each other, which takes long where other tests have the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The base, a version like it, and another that is faster in GELU and dies of SiLU."""
    folder = tmp_path_factory.mktemp("versions")
    base, other = tree(folder / "base"), tree(folder / "other", gelu=(0.002, 1), silu=(0, 0))
    made = [Worker(name, place, folder) for name, place in (("base", base), ("like", base), ("other", other))]
    for worker in made:
        worker.greet()
    yield made
    for worker in made:
        worker.end()
        assert worker.process.poll() is not None


def test_what_is_slower_or_wrong_is_named(tmp_path, monkeypatch, capfd):
    """The command as a whole. What seems slower is measured again, by other processes."""
    base, mine = tree(tmp_path / "base"), tree(tmp_path / "mine", gelu=(0.0056, 1), relu=(0, 1.01))
    monkeypatch.setattr(check, "unpacked", lambda commit, device: base)
    monkeypatch.setattr(check, "commit_of", lambda reference: "c0ffee")
    monkeypatch.setattr(check, "same", lambda commit, *places: True)
    monkeypatch.setattr(check, "ROOT", mine)
    assert check.main(["--base", "main", "--case", "layer 4×8→8", "--seconds", "0.1"]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "base: c0ffee, as asked for" and "noise" in said[1]
    slower = [line for line in said if line.startswith("SLOWER")]
    assert len(slower) == 1 and slower[0].endswith(GELU.name)
    assert 1.2 < float(slower[0].split()[1]) < 1.6
    assert said[said.index(slower[0]) + 1].endswith(SILU.name), "the slowest comes first"
    assert f"  {GELU.name}" in said[next(i for i, line in enumerate(said) if line.startswith("once more")) + 1 :]
    assert f"not compared: {RELU.name}: this tree is WRONG: its error is 0.01" in said
    assert said[-1] == "3 cases: 1 slower, 0 faster, 1 not compared"


def test_a_version_like_the_base_is_not_slower(workers, capsys):
    base, like, _ = workers
    arguments = check.parse(["--suite", "overhead", "--case", GELU.name, "--seconds", "0.1"])
    found = check.measured(arguments, [base, base, like])
    assert [verdict.name for verdict in found] == [GELU.name]
    assert check.report(found) == 0
    assert "1 cases: 0 slower, " in capsys.readouterr().out


def test_the_faster_one_is_told_and_no_failure(workers, capsys):
    found = check.compare(GELU, "cpu", workers, 0.1)
    assert found.faster and not found.slower and found.milliseconds[0] > 4
    assert check.report([found]) == 0 and "faster" in capsys.readouterr().out


def test_what_a_version_cannot_do_is_said_and_the_next_case_is_compared(workers):
    base, like, other = workers
    gone = check.compare(Case("mlp", 4, (8, 8, 8)), "cpu", [base, like, other], 0.01)
    assert gone == Fault("mlp 4×8→8→8 gelu float32", gone.reason, fatal=False), "what the base lacks is no fault"
    assert gone.reason.startswith("base: AttributeError")
    dead = check.compare(SILU, "cpu", [base, like, other], 0.01)
    assert dead == Fault(SILU.name, "other: its process ended with exit code 11", fatal=True)
    assert isinstance(check.compare(GELU, "cpu", [base, like, other], 0.01), Verdict)
    assert [check.report([found]) for found in (gone, dead)] == [0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_is_not_asked_stands_still(workers):
    """Threads that spin would be timed with the other version."""
    workers[0].prepare(GELU, "cpu")
    for worker in workers[:2]:
        for task in Path(f"/proc/{worker.process.pid}/task").iterdir():
            assert (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_process_of_another_tree_is_refused(tmp_path):
    """Had the installed package been imported, one version would be measured twice."""
    worker = Worker("base", tmp_path, tmp_path)
    try:
        with pytest.raises(Unusable, match=rf"base: a process for {tmp_path} imports .*fastbp"):
            worker.greet()
    finally:
        worker.end()


@each(
    ("states", "refused"),
    [
        (("available", "available"), False),
        (("not built", "not built"), False),
        (("not built", "available"), True),
        (("available", "built from other sources"), True),
        (("", "available"), False),  # a version without such kernels
    ],
)
def test_kernels_of_one_version_alone_are_no_comparison(workers, monkeypatch, states, refused):
    for worker, state in zip(workers, states, strict=False):
        monkeypatch.setattr(worker, "backends", {"native": state} if state else {"reference": "available"})
    if not refused:
        return versions.check_alike(*workers[:2])
    with pytest.raises(Unusable, match=f"base: {states[0]}; like: {states[1]}"):
        versions.check_alike(*workers[:2])


@each(
    ("ratio", "noise", "slower"),
    [
        ((1.05, 1.10, 1.20), FLAT, True),
        ((0.98, 1.10, 1.20), FLAT, False),  # some turns the other way
        ((1.005, 1.015, 1.02), FLAT, False),  # less than 2 %
        ((1.05, 1.10, 1.20), (0.8, 1.0, 1.3), False),  # the same thing twice differs as much
        ((1.05, 1.10, 1.20), (1.1, 1.12, 1.13), False),
        ((0.80, 0.85, 0.90), FLAT, False),
    ],
)
def test_slower_is_more_than_noise(ratio, noise, slower):
    verdict = Verdict("a case", ratio, noise, (1.0, 1.0), (0.0, 0.0))
    assert verdict.slower is slower and ("SLOWER" in str(verdict)) is slower
    assert check.report([verdict, Verdict("another", FLAT, FLAT, (1.0, 1.0), (0.0, 0.0))]) == slower


def test_the_slowest_comes_first_and_suspects_are_measured_again(monkeypatch, capsys):
    asked, processes = [], [1]
    ratios = {"a": [1.5, 1.0], "b": [1.2, 1.2], "c": [1.3, 1.3], "d": [1.0]}

    def compare(case, device, workers, seconds):
        asked.append((case.activation, seconds, len(processes)))
        ratio = ratios[case.activation].pop(0)
        return Verdict(case.activation, (ratio - 0.01, ratio, ratio + 0.01), FLAT, (1.0, 1.0), (0.0, 0.0))

    monkeypatch.setattr(check, "compare", compare)
    monkeypatch.setattr(check, "restart", processes.append)
    arguments = check.parse(["--seconds", "2"])
    arguments.cases = [Case("layer", 1, (2, 2), name) for name in ratios]
    found = check.measured(arguments, [])
    assert asked == [*((name, 2, 1) for name in "abcd"), *((name, 6, 2) for name in "abc")]
    capsys.readouterr()
    assert check.report(found, 7) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in printed[2:6]] == ["c", "b", "a", "d"]
    assert printed[-1].startswith("4 cases: 2 slower, 0 faster, 0 not compared; 7 others left out")


def test_what_time_is_up_for_is_said(monkeypatch, capsys):
    monkeypatch.setattr(check, "compare", lambda *_: pytest.fail("measured"))
    assert check.measured(check.parse(["--limit", "-1", "--case", GELU.name, "--suite", "overhead"]), []) == []
    assert f"{GELU.name}: not measured, the time is up" in capsys.readouterr().out


@each("device", ["cpu", "cuda"])
def test_a_part_is_of_every_suite_and_dtype_evenly(device):
    suites = [SUITES[name].cases[device] for name in check.DEFAULT]
    part = check.spread(suites, 3)
    for cases in suites:
        for dtype in {case.dtype for case in cases}:
            group = [case for case in cases if case.dtype == dtype]
            taken = [group.index(case) for case in part if case in group]
            assert taken == [i * len(group) // 3 for i in range(3)], "the first of each first"
    assert len(part) == len(set(part)) == 3 * sum(len({case.dtype for case in cases}) for cases in suites)


@each(
    ("words", "measured", "left_out"),
    [
        ([], 6 * 7 + 3, True),  # of models there are three
        (["--quick"], 8, True),
        (["--suite", "overhead"], len(SUITES["overhead"].cases["cpu"]), False),
        (["--case", "layer 1×8→8 gelu"], 2, False),  # of the edges, though nobody named them
    ],
)
def test_how_many_are_measured(words, measured, left_out):
    arguments = check.parse(words)
    assert len(arguments.cases) == measured and bool(arguments.left_out) is left_out
    if left_out:
        total = sum(len(SUITES[name].cases["cpu"]) for name in check.DEFAULT)
        assert arguments.left_out == total - measured


def test_every_case_can_be_checked():
    timed = [case for name in check.TIMED for cases in SUITES[name].cases.values() for case in cases]
    assert any(isinstance(case, Model) for case in timed)
    assert {case.activation for case in timed} <= set(version_worker.ACTIVATIONS)


@each("kind", ["layer", "gated", "mlp", "gated_mlp"])
@each("factor", [1, 1.01])
def test_a_result_is_compared_with_float64(kind, factor, monkeypatch):
    import fastbp

    case = Case(kind, 5, (6, 7, 8) if kind.endswith("mlp") else (6, 8), "silu")
    torch.manual_seed(0)
    block = version_worker.block_of(fastbp, case, "cpu")
    block.register_forward_hook(lambda module, inputs, y: y * factor)
    found = version_worker.checked(case, block, torch.randn(5, 6).requires_grad_(), torch.randn(5, 8))
    assert found["accurate"] is (factor == 1) and abs(found["error"] - (factor - 1)) < 1e-6


@each("case", TINY)
@each("factor", [1, 1.01])
def test_a_models_result_is_compared_with_float64(case, factor):
    import fastbp

    def fuse(model):
        assert fastbp.fuse(model).fused
        model.head.register_forward_hook(lambda module, inputs, y: y * factor)

    step, found = version_worker.prepare(SimpleNamespace(fuse=fuse), case, "cpu")
    assert found["accurate"] is (factor == 1) and found["error"] < 0.05
    assert len(step()) == 1 + sum(1 for _ in models.build(case).parameters())
