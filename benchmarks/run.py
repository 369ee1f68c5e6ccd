"""Speed, memory and accuracy against the rivals: ``python -m benchmarks.run --suite layers``; the suites are below.

Every rival gets the same parameters and inputs, is checked against float64 before it is timed, and takes its turn in
short bursts beside the others. The table shows medians: milliseconds of a step, and how many times as fast as eager
(in brackets the 20th and 80th percentile, turn by turn). ``eager again`` is the noise, ``linears alone`` the floor. A
rival that is less accurate than twice eager's error is timed and marked; fastbp is not let off, and the exit code is 1,
as it is where a route of it is broken. A rival that cannot take part is named with the reason. Results go to
benchmarks/results/<device>/<suite>.jsonl.

Modes: fwd_bwd, forward and backward; fwd, a forward pass of which nothing is kept; bwd, backward alone; train, of a
model both by way of its loss, and a step of AdamW.

With ``--device cuda`` the milliseconds are by events around bursts; beside them stand those of a replayed CUDA graph,
which are the kernels' alone, and what a call costs the host. The inputs rotate over more copies than the L2 cache has
room for.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_clock
from benchmarks.cases import Case, flops, least_bytes
from benchmarks.choice import Item, chosen, names_of, passed_on
from benchmarks.environment import CPU, NOT_MEASURED, announced, keep_freed_memory, results_of, write
from benchmarks.measure import burst, bursts, on_cuda, prepare, summarise
from benchmarks.peaks import peaks
from benchmarks.records import Row
from benchmarks.rivals import RIVALS
from benchmarks.suites import MODES, SUITES

DTYPES = ("float32", "bfloat16", "float16")
QUICK_SECONDS = 0.02
REMARKS = {"left_out": "left out", "broken": "is broken", "no_graph": "has no CUDA graph"}


def measure(case: Case, names: list[str], seconds: float, device: torch.device, mode: str = "fwd_bwd") -> Row:
    """One row of a result file."""
    prepared = prepare(case, names, device, mode)
    cuda = device.type == "cuda"
    times = bursts(prepared.steps, seconds, cuda_clock.burst if cuda else burst)
    figures, ungraphed = on_cuda(prepared, seconds, mode) if cuda else ({}, {})
    rows = {
        name: summarise(t, times["eager"]) | figures.get(name, {}) | prepared.accuracy.get(name, {})
        for name, t in times.items()
    }
    remarks = {"left_out": prepared.left_out, "broken": prepared.broken, "no_graph": ungraphed}
    copies = {"copies": prepared.copies} if cuda else {}
    least = {"flops": flops(case, mode), "bytes": least_bytes(case, mode)}
    row = {"case": case.name, "mode": mode, **copies, **least, "rivals": rows}
    return row | {key: found for key, found in remarks.items() if found}


def print_row(row: Row) -> None:
    """A case on the terminal."""
    print(f"{row['case']} {row['mode']}")
    rivals: dict[str, dict[str, float]] = row["rivals"]
    remarks: dict[str, dict[str, str]] = {key: row.get(key, {}) for key in REMARKS}
    names = [*rivals, *(name for found in remarks.values() for name in found)]
    wide = max(18, *(len(name) + 1 for name in names))
    for name, r in rivals.items():
        spread = f"({r['over_eager_p20']:.2f} to {r['over_eager_p80']:.2f})"
        note = ""
        if "host_ms" in r:
            note += f"   host {r['host_ms']:7.3f} ms"
        if "graph_ms" in r:
            note += f"   graph {r['graph_ms']:10.3f} ms"
        if "graph_over_eager" in r:
            note += f"   {r['graph_over_eager']:6.2f} × eager"
        if not r.get("accurate", True):
            said = "no number" if r["error"] is None else f"{r['error']:.1e}"
            note += f"  less accurate than eager allows: error {said}"
        print(f"  {name:{wide}}{r['ms']:10.3f} ms   {r['over_eager']:6.2f} × eager {spread}{note}", flush=True)
    for key, found in remarks.items():
        for name, reason in found.items():
            print(f"  {name:{wide}}{REMARKS[key]}: {reason}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with what they leave open filled in: ``items`` is what there is to measure, suite by suite."""
    suites = "\n".join(f"  {name:10}{suite.about}" for name, suite in SUITES.items())
    rivals = textwrap.fill("; ".join(RIVALS), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsuites:\n{suites}\n\nrivals:\n{rivals}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--suite", choices=list(SUITES), action="append", help="may be given more than once; all if not"
    )
    parser.add_argument("--case", help="only the case of this name, or those with this in their names")
    parser.add_argument("--mode", choices=MODES, action="append", help="those of the suite if not given")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only cases of it")
    one_of: dict[str, Any] = {"choices": list(RIVALS), "action": "append", "metavar": "RIVAL"}
    parser.add_argument("--rival", **one_of, help="beside eager; those of the suite if not given")
    parser.add_argument("--skip", **one_of, default=[], help="a rival to leave out")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each rival of a case")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case begins")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest case of every suite for a moment, without torch.compile"
    )
    parser.add_argument("--output", type=Path, help="a folder for the result files, also for a part of a suite")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    if "eager" in arguments.skip:
        parser.error("--skip eager: every other rival is compared with it")
    if arguments.quick:
        arguments.seconds = QUICK_SECONDS
        arguments.skip += [name for name in RIVALS if name.startswith("torch.compile")]
    try:
        arguments.items = chosen(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = parse(argv)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    command = ["benchmarks.run", *(argv if argv is not None else sys.argv[1:])]
    # A result file holds a whole suite: a part of one goes only where it is sent.
    part = any((arguments.quick, arguments.case, arguments.mode, arguments.dtype, arguments.rival))
    output: Path | None = arguments.output or (None if part else results_of(device))
    keep_freed_memory()
    timed = any(not SUITES[item.suite].module for item in arguments.items)
    highest = peaks(device) if output is not None and timed and not arguments.quick else None
    rows: dict[str, list[Row]] = {}
    failed = False
    for item in announced(arguments.items):
        left = arguments.limit - (time.monotonic() - start)
        if left < 0:
            print(f"{f'{item.case.name} {item.mode}' if item.case else item.suite}{NOT_MEASURED}", flush=True)
            continue
        if item.case is None:
            failed = bool(import_module(SUITES[item.suite].module).main(passed_on(item, arguments, left))) or failed
            continue
        row = _row(item, item.case, arguments, device)
        failed = failed or row is None or "broken" in row
        if row is None:
            continue
        rows.setdefault(item.suite, []).append(row)
        print_row(row)
        if output is not None:  # now, should this process be ended before the last case
            write(output / f"{item.suite}.jsonl", rows[item.suite], command, device, quiet=True, peaks=highest)
    for suite in rows if output is not None else ():
        print(f"written to {output / f'{suite}.jsonl'}")  # type: ignore[operator]
    return int(failed)


def _row(item: Item, case: Case, arguments: argparse.Namespace, device: torch.device) -> Row | None:
    """What was measured; None where fastbp or eager failed, which is said."""
    torch._dynamo.reset()
    try:
        return measure(case, names_of(item.suite, case, arguments), arguments.seconds, device, item.mode)
    except AssertionError as error:  # a wrong result is not worth timing
        print(f"  {item.mode}: {error}", file=sys.stderr)
    except Exception as error:  # the other cases are still worth it
        print(f"  {case.name} {item.mode}: {type(error).__name__}: {error}", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main())
