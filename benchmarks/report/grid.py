"""A result file as one table with everything in it: its columns, and a line for each case, mode and rival."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.records import Row
from benchmarks.report.load import REMARKS, TIMES, Suite, is_number

HEADS = {
    "over_eager": "× eager",
    "host_ms": "host ms",
    "graph_ms": "graph ms",
    "graph_over_eager": "× eager in a graph",
    "mib": "MiB",
}
FORMATS = {
    "ms": ".4f",
    "× eager": ".3f",
    "× floor": ".3f",
    "error": ".2e",
    "GFLOP/s": ".1f",
    "× eager in a graph": ".3f",
}
NOT_COLUMNS = ("case", "mode", "rivals", "winner", *REMARKS)  # of a row: they have places of their own
Cell = str | float | None


def shown(head: str, cell: Cell) -> str:
    """A cell's text, figures of a column alike."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    if head in FORMATS:
        return format(cell, FORMATS[head])
    return str(cell) if isinstance(cell, int) else f"{cell:.4g}"


@dataclass(frozen=True)
class Line:
    """A row of the table: its cells by column; ``of`` counts the rows of the file."""

    cells: dict[str, Cell]
    of: int
    ours: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table."""

    lines: list[Line]

    @property
    def heads(self) -> list[str]:
        """The columns in which anything stands, as they come."""
        filled = {head for line in self.lines for head, cell in line.cells.items() if cell is not None}
        return [head for head in dict.fromkeys(head for line in self.lines for head in line.cells) if head in filled]

    def numeric(self, head: str) -> bool:
        """Whether it is a column of figures, "1.02 to 1.05" and "NaN" among them."""
        found = [cell for line in self.lines if (cell := line.cells.get(head)) is not None]
        return all(not isinstance(cell, str) or _is_figure(cell) for cell in found)


def grid(suite: Suite) -> Grid:
    """The table of any result file."""
    if not any("rivals" in row for row in suite.rows):
        return _plain(suite)
    return _timed(suite) if suite.timed else _by_rival(suite)


def _timed(suite: Suite) -> Grid:
    """Milliseconds, the same over eager's and over the floor's, and the error; then whatever else there is."""
    known = (*TIMES, "ms_p20", "ms_p80", "error", "accurate")
    lines = []
    for of, row in enumerate(suite.rows):
        own = {"case": row["case"], "mode": row["mode"]}
        rest = _scalars(row, "flops", "bytes")
        base = row["rivals"].get("linears alone", {}).get("ms")
        for name, found in row["rivals"].items():
            wrong = found.get("accurate") is False
            cells = own | {"rival": name, "ms": found["ms"], "× eager": found["over_eager"]}
            cells["p20 to p80"] = f"{found['over_eager_p20']:.3f} to {found['over_eager_p80']:.3f}"
            cells |= {"× floor": found["ms"] / base if base else None, "error": _cell(found.get("error"))}
            cells |= {"note": _note(row, name, wrong)} | _roofline(row, found) | _figures(found, known) | rest
            lines.append(Line(cells, of, name.startswith("fastbp"), wrong))
        lines += _absent(row, of, own)
    return Grid(lines)


def _by_rival(suite: Suite) -> Grid:
    """Of each rival whatever figures it has."""
    lines = []
    for of, row in enumerate(suite.rows):
        own = {"case": row["case"]} | _scalars(row)
        for name, found in row["rivals"].items():
            cells = own | {"rival": name} | _figures(found) | {"note": _note(row, name)}
            lines.append(Line(cells, of, name.startswith("fastbp")))
        lines += _absent(row, of, own)
    return Grid(lines)


def _plain(suite: Suite) -> Grid:
    """Rows of any other kind: a column for each key."""
    return Grid(
        [Line({_head(key): _cell(value) for key, value in row.items()}, of) for of, row in enumerate(suite.rows)]
    )


def _figures(found: dict[str, Any], known: tuple[str, ...] = ()) -> dict[str, Cell]:
    """What a rival has beside the ``known`` figures."""
    return {_head(key): _cell(value) for key, value in found.items() if key not in known}


def _scalars(row: Row, *known: str) -> dict[str, Cell]:
    """What a row has beside case, mode and rivals."""
    return {_head(key): _cell(value) for key, value in row.items() if key not in (*NOT_COLUMNS, *known)}


def _roofline(row: Row, found: dict[str, Any]) -> dict[str, Cell]:
    """The speed of a step's products, where their number is known."""
    if not is_number(row.get("flops")):
        return {}
    by_byte = row["flops"] / row["bytes"] if is_number(row.get("bytes")) and row["bytes"] else None
    return {"GFLOP/s": row["flops"] / found["ms"] / 1e6, "operations by byte": by_byte}


def _absent(row: Row, of: int, own: dict[str, Cell]) -> list[Line]:
    """Rivals that have no figures, with the reason."""
    names = dict.fromkeys(name for key in REMARKS for name in row.get(key, {}) if name not in row["rivals"])
    return [Line(own | {"rival": name, "note": _note(row, name)}, of, wrong="broken" in row) for name in names]


def _head(key: str) -> str:
    return HEADS.get(key, key.replace("_", " "))


def _note(row: Row, name: str, wrong: bool = False) -> Cell:
    parts = ["less accurate than allowed"] * wrong
    parts += [f"{words}: {row[key][name]}" for key, words in REMARKS.items() if name in row.get(key, {})]
    if name == "fastbp" and row.get("winner"):
        parts.append(f"chosen: {_cell(row['winner'])}")
    return "; ".join(parts) or None


def _cell(value: Any) -> Cell:
    """A figure or a text as it is, anything else as JSON."""
    if value is None or isinstance(value, str) or is_number(value):
        return value  # type: ignore[no-any-return]
    return json.dumps(value, ensure_ascii=False)


def _is_figure(cell: str) -> bool:
    low, to, _ = cell.partition(" to ")
    return cell in ("NaN", "Infinity", "-Infinity") or (bool(to) and low.replace(".", "").isdigit())
