"""The whole model before and after: same outputs, same gradients, on the caller's own inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastbp.fusion.templates import difference

# Relative L2 between two evaluations that differ in rounding only, through a deep model. Blocks were told apart in
# float64 before; this looks for mistakes of wiring, which are of the size of the values themselves.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs of the model in here are differentiable, draw the same random numbers, and leave no trace.

    PyTorch's random state and the model's buffers (running statistics) are afterwards what they were before.
    """
    buffers = [
        (owner, name, buffer, buffer.detach().clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, before in buffers:
                owner._buffers[name] = buffer  # a forward may have put another tensor there
                buffer.copy_(before)


def observe(model: nn.Module, sample_inputs: Any) -> dict[str, Tensor]:
    """The model's outputs, and the gradients of its parameters for random output gradients.

    In the mode the model is in; of the other (evaluating or training) the outputs, if it runs there. Random state,
    buffers and ``.grad`` are left as they were.
    """
    with undisturbed(model):
        leaves = _floats(run_sample(model, sample_inputs))
        observed = {f"output {i}": t.detach().clone() for i, t in enumerate(leaves)}
        roots = [t for t in leaves if t.requires_grad]
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if roots and parameters:
            cotangents = [torch.randn_like(t) for t in roots]
            grads = torch.autograd.grad(roots, list(parameters.values()), cotangents, allow_unused=True)
            observed |= {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}
    modes = [(module, module.training) for module in model.modules()]
    other = not model.training
    try:
        model.train(other)
        with undisturbed(model), torch.no_grad():
            leaves = _floats(run_sample(model, sample_inputs))
        observed |= {f"output {i} {'training' if other else 'evaluating'}": t.clone() for i, t in enumerate(leaves)}
    except ValueError:
        pass  # it does not run so; nor will it afterwards
    finally:
        for module, training in modes:
            module.training = training
    return observed


def _floats(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def run_sample(model: nn.Module, sample_inputs: Any) -> Any:
    """The model's outputs; ValueError where it does not run with them."""
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
            f"fastbp.fuse: the model does not run with sample_inputs ({shapes or type(sample_inputs).__name__}): "
            f"{type(error).__name__}: {error}; they are a tensor, a tuple of arguments or a dict of keyword arguments "
            "for it, and the model is as it was"
        ) from error


def as_call(sample_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(sample_inputs, dict):
        return (), sample_inputs
    return (tuple(sample_inputs) if isinstance(sample_inputs, (tuple, list)) else (sample_inputs,)), {}


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """The relative L2 difference of everything observed; infinite for what is on one side only."""
    names: Iterable[str] = before.keys() | after.keys()
    missing = torch.empty(0)
    # Gradients that are zero but for rounding say nothing relative to themselves, so the scale is that of their kind.
    return {
        name: _scaled(before.get(name, missing), after.get(name, missing), before.values()) for name in sorted(names)
    }


def _scaled(a: Tensor, b: Tensor, everything: Iterable[Tensor]) -> float:
    if a.shape != b.shape:
        return float("inf")
    own = difference(b, a)
    floor = 1e-2 * max((float(t.double().square().mean().sqrt()) for t in everything if t.numel()), default=0.0)
    rms = float(a.double().square().mean().sqrt()) if a.numel() else 0.0
    return own * rms / floor if 0.0 < rms < floor else own


def agree(errors: dict[str, float], observed: dict[str, Tensor]) -> bool:
    """Whether every difference is within the tolerance of its dtype."""
    return all(error <= TOLERANCES.get(observed[name].dtype, 0.0) for name, error in errors.items() if name in observed)
