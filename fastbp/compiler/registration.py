"""How ``torch.compile`` finds the backend by its name, without Dynamo being imported for it.

An installed fastbp has the entry point, which Dynamo looks for. Where fastbp is merely on the path, as in a checkout,
importing it enters the same, at once or as soon as Dynamo's registry is imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType

from fastbp.imports import when_imported

NAME = "fastbp"
_ENTRY = EntryPoint(NAME, "fastbp.compiler:compile_graph", "torch_dynamo_backends")


def _enter(registry: ModuleType) -> None:
    registry._BACKENDS.setdefault(NAME, _ENTRY)


def register() -> None:
    """Enter the backend into Dynamo's registry, now or when that is imported."""
    when_imported("torch._dynamo.backends.registry", _enter)
