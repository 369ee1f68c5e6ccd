"""The pictures of results.

Each function gives what draws its picture as the text of an SVG, or None where the files lack what it shows.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.records import Row
from benchmarks.report.drawing import FAINT, INK, OURS, PALE, SERIES, name_series, panels, plain_ticks, svg
from benchmarks.report.load import DTYPES, Machine, Suite, dtype_of, in_order, is_number, peaks_of
from benchmarks.report.policies import values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = Callable[[], str]
MODE = "fwd_bwd"  # what the pictures of speed are of
EXTREMES = ("edges", "overhead")  # how suites of layers at the ends of the range are named
SPREAD = 0.24  # between the marks of one line

CAPTIONS = {
    "floor": "Time of a step over that of its products alone: marks are medians of the activations, lines their range.",
    "roofline": "Speed of a step's products against operations by byte, under the roofs measured with it.",
    "kept": "Bytes kept for backward by hidden element, of blocks of known models.",
    "training": "Held-out losses by policy, a dot for each seed.",
}
CAPTIONS["floor-edges"] = CAPTIONS["floor"]


def of(machine: Machine) -> dict[str, Drawing]:
    """Those that a machine's files allow, by name."""
    ordinary, extreme = parted(machine)
    found = {
        "floor": floor(ordinary),
        "floor-edges": floor(extreme),
        "roofline": roofline(ordinary),
        "kept": kept(machine),
        "training": training(machine),
    }
    return {name: drawing for name, drawing in found.items() if drawing}


def parted(machine: Machine) -> tuple[list[Suite], list[Suite]]:
    """The suites in which fastbp was timed: ordinary ones, and those of the ends of the range, of many shapes."""
    timed = [suite for suite in machine.compared if any("fastbp" in row["rivals"] for row in suite.rows)]
    extreme = [suite for suite in timed if suite.name.endswith(EXTREMES)]
    return [suite for suite in timed if suite not in extreme], extreme


def shape_of(row: Row) -> str:
    """A case without activation and dtype, and equal layers counted: ``mlp 8192×64, 5 layers``."""
    shape = str(row["case"]).rpartition(" ")[0].rpartition(" ")[0]
    return re.sub(r"×(\d+)((?:→\1){2,})$", lambda m: f"×{m[1]}, {m[2].count('→')} layers", shape)


def floor(suites: Sequence[Suite]) -> Drawing | None:
    """A step's time over that of its products alone, a line for each shape: median and range of the activations."""
    rows = [
        (suite.name, row)
        for suite in suites
        for row in suite.part(MODE)
        if {"linears alone", "fastbp"} <= set(row["rivals"])
    ]
    if not rows:
        return None
    lines = list(dict.fromkeys((suite, shape_of(row)) for suite, row in rows))
    dtypes = in_order((dtype_of(row) for _, row in rows), DTYPES)
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for suite, row in rows:
        for name in SERIES:
            if name in row["rivals"]:
                ratio = row["rivals"][name]["ms"] / row["rivals"]["linears alone"]["ms"]
                found.setdefault((dtype_of(row), name, suite, shape_of(row)), []).append(ratio)
    draw = partial(_floor, found=found, lines=lines, dtypes=dtypes)
    return partial(svg, draw, 9.2, 1.3 + 0.27 * (len(lines) + len({suite for suite, _ in lines})))


def _floor(figure: Figure, found: dict[Any, list[float]], lines: list[tuple[str, str]], dtypes: list[str]) -> None:
    places, heads, at = {}, {}, 0
    for suite, shape in lines:  # downwards, a line of its own for each suite's name
        if suite not in heads:
            heads[suite] = at
            at += 1
        places[suite, shape] = at
        at += 1
    everything = [ratio for ratios in found.values() for ratio in ratios]
    lowest, highest = 0.93 * min(*everything, 0.9), 1.08 * max(*everything, 1.1)
    names = [name for name in SERIES if any(key[1] == name for key in found)]
    for axes, dtype in zip(panels(figure, len(dtypes)), dtypes, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(lowest, highest)
        axes.set_ylim(at - 0.4, -0.6)
        plain_ticks(axes.xaxis, [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50], lowest, highest)
        axes.grid(axis="x")
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.set_title(dtype)
        axes.set_axisbelow(True)
        for offset, name in enumerate(names):
            color, mark = SERIES[name]
            for key, place in places.items():
                if ratios := found.get((dtype, name, *key)):
                    y = place + SPREAD * (offset - (len(names) - 1) / 2)
                    axes.plot([min(ratios), max(ratios)], [y, y], color=color, linewidth=1.6, alpha=0.6)
                    axes.plot(statistics.median(ratios), y, mark, color=color, markersize=4.5)
        axes.set_yticks([*places.values(), *heads.values()], [*(shape for _, shape in places), *heads])
        axes.tick_params(axis="y", length=0)
        for label in axes.get_yticklabels()[len(places) :]:
            label.set_fontweight("bold")
    figure.supxlabel("time of a step (forward and backward) ÷ time of its products alone; left is faster", fontsize=10)
    name_series(figure, names)


def kept(machine: Machine) -> Drawing | None:
    """What each rival keeps of the blocks of models, in bytes by hidden element."""
    rows = machine.rows("model_memory")
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["rivals"]))

    def draw(figure: Figure) -> None:
        most = max(found.get("kept_per_hidden", 0) for row in rows for found in row["rivals"].values()) or 1
        for axes, row in zip(panels(figure, len(rows)), rows, strict=True):
            for place, name in enumerate(names):
                if (value := row["rivals"].get(name, {}).get("kept_per_hidden")) is None:
                    continue
                ours, auto = name.startswith("fastbp"), name == row["auto"]
                axes.barh(
                    place, value, color=OURS if ours else FAINT, alpha=1 if auto or not ours else 0.55, height=0.7
                )
                axes.text(value + 0.02 * most, place, f" {value:.3g}", va="center", weight="bold" if auto else None)
            axes.set_xlim(0, 1.28 * most)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
            axes.tick_params(axis="y", length=0)
            axes.set_title(f"{row['block']}\n{row['case'].split()[-2]}")
        figure.supxlabel("bytes kept for backward by hidden element; bold is what auto takes", fontsize=10)

    return partial(svg, draw, 9.2, 1.2 + 0.38 * len(names))


def roofline(suites: Sequence[Suite]) -> Drawing | None:
    """Speed against operations by byte, under what the machine was seen to do at most."""
    peaks: dict[str, float] = {}
    rows: list[Row] = []
    for suite in suites:
        seen = peaks_of(suite)
        found = [
            row
            for row in suite.part(MODE)
            if "fastbp" in row["rivals"] and is_number(row.get("flops")) and is_number(row.get("bytes"))
        ]
        if seen and found:
            rows += found
            peaks |= {key: max(peak, peaks.get(key, 0)) for key, peak in seen.items()}
    dtypes = [dtype for dtype in in_order(map(dtype_of, rows), DTYPES) if dtype in peaks]
    if "copy" not in peaks or not dtypes:
        return None
    return partial(svg, partial(_roofline, rows=rows, peaks=peaks, dtypes=dtypes), 9.2, 4.2)


def _roofline(figure: Figure, rows: list[Row], peaks: dict[str, float], dtypes: list[str]) -> None:
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 1.6, max(*intensities, max(peaks[dtype] for dtype in dtypes) / peaks["copy"]) * 2
    names = [name for name in SERIES if any(name in row["rivals"] for row in rows)]
    for axes, dtype in zip(panels(figure, len(dtypes)), dtypes, strict=True):
        axes.set(xscale="log", yscale="log", xlim=(left, right))
        ridge = peaks[dtype] / peaks["copy"]
        corners = [left, min(max(ridge, left), right), right]
        axes.plot(corners, [min(peaks[dtype], x * peaks["copy"]) for x in corners], color=INK, linewidth=1.4)
        for name in names:
            color, mark = SERIES[name]
            own = [row for row in rows if dtype_of(row) == dtype and name in row["rivals"]]
            speeds = [row["flops"] / row["rivals"][name]["ms"] / 1e6 for row in own]
            axes.plot(
                [row["flops"] / row["bytes"] for row in own], speeds, mark, color=color, markersize=4.5, alpha=0.75
            )
        axes.set_title(f"{dtype}, roofs: {peaks[dtype]:.4g} GFLOP/s and {peaks['copy']:.3g} GB/s")
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel("operations by byte (least traffic)")
        axes.tick_params(which="minor", length=0)
    figure.axes[0].set_ylabel("GFLOP/s of the products")
    name_series(figure, names)


def training(machine: Machine) -> Drawing | None:
    """Every run as a dot: tasks side by side, policies beside stock PyTorch, the band is stock's mean ± its spread."""
    rows = machine.rows("training")
    if not rows:
        return None
    tasks, saves = values(rows, "task"), values(rows, "save")
    if any(len(machine.rows("training", task=task, save="stock")) < 2 for task in tasks):
        return None  # without a second seed there is no spread

    def draw(figure: Figure) -> None:
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            stock = [row["held_out"] for row in machine.rows("training", task=task, save="stock")]
            middle, spread = statistics.fmean(stock), statistics.stdev(stock)
            axes.axhspan(middle - spread, middle + spread, color=PALE, alpha=0.5)
            axes.axhline(middle, color=FAINT, linewidth=0.8)
            for place, save in enumerate(saves):
                losses = [row["held_out"] for row in machine.rows("training", task=task, save=save)]
                color = FAINT if save == "stock" else OURS
                axes.plot([place] * len(losses), losses, "o", color=color, alpha=0.6, markersize=5, linestyle="none")
                axes.plot([place - 0.2, place + 0.2], [statistics.fmean(losses)] * 2, color=color, linewidth=2)
            axes.set_xticks(range(len(saves)), saves, rotation=20)
            axes.set_title(task)
            axes.set_ylabel(f"held-out loss, {machine.rows('training', task=task)[0]['unit']}")

    return partial(svg, draw, 4.2 * len(tasks), 3.6)
