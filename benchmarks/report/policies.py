"""What the save policies lose, and what time they take."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.records import Row
from benchmarks.report.load import Machine
from benchmarks.report.tables import markdown, stamp
from benchmarks.summary import policy_times

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def values(rows: list[Row], key: str) -> list[Any]:
    """The different values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def slope_table(machine: Machine) -> str:
    """Relative L2 errors of the slope: a row for each activation and policy."""
    rows = machine.rows("accuracy", table="slopes")
    columns = [(dtype, z) for dtype in DTYPES for z in values(rows, "distribution")]
    head = ["activation", "policy", *(f"{DTYPES[dtype]}, {z}" for dtype, z in columns)]
    table = []
    for activation in values(rows, "activation"):
        for save in values([row for row in rows if row["activation"] == activation], "save"):
            cells = {
                (r["dtype"], r["distribution"]): r for r in rows if (r["activation"], r["save"]) == (activation, save)
            }
            errors = (f"{cells[column]['relative']:.1e}" for column in columns)
            table.append([f"`{activation}`", f"`{save}`", *errors])
    return markdown(head, table)


def gradient_table(machine: Machine) -> str:
    """Errors of the gradients of an MLP: eager's own, and by every policy over eager's."""
    rows = machine.rows("accuracy", table="gradients")
    kinds = ("dx", "dW", "db")
    head = ["activation", "policy", *(f"{kind}, {short}" for short in DTYPES.values() for kind in kinds)]
    table = []
    for activation in values(rows, "activation"):
        own = [row for row in rows if row["activation"] == activation]
        for save in values(own, "save"):
            cells = []
            for dtype in DTYPES:
                eager, row = (next(r for r in own if (r["dtype"], r["save"]) == (dtype, s)) for s in ("eager", save))
                for kind in kinds:
                    cells.append(f"{row[kind]:.1e}" if save == "eager" else f"{row[kind] / eager[kind]:.2f} ×")
            table.append([f"`{activation}`", save if save == "eager" else f"`{save}`", *cells])
    return markdown(head, table)


def speed_table(machine: Machine) -> str:
    """The time of a step by every policy."""
    head, *table = policy_times(machine.rows("policies", mode="fwd_bwd"))
    return markdown(head, table) + f"\n{stamp(machine.suites['policies'].environment)}.\n"


def training_table(machine: Machine) -> str:
    """Losses on held-out data at the end: stock PyTorch over the seeds, and how far the policies are off."""
    rows = machine.rows("training")
    policies = [save for save in values(rows, "save") if save != "stock"]
    head = ["task", "stock: mean ± spread of the seeds", *(f"`{save}`: mean − stock's" for save in policies)]
    head += [f"`{save}`: bytes kept" for save in policies]
    table = []
    for task in values(rows, "task"):
        losses = {
            save: [r["held_out"] for r in machine.rows("training", task=task, save=save)]
            for save in values(rows, "save")
        }
        kept = {save: machine.rows("training", task=task, save=save)[0]["kept"] for save in losses}
        stock, spread = statistics.fmean(losses["stock"]), statistics.stdev(losses["stock"])
        unit = machine.rows("training", task=task)[0]["unit"]
        apart = (f"{statistics.fmean(losses[save]) - stock:+.4f}" for save in policies)
        share = (f"{kept[save] / kept['stock']:.2f} × stock's" for save in policies)
        table.append([task, f"{stock:.4f} ± {spread:.4f} {unit}", *apart, *share])
    return markdown(head, table)
