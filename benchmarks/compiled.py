"""Which kernels compile without a fault: benchmarks/results/compiled.jsonl, by ``benchmarks.static --record``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks import records
from benchmarks.environment import environment

FILE = records.RESULTS / "compiled.jsonl"


class Tally:
    """Kernels and faults, by a kernel's name in docs/gpu-status.md and its architecture."""

    def __init__(self) -> None:
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.faulty: Counter[tuple[str, str]] = Counter()

    def add(self, kernel: str, family: str, faulty: bool) -> None:
        self.kernels[kernel, family] += 1
        self.faulty[kernel, family] += faulty

    def write(self, command: str, quick: bool, **versions: str) -> None:
        """Put the rows of these kernels and architectures in the place of those that were there."""
        now = environment(command)
        stamp = {"date": now["date"], "commit": now["commit"], "command": command, "quick": quick, **versions}
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        if FILE.exists():
            rows = {(row["kernel"], row["family"]): row for row in records.read(FILE).rows}
        for key, count in self.kernels.items():
            kernel, family = key
            found = {"kernel": kernel, "family": family, "kernels": count, "faulty": self.faulty[key]}
            rows[key] = found | stamp
        records.write(FILE, now, [rows[key] for key in sorted(rows)])
        print(f"written to {FILE}")
