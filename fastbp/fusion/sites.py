"""What the linears and blocks of a model did, site by site."""

from __future__ import annotations

from dataclasses import dataclass, field

FUSED, LEFT, WOULD_FUSE, NO_GAIN = "fused", "left", "would fuse", "no gain"


@dataclass(frozen=True)
class Site:
    """One place in the model: a linear behind an activation, a block whose code is known, or what was left."""

    name: str  # as model.named_modules() has it; "" is the model itself
    kind: str  # the module's class, and which of its children
    what: str  # the fused call, with its activation
    status: str
    reason: str = ""
    unkept: int = 0  # bytes that PyTorch would have kept for backward and fastbp did not


@dataclass
class FusionReport:
    """The outcome of ``fastbp.fuse`` or ``fastbp.report``; ``print(report)`` shows a table.

    ``sites`` has a row for each block whose code is known, and where the model was run, for each linear behind an
    activation: ``fused``, or ``left`` with the reason, or ``no gain`` where PyTorch keeps as little. ``linears`` counts
    the linears that look at their input in every call.
    """

    sites: list[Site] = field(default_factory=list)
    linears: int = 0
    ran: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> list[Site]:
        """The sites that run fused (or would, in a dry run)."""
        return [site for site in self.sites if site.status in (FUSED, WOULD_FUSE)]

    @property
    def left(self) -> list[Site]:
        """The sites that PyTorch computes, each with its reason."""
        return [site for site in self.sites if site.status == LEFT]

    def __str__(self) -> str:
        rows = [("site", "module", "call", "status", "not kept", "why")]
        for s in self.sites:
            unkept = f"{s.unkept:,} B" if s.unkept else ""
            rows.append((s.name or "(model)", s.kind, s.what, s.status, unkept, s.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(f"{len(self.fused)} fused, {len(self.left)} left; {self.linears} linears look at their input")
        if not self.ran:
            lines.append("What the linears do is known once the model has run: fastbp.report(model), or sample_inputs.")
        return "\n".join(lines + self.notes)
