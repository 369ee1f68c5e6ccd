"""What a run on a GPU found, in one page: its stages, and of every ratio the worst first."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Row

SHOWN = 10  # rows of a table
FACTS = (
    "gpu", "capability", "multiprocessors", "memory_gib", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit",
    "cpu", "cuda", "torch", "triton", "python", "fastbp", "native", "commit", "date", "command",
)  # fmt: skip


def summary(output: Path, facts: dict[str, Any], stages: dict[str, dict[str, Any]], dry: bool) -> str:
    """The page, of the result files in a folder; ``facts`` as in them, of the run that writes it."""
    title = "A dry run without a GPU: no figure here means anything" if dry else f"GPU run: {facts.get('gpu')}"
    parts = [f"# {title}\n", "".join(f"- {key}: {facts[key]}\n" for key in FACTS if facts.get(key) not in (None, ""))]
    rows = [
        [name, s["outcome"] + ("" if s["required"] else " (not required)"), f"{s['seconds']:.0f}", s["note"], s["date"]]
        for name, s in stages.items()
    ]
    parts.append("## Stages\n\n" + table(["stage", "outcome", "seconds", "", "date"], rows))
    for path in sorted(output.glob("*.jsonl")):
        found, measured = records.read(path)
        if not measured:
            continue
        of = f"commit {found['commit']}, {found['date']}"
        if path.stem == "kernels":
            parts += _kernels(measured, of)
        elif path.stem == "model_memory":
            parts.append(_memory(measured, of))
        elif path.stem == "accuracy":
            parts.append(_accuracy(measured, of))
        elif path.stem == "policies":
            parts.append(_policies(path.stem, measured, of))
        elif "rivals" in measured[0]:
            parts += _suite(path.stem, measured, of)
    return "\n".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the worst rows of many."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in lines)


def worst(head: list[str], rows: list[tuple[float, list[str]]]) -> str:
    """A table of the lowest figures, and the line that says of how many."""
    rows = sorted(rows, key=lambda row: row[0])
    figures = [figure for figure, _ in rows]
    line = (
        f"{len(rows)} in all: worst, median, best {figures[0]:.2f}, {statistics.median(figures):.2f}, {figures[-1]:.2f}"
    )
    return table(head, [cells for _, cells in rows[:SHOWN]]) + f"\n{line}\n"


def policy_times(rows: list[Row]) -> list[list[str]]:
    """The time of a step by every policy, over that of ``preact``: cells, the head first."""
    names = dict.fromkeys(name for row in rows for name in row["rivals"] if name not in ("eager", "fastbp preact"))
    cells = [["case", "`preact`, ms", *(f"`{name.removeprefix('fastbp ')}`" for name in names)]]
    for row in rows:
        times = {name: rival["ms"] for name, rival in row["rivals"].items()}
        base = times["fastbp preact"]
        ratios = (f"{times[name] / base:.2f} ×" if name in times else "" for name in names)
        cells.append([row["case"], f"{base:.2f}", *ratios])
    return cells


def _remarks(rows: list[Row]) -> str:
    """Who is broken, was wrong, was left out or has no graph, in this order, and in how many cases."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        wrong = {
            name: f"error {rival['error']}"
            for name, rival in row["rivals"].items()
            if not rival.get("accurate", True) and not name.startswith("fastbp ")
        }
        for found, words in (
            (row.get("broken", {}), "is BROKEN"),
            (wrong, "is less accurate than eager allows"),
            (row.get("left_out", {}), "was left out"),
            (row.get("no_graph", {}), "has no graph"),
        ):
            for name, reason in found.items():
                cases.setdefault(f"- {name} {words}: {reason}", []).append(row["case"])
    lines = [
        f"{line} ({where[0]}{f' and {len(where) - 1} more' if where[1:] else ''})\n" for line, where in cases.items()
    ]
    order = ("BROKEN", "less accurate", "left out", "no graph")
    return "".join(sorted(lines, key=lambda line: [word not in line for word in order])[:SHOWN])


def _policies(suite: str, rows: list[Row], of: str) -> str:
    """What a step takes by every policy, and who does not serve."""
    head, *cells = policy_times(rows)
    return f"## {suite}: time over preact's ({of})\n\n" + table(head, cells) + _remarks(rows)


def _suite(suite: str, rows: list[Row], of: str) -> list[str]:
    """fastbp over eager, by events, mode by mode; beside it by the replayed graph, what is noise, and the rivals."""
    parts = []
    for mode in dict.fromkeys(row.get("mode", "fwd_bwd") for row in rows):
        chosen = [row for row in rows if row.get("mode", "fwd_bwd") == mode]
        names = {name for row in chosen for name in row["rivals"]}
        ours = next((name for name in ("fastbp", "fastbp.Linear", "fastbp.fuse") if name in names), "fastbp")
        beside = list(dict.fromkeys(name for row in chosen for name in row["rivals"] if name not in ("eager", ours)))
        found = []
        for row in chosen:
            rivals = row["rivals"]
            mine = rivals.get(ours)
            if mine is None:
                continue
            figures = [mine["over_eager"], mine.get("graph_over_eager")]
            figures += [rivals.get(name, {}).get("over_eager") for name in beside]
            cells = ["" if figure is None else f"{figure:.2f}" for figure in figures]
            found.append((mine["over_eager"], [row["case"], f"{mine['ms']:.3f}", *cells]))
        head = ["case", f"{ours}, ms", "× eager", "× eager in a graph", *beside]
        heading = f"## {suite} {mode}: eager's time over fastbp's ({of})\n\n"
        parts.append(heading + (worst(head, found) if found else "") + _remarks(chosen))
    return parts


def _accuracy(rows: list[Row], of: str) -> str:
    """The gradients of an MLP by every policy: the largest of their errors over eager's own, by dtype."""
    of_policies: dict[tuple[str, str], float] = {}
    own: dict[tuple[str, str], Row] = {}
    for row in (row for row in rows if row["table"] == "gradients"):
        if row["save"] == "eager":
            own[row["activation"], row["dtype"]] = row
            continue
        eager, key = own[row["activation"], row["dtype"]], (row["save"], row["dtype"])
        of_policies[key] = max(of_policies.get(key, 0.0), *(row[kind] / eager[kind] for kind in ("dx", "dW", "db")))
    cells = [[save, dtype, f"{factor:.2f} ×"] for (save, dtype), factor in of_policies.items()]
    heading = f"## accuracy: the worst error of gradients over eager's ({of})\n\n"
    return heading + table(["policy", "dtype", "of eager's"], cells)


def _memory(rows: list[Row], of: str) -> str:
    """What each rival keeps and has in use of a model's block, and who was left out."""
    keys = ("kept", "kept_allocated", "peak", "in_use")
    found = [
        [row["block"], name, *(f"{r[f'{key}_per_hidden']:.2f}" if key in r else "" for key in keys)]
        for row in rows
        for name, r in row["rivals"].items()
    ]
    head = ["block", "", "kept", "kept, by the allocator", "most in use", "in operations of PyTorch's"]
    remarks = [
        f"- {name} was left out: {reason} ({row['case']})\n"
        for row in rows
        for name, reason in row.get("left_out", {}).items()
    ]
    return f"## Memory of models' blocks, bytes by hidden element ({of})\n\n{table(head, found)}{''.join(remarks)}"


def _kernels(rows: list[Row], of: str) -> list[str]:
    """Products of ours over PyTorch's, and elementwise kernels over a copy."""
    parts = []
    products = [row for row in rows if "over_library" in row]
    if products:
        keys = ("over_library", "over_library_again", "over_eager", "over_gemm")
        found = [
            (row["over_library"], [row["case"], row["best_tile"], *(f"{row[key]:.2f}" for key in keys)])
            for row in products
        ]
        head = ["product", "best tile", "× library", "× library again", "× eager", "× the product alone"]
        parts.append(f"## The time of others over the best fused tile's ({of})\n\n{worst(head, found)}")
    refused = [
        f"- {row['case']}: {name}: {reason}\n" for row in rows for name, reason in row.get("refused", {}).items()
    ]
    if refused:
        parts.append(f"## Candidates that were refused ({of})\n\n{''.join(refused)}")
    passes = [
        (row["of_copy"], [row["case"], f"{row['ms']:.4f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.2f}"])
        for row in rows
        if "of_copy" in row
    ]
    if passes:
        head = ["elementwise kernel", "ms", "GB/s", "of a copy"]
        parts.append(f"## Elementwise kernels, of the bandwidth of a copy ({of})\n\n{worst(head, passes)}")
    return parts
