"""What a policy costs: multiplications that are done again, and errors of the slope."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp import functional
from fastbp.activations import Bound
from fastbp.forms import Form
from fastbp.saving import find_kept

STEPS = 3  # a step is a forward and a backward of twice its products


class ProductCounter(TorchDispatchMode):
    """Count the floating point operations of products, convolutions and attention, as they are run.

    PyTorch's FlopCounterMode sets hooks on all modules, for which layers with children do not run fused.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # not needed to import fastbp

        self.total = 0
        self.paused = False
        self._registry, self._attention = flop_registry, sdpa_flop_count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.paused:
            return result
        packet = func.overloadpacket
        if packet in self._registry:
            self.total += self._registry[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += self._attention(*(t.shape for t in args[:3]))
        return result


def rows_of(x: Tensor) -> int:
    """How many rows of features a call has."""
    return x.numel() // max(x.shape[-1], 1)


def forward_operations(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Of the products of a call."""
    return sum(2 * rows_of(x) * weight.numel() for weight in weights)


def repeated_operations(form: Form, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """Of the products that backward does again under ``recompute``, if that is a policy of the form."""
    if form.given:
        return 0
    needs = tuple(t is not None and t.requires_grad for t in (x, *weights, *biases))
    wanted = find_kept(form, "preact", True, needs)[1 + len(needs) :]
    if not form.gated:  # a chain is replayed up to the deepest one
        wanted = tuple(any(wanted[i:]) for i in range(len(wanted)))
    return sum(2 * rows_of(x) * weight.numel() for weight, again in zip(weights, wanted, strict=False) if again)


@lru_cache(maxsize=1024)
def slope_error(gated: bool, activation: Bound, policy: str, dtype: torch.dtype) -> float:
    """The relative L2 error that a policy adds to the gradient at normally distributed z, beyond what rounding does.

    Measured, with the gradient from z in float64 as the truth.
    """
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        generator = torch.Generator().manual_seed(0)
        z, dy = (torch.randn(256, 64, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))

        def gradient(dtype: torch.dtype, save: str) -> Tensor:
            x, unit = z.to(dtype).requires_grad_(), torch.eye(64, dtype=dtype)
            options: dict[str, Any] = {"activation": activation, "save": save, "backend": "reference"}
            if gated:
                y = functional.gated_linear_act(x, unit, unit.flip(0).contiguous(), **options)
            else:
                y = functional.linear_act(x, unit, **options)
            return torch.autograd.grad(y, x, dy.to(dtype))[0].double()

        truth = gradient(torch.float64, "preact")
        found, rounding = ((gradient(dtype, save) - truth).norm() / truth.norm() for save in (policy, "preact"))
        return float((found.square() - rounding.square()).clamp(min=0.0).sqrt())
