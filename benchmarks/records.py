"""Result files: JSON lines, of which the first says what the others belong to, and each other one is a row.

    {"environment": {"date": ..., "commit": ..., "command": ..., "cpu": ..., ...}}
    {"case": "layer 512×768→3072 gelu float32", "mode": "fwd_bwd", "rivals": {"eager": {"ms": ...}, ...}}

A line that cannot be used is named by file and line, with a warning, and the others are read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Records(NamedTuple):
    """A result file."""

    environment: dict[str, Any]
    rows: list[Row]


def write(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put a file in place of what there was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"environment": environment}, *rows]
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


def read(path: Path, needed: Sequence[str] = (), fault: Callable[[Row], str] = lambda row: "") -> Records:
    """A file's environment and rows. What is no row, lacks a ``needed`` key, or has a ``fault``, in words what is wrong
    with it, is skipped with a warning.

    A file without an environment has no rows: nobody knows what they belong to.
    """
    environment: dict[str, Any] | None = None
    rows: list[Row] = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        found = _parsed(text)
        if isinstance(found, dict) and environment is None and isinstance(found.get("environment"), dict):
            environment = found["environment"]
        elif not isinstance(found, dict):
            _skip(path, number, found or "not a JSON object")
        elif environment is None:
            _skip(path, number, "no line before it says to which environment it belongs")
        elif missing := [key for key in needed if key not in found]:
            _skip(path, number, f"it has no {', '.join(missing)}")
        elif wrong := fault(found):
            _skip(path, number, wrong)
        else:
            rows.append(found)
    return Records(environment or {}, rows)


def _parsed(text: bytes) -> Any:
    """What a line holds, or as a text why it is not JSON."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return found if isinstance(found, dict) else None


def _skip(path: Path, number: int, reason: str) -> None:
    warnings.warn(f"{path}, line {number}, is skipped: {reason}", RuntimeWarning, stacklevel=3)
