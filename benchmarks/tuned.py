"""Is what ``fastbp.tune`` chooses the best there is? ``python -m benchmarks.tuned --suite layers``.

Each case is tuned in a cache of its own. Then eager, fastbp by its written rule, fastbp tuned and every candidate that
was within a quarter of the fastest take turns anew, forward and backward, all by the same module. ``of best`` is the
time of the best candidate over that of the tuned call, turn by turn, ``of eager`` that of eager. Which candidate is the
best is told from one half of the turns, and its ratio from the other, for the luckiest of several equals would always
be ahead of any of them. A ratio that is below its floor, 0.99 and 0.98, by more than the noise, two standard errors of
its median, is measured once more with the same choice and four times the turns, and that stands. Who then is below is
named at the end. Results go to benchmarks/results/<device>/tuned.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_clock, records
from benchmarks.cases import Case, Model, flops, least_bytes
from benchmarks.clock import Step, burst
from benchmarks.environment import CPU, NOT_MEASURED, announced, environment, keep_freed_memory, results_of, write
from benchmarks.measure import bursts, quantiles, summarise
from benchmarks.rivals import Run, eager, fused
from benchmarks.steps import Task, step_of, task_of
from benchmarks.suites import SUITES
from fastbp import backends, tuning
from fastbp.backends import Table, with_choice
from fastbp.backends.measured import Choice, by_sizes
from fastbp.problem import Config
from fastbp.tuning.jobs import Job, watch
from fastbp.tuning.race import error_of_median

OF_BEST, OF_EAGER = 0.99, 0.98
LONGER = 4  # times the seconds, for who seems to be below a floor
NEAR = 1.25  # times as long as the fastest, when tuned, who is measured again
DEFAULT = ("layers", "blocks", "small", "edges", "overhead")
Row = dict[str, Any]


@contextmanager
def own_cache() -> Iterator[None]:
    """Nothing is known here, and nothing learnt here is known elsewhere."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="fastbp-tuned-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        backends.forget()
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
            backends.choose_from({})
            backends.forget()


def choosing(table: Table, step: Callable[[], object]) -> Step:
    """A step whose calls choose from this table."""

    def chosen() -> object:
        backends.choose_from(table)
        return step()

    return chosen


def steps_of(task: Task, job: Job, call: tuning.TunedCall) -> tuple[dict[str, Step], dict[str, str]]:
    """Who is measured: eager twice, fastbp by the rule, tuned, and by each candidate. And who is not, and why.

    Each candidate is called as if it were what is remembered: the look at the sizes is in its time as in the tuned
    call's, and not in that of the written rule.
    """
    module = fused()(task.case, task.parts)

    def step(run: Run) -> Callable[[], object]:
        return step_of(task, run, "fwd_bwd", None)

    def chosen(name: str) -> Config:
        backend, _, route = name.partition(" ")
        return with_choice(job.config, Choice(backend, route))

    key, rule = (job.config, job.device, job.dtype), chosen(call.unmeasured)

    steps = {"eager": step(eager(task.case, task.parts)), "eager again": step(eager(task.case, task.parts))}
    steps["fastbp"] = choosing({key: rule}, step(module))
    steps["fastbp tuned"] = choosing({}, step(module))
    left_out = {f"candidate {name}": reason for name, reason in call.refused.items()}
    for name, ms in call.milliseconds.items():
        slower = ms / call.milliseconds[call.fastest]
        if slower > NEAR:
            left_out[f"candidate {name}"] = f"{slower:.2f} times as long as the fastest when tuned"
        else:
            remembered = by_sizes(rule, {job.sizes: chosen(name)})
            steps[f"candidate {name}"] = choosing({key: remembered}, step(module))
    return steps, left_out


def measure(case: Case, device: torch.device, seconds: float, tuning_seconds: float) -> Row:
    """One row of the result file. A choice that is in the cache already is kept."""
    task = task_of(case, device)
    module: Any = fused()(case, task.parts)
    (job,) = watch("benchmarks.tuned", module, task.inputs[0][0]).jobs
    (call,) = tuning.tune_jobs([(job, 1)], tuning_seconds, again=False, quiet=True).calls
    steps, left_out = steps_of(task, job, call)
    times = bursts(steps, seconds, cuda_clock.burst if device.type == "cuda" else burst)
    rivals = {name: summarise(found, times["eager"]) for name, found in times.items()}
    row: Row = {"case": case.name, "mode": "fwd_bwd", "flops": flops(case, "fwd_bwd")}
    row |= {"bytes": least_bytes(case, "fwd_bwd"), "chosen": call.fastest, "rule": call.unmeasured}
    row |= beside_the_best(times) | {"rivals": rivals}
    of_eager = [e / t for e, t in zip(times["eager"], times["fastbp tuned"], strict=True)]
    row["of_eager_error"] = round(error_of_median(of_eager), 4)
    return row | ({"left_out": left_out} if left_out else {})


def beside_the_best(times: Mapping[str, Sequence[float]]) -> Row:
    """The time of the best candidate over the tuned call's; each half of the turns tells the other which that is."""
    candidates = [name for name in times if name.startswith("candidate ")]
    ratios: list[float] = []
    for half in (0, 1):
        best = min(candidates, key=lambda name: statistics.median(times[name][half::2]))
        pairs = zip(times[best][1 - half :: 2], times["fastbp tuned"][1 - half :: 2], strict=True)
        ratios += [b / t for b, t in pairs]
    best = min(candidates, key=lambda name: statistics.median(times[name]))
    return {
        "best": best.removeprefix("candidate "),
        "of_best": round(quantiles(ratios)[1], 3),
        "of_best_error": round(error_of_median(ratios), 4),
    }


def kept(path: Path, device: torch.device) -> list[Row]:
    """The rows of an earlier run, cut short, of this commit on this machine."""
    if not path.exists():
        return []
    found, rows = records.read(path, needed=("case", "rivals", "of_best", "of_best_error", "of_eager_error"))
    here = environment("", device)
    other = [key for key in here if key not in ("date", "command", "cpu_mhz") and here[key] != (found or {}).get(key)]
    if other:
        raise ValueError(f"{path} has rows of another {', '.join(other)}; without --resume they are replaced")
    return rows


def print_row(row: Row) -> None:
    tuned, again = row["rivals"]["fastbp tuned"], row["rivals"]["eager again"]
    rule = row["rivals"]["fastbp"]
    print(
        f"{row['case']}: {row['chosen']}, {tuned['ms']:.3f} ms, {tuned['over_eager']:.2f} × eager "
        f"(by the rule {rule['over_eager']:.2f}, noise {again['over_eager']:.2f}), {row['of_best']:.3f} ± "
        f"{row['of_best_error']:.3f} of {row['best']}",
        flush=True,
    )


def is_short(row: Row) -> bool:
    """Whether a floor is missed by more than the noise."""
    of_eager = row["rivals"]["fastbp tuned"]["over_eager"]
    return bool(row["of_best"] < OF_BEST - 2 * row["of_best_error"] or of_eager < OF_EAGER - 2 * row["of_eager_error"])


def summary(rows: list[Row]) -> str:
    """The lowest of each ratio."""
    lines = []
    for words, figure in (
        ("of the best candidate", lambda row: row["of_best"]),
        ("of eager, tuned", lambda row: row["rivals"]["fastbp tuned"]["over_eager"]),
        ("of eager, by the rule", lambda row: row["rivals"]["fastbp"]["over_eager"]),
        ("of eager, eager again", lambda row: row["rivals"]["eager again"]["over_eager"]),
    ):
        low, middle, high = min(rows, key=figure), quantiles([figure(row) for row in rows])[1], max(map(figure, rows))
        lines.append(f"{words}: worst {figure(low):.3f} ({low['case']}), median {middle:.3f}, best {high:.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--suite", choices=DEFAULT, action="append", help="all of these if not given")
    parser.add_argument("--case", default="", help="only cases whose name has this in it; nothing written")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each who takes part")
    parser.add_argument("--tuning-seconds", type=float, default=tuning.SECONDS, help="as fastbp.tune(seconds=)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case begins")
    parser.add_argument("--output", type=Path, help="a folder for the result file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure the others")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    every = [case for name in arguments.suite or DEFAULT for case in SUITES[name].cases[device.type]]
    cases = [case for case in dict.fromkeys(every) if arguments.case in case.name and not isinstance(case, Model)]
    if not cases:
        parser.error(f"--case {arguments.case!r} is in no name of {', '.join(case.name for case in every)}")
    output: Path | None = arguments.output or (None if arguments.case or arguments.suite else results_of(device))
    keep_freed_memory()
    rows: list[Row] = []
    if arguments.resume:
        if output is None:
            parser.error("--resume: without --output the rows of --suite and --case are written nowhere")
        try:
            rows = kept(output / "tuned.jsonl", device)
        except ValueError as error:
            parser.error(f"--resume: {error}")
    there = {row["case"] for row in rows}
    with own_cache():
        for case in announced([case for case in cases if case.name not in there]):
            if time.monotonic() - start > arguments.limit:
                print(f"{case.name}{NOT_MEASURED}", flush=True)
                continue
            row = measure(case, device, arguments.seconds, arguments.tuning_seconds)
            if is_short(row):
                print_row(row)
                row = measure(case, device, LONGER * arguments.seconds, arguments.tuning_seconds) | {"longer": LONGER}
            rows.append(row)
            print_row(row)
            if output is not None:
                command = ["benchmarks.tuned", *(argv if argv is not None else sys.argv[1:])]
                write(output / "tuned.jsonl", rows, command, device, quiet=True)
    if rows:
        print(summary(rows))
    for name in (row["case"] for row in rows if is_short(row)):
        print(f"below its floor by more than the noise: {name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
