"""The tables and the picture of what the save policies lose, from benchmarks/results/; tools/render.py puts them in."""

from __future__ import annotations

import io
import statistics
from typing import Any

from results import ZEN, markdown

from benchmarks import records
from benchmarks.records import RESULTS, Row
from benchmarks.summary import policy_times

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def found(name: str, machine: str = ZEN, **wanted: Any) -> list[Row]:
    """The rows of a result file that have these values."""
    rows = records.read(RESULTS / machine / f"{name}.jsonl").rows
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: list[Row], key: str) -> list[Any]:
    """The different values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def slope_table() -> str:
    """Relative L2 errors of the slope: a row for each activation and policy."""
    rows = found("accuracy", table="slopes")
    columns = [(dtype, z) for dtype in DTYPES for z in values(rows, "distribution")]
    table = [["activation", "policy", *(f"{DTYPES[dtype]}, {z}" for dtype, z in columns)]]
    for activation in values(rows, "activation"):
        for save in values([row for row in rows if row["activation"] == activation], "save"):
            cells = {
                (r["dtype"], r["distribution"]): r for r in rows if (r["activation"], r["save"]) == (activation, save)
            }
            errors = (f"{cells[column]['relative']:.1e}" for column in columns)
            table.append([f"`{activation}`", f"`{save}`", *errors])
    return markdown(table)


def gradient_table() -> str:
    """Errors of the gradients of an MLP: eager's own, and by every policy over eager's."""
    rows = found("accuracy", table="gradients")
    kinds = ("dx", "dW", "db")
    table = [["activation", "policy", *(f"{kind}, {short}" for short in DTYPES.values() for kind in kinds)]]
    for activation in values(rows, "activation"):
        own = [row for row in rows if row["activation"] == activation]
        for save in values(own, "save"):
            cells = []
            for dtype in DTYPES:
                eager, row = (next(r for r in own if (r["dtype"], r["save"]) == (dtype, s)) for s in ("eager", save))
                for kind in kinds:
                    cells.append(f"{row[kind]:.1e}" if save == "eager" else f"{row[kind] / eager[kind]:.2f} ×")
            table.append([f"`{activation}`", save if save == "eager" else f"`{save}`", *cells])
    return markdown(table)


def speed_table(machine: str = ZEN) -> str:
    """The time of a step by every policy."""
    return markdown(policy_times(found("policies", machine)))


def training_table() -> str:
    """Losses on held-out data at the end: stock PyTorch over the seeds, and how far the policies are off."""
    rows = found("training")
    policies = [save for save in values(rows, "save") if save != "stock"]
    table = [["task", "stock: mean ± spread of the seeds", *(f"`{save}`: mean − stock's" for save in policies)]]
    table[0] += [f"`{save}`: bytes kept" for save in policies]
    for task in values(rows, "task"):
        losses = {
            save: [r["held_out"] for r in found("training", task=task, save=save)] for save in values(rows, "save")
        }
        kept = {save: found("training", task=task, save=save)[0]["kept"] for save in losses}
        stock, spread = statistics.fmean(losses["stock"]), statistics.stdev(losses["stock"])
        unit = found("training", task=task)[0]["unit"]
        apart = (f"{statistics.fmean(losses[save]) - stock:+.4f}" for save in policies)
        share = (f"{kept[save] / kept['stock']:.2f} × stock's" for save in policies)
        table.append([task, f"{stock:.4f} ± {spread:.4f} {unit}", *apart, *share])
    return markdown(table)


def training_picture() -> str:
    """Every run as a dot: tasks side by side, policies beside stock PyTorch, the band is stock's mean ± its spread."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = found("training")
    tasks, saves = values(rows, "task"), values(rows, "save")
    with matplotlib.rc_context({"svg.hashsalt": "fastbp", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            stock = [row["held_out"] for row in found("training", task=task, save="stock")]
            middle, spread = statistics.fmean(stock), statistics.stdev(stock)
            axes.axhspan(middle - spread, middle + spread, color="#eef1f5")
            axes.axhline(middle, color="#8a8a8a", linewidth=0.8)
            for place, save in enumerate(saves):
                losses = [row["held_out"] for row in found("training", task=task, save=save)]
                color = "#8a8a8a" if save == "stock" else "#17375e"
                axes.plot([place] * len(losses), losses, "o", color=color, alpha=0.6, markersize=5, linestyle="none")
                axes.plot([place - 0.2, place + 0.2], [statistics.fmean(losses)] * 2, color=color, linewidth=2)
            axes.set_xticks(range(len(saves)), saves, rotation=20)
            axes.set_title(task)
            axes.set_ylabel(f"held-out loss, {found('training', task=task)[0]['unit']}")
            axes.spines[["top", "right"]].set_visible(False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in picture.getvalue().splitlines())
