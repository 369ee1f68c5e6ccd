"""Did something become slower? ``make bench-check``: this tree beside a committed version, in one run in turns.

The base is by default the commit that the committed results of this machine belong to. It is unpacked into
build/bench-check with a native library of its own, and stays there for the next run. Each version has a process that
makes the calls, forward and backward, and the base has two: what differs between those is the noise. They take turns in
bursts, in an order of its own every turn. A case is slower where the ratio of times, turn by turn, is above 1 from its
20th percentile on, and its median by more than the noise and 2 %. Who seems so is measured once more, by new processes
and three times as long, and that is what counts. Each version's results are compared with float64 first.

Without --suite, --case or --quick a part of the cases is measured, spread over each suite and dtype.
Exit code 1 where something became slower or is wrong, 2 where the versions or cases asked for cannot be had.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.choice import matching
from benchmarks.environment import CPU, NOT_MEASURED, announced
from benchmarks.measure import bursts, quantiles
from benchmarks.suites import SUITES
from benchmarks.versions import (
    MEASURED,
    ROOT,
    Failed,
    Unusable,
    Worker,
    check_alike,
    commit_of,
    default_base,
    restart,
    same,
    unpacked,
)

TIMED = tuple(name for name, suite in SUITES.items() if "fastbp" in suite.rivals["cpu"])
DEFAULT = ("layers", "blocks", "small", "overhead", "models")
PART, QUICK = 6, 1  # cases of each suite and dtype, where not all are asked for
LEAST = 0.02  # what no noise is taken to be below
AGAIN = 3  # times as long


@dataclass(frozen=True)
class Verdict:
    """Of one case: this tree's time over the base's, turn by turn, and the same of the noise; 20th percentile, median,
    80th."""

    name: str
    ratio: tuple[float, float, float]
    noise: tuple[float, float, float]
    milliseconds: tuple[float, float]  # the base's and this tree's, as are the errors
    errors: tuple[float, float]

    @property
    def margin(self) -> float:
        low, middle, high = self.noise
        return max(LEAST, abs(middle - 1), (high - low) / 2)

    @property
    def slower(self) -> bool:
        return self.ratio[0] > 1 and self.ratio[1] > 1 + self.margin

    @property
    def faster(self) -> bool:
        return self.ratio[2] < 1 and self.ratio[1] < 1 - self.margin

    def __str__(self) -> str:
        low, middle, high = self.ratio
        base, mine = self.milliseconds
        word = "SLOWER" if self.slower else "faster" if self.faster else ""
        return (
            f"{word:6} {middle:6.3f} ({low:.3f} to {high:.3f})  ±{self.margin:.3f}  {base:9.3f} {mine:9.3f}  "
            f"{self.errors[0]:7.1e} {self.errors[1]:7.1e}  {self.name}"
        )


HEAD = f"{'':6} {'this tree over base':23}  {'noise':>6}  {'base ms':>9} {'tree ms':>9}  {'errors':15}  case"


@dataclass(frozen=True)
class Fault:
    """A case that was not compared. ``fatal``: because of a wrong result, or of what this tree alone cannot do."""

    name: str
    reason: str
    fatal: bool


def compare(case: Case, device: str, workers: Sequence[Worker], seconds: float) -> Verdict | Fault:
    """Bursts of the base, of the base again and of this tree, in turn; checked first."""
    errors = []
    try:
        for worker in workers:
            found = worker.prepare(case, device)
            if not found["accurate"]:
                return Fault(case.name, f"{worker.name} is WRONG: its error is {found['error']:.2g}", True)
            errors.append(found["error"])
        times = bursts({str(turn): worker.ask for turn, worker in enumerate(workers)}, seconds, _burst)
    except Failed as failed:
        return Fault(case.name, str(failed), failed.worker is workers[-1])
    base, again, mine = times.values()
    ratio, noise = (quantiles([t / b for t, b in zip(other, base, strict=True)]) for other in (mine, again))
    return Verdict(case.name, ratio, noise, (quantiles(base)[1], quantiles(mine)[1]), (errors[0], errors[-1]))


def _burst(ask: Any, calls: int) -> float:
    return float(ask(calls=calls)["seconds"])


def chosen(arguments: argparse.Namespace) -> tuple[list[Case], int]:
    """The cases to measure, and how many the part of them leaves out. ValueError where there are none."""
    suites = arguments.suite or (TIMED if arguments.case else DEFAULT)
    every = [SUITES[suite].cases[arguments.device] for suite in dict.fromkeys(suites)]
    if arguments.case:
        found = [case for cases in every for case in matching(cases, arguments.case)]
        if not found:
            names = "\n  ".join(case.name for cases in every for case in cases)
            raise ValueError(f"--case {arguments.case!r} is in no name of {', '.join(suites)}:\n  {names}")
        return list(dict.fromkeys(found)), 0
    total = list(dict.fromkeys(case for cases in every for case in cases))
    if arguments.suite and not arguments.quick:
        return total, 0
    part = spread(every, QUICK if arguments.quick else PART)
    return part, len(total) - len(part)


def spread(suites: Sequence[Sequence[Case]], most: int) -> list[Case]:
    """So many of each suite and dtype, evenly over its table; the first of each come first, for time may run out."""
    groups: dict[tuple[int, torch.dtype], list[Case]] = defaultdict(list)
    for index, cases in enumerate(suites):
        for case in cases:
            groups[index, case.dtype].append(case)
    taken = []
    for turn in range(most):
        for group in groups.values():
            few = min(most, len(group))
            if turn < few:
                taken.append(group[turn * len(group) // few])
    return list(dict.fromkeys(taken))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit, tag or branch; if not given that of the machine's committed results")
    parser.add_argument("--suite", choices=TIMED, action="append", help=f"if not given {', '.join(DEFAULT)}, in part")
    parser.add_argument("--case", default="", help="the case of this name, or those with this in it; of all suites")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of the three processes, of a case")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which no new case begins (420)")
    parser.add_argument("--quick", action="store_true", help="0.1 seconds, and a case of each suite and dtype")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    if arguments.quick:
        arguments.seconds = 0.1
    try:
        arguments.cases, arguments.left_out = chosen(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    try:
        if arguments.base is None:
            commit, why = default_base(arguments.suite or DEFAULT, device)
        else:
            commit, why = commit_of(arguments.base), "as asked for"
        print(f"base: {commit}, {why}", flush=True)
        if same(commit, *MEASURED):
            print(f"this tree has the same {', '.join(MEASURED)}: what is measured is noise", flush=True)
        return between(unpacked(commit, device), ROOT, arguments)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def between(base: Path, mine: Path, arguments: argparse.Namespace) -> int:
    """Compare the fastbp of two trees; the exit code."""
    with ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbp-check-")))
        workers = []
        for name, tree in (("base", base), ("base again", base), ("this tree", mine)):
            workers.append(Worker(name, tree, cache))
            stack.callback(workers[-1].end)
        for worker in workers:
            worker.greet()
        for worker in (workers[0], workers[-1]):
            said = ", ".join(f"{name}: {state}" for name, state in worker.backends.items())
            print(f"{worker.name}: {worker.tree}; {said}", flush=True)
        check_alike(workers[0], workers[-1])
        return report(measured(arguments, workers), arguments.left_out)


def measured(arguments: argparse.Namespace, workers: Sequence[Worker]) -> list[Verdict | Fault]:
    """What came of each case; suspects once more, when it is settled who they are."""
    start = time.monotonic()
    found: dict[Case, Verdict | Fault] = {}
    for case in announced(arguments.cases):
        if time.monotonic() - start > arguments.limit:
            print(f"{case.name}{NOT_MEASURED}", flush=True)
        else:
            found[case] = compare(case, arguments.device, workers, arguments.seconds)
    suspects = [case for case, verdict in found.items() if isinstance(verdict, Verdict) and verdict.slower]
    if suspects:
        names = "".join(f"\n  {case.name}" for case in suspects)
        print(f"once more, by new processes and {AGAIN} times as long, because they seem slower:{names}", flush=True)
        restart(workers)  # where their memory lies is worth some per cent, and is drawn anew
    for case in announced(suspects):
        found[case] = compare(case, arguments.device, workers, AGAIN * arguments.seconds)
    return list(found.values())


def report(found: Sequence[Verdict | Fault], left_out: int = 0) -> int:
    """The table, the slowest first, and what was not compared; the exit code."""
    verdicts = sorted((v for v in found if isinstance(v, Verdict)), key=lambda v: -v.ratio[1])
    faults = [f for f in found if isinstance(f, Fault)]
    for line in (f"\n{HEAD}", *verdicts) if verdicts else ():
        print(line)
    for fault in faults:
        print(f"not compared: {fault.name}: {fault.reason}")
    slower, faster = sum(v.slower for v in verdicts), sum(v.faster for v in verdicts)
    print(f"\n{len(found)} cases: {slower} slower, {faster} faster, {len(faults)} not compared", end="")
    print(f"; {left_out} others left out, which --suite or --case measure" if left_out else "")
    return int(slower > 0 or any(fault.fatal for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
