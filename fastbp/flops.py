"""How ``torch.utils.flop_counter`` counts the ops: told when that is imported, which fastbp itself does not do.

Importing it brings in Triton, a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from fastbp.imports import when_imported

_formulas: dict[Any, Callable[..., int]] = {}


def count_as(op: Any, formula: Callable[..., int]) -> None:
    """Let ``FlopCounterMode`` count a call of ``torch.ops.namespace.op`` as ``formula(*arguments)``."""
    first = not _formulas
    _formulas[op] = formula
    if first or _counters:
        when_imported("torch.utils.flop_counter", _tell)


_counters: list[ModuleType] = []  # the counter, once it was told


def _tell(counter: ModuleType) -> None:
    _counters[:] = [counter]
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(_without_result(formula))


def _without_result(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None: formula(*args)
