"""The command ``benchmarks.run``: what its arguments choose, what its rows say, and when it fails."""

import json
from importlib import import_module

import pytest
import torch
from support import each

from benchmarks import environment, peaks, records, rivals, run
from benchmarks.cases import flops
from benchmarks.rivals import RIVALS, Rival
from benchmarks.suites import MODES, SUITES, TINY

CPU = torch.device("cpu")
UNKNOWN = [
    (["--suite", "nope"], ["nope", *SUITES]),
    (["--rival", "nope"], ["nope", "eager again", "fastbp native fp8", "quack"]),
    (["--mode", "nope"], ["nope", *MODES]),
    (["--dtype", "nope"], ["nope", "float32", "bfloat16", "float16"]),
    (["--suite", "overhead", "--case", "layer 4×8→9 gelu"], ["no such case", "layer 4×8→8 gelu float32"]),
    (["--suite", "small", "--mode", "train"], ["--mode train", "small has fwd_bwd"]),
    (["--suite", "overhead", "--dtype", "float16"], ["overhead", "dtypes: float32"]),
    (["--suite", "accuracy", "--case", "mlp"], ["--case", "accuracy", "benchmarks.accuracy --help"]),
    (["--suite", "memory", "--mode", "fwd"], ["--mode", "memory"]),
]


def quick(*arguments, output=None):
    return run.main(["--suite", "overhead", "--quick", *arguments, *(["--output", str(output)] if output else [])])


@each(("wrong", "said"), [(2.0, "2.0e+00"), (float("nan"), "no number")])
def test_a_wrong_rival_is_marked_and_timed(wrong, said, monkeypatch, capsys, tmp_path):
    def make(case, linears):
        module = rivals.eager(case, linears)
        return lambda x: module(x) * (1 + wrong)

    monkeypatch.setitem(RIVALS, "eager again", Rival(make))
    assert quick(output=tmp_path) == 0
    row = records.read(tmp_path / "overhead.jsonl").rows[0]
    found = row["rivals"]["eager again"]
    assert found["accurate"] is False and found["ms"] > 0
    assert found["error"] is None if said == "no number" else found["error"] == pytest.approx(wrong, rel=0.01)
    assert f"less accurate than eager allows: error {said}" in capsys.readouterr().out
    json.loads((tmp_path / "overhead.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_a_wrong_fastbp_fails_the_run(monkeypatch, capsys):
    wrong = Rival(lambda case, linears: lambda x: rivals.eager(case, linears)(x) * 1.001)
    monkeypatch.setitem(RIVALS, "fastbp", wrong)
    assert quick() == 1
    assert "fastbp is inaccurate" in capsys.readouterr().err


@each(("arguments", "words"), UNKNOWN)
def test_unknown_names_list_the_choices(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words)


def items(*arguments):
    return run.parse(list(arguments)).items


def test_what_is_asked_for_is_chosen():
    cases = SUITES["layers"].cases["cpu"]
    every = items("--suite", "layers")
    assert [item.mode for item in every[:: len(cases)]] == list(SUITES["layers"].modes)
    assert [item.case for item in every[: len(cases)]] == list(cases)
    name = "mlp 512×768→3072→768 gelu float32"
    (one,) = items("--suite", "blocks", "--case", name, "--mode", "bwd")
    assert (one.case.name, one.mode) == (name, "bwd")
    exact = "mlp 256×64→64→64→64→64→64 gelu float32"
    assert {item.case.name for item in items("--case", exact)} == {exact}  # and of no gated_mlp
    halves = items("--suite", "layers", "--dtype", "bfloat16", "--mode", "fwd")
    assert len(halves) == len(cases) // 2 and all(item.case.dtype == torch.bfloat16 for item in halves)
    assert [item.suite for item in items("--quick", "--mode", "train")] == ["models"] * len(TINY)
    everything = items()
    assert {item.suite for item in everything} == set(SUITES)
    assert [item.suite for item in everything if item.case is None] == ["memory", "accuracy"]
    smallest = min(SUITES["edges"].cases["cpu"], key=lambda case: flops(case, "fwd"))
    assert [item.case for item in items("--suite", "edges", "--quick")] == [smallest]


@each("suite", [name for name, suite in SUITES.items() if suite.module])
def test_a_module_understands_what_is_passed_on(suite, monkeypatch):
    calls = []
    monkeypatch.setattr(import_module(SUITES[suite].module), "main", lambda words: calls.append(words) or 3)
    assert run.main(["--suite", suite, "--quick", "--limit", "100", "--output", "there"]) == 1
    monkeypatch.undo()
    (words,) = calls
    assert words[:3] == ["--device", "cpu", "--quick"] and "there" in words
    if suite == "memory":
        arguments = import_module("benchmarks.memory").parse([*words, "--rival", "eager"])
        assert 0 < arguments.limit <= 100 and len(arguments.steps) == 1 and arguments.rival == ["eager"]


def test_rows_say_what_a_roofline_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "peaks", lambda device: {"float32": 100.0, "bfloat16": 200.0, "copy": 10.0})
    name = "layer 4×8→8 relu float32"
    arguments = ["--suite", "overhead", "--case", name, "--seconds", "0.01", "--output", str(tmp_path)]
    assert run.main([*arguments, "--rival", "fastbp"]) == 0
    environment, (row,) = records.read(tmp_path / "overhead.jsonl")
    assert environment["peaks"]["copy"] == 10.0
    assert (row["case"], row["mode"], row["flops"], row["bytes"]) == (name, "fwd_bwd", 3 * 512, 3 * 4 * 128)
    assert f"{name} fwd_bwd" in capsys.readouterr().out


def test_peaks_are_those_of_products_and_a_copy(monkeypatch):
    monkeypatch.setitem(peaks.SIZES, "cpu", (64, 1 << 16))
    monkeypatch.setattr(peaks, "burst", lambda step, calls: step() is None or 1e-3)
    assert peaks.peaks(CPU) == {"float32": 0.5, "bfloat16": 0.5, "copy": 0.1}


def test_progress_is_said_on_a_terminal_only(monkeypatch, capsys):
    assert list(environment.progress("ab", 2)) == ["a", "b"] and not capsys.readouterr().err
    monkeypatch.setattr(environment.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(environment.announced("ab")) == ["a", "b"]
    assert capsys.readouterr().err == "1 of 2  \n2 of 2, about 0 min left  \n"
    assert list(environment.progress("ab", 2)) == ["a", "b"]  # one line that is written over
    assert capsys.readouterr().err == "1 of 2  \r2 of 2, about 0 min left  \r\n"
