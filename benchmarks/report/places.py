"""What of the results stands where in README.md and docs/. tools/render.py puts it there and keeps it fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

from benchmarks.records import RESULTS
from benchmarks.report import document, emulated, memory, pictures, policies, tuned
from benchmarks.report.load import Machine, load

ZEN = "cpu-amd-avx512-bf16"  # an AMD CPU
AMX = "cpu-intel-amx"  # an Intel CPU whose products of bfloat16 run on tiles


class Place(NamedTuple):
    """A file, or a region of it, and what is written there."""

    path: str
    region: str | None
    write: Callable[[], str]


TABLES: tuple[tuple[str, str, str, Callable[[Machine], str]], ...] = (
    ("README.md", "memory", ZEN, memory.steps),
    ("docs/memory.md", "kept", ZEN, memory.kept),
    ("docs/memory.md", "in-use", ZEN, memory.in_use),
    ("docs/memory.md", "policy-speed", ZEN, policies.speed_table),
    ("docs/memory.md", "policy-speed-amx", AMX, policies.speed_table),
    ("docs/tuning.md", "tuned", AMX, tuned.table),
    ("docs/numerics.md", "slopes", ZEN, policies.slope_table),
    ("docs/numerics.md", "gradients", ZEN, policies.gradient_table),
    ("docs/training.md", "training", ZEN, policies.training_table),
)


def places() -> Iterator[Place]:
    """All of them; a picture for each machine whose files allow it."""
    machines = load()
    by_name = {machine.name: machine for machine in machines}
    yield Place("README.md", "speed", partial(document.readme, machines))
    yield Place("README.md", "floor", partial(document.readme_picture, machines))
    yield Place("README.md", "demo", partial(document.demo, RESULTS / ZEN / "demo.json"))
    yield Place("docs/benchmarks.md", "suites", document.suites)
    yield Place("docs/benchmarks.md", "machines", partial(document.document, machines))
    yield Place("docs/gpu-status.md", "emulated", emulated.table)
    for path, region, name, write in TABLES:
        yield Place(path, region, partial(write, by_name[name]))
    for machine in machines:
        for name, draw in pictures.of(machine).items():
            yield Place(f"docs/{document.picture_file(machine, name)}", None, cache(draw))
