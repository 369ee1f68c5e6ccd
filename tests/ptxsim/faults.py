"""What a kernel does wrong, and what the emulator cannot do."""

from __future__ import annotations

import shutil
import subprocess


class Unsupported(Exception):
    """An instruction, or a form of one, that is not emulated."""


class Fault(Exception):
    """What a kernel did wrong: its kind, where, and what makes it happen again.

    ``message`` names the CTA, the warp, the line of the PTX with its text, and the line of the source. A launch adds
    its kernel, label and schedule; ``reports`` are all that was reported until then.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind, self.message = kind, message
        self.reports: list[str] = []
        self.kernel = self.label = ""
        self.schedule = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.message}"]
        if self.kernel:
            lines.append(f"  kernel: {demangled(self.kernel)}")
        if self.label:
            lines.append(f"  launch: {self.label}")
        if self.schedule is not None:
            lines.append(f"  again by: schedule={self.schedule.short()}")
        lines += [f"  also: {report}" for report in self.reports if report != f"{self.kind}: {self.message}"][:8]
        return "\n".join(lines)


def demangled(name: str) -> str:
    """A C++ name where a tool that reads it is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not name.startswith("_Z") or tool is None:
        return name
    return subprocess.run([tool, name], capture_output=True, text=True, check=False).stdout.strip() or name
