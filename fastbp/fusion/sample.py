"""Runs of a model on a sample, of which nothing remains."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastbp import linear, producers
from fastbp.linear import OUTCOME, Outcome


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs of the model in here are differentiable, draw the same random numbers, and leave no trace.

    The random states of PyTorch, numpy and Python and the model's buffers are afterwards what they were before.
    """
    buffers = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(state)
        with torch.no_grad():
            for owner, name, buffer, before in buffers:
                owner._buffers[name] = buffer  # a forward may have put another tensor there
                buffer.copy_(before)


def as_call(sample_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of arguments, or a mapping of keyword arguments, as a tokenizer gives them."""
    if isinstance(sample_inputs, Mapping):
        return (), dict(sample_inputs)
    return (tuple(sample_inputs) if isinstance(sample_inputs, (tuple, list)) else (sample_inputs,)), {}


def run(model: nn.Module, sample_inputs: Any, where: str) -> Any:
    """The model's outputs; ValueError, beginning with ``where``, if it does not run with them."""
    args, kwargs = as_call(sample_inputs)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(
            f"{type(t).__name__} {tuple(t.shape)} {t.dtype}"
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        )
        raise ValueError(
            f"{where}: the model does not run with sample_inputs ({shapes or type(sample_inputs).__name__}): "
            f"{type(error).__name__}: {error}; they are a tensor, a tuple of arguments or a mapping of keyword "
            "arguments for it"
        ) from error


def twin_of(model: nn.Module) -> nn.Module | None:
    """A copy with the same parameters, and whatever else the model has of its own; None where it cannot be copied."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # locks, handles, tensors of a graph: whatever a stranger's class holds
        return None


def watch(model: nn.Module, sample_inputs: Any) -> None:
    """Call a fused model on a sample, small calls as large ones, so that its linears know what they did."""
    readers = [m for m in model.modules() if isinstance(m, nn.Linear) and "forward" in type(m).__dict__]
    hooks = [m.register_forward_pre_hook(_note) for m in readers if not isinstance(m, linear.Linear)]
    try:
        with undisturbed(model), linear.of_any_size():
            run(model, sample_inputs, "fastbp.fuse")
    finally:
        for hook in hooks:
            hook.remove()


def _note(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of linears that are not fastbp's: whether an activation made the input."""
    x = args[0] if args else None
    node = x.grad_fn if isinstance(x, Tensor) else None
    if node is not None and producers.is_near(node):
        module.__dict__[OUTCOME] = Outcome(False, f"a {type(module).__name__}, which has a forward of its own")
