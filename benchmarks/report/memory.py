"""How much memory: what steps raise a process by, and what blocks of known models keep and have in use."""

from __future__ import annotations

from benchmarks.records import Row
from benchmarks.report.load import Machine, dtype_of, in_order
from benchmarks.report.tables import WORDS, Ratio, markdown, span, stamp


def steps(machine: Machine) -> str:
    """How far a step raises the memory in use, over eager's: the most first."""
    table = []
    for dtype in in_order(map(dtype_of, machine.rows("memory")), ("float32",)):
        rows = [row for row in machine.rows("memory") if dtype_of(row) == dtype]
        mine, recompute = (_of_eager(rows, who) for who in ("fastbp", "fastbp recompute"))
        cells = [dtype, str(len(rows)), span(mine, bold=True), mine[0].case.removesuffix(f" {dtype}"), span(recompute)]
        table.append(cells)
    head = ["dtype", "cases", f"of eager's: {WORDS}", "worst case", f"`recompute`: {WORDS}"]
    return markdown(head, table) + f"\n{stamp(machine.suites['memory'].environment)}.\n"


def _of_eager(rows: list[Row], who: str) -> list[Ratio]:
    """A rival's memory over eager's, the most first."""
    found = [(row["rivals"], row["case"]) for row in rows if {who, "eager"} <= set(row["rivals"])]
    return sorted((Ratio(rivals[who]["mib"] / rivals["eager"]["mib"], case) for rivals, case in found), reverse=True)


def kept(machine: Machine) -> str:
    """What each rival keeps of the blocks of models, in bytes by hidden element."""
    return _by_block(machine, "kept", "{:.2f}")


def in_use(machine: Machine) -> str:
    """The most that a step in operations of PyTorch's has in use, in bytes by hidden element."""
    return _by_block(machine, "in_use", "{:.1f}")


def _by_block(machine: Machine, key: str, form: str) -> str:
    """A row for each rival with such a figure, a column for each block; what ``auto`` takes is bold."""
    rows = machine.rows("model_memory")
    names = dict.fromkeys(name for row in rows for name, found in row["rivals"].items() if key in found)
    shapes = [row["case"].partition("×")[2].removesuffix(" bfloat16") for row in rows]
    table = []
    for name in names:
        cells = [f"`{name}`" if name.startswith("fastbp") else name]
        for row in rows:
            found = row["rivals"].get(name, {}).get(f"{key}_per_hidden")
            cell = "" if found is None else form.format(found)
            cells.append(f"**{cell}**" if cell and name == row["auto"] else cell)
        table.append(cells)
    return markdown(["", *(f"{row['block']} {shape}" for row, shape in zip(rows, shapes, strict=True))], table)
