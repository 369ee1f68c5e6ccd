"""The benchmark of tuned choices: who is measured beside whom, by which choice, and what counts as short of a floor."""

import os

import pytest
import torch
from support import each

from benchmarks import records, tuned
from benchmarks.cases import Case
from benchmarks.environment import CPU
from benchmarks.steps import task_of
from fastbp import backends
from fastbp.backends import native
from fastbp.tuning import TunedCall, isolation
from fastbp.tuning.jobs import watch

CASE = Case("layer", 4, (8, 8), "relu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    backends.choose_from({})
    backends.forget()


def test_a_case_is_tuned_and_measured_beside_its_candidates(tmp_path, capsys):
    before = os.environ.get("XDG_CACHE_HOME")
    arguments = ["--suite", "overhead", "--case", "layer 4×8→8 relu", "--seconds", "0.01", "--tuning-seconds", "0.01"]
    assert tuned.main([*arguments, "--output", str(tmp_path)]) == 0
    environment, (row,) = records.read(tmp_path / "tuned.jsonl", needed=("case", "mode", "rivals"))
    assert environment["command"].startswith("python -m benchmarks.tuned --suite overhead")
    assert row["case"] == "layer 4×8→8 relu float32" and 0 < row["of_best"] < 3
    names = {name for name in (*row["rivals"], *row["left_out"]) if name.startswith("candidate ")}
    assert {"candidate reference", "candidate eager"} <= names and f"candidate {row['best']}" in row["rivals"]
    assert {"eager", "eager again", "fastbp", "fastbp tuned", f"candidate {row['chosen']}"} <= set(row["rivals"])
    assert row["case"] in capsys.readouterr().out
    assert os.environ.get("XDG_CACHE_HOME") == before
    assert tuned.main([*arguments, "--limit", "0", "--output", str(tmp_path / "none")]) == 0
    assert "not measured, the time is up" in capsys.readouterr().out and not (tmp_path / "none").exists()


@pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
def test_each_step_is_computed_by_its_choice(monkeypatch):
    task = task_of(CASE, CPU)
    module = tuned.fused()(CASE, task.parts)
    (job,) = watch("x", module, task.inputs[0][0]).jobs
    milliseconds = {"native": 1.0, "native narrow": 1.1, "reference": 1.2, "eager": 1.01, "native wide": 2.0}
    call = TunedCall(job.key, 1, milliseconds, {"native library": "wrong"}, "native")
    with tuned.own_cache():
        backends.remember(CPU, job.key, {"fastest": "reference"})
        steps, left_out = tuned.steps_of(task, job, call)
        assert left_out == {
            "candidate native library": "wrong",
            "candidate native wide": "2.00 times as long as the fastest when tuned",
        }
        taken = {}
        for name, step in steps.items():
            step()
            if not name.startswith("eager"):
                weight, bias = task.parts[0].parameters()
                chosen = backends.choose(job.config, task.inputs[0][0], (weight, bias), (weight,))
                taken[name] = f"{chosen.backend} {chosen.route}".rstrip()
                other = backends.choose(job.config, task.inputs[0][0][:2], (weight, bias), (weight,))
                assert (other.backend, other.route) == ("native", ""), (
                    "candidates are looked up by sizes, like the tuned"
                )
    candidates = {f"candidate {name}": name for name in milliseconds if name != "native wide"}
    assert taken == {"fastbp": "native", "fastbp tuned": "reference", **candidates}
    assert backends.choose(job.config, task.inputs[0][0]).backend == "native", "nothing learnt there is known here"


def test_the_best_of_equals_is_no_better_than_the_others():
    """Of equals that scatter the luckiest is always ahead, and its ratio in the other half of the turns is not."""
    torch.manual_seed(0)
    scatter = (1 + 0.1 * torch.randn(9, 400).clamp(-2, 2)).tolist()
    times = {f"candidate {i}": t for i, t in enumerate(scatter[:8])} | {"fastbp tuned": scatter[8]}
    found = tuned.beside_the_best(times)
    assert abs(found["of_best"] - 1) < 3 * found["of_best_error"] < 0.03
    worse = times | {"fastbp tuned": [1.1 * t for t in scatter[8]]}
    assert abs(tuned.beside_the_best(worse)["of_best"] - 1 / 1.1) < 0.02


@each(
    ("of_best", "of_eager", "error", "short"),
    [(1.0, 2.0, 0.0, False), (0.985, 2.0, 0.001, True), (0.985, 2.0, 0.01, False), (1.0, 0.95, 0.001, True),
     (1.0, 0.97, 0.01, False)],
)  # fmt: skip
def test_a_floor_is_missed_by_more_than_the_noise(of_best, of_eager, error, short):
    rivals = {name: {"over_eager": of_eager} for name in ("fastbp tuned", "fastbp", "eager again")}
    row = {"case": "a", "of_best": of_best, "of_best_error": error, "of_eager_error": error, "rivals": rivals}
    assert tuned.is_short(row) is short
    assert f"of the best candidate: worst {of_best:.3f} (a)" in tuned.summary([row])


def test_who_seems_short_of_a_floor_is_measured_longer_by_the_same_choice(tmp_path, monkeypatch, capsys):
    """And that stands, whichever way it goes."""
    seen = []
    summarised = tuned.beside_the_best

    def doubtful(times):
        seen.append(sum(map(sum, times.values())))
        return summarised(times) | {"of_best": found[len(seen) - 1], "of_best_error": 0.001}

    monkeypatch.setattr(tuned, "beside_the_best", doubtful)
    monkeypatch.setattr(tuned, "is_short", lambda row: row["of_best"] < tuned.OF_BEST)
    arguments = ["--suite", "overhead", "--case", "layer 4×8→8 relu", "--seconds", "0.02", "--tuning-seconds", "0.01"]
    races, race = [], isolation.run_race
    monkeypatch.setattr(isolation, "run_race", lambda *arguments: races.append(arguments) or race(*arguments))
    for found in ([0.95, 1.0], [0.95, 0.94]):
        seen.clear()
        races.clear()
        tuned.main([*arguments, "--output", str(tmp_path)])
        _, (row,) = records.read(tmp_path / "tuned.jsonl", needed=("case", "mode", "rivals"))
        assert len(seen) == 2 and row["of_best"] == found[1] and row["longer"] == tuned.LONGER
        first, second = capsys.readouterr().out.splitlines()[:2]
        assert first.split(", ")[0] == second.split(", ")[0] and len(races) == 1, "the choice is kept"


def test_a_run_cut_short_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    rivals = {name: {"ms": 1.0, "over_eager": 1.0} for name in ("fastbp tuned", "fastbp", "eager again")}
    row = {"mode": "fwd_bwd", "chosen": "native", "best": "native", "of_best": 1.0, "of_best_error": 0.0}
    row |= {"of_eager_error": 0.0, "rivals": rivals}
    measured = []
    monkeypatch.setattr(tuned, "measure", lambda case, *_: measured.append(case.name) or {"case": case.name} | row)
    arguments = ["--suite", "overhead", "--output", str(tmp_path)]
    tuned.main([*arguments, "--case", "layer 4×8→8 silu", "--resume"])
    assert measured == ["layer 4×8→8 silu float32"]
    tuned.main([*arguments, "--case", "layer", "--resume"])
    assert measured == [f"layer 4×8→8 {activation} float32" for activation in ("silu", "gelu", "relu")]
    _, rows = records.read(tmp_path / "tuned.jsonl", needed=("case", "mode", "rivals"))
    assert [row["case"] for row in rows] == measured
    path = tmp_path / "tuned.jsonl"
    path.write_text(path.read_text().replace(f'"commit": "{records.read(path)[0]["commit"]}"', '"commit": "older"'))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tuned.jsonl").write_text('{"case": "of which nobody knows what it belongs to"}\n')
    with pytest.warns(RuntimeWarning, match="line 1, is skipped"), pytest.raises(SystemExit):
        tuned.main(["--suite", "overhead", "--output", str(broken), "--resume"])
    capsys.readouterr()
    for given, words in ((arguments, "has rows of another commit"), (["--suite", "overhead"], "written nowhere")):
        with pytest.raises(SystemExit):
            tuned.main([*given, "--resume"])
        assert words in capsys.readouterr().err


def test_unknown_arguments_list_what_there_is(capsys):
    for arguments, words in ((["--suite", "models"], "choose from"), (["--case", "zz"], "layer 2048×768→3072")):
        with pytest.raises(SystemExit) as stop:
            tuned.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
