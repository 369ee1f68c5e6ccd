"""Tuned choices: beside the best candidate, beside eager, and where they fall short."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.records import Row
from benchmarks.report.load import DTYPES, Machine, dtype_of
from benchmarks.report.tables import WORDS, Ratio, markdown, span, stamp
from benchmarks.tuned import OF_BEST, OF_EAGER, is_short

COLUMNS: dict[str, Callable[[Row], float]] = {
    "tuned, of the best candidate": lambda row: row["of_best"],
    "tuned × eager": lambda row: row["rivals"]["fastbp tuned"]["over_eager"],
    "by the rule × eager": lambda row: row["rivals"]["fastbp"]["over_eager"],
    "eager again": lambda row: row["rivals"]["eager again"]["over_eager"],
}


def table(machine: Machine) -> str:
    """Worst, median and best of each ratio by dtype, and the rows that miss a floor by more than the noise."""
    rows = machine.rows("tuned")
    if not rows:
        return f"Not measured on {machine.title}.\n"
    cells = []
    for dtype in DTYPES:
        found = [row for row in rows if dtype_of(row) == dtype]
        if found:
            spans = (span(sorted(Ratio(of(row), row["case"]) for row in found)) for of in COLUMNS.values())
            changed = sum(row["chosen"] != row["rule"] for row in found)
            cells.append([dtype, str(len(found)), str(changed), *spans])
    text = markdown(["dtype", "cases", "not by the rule", *(f"{name}: {WORDS}" for name in COLUMNS)], cells)
    facts = machine.suites["tuned"].environment
    return f"{text}\n{stamp(facts)}: `{facts.get('command', '')}`\n\n{_short(rows)}"


def _short(rows: list[Row]) -> str:
    short = sorted(
        (row for row in rows if is_short(row)), key=lambda row: min(of(row) for of in list(COLUMNS.values())[:2])
    )
    if not short:
        return f"Nowhere below {OF_BEST} of the best candidate or {OF_EAGER} of eager by more than the noise.\n"
    cells = [
        [
            row["case"],
            row["chosen"],
            f"{row['of_best']:.3f} ± {row['of_best_error']:.3f} ({row['best']})",
            f"{row['rivals']['fastbp tuned']['over_eager']:.3f} ± {row['of_eager_error']:.3f}",
            f"{row['rivals']['fastbp tuned']['ms']:.3f}",
        ]
        for row in short
    ]
    head = ["case", "chosen", "of the best candidate", "× eager", "ms"]
    line = f"Below {OF_BEST} of the best candidate or {OF_EAGER} of eager by more than two standard errors:"
    return f"{line}\n\n{markdown(head, cells)}"
