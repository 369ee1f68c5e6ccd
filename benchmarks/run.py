"""Speed of forward and backward against its rivals: ``python -m benchmarks.run --suite layers``.

Every rival gets the same parameters and input, is checked against float64 before it is timed, and takes its turn in
short bursts beside the others. The table shows medians: milliseconds of a step, and how many times as fast as eager
(in brackets the 20th and 80th percentile, turn by turn). ``eager again`` is the noise. A rival that is less accurate
than twice eager's error is timed and marked; fastbp is not let off, and the exit code is 1. Results go to
benchmarks/results/<device>/<suite>.json.

With ``--device cuda`` the milliseconds are by events around bursts; beside them stand those of a replayed CUDA graph,
which are the kernels' alone, and what a call costs the host. The inputs rotate over more copies than the L2 cache has
room for.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import cuda_clock
from benchmarks.environment import NOT_MEASURED, keep_freed_memory, results_of, write
from benchmarks.measure import burst, bursts, on_cuda, prepare, summarise
from benchmarks.rivals import RIVALS, rivals_of
from benchmarks.suites import SUITES, Case


def measure(case: Case, names: list[str], seconds: float, device: torch.device) -> dict[str, object]:
    """One row of a result file."""
    prepared = prepare(case, names, device)
    cuda = device.type == "cuda"
    times = bursts(prepared.steps, seconds, cuda_clock.burst if cuda else burst)
    figures, ungraphed = on_cuda(prepared, seconds) if cuda else ({}, {})
    rows = {
        name: summarise(t, times["eager"]) | figures.get(name, {}) | prepared.accuracy.get(name, {})
        for name, t in times.items()
    }
    remarks = {"left_out": prepared.left_out, "broken": prepared.broken, "no_graph": ungraphed}
    copies = {"copies": prepared.copies} if cuda else {}
    return {"case": case.name, **copies, "rivals": rows} | {key: found for key, found in remarks.items() if found}


def print_row(row: dict[str, object]) -> None:
    """A case on the terminal."""
    print(row["case"])
    rivals: dict[str, dict[str, float]] = row["rivals"]  # type: ignore[assignment]
    wide = max(18, *(len(name) + 1 for name in rivals))
    for name, r in rivals.items():
        spread = f"({r['over_eager_p20']:.2f} to {r['over_eager_p80']:.2f})"
        note = ""
        if "host_ms" in r:
            note += f"   host {r['host_ms']:7.3f} ms"
        if "graph_ms" in r:
            note += f"   graph {r['graph_ms']:10.3f} ms"
        if "graph_over_eager" in r:
            note += f"   {r['graph_over_eager']:6.2f} × eager"
        note += "" if r.get("accurate", True) else "  less accurate than eager allows"
        print(f"  {name:{wide}}{r['ms']:10.3f} ms   {r['over_eager']:6.2f} × eager {spread}{note}", flush=True)
    for remark, words in (("left_out", "left out"), ("broken", "is broken"), ("no_graph", "has no CUDA graph")):
        found: dict[str, str] = row.get(remark, {})  # type: ignore[assignment]
        for name, reason in found.items():
            print(f"  {name:{wide}}{words}: {reason}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with what they leave open filled in for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--suite", choices=list(SUITES), action="append", help="may be given more than once; all for the device if not"
    )
    parser.add_argument(
        "--rival", choices=list(RIVALS), action="append", help="beside eager; those of the suite if not"
    )
    parser.add_argument("--skip", choices=list(RIVALS), action="append", default=[], help="a rival to leave out")
    parser.add_argument("--case", default="", help="only cases whose name has this in it; nothing written")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each rival of a case")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case begins")
    parser.add_argument("--quick", action="store_true", help="0.1 seconds each, no torch.compile, nothing written")
    parser.add_argument("--output", type=Path, help="a folder for the result files, also for --quick and --case")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    timed = [name for name, suite in SUITES.items() if not suite.module and name != "models"]
    arguments.suite = arguments.suite or timed
    if "eager" in arguments.skip:
        parser.error("--skip eager: every other rival is compared with it")
    if arguments.quick:
        arguments.seconds = 0.1
        arguments.skip += [name for name in RIVALS if name.startswith("torch.compile")]
    return arguments


def names_of(suite: str, case: Case, arguments: argparse.Namespace) -> list[str]:
    """Who is measured in a suite."""
    names = ["eager", *(arguments.rival or rivals_of(suite, case, arguments.device))]
    return [name for name in dict.fromkeys(names) if name not in arguments.skip]


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = parse(argv)
    device = torch.device(arguments.device, 0 if arguments.device == "cuda" else None)
    # A result file holds a whole suite: a part of one goes only where it is sent.
    output = arguments.output or (None if arguments.quick or arguments.case else results_of(device))
    command = ["benchmarks.run", *(argv if argv is not None else sys.argv[1:])]
    keep_freed_memory()
    failed = False
    for suite in arguments.suite:
        rows: list[dict[str, object]] = []
        for case in SUITES[suite].cases[arguments.device]:
            if arguments.case not in case.name:
                continue
            if time.monotonic() - start > arguments.limit:
                print(f"{case.name}{NOT_MEASURED}", flush=True)
                continue
            torch._dynamo.reset()
            try:
                rows.append(measure(case, names_of(suite, case, arguments), arguments.seconds, device))
            except AssertionError as error:  # a wrong result is not worth timing
                print(f"  {error}", file=sys.stderr)
                failed = True
                continue
            except Exception as error:  # the other cases are still worth it
                print(f"  {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
                continue
            failed = failed or "broken" in rows[-1]
            print_row(rows[-1])
            if output is not None:  # now, should this process be ended before the last case
                write(output / f"{suite}.jsonl", rows, command, device, quiet=True)
        if output is not None and rows:
            print(f"written to {output / suite}.json")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
