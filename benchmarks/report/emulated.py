"""What is known of each GPU kernel: benchmarks/results/compiled.jsonl, which ``benchmarks.static --record`` writes, and
benchmarks/results/emulated.jsonl, which ``make emulate`` writes."""

from __future__ import annotations

from pathlib import Path

from benchmarks import compiled
from benchmarks.records import RESULTS, Row, read
from benchmarks.report.tables import markdown

FILE = RESULTS / "emulated.jsonl"
HEAD = ("kernel", "for", "compiled", "executed by emulation", "run on a GPU")
NOT_YET = "not yet"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
Key = tuple[str, str]


def table() -> str:
    """A row for each kernel and architecture. No result file of a GPU is here, so the last column is empty words."""
    made = _by_kernel(compiled.FILE, ("kernels", "faulty"))
    run = _by_kernel(FILE, ("runs", "faults", "shapes", "commit"))
    rows = [[*key, _compiled(made.get(key)), _executed(run.get(key)), NOT_YET] for key in sorted(made | run)]
    versions = {f"nvcc {row['nvcc']}, Triton {row['triton']}" for row in run.values()}
    runs = sum(row["runs"] for row in run.values())
    end = f"{runs:,} runs, each under a schedule of its own (`make emulate`), {'; '.join(sorted(versions))}."
    return f"{markdown(HEAD, rows)}\n{end}\n"


def _by_kernel(file: Path, needed: tuple[str, ...]) -> dict[Key, Row]:
    rows = read(file, ("kernel", "family", *needed)).rows if file.exists() else []
    return {(row["kernel"], row["family"]): row for row in rows}


def _compiled(row: Row | None) -> str:
    """Kernels of all activations, dtypes, tiles and policies, or of some."""
    if row is None:
        return NOT_YET
    part = ", a part" if row["quick"] else ""
    fine = row["kernels"] - row["faulty"]
    return f"{fine:,} of {row['kernels']:,} without a fault{part}; {row['date']}, {row['commit']}"


def _executed(row: Row | None) -> str:
    if row is None:
        return NOT_YET
    cases = f"{row['cases']:,}" if row["cases"] == row["of"] else f"{row['cases']:,} of {row['of']:,}"
    faults = ", ".join(f"{kind} {count}" for kind, count in row["faults"].items()) or "no fault"
    dtypes, policies = (", ".join(sorted(words)) for words in ([SHORT[t] for t in row["dtypes"]], row["policies"]))
    sizes = f"{_count(row['shapes'], 'shape')}, {_count(row['activations'], 'activation')}; {dtypes}; {policies}"
    return (
        f"{row['runs']:,} runs of {cases} cases: {faults}; {sizes}; {row['met']:.1%} of its instructions; "
        f"{row['date']}, {row['commit']}"
    )


def _count(of: list[str], what: str) -> str:
    return f"{len(of)} {what}{'s' * (len(of) != 1)}"
