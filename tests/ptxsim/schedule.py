"""How a seed schedules: which warp is next, for how long, and when asynchronous operations complete."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields


@dataclass
class Schedule:
    """How a seed schedules."""

    seed: int = 0
    order: str = "random"  # or "priority": the most important warp that can run, priorities changing now and then
    slice: int = 4  # visible instructions at a time, on average
    eager: float = 0.0  # the chance that an asynchronous operation is done where it is issued
    rate: float = 0.2  # the chance, after each slice, that one of those under way is done
    burst: int = 1
    groups: str = "lowest"  # or "random": which lanes go on where they went apart
    lazy: str = ""  # "products" or "copies": these are done only when they must be
    spin: float = 0.02  # the chance that a wait in vain comes back instead of being suspended
    resident: int = 0  # clusters at a time, 0 for all
    limit: int = 500_000_000  # warp instructions, after which a launch is a livelock
    strict: bool = False  # report what only the letter of the PTX ISA asks for, too
    races: bool = True  # check the order of all accesses to shared memory, and that warps share no global memory

    def short(self) -> str:
        """What makes it again: a seed, and the fields that differ from those it draws."""
        drawn = Schedule.of(self.seed)
        changed = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(drawn, f.name)
        }
        if not changed:
            return f"{self.seed}"
        return f"replace(Schedule.of({self.seed}), {', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @staticmethod
    def of(seed: int) -> Schedule:
        rng = random.Random(f"schedule {seed}")
        rate = rng.choice([0.0, 0.0, 0.05, 0.3, 0.8])
        return Schedule(
            seed,
            order=rng.choice(["random", "random", "priority"]),
            slice=rng.choice([1, 3, 10, 40, 200]),
            eager=rng.choice([0.0, 0.0, 0.3, 1.0]),
            rate=rate,
            burst=rng.choice([1, 1, 4]),
            groups=rng.choice(["lowest", "lowest", "random"]),
            lazy=rng.choice(["", "", "products", "copies"]),
            spin=rng.choice([0.02, 0.02, 0.5]),
        )
