"""Renders the table of models into docs/models.md, from what ``fastbp.fuse`` does with them here and now.

    python tools/render_models.py            writes the table where it is stale
    python tools/render_models.py --check    exits 1 where it is

It needs the packages that the models come from (``pip install -e .[dev]`` brings them).  tests/test_models.py, which
builds the models anyway, holds each row to what it sees.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tree this file lies in, and its table of models

import render  # noqa: E402
import torch  # noqa: E402

import fastbp  # noqa: E402

DOCUMENT = ROOT / "docs/models.md"
HEAD = ("model", "class", "fused", "left, and why", "difference below")


def row(name: str, known: Any, report: fastbp.FusionReport) -> str:
    """What ``fuse`` did with one of tests/known_models.py, as a line of the table."""
    calls = Counter(site.what for site in report.fused)
    fused = ", ".join(f"{count} × `{what}`" for what, count in calls.items())
    others = [site for site in report.sites if site not in report.fused]
    named = Counter(f"`{site.kind.partition(' ')[0]}`: {site.reason}" for site in others)
    left = [f"{count} × {reason}" for reason, count in named.items()]
    bound = f"{known.bound:.0e}".replace("e-0", "e-")
    if known.dtype != torch.float64:
        bound += f" in {known.dtype}".replace("torch.", "")
    return line((name, f"{known.package} `{known.kind}`", fused, "; ".join(left), bound))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table() -> str:
    """The whole table, every model built and fused."""
    lines = [line(HEAD), line(["---"] * len(HEAD))]
    for name, known in importlib.import_module("known_models").KNOWN.items():
        lines.append(row(name, known, fastbp.fuse(known.model(), sample_inputs=known.inputs())))
    return "".join(f"{text}\n" for text in lines)


def rows_shown() -> list[str]:
    """The rows that the document has."""
    lines = [text for text in DOCUMENT.read_text(encoding="utf-8").splitlines() if text.startswith("|")]
    return lines[2:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render what fuse does with the models of tests/known_models.py.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the table is stale")
    check = parser.parse_args(argv).check
    text = render.Target("docs/models.md", table, region="models").expected(ROOT)
    if DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print("render_models: docs/models.md is stale; run `python tools/render_models.py`", file=sys.stderr)
        return 1
    DOCUMENT.write_text(text, encoding="utf-8")
    print("render_models: wrote docs/models.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
