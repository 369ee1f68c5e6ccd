"""What may be read of the tensors that autograd's nodes keep, where saved-tensor hooks packed them."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks

from fastbp import producers
from fastbp.memory import SavedBytes
from fastbp.producers import Node


def hooks_allow(node: Node) -> bool | None:
    """Whether what the node and those below it keep may be read now (True), or in backward only (False), or not (None).

    Saved-tensor hooks are asked for what they packed: those that are active, and those that were when it was kept.
    """
    hooks = top_hooks(True)
    unpacks = producers.unpacks(node)
    if hooks is None and not unpacks:
        return True
    found = {_may_unpack(unpack) for unpack in (*unpacks, *(hooks[1:] if hooks is not None else ()))}
    return None if None in found else False not in found


def _may_unpack(unpack: Any) -> bool | None:
    """``hooks_allow`` of one hook.

    Those of SavedBytes give the tensor itself. In backward it may be asked for twice where unpacking is known to change
    nothing: that is save_on_cpu's, and what returns its argument.
    """
    owner = getattr(unpack, "__self__", None)
    if isinstance(owner, SavedBytes):
        return owner._gives_at_once
    code = getattr(getattr(unpack, "__func__", unpack), "__code__", None)
    # A checkpoint counts what is kept when it computes again, under hooks that return their argument.
    if code is None or unpack.__module__ == "torch.utils.checkpoint":
        return None
    takes = code.co_argcount
    return False if code is _FROM_CPU or (takes in _RETURNS and code.co_code == _RETURNS[takes]) else None


def _unpack_of_save_on_cpu() -> Any:
    with torch.autograd.graph.save_on_cpu():
        return top_hooks(True)[1].__code__


_FROM_CPU = _unpack_of_save_on_cpu()
_RETURNS = {1: (lambda packed: packed).__code__.co_code, 2: (lambda self, packed: packed).__code__.co_code}
