"""Telling a module of PyTorch's something once somebody imports it, for fastbp does not: that takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Tell = Callable[[ModuleType], None]


def when_imported(name: str, tell: Tell) -> None:
    """Call ``tell(module)`` now if the module is imported already, else once it has been executed."""
    if name in sys.modules:
        tell(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, tell))


class _Waiting(MetaPathFinder):
    """Waits for one module, and is gone with its import."""

    def __init__(self, name: str, tell: Tell) -> None:
        self.name, self.tell = name, tell

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self.tell(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
