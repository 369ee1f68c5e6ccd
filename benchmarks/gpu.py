"""All there is to do on a machine with a GPU, in one command: ``python -m benchmarks.gpu``.

Each stage is a process of its own with a limit of less than ten minutes, and each may be run alone (``--stage``). A
stage that fails does not stop the others; the exit code is 1 if one did. In the output folder (by default
benchmarks/results/<device>) are the result files, logs/<stage>.log, stages.json, which keeps what became of the stages
over several calls, and summary.md, which is printed too. Nothing needs a network. ``--dry-run`` runs every stage in the
form that a machine without a GPU allows, to see that all of this holds together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.environment import NOT_MEASURED, environment, results_of
from benchmarks.summary import summary

ROOT = Path(__file__).resolve().parents[1]
# A machine without a GPU: kernels are interpreted, and where there is one, it is not seen. With one thread, because two
# that wait for each other on busy cores take a hundred times as long.
DRY = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TESTS = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--junit-xml", "{output}/{stage}.xml")
SUITE = ("-m", "benchmarks.run", "--device", "cuda", "--seconds", "0.1", "--limit", "{soon}", "--output", "{output}")
QUICK = ("-m", "benchmarks.run", "--quick", "--output", "{output}")
KEPT = ("--rival", "eager", "--rival", "torch.compile", "--rival", "fastbp preact")  # which take no arithmetic
SOON = ("--seconds", "0.01", "--tuning-seconds", "0.01")
TUNED = ("--skip", "torch.compile max-autotune")  # a minute for each new shape


@dataclass(frozen=True)
class Stage:
    """A command of Python's, with {output}, {stage} and {soon}, the seconds after which it should not begin more."""

    command: tuple[str, ...]
    dry: tuple[str, ...]  # the same as far as a CPU can; nothing where there is no such thing
    results: tuple[str, ...] = ()  # the files in the output folder that it makes
    environment: Mapping[str, str] = field(default_factory=dict)
    required: bool = True  # whether its failure is one of the whole


def suite(name: str, *options: str) -> Stage:
    """A suite of benchmarks.run; in a dry run its smallest case."""
    return Stage((*SUITE, "--suite", name, *options), (*QUICK, "--suite", name), (f"{name}.jsonl",))


STAGES: dict[str, Stage] = {
    "doctor": Stage(("-m", "fastbp", "doctor"), ("-m", "fastbp", "doctor")),
    "build": Stage(
        ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."),
        (),
        environment={"FASTBP_BUILD": "cuda"},
        required=False,
    ),
    "static": Stage(
        ("-m", "benchmarks.static", "--quick"),
        (),  # it needs no GPU, and `make check` runs it whole
        environment={"TRITON_INTERPRET": "0"},
    ),
    "tests": Stage(
        (*TESTS, "tests/test_gpu.py"),
        (*TESTS, "tests/test_gpu.py", "tests/test_triton.py", "-k", "auto_is_right or unforced_small"),
        ("tests.xml",),
    ),
    "triton": Stage(
        (*TESTS, "tests/test_triton.py"),
        (*TESTS, "tests/test_triton.py", "-k", "sizes_of_zero and bfloat16"),
        ("triton.xml",),
    ),
    "kernels": Stage(
        ("-m", "benchmarks.kernels", "--remember", "--limit", "{soon}", "--output", "{output}"),
        ("-m", "benchmarks.kernels", "--device", "cpu", "--quick", "--output", "{output}"),
        ("kernels.jsonl",),
    ),
    "layers": suite("layers", *TUNED),
    "blocks": suite("blocks"),
    "small": suite("small", *TUNED),
    "edges": suite("edges", *TUNED),
    "overhead": suite("overhead", *TUNED),
    "reading": suite("reading"),
    "activations": suite("activations"),
    "policies": suite("policies"),
    "models": suite("models", *TUNED),
    "tuned": Stage(
        ("-m", "benchmarks.tuned", *SUITE[2:], "--suite", "blocks", "--suite", "layers"),
        ("-m", "benchmarks.tuned", "--suite", "overhead", "--case", "layer 4×8→8 relu", *SOON, "--output", "{output}"),
        ("tuned.jsonl",),
    ),
    "memory": Stage(
        (*SUITE, "--suite", "memory"),
        ("-m", "benchmarks.memory", "--suite", "models", "--block", "bert", *KEPT, "--output", "{output}"),
        ("model_memory.jsonl",),
    ),
    "accuracy": suite("accuracy"),
    "demo": Stage(
        ("-m", "fastbp", "demo", "--quick", "--output-dir", "{output}/demo"),
        ("-m", "fastbp", "demo", "--quick", "--output-dir", "{output}/demo"),
    ),
}


def command_of(name: str, output: Path, limit: float, dry: bool) -> list[str]:
    """The command line of a stage; empty where it has none in a dry run."""
    stage = STAGES[name]
    values = {"output": str(output), "stage": name, "soon": f"{max(limit - 60, limit / 2):.0f}"}
    words = [word.format(**values) for word in (stage.dry if dry else stage.command)]
    if stage.command[: len(TESTS)] == TESTS and not dry and importlib.util.find_spec("xdist"):
        words += ["-n", str(min(8, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]  # they wait for compilers
    return [sys.executable, *words] if words else []


def environment_of(name: str, dry: bool) -> dict[str, str]:
    """The environment of a stage."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return inherited | (DRY if dry else {}) | dict(STAGES[name].environment)


def run(name: str, output: Path, limit: float, dry: bool) -> dict[str, Any]:
    """Run a stage, its output in its log; what became of it."""
    outcome = {"date": date.today().isoformat(), "required": STAGES[name].required, "seconds": 0.0, "note": ""}
    command = command_of(name, output, limit, dry)
    if not command:
        return outcome | {"outcome": "left out", "note": "not in a dry run"}
    for old in STAGES[name].results:
        (output / old).unlink(missing_ok=True)  # or an old one would pass for what this run measured
    log = output / "logs" / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        # A process group of its own, so that what it starts itself ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment_of(name, dry), stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    outcome["seconds"] = round(time.monotonic() - start, 1)
    if code is None:
        return outcome | {"outcome": "over its limit", "note": f"ended after {limit:.0f} s"}
    passed, note = count_tests(output / f"{name}.xml")
    late = log.read_text(errors="replace").count(NOT_MEASURED)
    if late:
        note = f"no time for {late} cases: {log.relative_to(output)}"
    if code:
        note = "; ".join(filter(None, [f"exit code {code}", note]))
    elif not passed:
        note += "; none ran"
    return outcome | {"outcome": "failed" if code or not passed else "passed", "note": note}


def count_tests(report: Path) -> tuple[bool, str]:
    """Whether any test ran, and how many did, by pytest's report; of a stage that has none, yes."""
    if not report.exists():
        return True, ""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    words = f"{total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"
    return total > skipped, words


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", choices=list(STAGES), action="append", help="may be given more than once; all if not"
    )
    parser.add_argument("--dry-run", action="store_true", help="what a machine without a GPU can do of each stage")
    parser.add_argument("--output", type=Path, help="a folder in place of benchmarks/results/<device>")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for a stage (default: 540)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("no GPU that torch can use (`python -m fastbp doctor`); --dry-run tries every stage without one")
        return 1
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    output = arguments.output or (Path(tempfile.mkdtemp(prefix="fastbp-dry-run-")) if dry else results_of(device))
    output = output.resolve()  # the stages run in the repository
    (output / "logs").mkdir(parents=True, exist_ok=True)
    kept = output / "stages.json"
    stages: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    failed = False
    for name in [name for name in STAGES if name in (arguments.stage or STAGES)]:
        print(f"{name}: ", end="", flush=True)
        found = stages[name] = run(name, output, arguments.limit, dry)
        kept.write_text(json.dumps(stages, indent=1) + "\n")
        print(", ".join(filter(None, [found["outcome"], f"{found['seconds']:.0f} s", found["note"]])), flush=True)
        if found["outcome"] not in ("passed", "left out"):
            failed = failed or found["required"]
            lines = (output / "logs" / f"{name}.log").read_text(errors="replace").splitlines()
            print("".join(f"  {line}\n" for line in lines[-15:]), end="", flush=True)
    ordered = {name: stages[name] for name in STAGES if name in stages}
    facts = environment(f"python -m benchmarks.gpu {' '.join(argv if argv is not None else sys.argv[1:])}", device)
    text = summary(output, facts, ordered, dry)
    (output / "summary.md").write_text(text)
    print(f"\n{text}\n{output / 'summary.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
