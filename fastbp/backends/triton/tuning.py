"""What was measured on this machine: which tile, or PyTorch's own product, is the fastest for a product of ours.

``remember`` writes it into the cache, ``recall`` looks it up. A file belongs to one kind of GPU and its driver, one
version of torch and Triton and these very kernels: its name is the digest of them, and what was measured with others is
not found.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fastbp import cache
from fastbp.backends.triton import configs
from fastbp.backends.triton.configs import Tile
from fastbp.version import fingerprint

LIBRARY = "library"  # in place of a tile's name: PyTorch's product and one elementwise kernel


class Choice(NamedTuple):
    """The fastest; tile None for PyTorch's own product."""

    tile: Tile | None


@lru_cache(maxsize=64)
def environment(device: torch.device) -> dict[str, str]:
    """What a measurement belongs to."""
    return {
        **(cache.gpu_facts(device) if device.type == "cuda" else {"device": "interpreter"}),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": fingerprint(Path(__file__).parent, (".py",)),
    }


def file_name(found: dict[str, str]) -> str:
    """The file of an environment."""
    return f"triton-{hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]}.json"


def key(kind: str, activation: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> str:
    """A product in the file: ``dgrad gelu bfloat16 8192x3072x768``, sizes as m, n, k."""
    return f"{kind} {activation} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"


_recalled: dict[tuple[Any, ...], Choice | None] = {}  # grows with the sizes a program uses, not with its calls
_files: dict[torch.device, dict[str, Any]] = {}


def recall(
    device: torch.device, kind: str, activation: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> Choice | None:
    """What was measured for this product, or None. The file is read once."""
    at = (device, kind, activation, dtype, sizes)
    try:
        return _recalled[at]
    except KeyError:
        if device not in _files:
            _files[device] = _fastest(cache.read(file_name(environment(device))))
        found = _recalled[at] = _choice(kind, _files[device].get(key(kind, activation, dtype, sizes)))
        return found


def inventory(device: torch.device) -> str:
    """How many products were measured on this device, and where that is written."""
    name = file_name(environment(device))
    try:
        return f"{len(_fastest(cache.read(name)))}, in {cache.folder() / name}"
    except OSError as error:
        return f"none: {error}"


def _fastest(content: dict[str, Any]) -> dict[str, Any]:
    """What a file says of each product; {} where it is of another form."""
    found = content.get("fastest")
    return found if isinstance(found, dict) else {}


def _choice(kind: str, entry: Any) -> Choice | None:
    """An entry of the file as a choice; None for one that is not there or names no tile of these kernels."""
    name = entry.get("fastest") if isinstance(entry, dict) else None
    if name == LIBRARY:
        return Choice(None)
    return next((Choice(tile) for tile in configs.every_tile(kind) if tile.name == name), None)


def remember(device: torch.device, at: str, times: dict[str, float]) -> None:
    """Write down the times (milliseconds) of a product's candidates, by the tile's name or ``library``."""
    found, entry = environment(device), {"fastest": min(times, key=times.__getitem__), "milliseconds": times}
    cache.change(file_name(found), lambda content: {"environment": found, "fastest": _fastest(content) | {at: entry}})
    forget()


def forget() -> None:
    """Read the files again at the next look."""
    _recalled.clear()
    _files.clear()
