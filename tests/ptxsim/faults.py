"""What a kernel does wrong, and what the emulator cannot do."""

from __future__ import annotations


class Fault(Exception):
    """What a kernel did wrong, and where."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.reports: list[str] = []  # what was reported before


class Unsupported(Exception):
    pass
