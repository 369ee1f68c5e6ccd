"""What ``fuse`` did and did not do, site by site."""

from __future__ import annotations

from dataclasses import dataclass, field

FUSED, LEFT, ROLLED_BACK, WOULD_FUSE = "fused", "left", "rolled back", "would fuse"


@dataclass
class Site:
    """One place in the model: a module, or a run of children of an ``nn.Sequential``."""

    name: str  # as model.named_modules() has it; "" is the model itself
    kind: str  # the module's class, and which of its children
    what: str  # the fused call, with its activation
    status: str
    reason: str = ""


@dataclass
class FusionReport:
    """The outcome of ``fastbp.fuse``: every site with its status and reason, and the errors that verifying measured.

    ``print(report)`` shows a table. ``errors`` maps what was compared to the relative L2 difference between before and
    after; empty where ``verify`` was off. ``verified`` is None where nothing was verified.
    """

    sites: list[Site] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    verified: bool | None = None
    dry_run: bool = False

    @property
    def fused(self) -> list[Site]:
        """The sites that now run fused (or would, in a dry run)."""
        return [site for site in self.sites if site.status in (FUSED, WOULD_FUSE)]

    @property
    def left(self) -> list[Site]:
        """The sites that run as before, each with its reason."""
        return [site for site in self.sites if site.status in (LEFT, ROLLED_BACK)]

    def __str__(self) -> str:
        rows = [("site", "module", "call", "status", "why")]
        rows += [(s.name or "(model)", s.kind, s.what, s.status, s.reason) for s in self.sites]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        done = "would be fused" if self.dry_run else "fused"
        lines.append(f"{len(self.fused)} {done}, {len(self.left)} left as they were{self._verdict()}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.verified is None:
            return ""
        worst = max(self.errors.values(), default=0.0)
        text = "agree with" if self.verified else "DIFFER from"
        return f"; outputs and gradients {text} the model before (largest relative difference {worst:.1e})"
