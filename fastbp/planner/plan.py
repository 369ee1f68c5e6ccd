"""What ``plan_memory`` found and did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass
class PlannedLayer:
    """One layer: its policy and bytes before and after.

    Bytes are those of the storages that the layer is the first to keep, and no other part of the model keeps. ``calls``
    are the fused calls it makes; ``before`` is "eager" where it was not fused, ``after`` the same as ``before`` where
    it was left alone, for the ``reason`` given. ``extra_time`` is the share of a step's operations in products that
    backward repeats, by count. ``error`` is the relative L2 error that the policy adds to the slope.
    """

    name: str  # as model.named_modules() has it; "" is the model itself
    calls: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    extra_time: float
    error: float
    reason: str = ""


@dataclass
class MemoryPlan:
    """The outcome of ``fastbp.plan_memory``; ``print(plan)`` shows a table.

    ``total_before`` and ``total_after`` are the bytes autograd keeps for the whole model in one forward on the sample,
    as ``fastbp.SavedBytes`` measures them without the model and the inputs. ``extra_time`` is the sum of the layers':
    the operations of products that backward repeats over those of a step (three times forward's), by count and not
    measured. ``applied`` says whether the model has been changed.
    """

    layers: list[PlannedLayer]
    budget: int
    total_before: int
    total_after: int
    extra_time: float
    applied: bool
    approximate: list[str] = field(default_factory=list)  # the layers whose gradients are no longer exact

    @property
    def policies(self) -> dict[str, str]:
        """The policy of each layer that was planned."""
        return {layer.name: layer.after for layer in self.layers if not layer.reason}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "call", "policy", "kept before", "kept after", "extra time", "error", "left alone because")
        ]
        rows += [_row(layer) for layer in self.layers]
        used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        widths = [max(len(row[i]) for row in rows) for i in used]
        lines = ["  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        elsewhere = self.total_after - sum(layer.bytes_after for layer in self.layers)
        lines.append(f"the rest of the model keeps {human(elsewhere)}")
        when = "after" if self.applied else "if applied"
        lines.append(
            f"kept in all: {human(self.total_before)} before, {human(self.total_after)} {when}; "
            f"budget {human(self.budget)}"
        )
        lines.append(
            f"extra time: {self.extra_time:.1%} of a step's floating point operations in products, which backward "
            "repeats; counted, not measured"
        )
        if self.approximate:
            lines.append(f"approximate gradients in {len(self.approximate)} of {len(self.layers)} layers")
        return "\n".join(lines)


def _row(layer: PlannedLayer) -> tuple[str, ...]:
    same = layer.before == layer.after
    return (
        layer.name or "(model)",
        layer.calls,
        layer.after if same else f"{layer.before} -> {layer.after}",
        human(layer.bytes_before),
        human(layer.bytes_after),
        f"{layer.extra_time:.1%}" if layer.extra_time else "",
        f"{layer.error:.0e}" if layer.error else "",
        layer.reason,
    )


def human(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    amount, unit = float(size), 0
    while abs(amount) >= 1024 and unit < len(UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.2f} {UNITS[unit]}" if unit else f"{size} B"
