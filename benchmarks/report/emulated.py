"""Which kernels were executed by emulation: benchmarks/results/emulated.jsonl, which ``make emulate`` writes."""

from __future__ import annotations

from typing import Any

from benchmarks.records import RESULTS, Row, read
from benchmarks.report.tables import markdown

FILE = RESULTS / "emulated.jsonl"
ON_A_GPU = "not yet"  # no result file of a GPU is here


def table() -> str:
    """A row for each kernel and architecture, and beneath it what all of them belong to."""
    found = read(FILE, ("kernel", "family", "runs", "faults", "shapes"))
    head = [
        "kernel",
        "for",
        "runs",
        "shapes",
        "activations",
        "dtypes",
        "policies",
        "faults",
        "instructions met",
        "on a GPU",
    ]
    rows = [_cells(row) for row in found.rows]
    runs = sum(row["runs"] for row in found.rows)
    return f"{markdown(head, rows)}\n{runs:,} runs, {_stamp(found.environment, found.rows)}.\n"


def _cells(row: Row) -> list[str]:
    faults = ", ".join(f"{kind} {count}" for kind, count in row["faults"].items()) or "none"
    return [
        row["kernel"], row["family"], f"{row['runs']:,}", str(len(row["shapes"])), str(len(row["activations"])),
        ", ".join(row["dtypes"]), ", ".join(f"`{policy}`" for policy in row["policies"]), faults, f"{row['met']:.1%}",
        ON_A_GPU,
    ]  # fmt: skip


def _stamp(environment: dict[str, Any], rows: list[Row]) -> str:
    first = min(row["seeds"][0] for row in rows)
    last = max(row["seeds"][1] for row in rows)
    return (
        f"seeds {first} to {last}, `{environment['command']}`, {environment['date']}, commit {environment['commit']}, "
        f"nvcc {environment['nvcc']}, Triton {environment['triton']}"
    )
