"""The large campaign: every kernel's real PTX with many cases and schedules, ``make emulate``.

    PYTHONPATH=tests python -m emulated.campaign                        everything
    PYTHONPATH=tests python -m emulated.campaign --kernel hopper        the kernels with this in their name
    PYTHONPATH=tests python -m emulated.campaign --quick                a few cases of each, and no results
    PYTHONPATH=tests python -m emulated.campaign --only LABEL --seed 7  one run again, and no results

The results, a row for each kernel and architecture with the day and the commit, go to benchmarks/results/emulated.jsonl
in place of the rows of these kernels, and docs/gpu-status.md shows them. The exit code is 1 where anything was not
right.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import itertools
import math
import multiprocessing
import os
import random
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ptxsim import Device

from benchmarks import records
from benchmarks.environment import environment
from emulated import compiled

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "emulated.jsonl"
CUDA = ("cuda_hopper", "cuda_elementwise", "cuda_compressed")
TRITON = ("triton_products", "triton_elementwise", "triton_compressed", "triton_sweeps", "pingpong")
VALUES = {"activation": "activations", "dtype": "dtypes", "policy": "policies", "shape": "shapes"}  # of a line
SEEDS, FIRST_SEED = 8, 1000
EACH = 400  # cases of a worker, before another takes its place: it keeps what it parsed and translated


class Run(NamedTuple):
    """A job under one seed."""

    seed: int
    fault: str
    text: str
    error: float
    instructions: int


class Outcome(NamedTuple):
    """A job under all its seeds, and what was met of the kernels that ran: by digest their instructions, and bits."""

    number: int
    runs: list[Run]
    met: dict[str, tuple[int, bytes]]
    seconds: float


@dataclass
class Line:
    """A line of the results."""

    of: int = 0  # cases that there are
    cases: int = 0  # that were run
    runs: int = 0
    instructions: int = 0
    seconds: float = 0.0
    error: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    met: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, job: Any, outcome: Outcome) -> None:
        if not outcome.runs:
            return
        self.cases += 1
        self.runs += len(outcome.runs)
        self.seconds += outcome.seconds
        for run in outcome.runs:
            self.instructions += run.instructions
            self.error = max(self.error, run.error)
            if run.fault:
                self.faults[run.fault] += 1
        for name, several in VALUES.items():
            self.values.setdefault(several, {})[getattr(job, name)] = None
        for digest, (count, bits) in outcome.met.items():
            found = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)
            self.met[digest] = self.met[digest] | found if digest in self.met else found

    def row(self, kernel: str, family: str) -> dict[str, Any]:
        total, met = (sum(figure(found) for found in self.met.values()) for figure in (len, np.count_nonzero))
        return {
            "kernel": kernel, "family": family, "cases": self.cases, "of": self.of, "runs": self.runs,
            "faults": dict(self.faults), "error": round(self.error, 3), "instructions": self.instructions,
            "met": round(int(met) / total, 4) if total else None, "seconds": round(self.seconds, 1),
            **{several: list(found) for several, found in self.values.items()},
        }  # fmt: skip


def jobs() -> Iterator[Any]:
    """Every job of every module that can run here; a line says what cannot."""
    from emulated import ptx

    if ptx.UNAVAILABLE:
        print(f"no CUDA kernels: {ptx.UNAVAILABLE}")
    for name in (() if ptx.UNAVAILABLE else CUDA) + TRITON:
        yield from importlib.import_module(f"emulated.{name}").campaign()


def chosen(options: argparse.Namespace) -> list[Any]:
    found = [job for job in jobs() if options.kernel in job.kernel and options.only in job.label]
    if options.quick:  # the first, a middle and the last of each kernel, architecture and policy
        alike: dict[tuple[str, ...], list[Any]] = {}
        for job in found:
            alike.setdefault((job.kernel, job.family, job.policy), []).append(job)
        found = [job for like in alike.values() for job in dict.fromkeys((like[0], like[len(like) // 2], like[-1]))]
    return found


_jobs: list[Any] = []  # of a worker: the same list in each
_launched: dict[int, Any] = {}  # the kernels of the job that it runs, by identity


def _start(options: argparse.Namespace) -> None:
    compiled.compiling()
    _jobs.extend(chosen(options))
    launch = Device.launch

    @functools.wraps(launch)
    def watched(device: Device, kernel: Any, *arguments: Any, **others: Any) -> Any:
        _launched[id(kernel)] = kernel
        return launch(device, kernel, *arguments, **others)

    Device.launch = watched


def _work(asked: tuple[int, Sequence[int], float]) -> Outcome:
    number, seeds, until = asked
    runs: list[Run] = []
    _launched.clear()
    began = time.perf_counter()
    for seed in seeds if time.time() < until else ():
        verdict = _judged(_jobs[number], seed)
        runs.append(Run(seed, verdict.fault, verdict.text, verdict.error, verdict.instructions))
    seconds, met = time.perf_counter() - began, {}
    if runs:
        gc.collect()  # of few objects, which hold the memory of a device
        gc.freeze()  # what was parsed stays, and to look through it again took as long as the run
    for kernel in _launched.values():
        digest = hashlib.sha256(f"{kernel.name} {kernel.module.source}".encode()).hexdigest()
        bits = kernel.coverage().met
        met[digest] = len(bits), np.packbits(bits).tobytes()
    return Outcome(number, runs, met, seconds)


def _judged(job: Any, seed: int) -> Any:
    from emulated.jobs import Verdict, judged

    try:
        return judged(job.run, *job.args, seed)
    except Exception as error:  # the case itself is at fault, and the others shall go on
        return Verdict(type(error).__name__, "".join(traceback.format_exception(error)))


def schedules(todo: Sequence[Any], options: argparse.Namespace) -> list[tuple[int, Sequence[int], float]]:
    """Each case with its seeds, which no other case has, in an order that mixes the kernels; and until when it may
    begin."""
    until = time.time() + 60 * options.minutes
    if options.seed is not None:
        return [(i, [options.seed], until) for i in range(len(todo))]
    many = [max(1, round(options.seeds * job.share)) for job in todo]
    firsts = itertools.accumulate(many, initial=FIRST_SEED)
    asked = [
        (i, range(first, first + count), until) for i, (first, count) in enumerate(zip(firsts, many, strict=False))
    ]
    random.Random(0).shuffle(asked)
    return asked


def execute(options: argparse.Namespace) -> tuple[dict[tuple[str, str], Line], int]:
    """All that was chosen, in several processes. The lines of the results, and how many runs failed."""
    todo = chosen(options)
    print(f"{len(todo)} cases", flush=True)
    lines: dict[tuple[str, str], Line] = {}
    for job in todo:
        lines.setdefault((job.kernel, job.family), Line()).of += 1
    failed = 0
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, _start, (options,), EACH) as pool:
        for done, outcome in enumerate(pool.imap_unordered(_work, schedules(todo, options)), start=1):
            job = todo[outcome.number]
            lines[job.kernel, job.family].add(job, outcome)
            for run in outcome.runs:
                if run.fault:
                    failed += 1
                    what = f"{job.kernel} {job.family} {job.label}, seed {run.seed}"
                    print(f"{what}: {run.fault}\n{run.text}", flush=True)
            if done % 100 == 0 or done == len(todo):
                print(f"{done} of {len(todo)} cases, {failed} faults, {time.perf_counter() - began:.0f} s", flush=True)
    return lines, failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m emulated.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few cases of each kernel, and no results file")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="kernels with this in their name")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their label; no results")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="schedules for each case (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="this schedule alone, as a fault names it")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long; else all are run")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args(argv)
    compiled.compiling()
    lines, failed = execute(options)
    if not lines:
        parser.error(f"no case has {options.only!r} in it, or no kernel {options.kernel!r}")
    rows = [line.row(*key) for key, line in lines.items() if line.runs]
    for row in rows:
        faults, met = row["faults"] or "none", row["met"] or 0
        print(f"{row['kernel']} {row['family']}: {row['runs']} runs, faults {faults}, {met:.1%} of its instructions")
    if not (options.quick or options.only or options.seed is not None):
        remember(rows, sys.argv[1:] if argv is None else argv)
    return int(failed > 0)


def remember(rows: Sequence[dict[str, Any]], words: Sequence[str]) -> None:
    """Put rows in the place of those of the same kernels and architectures, with what they belong to."""
    import triton

    from emulated import ptx

    command = f'make emulate ARGS="{shlex.join(words)}"' if words else "make emulate"
    nvcc = None if ptx.UNAVAILABLE else ptx.version()
    now = environment(command) | {"nvcc": nvcc, "triton": triton.__version__, "numpy": np.__version__}
    del now["settings"]  # where the compilers keep their files is nobody's business, and changes no result
    stamp = {name: now[name] for name in ("date", "commit", "command", "nvcc", "triton")}
    before = records.read(RESULTS).rows if RESULTS.exists() else []
    found = {(row["kernel"], row["family"]): row for row in before}
    found |= {(row["kernel"], row["family"]): row | stamp for row in rows}
    records.write(RESULTS, now, [found[key] for key in sorted(found)])
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
