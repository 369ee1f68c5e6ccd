"""How pictures are drawn: SVG that comes out the same every time, with its text as text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.report.load import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PALE, PAPER = "#1f2328", "#8a8a8a", "#d5d9df", "#ffffff"
# Who has which colour and mark everywhere; told apart by everybody who sees colours, and by the marks.
SERIES = {"eager": ("#6b6b6b", "o"), "torch.compile": ("#d55e00", "D"), "fastbp": ("#0072b2", "s")}
OURS = SERIES["fastbp"][0]
STYLE: Any = {
    "svg.hashsalt": "fastbp",
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
}


def svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """What ``draw`` puts on a figure of these inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("pictures need matplotlib: `pip install -e .[demo]` brings it") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        draw(figure)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in picture.getvalue().splitlines())


def panels(figure: Figure, count: int) -> list[Axes]:
    """Axes side by side that share their vertical one."""
    return list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def name_series(figure: Figure, names: list[str]) -> None:
    """Above the picture, each in its own colour with its mark."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=SERIES[name][0], marker=SERIES[name][1], label=name) for name in names]
    figure.legend(handles=marks, loc="outside upper left", ncols=len(names), frameon=False, labelcolor="linecolor")


def plain_ticks(axis: Any, ticks: list[float], lowest: float, highest: float) -> None:
    """Numbers as people write them on a logarithmic axis."""
    shown = [tick for tick in ticks if lowest <= tick <= highest]
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_ticks([], minor=True)
