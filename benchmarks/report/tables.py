"""What the tables are made of: ratios, and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.records import Row

WORDS = "worst, median, best"  # what the three figures of a span are


class Ratio(NamedTuple):
    """A case's figure."""

    value: float
    case: str


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. What comes from files may hold a bar or a line's end."""
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def folded(summary: str, text: str) -> str:
    """A part that is shown when it is clicked on."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def span(ratios: Sequence[Ratio], bold: bool = False) -> str:
    """Worst, median and best of ratios in this order; nothing where there are none."""
    if not ratios:
        return ""
    text = f"{ratios[0].value:.2f}, {statistics.median(r.value for r in ratios):.2f}, {ratios[-1].value:.2f}"
    return f"**{text}**" if bold else text


def over_eager(rows: Sequence[Row], who: str) -> list[Ratio]:
    """How many times as fast as eager, the slowest case first."""
    return _ratios(rows, lambda row: row["rivals"][who]["over_eager"])


def over_floor(rows: Sequence[Row], who: str) -> list[Ratio]:
    """The time over that of the products alone, the longest first."""
    return _ratios(rows, lambda row: row["rivals"][who]["ms"] / row["rivals"]["linears alone"]["ms"])[::-1]


def _ratios(rows: Sequence[Row], figure: Callable[[Row], float]) -> list[Ratio]:
    """The lowest first, of the rows that have this figure."""
    found = []
    for row in rows:
        try:
            found.append(Ratio(figure(row), row["case"]))
        except KeyError:  # this rival was left out here
            continue
    return sorted(found)


def rivals_in(rows: Iterable[Row]) -> list[str]:
    """Everybody who is in one of the rows, as they come."""
    return list(dict.fromkeys(name for row in rows for name in row["rivals"]))


def stamp(*environments: dict[str, Any]) -> str:
    """Machine, versions and date of results in a line. Where they differ in one of these, all that there are."""
    parts = (
        _all("{}", [facts.get("gpu") or facts.get("cpu") for facts in environments]),
        _all("{} threads", [facts.get("threads") for facts in environments]),
        _all("torch {}", [facts.get("torch") for facts in environments]),
        _all("{}", [facts.get("date") for facts in environments]),
        _all("commit {}", [facts.get("commit") for facts in environments]),
    )
    return ", ".join(part for part in parts if part)


def _all(form: str, found: Sequence[Any]) -> str:
    """Each once, in the form; nothing where nothing is known."""
    known = dict.fromkeys(str(value) for value in found if value)
    return form.format(" and ".join(known)) if known else ""
