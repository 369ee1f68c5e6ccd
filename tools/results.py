"""The tables of results in README.md and docs/, from the files in benchmarks/results/; tools/render.py puts them in."""

from __future__ import annotations

import statistics

from benchmarks import records
from benchmarks.records import RESULTS, Row

ZEN = "cpu-amd-avx512-bf16"  # where the results of an AMD CPU are
AMX = "cpu-intel-amx"  # where the results of an Intel CPU with AMX are
SUITES_SHOWN = ("layers", "blocks", "small", "edges", "overhead")
DTYPES = ("float32", "bfloat16")


def rows_of(suite: str, machine: str = ZEN) -> list[tuple[str, list[Row]]]:
    """A file's rows, by dtype."""
    rows = records.read(RESULTS / machine / f"{suite}.jsonl").rows
    chosen = [(dtype, [row for row in rows if row["case"].endswith(dtype)]) for dtype in DTYPES]
    return [(dtype, found) for dtype, found in chosen if found]


def span(ratios: list[tuple[float, str]]) -> str:
    """Worst, median and best of ratios in this order."""
    return f"{ratios[0][0]:.2f}, {statistics.median(r for r, _ in ratios):.2f}, {ratios[-1][0]:.2f}"


def markdown(table: list[list[str]]) -> str:
    table.insert(1, ["---"] * len(table[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def speed_table(machine: str = ZEN, beside: str = "torch.compile") -> str:
    """Each suite on a CPU: fastbp over eager, the slowest case first, and another rival over eager."""
    head = ["suite", "dtype", "cases", "× eager: worst, median, best", "worst case"]
    table = [[*head, f"{beside}: worst, median, best"]]
    for suite in SUITES_SHOWN:
        for dtype, rows in rows_of(suite, machine):
            mine, other = (
                sorted((row["rivals"][who]["over_eager"], row["case"]) for row in rows) for who in ("fastbp", beside)
            )
            worst = mine[0][1].removesuffix(f" {dtype}")
            table.append([suite, dtype, str(len(rows)), f"**{span(mine)}**", worst, span(other)])
    return markdown(table)


def memory_table() -> str:
    """How far a step raises the memory in use, over eager's: the most first."""
    table = [["dtype", "cases", "of eager's: worst, median, best", "worst case", "`recompute`: worst, median, best"]]
    for dtype, rows in rows_of("memory"):
        mine, recompute = (
            sorted(
                ((row["rivals"][who]["mib"] / row["rivals"]["eager"]["mib"], row["case"]) for row in rows), reverse=True
            )
            for who in ("fastbp", "fastbp recompute")
        )
        worst = mine[0][1].removesuffix(f" {dtype}")
        table.append([dtype, str(len(rows)), f"**{span(mine)}**", worst, span(recompute)])
    return markdown(table)


def kept_table() -> str:
    """What each rival keeps of the blocks of models, in bytes by hidden element."""
    return by_block("kept", "{:.2f}")


def in_use_table() -> str:
    """The most that a step in operations of PyTorch's has in use, in bytes by hidden element."""
    return by_block("in_use", "{:.1f}")


def by_block(key: str, form: str) -> str:
    """A row for each rival with such a figure, a column for each block; what ``auto`` takes is bold."""
    rows = records.read(RESULTS / ZEN / "model_memory.jsonl").rows
    names = dict.fromkeys(name for row in rows for name, found in row["rivals"].items() if key in found)
    shapes = [row["case"].partition("×")[2].removesuffix(" bfloat16") for row in rows]
    table = [["", *(f"{row['block']} {shape}" for row, shape in zip(rows, shapes, strict=True))]]
    for name in names:
        cells = [f"`{name}`" if name.startswith("fastbp") else name]
        for row in rows:
            found = row["rivals"].get(name, {}).get(f"{key}_per_hidden")
            cell = "" if found is None else form.format(found)
            cells.append(f"**{cell}**" if cell and name == row["auto"] else cell)
        table.append(cells)
    return markdown(table)
