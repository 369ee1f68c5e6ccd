"""The benchmarks' machinery: the one command for a GPU, as far as a CPU can run it, and what is noted, not raised."""

import json
import math
import types

import pytest
import torch

from benchmarks import cuda_clock, environment, gpu, kernels, measure, memory, records, rivals, run, summary
from benchmarks.suites import MODEL_BLOCKS, SUITES, Case
from fastbp.backends import triton
from fastbp.saving import POLICIES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
with_triton = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
interpreted = pytest.mark.skipif(not triton.interpreting(), reason="for interpreted kernels")
CPU = torch.device("cpu")
IN_DRY_RUN = [name for name in gpu.STAGES if name != "demo"]  # test_demo.py runs that


def rows_of(path):
    environment, rows = records.read(path)
    assert environment["command"].startswith("python -m benchmarks.")
    return rows


@with_triton
def test_dry_run(tmp_path):
    """Every stage runs, what it writes is read again, and the page names it all. One test, because it takes a while."""
    chosen = [word for name in IN_DRY_RUN for word in ("--stage", name)]
    code = gpu.main(["--dry-run", "--output", str(tmp_path), *chosen])
    assert code == 0, {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}
    text = (tmp_path / "summary.md").read_text()
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert list(stages) == IN_DRY_RUN
    for name, found in stages.items():
        assert f"| {name} | {found['outcome']}" in text
        assert found["outcome"] == ("left out" if name in ("build", "static") else "passed")
    assert "no figure here means anything" in text
    for name, suite in SUITES.items():
        for row in rows_of(tmp_path / f"{name}.jsonl") if not suite.module else ():
            ours = {"policies": "fastbp preact", "reading": "fastbp.Linear", "activations": "fastbp.fuse"}.get(
                name, "fastbp"
            )
            assert row["rivals"][ours]["over_eager"] > 0
            assert row["mode"] in suite.modes
            assert f"| {row['case']} |" in text
    assert "| output_lsb | float32 |" in text
    for name in ("tests", "triton"):
        assert " passed, 0 failed, " in stages[name]["note"]
    assert [row["block"] for row in rows_of(tmp_path / "model_memory.jsonl")] == ["bert"]
    assert "| bert | torch.compile | 4.00 |" in text and "| bert | fastbp preact | 2.00 |" in text
    check_kernels({row["case"].split()[0]: row for row in rows_of(tmp_path / "kernels.jsonl")})
    assert "the times mean nothing" in (tmp_path / "logs" / "kernels.log").read_text()


def check_kernels(rows):
    """Every candidate of every product is there, and every elementwise kernel."""
    from fastbp.backends.triton import autotune, configs

    assert set(rows) == {*configs.KINDS, *kernels.ELEMENTWISE}
    for kind in configs.KINDS:
        row, candidates = rows[kind], set(autotune.candidates(kind, CPU))
        assert set(row["times"]) == candidates | {"library again", "eager", "gemm"}
        assert set(row["errors"]) == candidates and not row["refused"]
        assert row["best_tile"] in candidates - {"library"}
        assert row["over_library"] > 0
    for kernel in kernels.ELEMENTWISE:
        assert rows[kernel]["ms"] > 0 and rows[kernel]["copy_ms"] > 0


def stage(program, **options):
    return gpu.Stage(("-c", program), ("-c", program), **options)


def test_a_failing_stage_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    stages = {"broken": stage("print('oh dear'); raise SystemExit(3)"), "fine": stage("print('well')")}
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "broken: failed" in printed and "exit code 3" in printed and "  oh dear" in printed
    assert "| broken | failed |" in printed and "| fine | passed |" in printed
    assert (tmp_path / "logs" / "fine.log").read_text() == "well\n"


def test_a_stage_that_may_fail_does_not_fail_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {"optional": stage("raise SystemExit('no compiler')", required=False)})
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| optional | failed (not required) |" in printed and "no compiler" in printed


def test_a_stage_over_its_limit_ends_with_all_it_started(tmp_path, monkeypatch, capsys):
    """A child that goes on would hold the GPU, and write a file after its parent is gone."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu, "STAGES", {"endless": stage(program)})
    assert gpu.main(["--dry-run", "--limit", "0.5", "--output", str(tmp_path)]) == 1
    assert "| endless | over its limit |" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "STAGES", {"wait": stage("import time; time.sleep(2.5)")})
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert not late.exists()


def test_stages_of_several_calls_add_up_and_old_results_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {"one": stage("", results=("one.jsonl",)), "two": stage("")})
    (tmp_path / "one.jsonl").write_text('{"environment": {"commit": "0", "date": "0"}}\n{"case": "a", "rivals": {}}\n')
    assert gpu.main(["--dry-run", "--stage", "two", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "one.jsonl").exists()
    assert gpu.main(["--dry-run", "--stage", "one", "--output", str(tmp_path)]) == 0
    assert not (tmp_path / "one.jsonl").exists()
    text = (tmp_path / "summary.md").read_text()
    assert text.index("| one | passed") < text.index("| two | passed")


def test_cases_for_which_there_was_no_time_are_counted(tmp_path, monkeypatch, capsys):
    program = "from benchmarks.run import main; main(['--suite', 'overhead', '--case', 'layer', '--limit', '0'])"
    monkeypatch.setattr(gpu, "STAGES", {"late": stage(program)})
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert "| late | passed |" in (text := capsys.readouterr().out) and "no time for 3 cases: logs/late.log" in text


def test_a_run_of_tests_that_are_all_skipped_has_not_passed(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="3"/></testsuites>')
    assert gpu.count_tests(report) == (False, "0 passed, 0 failed, 3 skipped")


@no_gpu
def test_without_a_gpu_one_line_says_so(capsys):
    assert gpu.main(["--output", "/nonexistent"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "no GPU" in line and "--dry-run" in line


REFUSED = [
    (gpu, ["--stage", "nope"], ["nope", *gpu.STAGES]),
    (run, ["--skip", "eager"], ["eager"]),
    (memory, ["--block", "nope"], ["nope", *MODEL_BLOCKS]),
    (memory, ["--rival", "nope"], ["nope", *(f"fastbp {policy}" for policy in POLICIES)]),
    (memory, ["--suite", "nope"], ["nope", *memory.SUITES]),
    pytest.param(memory, ["--device", "cuda"], ["no GPU"], marks=no_gpu),
    pytest.param(run, ["--device", "cuda"], ["no GPU"], marks=no_gpu),
    pytest.param(kernels, [], ["no GPU", "TRITON_INTERPRET"], marks=[no_gpu, with_triton]),
    pytest.param(kernels, ["--device", "cpu"], ["--quick"], marks=[no_gpu, with_triton, interpreted]),
]


@pytest.mark.parametrize(("module", "arguments", "words"), REFUSED)
def test_bad_arguments_exit_with_2_and_the_choices(module, arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words)


def test_the_commands_for_a_gpu_are_understood_and_end_in_time(monkeypatch, tmp_path):
    """Nothing here runs them: their programs parse them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    monkeypatch.setattr(triton, "unavailable", None)
    limit = gpu.parse([]).limit
    assert limit < 600
    understood = set()
    for name in gpu.STAGES:
        _, *command = gpu.command_of(name, tmp_path, limit, dry=False)
        assert not any(brace in word for word in command for brace in "{}")
        module = {"benchmarks.run": run, "benchmarks.kernels": kernels, "benchmarks.memory": memory}.get(command[1])
        if module:
            arguments = module.parse(command[2:])
            assert (arguments.device, arguments.output) == ("cuda", tmp_path)
            assert arguments.limit == limit - 60
            understood.add(name)
    assert understood == {"kernels", *SUITES}
    assert "TRITON_INTERPRET" not in gpu.environment_of("tests", dry=False)


def test_a_rival_that_raises_is_left_out_and_eager_and_fastbp_are_not(monkeypatch):
    def make(case, linears):
        def call(x):
            raise RuntimeError("no such kernel\nand more")

        return call

    case = Case("layer", 4, (8, 8))
    monkeypatch.setitem(rivals.RIVALS, "torch.compile", rivals.Rival(make))
    found = measure.prepare(case, ["eager", "torch.compile", "linears alone", "fastbp"], CPU)
    assert list(found.steps) == ["eager", "linears alone", "fastbp"]
    assert found.left_out == {"torch.compile": "RuntimeError: no such kernel"}
    monkeypatch.setitem(rivals.RIVALS, "fastbp", rivals.Rival(make))
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure.prepare(case, ["eager", "fastbp"], CPU)


@with_triton
@interpreted
def test_a_broken_route_is_named_and_fails_the_run_but_not_the_case(monkeypatch, capsys):
    from fastbp.backends.triton import launch

    monkeypatch.setattr(
        launch, "forward", lambda how, tile, programs, x, weight, bias, y, *kept, **codes: lambda: y.fill_(7)
    )
    arguments = ["--suite", "edges", "--case", "layer 16×64→64 gelu bfloat16", "--quick", "--rival", "fastbp"]
    assert run.main(arguments) == 0
    assert run.main([*arguments, "--rival", "fastbp fused"]) == 1
    printed = capsys.readouterr().out
    assert "is broken: AssertionError" in printed and printed.count("× eager") == 4


@with_triton
@interpreted
@pytest.mark.parametrize(("route", "fused"), [("fused", True), ("library", False)])
def test_a_forced_rival_takes_its_route_both_ways(route, fused, monkeypatch):
    from fastbp.backends.triton import launch

    taken = set()
    for name in ("forward", "dgrad", "activation", "chain_rule"):
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, name=name, original=original: taken.add(name) or original(*a))
    found = measure.prepare(Case("mlp", 16, (32, 48, 32), dtype=torch.bfloat16), ["eager", f"fastbp {route}"], CPU)
    assert taken == ({"forward", "dgrad"} if fused else {"activation", "chain_rule"})
    taken.clear()
    found.steps[f"fastbp {route}"]()
    assert taken == ({"forward", "dgrad"} if fused else {"activation", "chain_rule"})


def test_who_cannot_be_captured_is_noted(monkeypatch, capsys, tmp_path):
    """The figures of a GPU, with clocks that need none."""

    def capture(step, calls):
        if step is slow:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [step() for _ in range(calls)]

    def slow():
        return sum(range(5000))

    monkeypatch.setattr(cuda_clock, "capture", capture)
    monkeypatch.setattr(cuda_clock, "burst", measure.burst)
    monkeypatch.setattr(cuda_clock, "host_milliseconds", lambda step: 0.5)
    steps = {"eager": lambda: sum(range(2000)), "torch.compile": slow, "fastbp": lambda: sum(range(1000))}
    prepared = measure.Prepared(steps, {}, {"fastbp fused": "is not there"}, {}, copies=3)
    monkeypatch.setattr(run, "prepare", lambda case, names, device, mode: prepared)
    row = run.measure(Case("layer", 4, (8, 8)), list(steps), 0.02, types.SimpleNamespace(type="cuda"))
    assert row["no_graph"] == {"torch.compile": "RuntimeError: operation not permitted when stream is capturing"}
    assert row["left_out"] == prepared.left_out and row["copies"] == 3
    assert "graph_ms" not in row["rivals"]["torch.compile"]
    mine = row["rivals"]["fastbp"]
    assert mine["host_ms"] == 0.5 and 1 < mine["graph_over_eager"] < 6
    assert math.isclose(mine["graph_ms"], mine["ms"], rel_tol=0.5)  # of one step, not of the three in a graph
    run.print_row(row)
    printed = capsys.readouterr().out
    assert "has no CUDA graph: RuntimeError" in printed and "left out: is not there" in printed
    records.write(tmp_path / "edges.jsonl", {"commit": "c0ffee", "date": "today"}, [row])
    text = summary.summary(tmp_path, {"gpu": "Wonder 1"}, {}, dry=False)
    assert "Wonder 1" in text and "c0ffee" in text and f"{mine['over_eager']:.2f}" in text
    assert "torch.compile has no graph" in text and "fastbp fused was left out" in text


def test_the_worst_ratios_come_first_and_refusals_are_listed(tmp_path):
    rows = [
        {"case": f"forward {i}", "best_tile": "t", "refused": {"other": "error 1"} if i == 3 else {}}
        | dict.fromkeys(("over_library", "over_library_again", "over_eager", "over_gemm"), 1 + i % 7 / 10)
        for i in range(14)
    ]
    records.write(tmp_path / "kernels.jsonl", {"commit": "a", "date": "b"}, rows)
    text = summary.summary(tmp_path, {}, {}, dry=False)
    shown = [float(line.split("|")[3]) for line in text.splitlines() if line.startswith("| forward")]
    assert shown == sorted(shown) and len(shown) == summary.SHOWN and shown[0] == 1.0
    assert "14 in all: worst, median, best 1.00, 1.30, 1.60" in text
    assert "- forward 3: other: error 1" in text


def test_the_facts_of_a_gpu(monkeypatch):
    found = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150 << 30, uuid="12-34"
    )
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found.name)
    device = torch.device("cuda", 0)
    assert environment.folder_of(device) == "nvidia-h200"
    answers = "580.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W"
    monkeypatch.setattr(environment, "_said", lambda *command: asked.append(command) or answers)
    environment.gpu.cache_clear()
    facts = environment.gpu(device)
    assert "--id=GPU-12-34" in asked[0]
    assert (facts["gpu"], facts["capability"], facts["driver_version"]) == ("NVIDIA H200", "9.0", "580.1")
    monkeypatch.setattr(environment, "_said", lambda *command: "")  # no nvidia-smi
    environment.gpu.cache_clear()
    assert environment.gpu(device)["driver_version"] == "unknown"
    environment.gpu.cache_clear()


def test_a_command_that_is_not_there_says_nothing():
    assert environment._said("no-such-command") == environment._said("false") == ""
