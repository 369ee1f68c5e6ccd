"""The result files of all machines, read and checked: benchmarks/results/<machine>/<suite>.jsonl."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import RESULTS, Row
from benchmarks.suites import MODES, SUITES

DTYPES = ("float32", "bfloat16", "float16", "float64")
TIMES = ("ms", "over_eager", "over_eager_p20", "over_eager_p80")  # what every timed rival has
OTHERS = ("tuned",)  # timed, but not against rivals: they have tables of their own
YARDSTICKS = ("linears alone", "eager again")  # the floor and the noise: not rivals
KEYS = {  # of rows of the files that have tables of their own, beside case and rivals
    "model_memory": ("block", "auto"),
    "training": ("task", "unit", "save", "held_out", "kept"),
    "accuracy": ("table", "activation", "save", "dtype"),
}
REMARKS = {"left_out": "left out", "broken": "broken", "no_graph": "no CUDA graph"}


class ReportError(Exception):
    """There is nothing to report of."""


@dataclass(frozen=True)
class Suite:
    """A result file."""

    name: str
    environment: dict[str, Any]
    rows: list[Row]

    @property
    def timed(self) -> bool:
        """Whether its rows are steps that were timed."""
        return any(_timed(row) for row in self.rows)

    def part(self, mode: str, dtype: str | None = None) -> list[Row]:
        """The rows of a mode, and of a dtype."""
        return [row for row in self.rows if row["mode"] == mode and dtype in (None, dtype_of(row))]

    @property
    def modes(self) -> list[str]:
        return in_order((row["mode"] for row in self.rows), MODES)

    @property
    def dtypes(self) -> list[str]:
        return in_order(map(dtype_of, self.rows), DTYPES)

    def command(self, row: Row) -> str:
        """What makes a row again: of a timed suite that alone, otherwise the whole file."""
        if not self.timed or self.name in OTHERS:
            return str(self.environment.get("command", ""))
        words = ["python", "-m", "benchmarks.run", "--suite", self.name, "--case", row["case"], "--mode", row["mode"]]
        if self.environment.get("device") == "cuda":
            words[3:3] = ["--device", "cuda"]
        settings = self.environment.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        return " ".join([*(f"{key}={shlex.quote(str(value))}" for key, value in settings.items()), shlex.join(words)])


@dataclass(frozen=True)
class Machine:
    """A folder of result files."""

    name: str
    suites: dict[str, Suite]

    def rows(self, suite: str, **wanted: Any) -> list[Row]:
        """The rows of a file that have these values; none where it has no such file."""
        rows = self.suites[suite].rows if suite in self.suites else []
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    @property
    def timed(self) -> list[Suite]:
        return [suite for suite in self.suites.values() if suite.timed]

    @property
    def compared(self) -> list[Suite]:
        """Those in which fastbp is timed against rivals."""
        return [suite for suite in self.timed if suite.name not in OTHERS]

    @property
    def title(self) -> str:
        """What it is, in its own words: the GPU, or the CPU."""
        found = [s.environment.get("gpu") or s.environment.get("cpu") for s in (*self.timed, *self.suites.values())]
        return str(next((name for name in found if name), self.name))


def dtype_of(row: Row) -> str:
    """The last word of a case's name."""
    return str(row["case"].rpartition(" ")[2])


def in_order(found: Iterable[str], order: Sequence[str]) -> list[str]:
    """Each once: those in ``order`` first, then the others as they come."""
    found = list(dict.fromkeys(found))
    return [name for name in order if name in found] + [name for name in found if name not in order]


def load(root: Path = RESULTS, only: Sequence[str] = ()) -> list[Machine]:
    """All machines that have results, or ``only`` these."""
    folders = sorted(path for path in root.glob("*") if path.is_dir() and any(path.glob("*.jsonl")))
    names = [folder.name for folder in folders]
    if not folders:
        there = ", ".join(sorted(path.name for path in root.glob("*"))) if root.is_dir() else "no such folder"
        how = "`python -m benchmarks.run` writes them"
        raise ReportError(f"{root} holds no <machine>/<suite>.jsonl (there: {there or 'nothing'}); {how}")
    if unknown := [name for name in only if name not in names]:
        raise ReportError(f"no results of {', '.join(unknown)} in {root}; there are {', '.join(names)}")
    return [_machine(folder) for folder in folders if not only or folder.name in only]


def _machine(folder: Path) -> Machine:
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    suites = {name: _suite(paths[name]) for name in in_order(paths, [*SUITES, "memory", "model_memory"])}
    return Machine(folder.name, {name: suite for name, suite in suites.items() if suite.rows})


def _suite(path: Path) -> Suite:
    """A file. What its rows must have follows from what they are, not from its name: any suite is shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the second reading says it
        rows = records.read(path).rows
    timed = any(_timed(row) for row in rows)
    needed = KEYS.get(path.stem, ())
    if any("rivals" in row for row in rows):
        needed = ("case", *(("mode",) if timed else ()), "rivals", *needed)
    found = records.read(path, needed, partial(_fault, timed=timed))
    if not found.rows:
        warnings.warn(f"{path} has no rows and is left out", RuntimeWarning, stacklevel=2)
    return Suite(path.stem, *found)


def _timed(row: Row) -> bool:
    rivals = row.get("rivals")
    return isinstance(rivals, dict) and any(isinstance(found, dict) and "ms" in found for found in rivals.values())


def _fault(row: Row, timed: bool) -> str:
    """Why a row with rivals cannot be shown; nothing where it can."""
    if "rivals" not in row:
        return ""
    if not all(isinstance(row.get(key, ""), str) for key in ("case", "mode")):
        return "its case and mode must be text"
    rivals = row["rivals"]
    if not isinstance(rivals, dict) or not all(isinstance(found, dict) for found in rivals.values()):
        return "its rivals must be objects by name"
    if not all(isinstance(row.get(key, {}), dict) for key in REMARKS):
        return f"{', '.join(REMARKS)} must be reasons by rival"
    for name, found in rivals.items() if timed else ():
        for key in TIMES:
            if not is_number(found.get(key)) or found[key] <= 0:
                return f"{key} of {name} is {found.get(key)!r}, not a positive number"
    return ""


def peaks_of(suite: Suite) -> dict[str, float]:
    """What the machine was seen to do at most when this was measured, as far as the file says."""
    found = suite.environment.get("peaks")
    return {key: peak for key, peak in found.items() if is_number(peak)} if isinstance(found, dict) else {}


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
