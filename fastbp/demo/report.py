"""What the demo shows: progress, tables, and the numbers as a file. The picture is in ``picture.py``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastbp.demo.training import MARGIN, TAIL, Outcome
from fastbp.version import __version__

AGREE = (
    "Stock and fused agree: at every step the loss and the norm of the gradient differ by no more than "
    f"{MARGIN:g} times what rounding does."
)
_COLUMNS = ("", "stock", "fused", "fused vs stock", "stock again")
_NOTES = (
    "stock again: weights moved by one rounding unit and batches in reverse order, to see what rounding does\n"
    f"limit: {MARGIN:g} times what rounding has done up to a step; above 100 % stock and fused part"
)


class Progress:
    """A bar on a terminal; elsewhere a line every fifth of the way."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.bar = name, steps, sys.stdout.isatty()

    def __call__(self, step: int, loss: float) -> None:
        """Step ``step``, counted from 1, is done."""
        done = f"{self.name} {step:{len(str(self.steps))}}/{self.steps}"
        if self.bar:
            filled = 30 * step // self.steps
            end = "\r" if step < self.steps else "\n\n"
            print(f"\r{done} [{'#' * filled}{'.' * (30 - filled)}] loss {loss:.4f}", end=end, flush=True)
        elif step * 5 // self.steps > (step - 1) * 5 // self.steps:
            print(f"{done}  loss {loss:.4f}", end="\n" if step < self.steps else "\n\n", flush=True)


def machine(device: torch.device) -> str:
    """Where it runs, in a line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''})"
    return f"fastbp {__version__}, torch {torch.__version__}, float32 on {name}"


def table(outcome: Outcome) -> str:
    """The comparison, aligned."""
    stock, fused, again = (outcome.summaries[name] for name in ("stock", "fused", "again"))
    unit = outcome.task.unit

    def row(title: str, field: str, form: str, scale: float = 1.0, ratio: bool = False) -> tuple[str, ...]:
        values = [getattr(summary, field) * scale for summary in (stock, fused, again)]
        s, f, a = (format(value, form) for value in values)
        return title, s, f, f"x {values[1] / values[0]:.2f}" if ratio else "", a

    rows = [
        _COLUMNS,
        row(f"training loss, {unit}, last {TAIL} steps", "train_loss", ".6f"),
        row(f"held-out loss, {unit}", "held_out_loss", ".6f"),
        row("held-out accuracy, %", "accuracy", ".2f", 100),
    ]
    for quantity, words in (("losses", "loss"), ("norms", "gradient norm")):
        f, a = (outcome.difference(name, quantity) for name in ("fused", "again"))
        share = f"{100 * f.share:.0f} % of limit"
        rows.append((f"largest difference of {words}", "", f"{f.largest:.1e}", share, f"{a.largest:.1e}"))
    rows += [
        row("step, median, ms", "step_seconds", ".2f", 1e3, ratio=True),
        row("kept for backward, MiB", "kept_bytes", ".2f", 2**-20, ratio=True),
        row("kept in a block, bytes/hidden element", "kept_bytes_per_hidden", ".2f", ratio=True),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in [*lines, _NOTES])


def write_json(outcomes: list[Outcome], machine: str, seed: int, path: Path) -> None:
    """All numbers of the tables, and the curves."""
    document = {"machine": machine, "seed": seed, "margin": MARGIN, "tasks": [_numbers(o) for o in outcomes]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _numbers(outcome: Outcome) -> dict[str, Any]:
    stock, fused = outcome.summaries["stock"], outcome.summaries["fused"]
    ratios = ("step_seconds", "kept_bytes", "kept_bytes_per_hidden")
    return {
        "name": outcome.task.name,
        "about": outcome.task.about,
        "loss_unit": outcome.task.unit,
        "failures": outcome.failures(),
        "runs": {
            name: dataclasses.asdict(outcome.summaries[name]) | {"losses": run.losses, "gradient_norms": run.norms}
            for name, run in outcome.runs.items()
        },
        "fused_to_stock": {name: getattr(fused, name) / getattr(stock, name) for name in ratios},
        "differences_from_stock": {
            words: {
                "fused": (d := outcome.difference("fused", quantity)).largest,
                "stock again": outcome.difference("again", quantity).largest,
                "share_of_limit": d.share,
            }
            for quantity, words in (("losses", "loss"), ("norms", "gradient_norm"))
        },
    }
