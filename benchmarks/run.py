"""Speed of forward and backward against its rivals: ``python -m benchmarks.run --suite layers``.

Every rival gets the same parameters and input, is checked against float64 before it is timed, and takes its turn in
short bursts beside the others. The table shows medians: milliseconds of a step, and how many times as fast as eager
(in brackets the 20th and 80th percentile, turn by turn). ``eager again`` is the noise. A rival that is less accurate
than twice eager's error is timed and marked; fastbp is not let off, and the exit code is 1. Results go to
benchmarks/results/<device>/<suite>.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, keep_freed_memory, write
from benchmarks.measure import bursts, prepare, summarise
from benchmarks.rivals import RIVALS
from benchmarks.suites import SUITES, Case


def measure(case: Case, names: list[str], seconds: float) -> dict[str, object]:
    """One row of a result file."""
    steps, accuracy = prepare(case, names)
    times = bursts(steps, seconds)
    rows = {name: summarise(t, times["eager"]) | accuracy.get(name, {}) for name, t in times.items()}
    return {"case": case.name, "rivals": rows}


def print_row(row: dict[str, object]) -> None:
    """A case on the terminal."""
    print(row["case"])
    rivals: dict[str, dict[str, float]] = row["rivals"]  # type: ignore[assignment]
    for name, r in rivals.items():
        spread = f"({r['over_eager_p20']:.2f} to {r['over_eager_p80']:.2f})"
        note = "" if r.get("accurate", True) else "  less accurate than eager allows"
        print(f"  {name:18}{r['ms']:10.3f} ms   {r['over_eager']:6.2f} × eager {spread}{note}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument(
        "--suite", choices=list(SUITES), action="append", help="may be given more than once; all if not"
    )
    parser.add_argument(
        "--rival", choices=list(RIVALS), action="append", help="beside eager; those for every run if not"
    )
    parser.add_argument("--case", default="", help="only cases whose name has this in it; nothing written")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each rival of a case")
    parser.add_argument("--quick", action="store_true", help="0.1 seconds each, no torch.compile, nothing written")
    parser.add_argument("--output", type=Path, help="a folder for the result files, also for --quick and --case")
    arguments = parser.parse_args(argv)
    names = ["eager", *(arguments.rival or [n for n, r in RIVALS.items() if r.always and n != "eager"])]
    seconds = arguments.seconds
    # A result file holds a whole suite: a part of one goes only where it is sent.
    output = arguments.output or (None if arguments.quick or arguments.case else RESULTS / arguments.device)
    if arguments.quick:
        seconds = 0.1
        names = [name for name in names if name != "torch.compile"]
    keep_freed_memory()
    failed = False
    for suite in arguments.suite or SUITES:
        rows = []
        for case in SUITES[suite]:
            if arguments.case not in case.name:
                continue
            torch._dynamo.reset()
            try:
                rows.append(measure(case, names, seconds))
            except AssertionError as error:  # a wrong result is not worth timing
                print(f"  {error}", file=sys.stderr)
                failed = True
                continue
            print_row(rows[-1])
        if output is not None and rows:
            write(output / f"{suite}.json", rows, ["benchmarks.run", *(argv if argv is not None else sys.argv[1:])])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
