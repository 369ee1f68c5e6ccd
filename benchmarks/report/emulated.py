"""Which kernels were executed by emulation: benchmarks/results/emulated.jsonl, which ``make emulate`` writes."""

from __future__ import annotations

from benchmarks.records import RESULTS, Row, read
from benchmarks.report.tables import markdown

FILE = RESULTS / "emulated.jsonl"
HEAD = (
    *("kernel", "for", "runs", "cases", "shapes", "activations", "dtypes", "policies", "faults"),
    *("instructions met", "when", "on a GPU"),
)
ON_A_GPU = "not yet"  # no result file of a GPU is here


def table() -> str:
    """A row for each kernel and architecture."""
    rows = read(FILE, ("kernel", "family", "runs", "faults", "shapes", "commit")).rows
    versions = {f"nvcc {row['nvcc']}, Triton {row['triton']}" for row in rows}
    runs = sum(row["runs"] for row in rows)
    end = f"{runs:,} runs, each under a schedule of its own (`make emulate`), {'; '.join(sorted(versions))}."
    return f"{markdown(HEAD, map(_cells, rows))}\n{end}\n"


def _cells(row: Row) -> list[str]:
    cases = f"{row['cases']:,}" if row["cases"] == row["of"] else f"{row['cases']:,} of {row['of']:,}"
    faults = ", ".join(f"{kind} {count}" for kind, count in row["faults"].items()) or "none"
    dtypes = [{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}[t] for t in row["dtypes"]]
    policies = ", ".join(f"`{policy}`" for policy in row["policies"])
    numbers = [f"{row['runs']:,}", cases, str(len(row["shapes"])), str(len(row["activations"]))]
    when = f"{row['date']}, {row['commit']}"
    return [
        row["kernel"],
        row["family"],
        *numbers,
        ", ".join(dtypes),
        policies,
        faults,
        f"{row['met']:.1%}",
        when,
        ON_A_GPU,
    ]
