"""What autograd keeps between forward and backward, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class SavedBytes:
    """Count the bytes that autograd keeps for backward inside the ``with`` block, each storage once.

    ::

        with fastbp.SavedBytes(exclude=[x, model]) as saved:
            y = model(x)
        print(saved.total)

    ``exclude`` holds tensors and modules whose storages are not counted: parameters and inputs exist anyway. ``total``
    is the sum in bytes, ``by_storage`` the size of every storage in the order it was first kept. Works on any device,
    meta and fake tensors too, and for any module, not only those of fastbp. Only what goes through autograd's saved
    tensors is seen, which is all that PyTorch's and fastbp's layers keep; not what selective activation checkpointing
    puts aside beside it.
    """

    def __init__(self, exclude: Iterable[Tensor | nn.Module] = ()) -> None:
        self._excluded: dict[Any, int] = {}
        self._kept: dict[Any, int] = {}
        self._doubtful: list[StorageWeakRef] = []
        if isinstance(exclude, (Tensor, nn.Module)) or not hasattr(exclude, "__iter__"):
            kind = type(exclude).__name__
            raise TypeError(f"fastbp.SavedBytes: exclude must be a list of tensors and modules, got {kind}")
        for item in exclude:
            if isinstance(item, nn.Module):
                tensors = [*item.parameters(), *item.buffers()]
            elif isinstance(item, Tensor):
                tensors = [item]
            else:
                raise TypeError(f"fastbp.SavedBytes: exclude must hold tensors and modules, got {type(item).__name__}")
            for tensor in tensors:
                self._add(tensor, self._excluded)

    @property
    def total(self) -> int:
        """The bytes of all storages kept."""
        return sum(self._counted().values())

    @property
    def by_storage(self) -> tuple[int, ...]:
        """The bytes of each storage kept, in the order they came."""
        return tuple(self._counted().values())

    def _add(self, tensor: Tensor, into: dict[Any, int]) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._add(getattr(tensor, name), into)
            return
        if tensor.layout is not torch.strided:  # sparse and its kin are made of strided tensors
            for part in _strided_parts(tensor):
                self._add(part, into)
            return
        storage = tensor.untyped_storage()
        # A weak reference keeps the identity, not the memory: an address would be reused when a storage dies.
        key = StorageWeakRef(storage)
        if key not in self._excluded:
            into.setdefault(key, storage.nbytes())

    def _let_go(self, *tensors: Tensor) -> None:
        """Count these storages only if they still are there when somebody asks, for a node that kept them goes now."""
        self._doubtful += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def _counted(self) -> dict[Any, int]:
        for key in self._doubtful:
            if key.expired():
                self._kept.pop(key, None)
        return self._kept

    _gives_at_once = True  # whether _unpack may be called while the model runs

    def _pack(self, tensor: Tensor) -> Any:
        self._add(tensor, self._kept)
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        return packed  # type: ignore[no-any-return]

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._counted()
        self._doubtful.clear()
        self._hooks.__exit__(*exception)


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    raise TypeError(f"fastbp.SavedBytes: cannot count the bytes of a tensor of layout {tensor.layout}")
