"""The results of all machines in Markdown, as docs/benchmarks.md and README.md show them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import pictures, speed
from benchmarks.report.load import Machine, Suite
from benchmarks.report.tables import markdown, over_eager, stamp
from benchmarks.suites import SUITES

MODE = "fwd_bwd"  # what README.md shows
BESIDE = ("torch.compile",)  # and beside fastbp


def suites() -> str:
    """What each suite is."""
    return markdown(["suite", "what is measured"], [[f"`{name}`", suite.about] for name, suite in SUITES.items()])


def document(machines: Sequence[Machine]) -> str:
    """A section for each machine."""
    return "\n".join(map(_section, machines))


def _section(machine: Machine) -> str:
    parts = [f"## {machine.title} (`{machine.name}`)\n", speed.measured(machine)]
    if peaks := speed.peaks(machine):
        parts.append(f"The most that was seen of it: {peaks}.\n")
    if machine.timed:
        parts += ["### fastbp over eager\n", speed.summary(machine)]
        parts += [f"![{pictures.CAPTIONS[name]}]({picture_file(machine, name)})\n" for name in shown(machine)]
        parts += [f"{reason}\n" for reason in missing(machine)]
        parts += ["### Everybody over eager: worst, median, best\n", speed.rivals(machine)]
        parts += ["### Where a rival is ahead\n", speed.ahead(machine)]
        parts += ["### Who was wrong or left out\n", speed.failures(machine)]
    return "\n".join(parts)


def shown(machine: Machine) -> list[str]:
    """The pictures of speed; those of memory and training have pages of their own."""
    return [name for name in pictures.of(machine) if name not in ("kept", "training")]


def picture_file(machine: Machine, name: str) -> str:
    """Where in docs/ a picture is. There is one training, whose page was there before there were machines."""
    if name == "training":
        return "training.svg"
    return f"{name}-{machine.name}.svg"


def missing(machine: Machine) -> list[str]:
    """In words what a machine's files do not allow to draw, and what does."""
    found, again = pictures.of(machine), "the next run of `python -m benchmarks.run` will"
    reasons = {
        "floor": f'No picture of speed over the floor: no row has both "linears alone" and "fastbp"; {again}.',
        "roofline": f"No roofline: the files lack the operations and bytes of a row or the machine's peaks; {again}.",
    }
    return [reason for name, reason in reasons.items() if name not in found]


def readme(machines: Sequence[Machine]) -> str:
    """For each machine what and when it was, and fastbp over eager."""
    parts = []
    for machine in machines:
        if found := [suite for suite in machine.compared if over_eager(suite.part(MODE), "fastbp")]:
            where = f"[benchmarks/results/{machine.name}/](benchmarks/results/{machine.name}/)"
            parts.append(f"**{_when(found)}** ({where}):\n\n{speed.summary(machine, BESIDE, (MODE,))}")
    return "\n".join(parts)


def readme_picture(machines: Sequence[Machine]) -> str:
    """Speed over the floor, of the machine that was measured last."""
    found = [(pictures.parted(machine)[0], machine) for machine in machines if "floor" in pictures.of(machine)]
    if not found:
        return ""
    suites, machine = max(found, key=lambda pair: max(str(suite.environment.get("date")) for suite in pair[0]))
    caption = pictures.CAPTIONS["floor"]
    return f"![{caption}](docs/{picture_file(machine, 'floor')})\n\n{caption} {_when(suites)}.\n"


def _when(suites: Sequence[Suite]) -> str:
    return stamp(*(suite.environment for suite in suites))


def demo(path: Path) -> str:
    """What the demo found: fastbp over stock PyTorch, and stock run twice."""
    found = json.loads(path.read_text(encoding="utf-8"))
    table = []
    for task in found["tasks"]:
        runs, ratios = task["runs"], task["fused_to_stock"]
        again = runs["again"]["step_seconds"] / runs["stock"]["step_seconds"]
        figures = (ratios["step_seconds"], again, ratios["kept_bytes"], ratios["kept_bytes_per_hidden"])
        losses = (f"{runs[name]['held_out_loss']:.4f}" for name in ("stock", "fused"))
        table.append([task["about"], *(f"{figure:.2f}" for figure in figures), ", ".join(losses)])
    head = ["task", "step time, of stock's", "stock again", "bytes kept, of stock's", "inside the fused blocks"]
    return markdown([*head, "held-out loss: stock, fused"], table) + f"\n{found['machine']}.\n"
