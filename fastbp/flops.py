"""How ``torch.utils.flop_counter`` counts the ops: told when that is imported, which fastbp itself does not do.

Importing it brings in Triton, a tenth of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count_as(op: Any, formula: Callable[..., int]) -> None:
    """Let ``FlopCounterMode`` count a call of ``torch.ops.namespace.op`` as ``formula(*arguments)``."""
    _formulas[op] = formula
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _tell(counter: ModuleType) -> None:
    for op, formula in _formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(_without_result(formula))


def _without_result(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None: formula(*args)


class _Finder(MetaPathFinder):
    """Tells the module once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                _tell(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
