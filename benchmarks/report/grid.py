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
    """A row of the table; ``of`` counts the rows of the file."""

    cells: list[Cell]
    of: int
    ours: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table."""

    heads: list[str]
    lines: list[Line]

    def numeric(self, column: int) -> bool:
        """Whether it is a column of figures, "1.02 to 1.05" and "NaN" among them."""
        found = [line.cells[column] for line in self.lines if line.cells[column] is not None]
        return bool(found) and all(not isinstance(cell, str) or _is_figure(cell) for cell in found)


def grid(suite: Suite) -> Grid:
    """The table of any result file."""
    if not any("rivals" in row for row in suite.rows):
        return _plain(suite)
    return _timed(suite) if suite.timed else _by_rival(suite)


def _timed(suite: Suite) -> Grid:
    """Milliseconds, the same over eager's and over the floor's, and the error; then whatever else there is."""
    known = (*TIMES, "ms_p20", "ms_p80", "error", "accurate")
    extra, own = _others(suite, known), _scalars(suite)
    floor = any("linears alone" in row["rivals"] for row in suite.rows)
    flops = any(is_number(row.get("flops")) for row in suite.rows)
    heads = ["case", "mode", "rival", "ms", "× eager", "p20 to p80"]
    heads += ["× floor"] * floor + ["error"] + [HEADS.get(key, key) for key in extra] + ["GFLOP/s"] * flops + own
    lines = []
    for of, row in enumerate(suite.rows):
        base = row["rivals"].get("linears alone", {}).get("ms")
        for name, found in row["rivals"].items():
            cells: list[Cell] = [row["case"], row["mode"], name, found["ms"]]
            cells += [found["over_eager"], f"{found['over_eager_p20']:.3f} to {found['over_eager_p80']:.3f}"]
            cells += [found["ms"] / base if base else None] * floor + [_cell(found.get("error"))]
            cells += [_cell(found.get(key)) for key in extra]
            cells += [row["flops"] / found["ms"] / 1e6 if is_number(row.get("flops")) else None] * flops
            cells += [_cell(row.get(key)) for key in own]
            wrong = found.get("accurate") is False
            lines.append(Line([*cells, _note(row, name, wrong)], of, name.startswith("fastbp"), wrong))
        lines += _absent(row, of, [row["case"], row["mode"]], len(heads))
    return Grid([*heads, "note"], lines)


def _by_rival(suite: Suite) -> Grid:
    """Of each rival whatever figures it has."""
    keys, own = _others(suite), _scalars(suite)
    heads = ["case", *own, "rival", *(HEADS.get(key, key.replace("_", " ")) for key in keys)]
    lines = []
    for of, row in enumerate(suite.rows):
        first = [row["case"], *(_cell(row.get(key)) for key in own)]
        for name, found in row["rivals"].items():
            cells = [*first, name, *(_cell(found.get(key)) for key in keys)]
            lines.append(Line([*cells, _note(row, name)], of, name.startswith("fastbp")))
        lines += _absent(row, of, first, len(heads))
    return Grid([*heads, "note"], lines)


def _plain(suite: Suite) -> Grid:
    """Rows of any other kind: a column for each key."""
    keys = list(dict.fromkeys(key for row in suite.rows for key in row))
    lines = [Line([_cell(row.get(key)) for key in keys], of) for of, row in enumerate(suite.rows)]
    return Grid([key.replace("_", " ") for key in keys], lines)


def _others(suite: Suite, known: tuple[str, ...] = ()) -> list[str]:
    """What rivals have beside the ``known`` figures."""
    keys = dict.fromkeys(key for row in suite.rows for found in row["rivals"].values() for key in found)
    return [key for key in keys if key not in known]


def _scalars(suite: Suite) -> list[str]:
    """What rows have beside case, mode and rivals."""
    return list(dict.fromkeys(key for row in suite.rows for key in row if key not in NOT_COLUMNS))


def _absent(row: Row, of: int, first: list[Cell], width: int) -> list[Line]:
    """Rivals that have no figures, with the reason."""
    names = dict.fromkeys(name for key in REMARKS for name in row.get(key, {}) if name not in row["rivals"])
    blank: list[Cell] = [None] * (width - len(first) - 1)
    return [Line([*first, name, *blank, _note(row, name)], of, wrong="broken" in row) for name in names]


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
