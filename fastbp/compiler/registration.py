"""How ``torch.compile`` finds the backend by its name, without Dynamo being imported for it.

An installed fastbp has the entry point, which Dynamo looks for. Where fastbp is merely on the path, as in a checkout,
importing it enters the same, at once or as soon as Dynamo's registry is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

NAME = "fastbp"
_ENTRY = EntryPoint(NAME, "fastbp.compiler:compile_graph", "torch_dynamo_backends")
_REGISTRY = "torch._dynamo.backends.registry"


class _AtImport(importlib.abc.MetaPathFinder):
    """Waits for the registry's import, enters the backend, and is gone."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _enter(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _enter(registry: ModuleType) -> None:
    registry._BACKENDS.setdefault(NAME, _ENTRY)


def register() -> None:
    """Enter the backend into Dynamo's registry, now or when that is imported."""
    if _REGISTRY in sys.modules:
        _enter(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _AtImport())
