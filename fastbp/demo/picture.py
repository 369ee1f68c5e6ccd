"""The demo's picture: the loss curves of stock and fused on top of each other, their difference, memory and time."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from fastbp.demo.training import MARGIN, Outcome

_STOCK, _FUSED, _AGAIN = "#f2b56b", "#17375e", "#b23a48"
_INK, _PALE = "#333333", "#8a8a8a"


def draw(outcomes: list[Outcome], machine: str, path: Path) -> None:
    """Write the picture, a column for each task."""
    figure = Figure(figsize=(6.4 * len(outcomes), 9.4), layout="constrained")
    figure.suptitle("The same training, stock PyTorch and fastbp", fontsize=15, color=_INK)
    figure.supxlabel(machine, fontsize=8.5, color=_PALE)
    grid = figure.subplots(3, len(outcomes), squeeze=False, height_ratios=(3, 2, 1.7))
    for (losses, difference, bars), outcome in zip(grid.T, outcomes, strict=True):
        for axes in (losses, difference, bars):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(which="both", labelsize=9, labelcolor=_INK, color=_PALE)
        _draw_losses(losses, outcome)
        _draw_difference(difference, outcome)
        _draw_bars(bars, outcome)
    figure.savefig(path, dpi=140, bbox_inches="tight", pad_inches=0.25)


def _draw_losses(axes: Axes, outcome: Outcome) -> None:
    task, runs = outcome.task, outcome.runs
    steps = range(1, task.steps + 1)
    axes.plot(steps, runs["stock"].losses, color=_STOCK, linewidth=5, solid_joinstyle="round", label="stock PyTorch")
    axes.plot(steps, runs["fused"].losses, color=_FUSED, linewidth=1.1, label="fastbp")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(task.name, fontsize=12, color=_INK)
    axes.set_ylabel(f"training loss, {task.unit}", color=_INK)
    axes.grid(which="both", color="#eeeeee")
    axes.legend(frameon=False, labelcolor=_INK)


def _draw_difference(axes: Axes, outcome: Outcome) -> None:
    steps = range(1, outcome.task.steps + 1)
    fused, again = (outcome.difference(name, "losses") for name in ("fused", "again"))
    axes.fill_between(
        steps, fused.allowed, color="#eef1f5", label=f"allowed: {MARGIN:g} × what rounding has done so far"
    )
    axes.plot(steps, again.steps, ".", markersize=3.5, color=_AGAIN, alpha=0.6, label="stock again, rounded otherwise")
    exact = fused.largest == 0
    label = "fastbp: 0 at every step, equal to the last bit" if exact else "fastbp"
    axes.plot(steps, fused.steps, ".", markersize=3.5, color=_FUSED, label=label, clip_on=False)
    # Linear below the smallest difference there is, so that 0 has a place too.
    drawn = [d for d in fused.steps + again.steps + fused.allowed if 0 < d < math.inf]
    axes.set_yscale("symlog", linthresh=min(drawn))
    axes.set_ylim(0, 60 * max(drawn))
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss: distance from stock", color=_INK)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8.5, loc="upper left")


def _draw_bars(axes: Axes, outcome: Outcome) -> None:
    stock, fused = outcome.summaries["stock"], outcome.summaries["fused"]
    rows = (
        ("training\nstep", stock.step_seconds, fused.step_seconds, 1e3, "ms"),
        ("kept for\nbackward", stock.kept_bytes, fused.kept_bytes, 2**-20, "MiB"),
        (
            "kept inside\na block",
            stock.kept_bytes_per_hidden,
            fused.kept_bytes_per_hidden,
            1,
            "bytes per hidden element",
        ),
    )
    for i, (_, before, after, scale, unit) in enumerate(rows):
        for y, value, color, ink in ((i - 0.19, before, _STOCK, _INK), (i + 0.19, after, _FUSED, "white")):
            axes.barh(y, value / before, height=0.36, color=color)
            axes.text(0.015, y, f"{value * scale:.3g} {unit}", va="center", color=ink, fontsize=8.5)
        axes.text(max(1, after / before) + 0.02, i, f"× {after / before:.2f}", va="center", color=_INK, fontsize=12)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(1.0, *(after / before for _, before, after, _, _ in rows)))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
