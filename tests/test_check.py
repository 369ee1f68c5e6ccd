"""The regression guard: two versions beside each other, what counts as slower, and what cannot be compared."""

import subprocess

import pytest
from support import each

from benchmarks import check, records
from benchmarks.cases import Case
from benchmarks.check import Unusable, Verdict, Worker
from benchmarks.environment import CPU

ROOT = check.ROOT
CASE = Case("layer", 4, (8, 8))
FLAT = (0.99, 1.0, 1.01)
in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")

VERSION = """
import time
import torch.nn.functional as F
from torch import nn

def available_backends():
    return {{"this": "available"}}

class LinearAct(nn.Linear):
    def __init__(self, *sizes, activation, **options):
        super().__init__(*sizes, **options)

    def forward(self, x):
        time.sleep({seconds})
        return {factor} * F.gelu(super().forward(x))
"""


def tree(folder, seconds, factor=1):
    """A version of fastbp whose layer takes so long, and is wrong by a factor."""
    package = folder / "fastbp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VERSION.format(seconds=seconds, factor=factor))
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    made = {
        "base": Worker(tree(folder / "base", 0.004)),
        "slower": Worker(tree(folder / "slower", 0.0056)),
        "wrong": Worker(tree(folder / "wrong", 0, 1.01)),
    }
    yield made
    for worker in made.values():
        worker.end()
        assert worker.process.poll() is not None


@each(("mine", "slower", "faster"), [("slower", True, False), ("base", False, False)])
def test_a_version_that_takes_longer_is_found(workers, mine, slower, faster):
    base = workers["base"]
    found = check.compare(CASE, "cpu", [base, base, workers[mine]], 0.3)
    assert (found.slower, found.faster, found.fault) == (slower, faster, "")
    assert found.milliseconds > 4
    if slower:
        assert 1.2 < found.ratio[1] < 1.6
        back = check.compare(CASE, "cpu", [workers[mine], workers[mine], base], 0.3)
        assert back.faster and not back.slower


@each(("mine", "words"), [("wrong", "this tree is WRONG: relative error 0.01"), ("base", "")])
def test_a_wrong_result_is_not_timed(workers, mine, words):
    base = workers["base"]
    found = check.compare(CASE, "cpu", [base, base, workers[mine]], 0.01)
    assert found.fault.startswith(words) and check.report([found]) == bool(words)


def test_what_a_version_cannot_compute_is_said_and_the_next_case_is_compared(workers):
    base = workers["base"]
    gone = check.compare(Case("mlp", 4, (8, 8, 8)), "cpu", [base, base, base], 0.01)
    assert gone.fault.startswith("the other version does not compute it: AttributeError")
    assert check.report([gone]) == 0, "what an older version lacks is no fault of this tree"
    assert not check.compare(CASE, "cpu", [base, base, base], 0.01).fault


def test_a_process_of_another_tree_is_refused(tmp_path, monkeypatch):
    """Had the installed package been imported, one version would be measured twice."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unusable, match=r"a process for .*empty imports .*fastbp"):
        Worker(tmp_path / "empty")


@each(
    ("ratio", "noise", "slower"),
    [
        ((1.05, 1.10, 1.20), FLAT, True),
        ((0.98, 1.10, 1.20), FLAT, False),  # some rounds the other way
        ((1.005, 1.015, 1.02), FLAT, False),  # less than 2 %
        ((1.05, 1.10, 1.20), (0.8, 1.0, 1.3), False),  # the same thing twice differs as much
        ((1.05, 1.10, 1.20), (1.1, 1.12, 1.13), False),
        ((0.80, 0.85, 0.90), FLAT, False),
    ],
)
def test_slower_is_more_than_noise(ratio, noise, slower):
    verdict = Verdict("a case", ratio, noise, 1.0)
    assert verdict.slower is slower and ("SLOWER" in str(verdict)) is slower
    assert check.report([verdict, Verdict("another", FLAT, FLAT, 1.0)]) == slower


def test_the_slowest_comes_first_and_suspects_are_measured_again(monkeypatch, capsys):
    asked = []
    ratios = {"a": [1.5, 1.0], "b": [1.2, 1.2], "c": [1.3, 1.3], "d": [1.0]}

    def compare(case, device, workers, seconds):
        asked.append((case.activation, seconds))
        ratio = ratios[case.activation].pop(0)
        return Verdict(case.activation, (ratio - 0.01, ratio, ratio + 0.01), FLAT, 1.0)

    monkeypatch.setattr(check, "compare", compare)
    arguments = check.parse(["--seconds", "2"])
    arguments.cases = [Case("layer", 1, (2, 2), name) for name in ratios]
    verdicts = check.measured(arguments, [])
    assert asked == [("a", 2), ("a", 6), ("b", 2), ("b", 6), ("c", 2), ("c", 6), ("d", 2)]
    capsys.readouterr()
    assert check.report(verdicts) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "4 cases: 2 slower, 0 faster, 0 not compared"
    assert [line.split()[-1] for line in printed[2:]] == ["c", "b"]


@in_git
def test_the_other_version_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    commit = check.commit_of("HEAD")

    def fail(commit, tree):
        assert (tree / "fastbp" / "__init__.py").is_file()
        raise Unusable("the native library does not build")

    with monkeypatch.context() as patch, pytest.raises(Unusable):
        patch.setattr(check, "give_library", fail)
        check.unpacked(commit, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(check, "give_library", lambda commit, tree: None)
    found = check.unpacked(commit, tmp_path)
    assert found == tmp_path / commit and (found / "csrc" / "ops.cpp").is_file()
    monkeypatch.setattr(check, "give_library", fail)
    assert check.unpacked(commit, tmp_path) == found, "made once"


@in_git
def test_a_library_of_the_same_sources_is_taken_over(tmp_path, monkeypatch):
    (tmp_path / "fastbp").mkdir()
    library = ROOT / "fastbp" / "_native.abi3.so"
    if not library.is_file():
        pytest.skip("no library was built")
    monkeypatch.setattr(check, "git", lambda *arguments: "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("built anew"))
    check.give_library("c0ffee", tmp_path)
    assert (tmp_path / "fastbp" / library.name).read_bytes() == library.read_bytes()


@in_git
def test_which_version_is_the_other(monkeypatch, tmp_path):
    head = check.commit_of("HEAD")
    monkeypatch.setattr(check, "results_of", lambda device: ROOT / "nothing-here")
    assert check.default_base(["layers"], CPU) == (head, "HEAD, for there are no results in nothing-here")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "results_of", lambda device: tmp_path)
    monkeypatch.setattr(check, "git", lambda *arguments: subprocess.check_output(
        ["git", "-C", str(ROOT), *arguments], text=True, stderr=subprocess.DEVNULL).strip())  # fmt: skip
    records.write(tmp_path / "layers.jsonl", {"commit": head}, [])
    assert check.default_base(["small", "layers"], CPU) == (head, "that of layers.jsonl")


@in_git
@each(
    ("arguments", "words"),
    [
        (["--base", "no-such-branch"], "--base 'no-such-branch' is no commit of this repository; the last ones are"),
        (["--suite", "nothing"], "choose from"),
        (["--case", "nothing"], "is in no name of layer 2048×768→3072 gelu float32"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, words, capsys):
    try:
        code = check.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err
