"""Weight gradients that are added in float32 to a tensor of the caller's: where to, and the product that adds.

Megatron names that tensor ``weight.main_grad``. Where there is none it is ``weight.grad``, if that may be float32.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

ADDED_TO = (torch.float32, torch.bfloat16, torch.float16)  # float64 would lose digits
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_CHUNK = 1 << 22  # numbers widened at a time, 16 MiB
_lock = threading.RLock()  # threads that train one weight; autograd has one for .grad


def destination(where: str, name: str, weight: Tensor, make: bool = False) -> Tensor | None:
    """The float32 tensor that takes the gradient of a leaf; ValueError where there is none that can.

    None for a .grad that does not exist yet, unless it is to be made, of zeros.
    """
    main = getattr(weight, "main_grad", None)
    if main is not None:
        return _checked(where, f"{name}.main_grad", main, weight)
    allowed = getattr(weight, "grad_dtype", weight.dtype)  # PyTorch without grad_dtype allows the weight's own
    if weight.grad is not None and weight.grad.dtype is torch.float32:
        return _checked(where, f"{name}.grad", weight.grad, weight)
    if weight.grad is None and allowed is torch.float32:
        with _lock:
            if make and weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.float32)
        return weight.grad
    found = "no .grad" if weight.grad is None else f"a .grad of {weight.grad.dtype}"
    raise ValueError(
        f"{where}: {name} must have a main_grad in float32 for gradient_accumulation_fusion, got none, and {found} "
        f"with grad_dtype {allowed}; try {name}.main_grad = torch.zeros_like({name}, dtype=torch.float32), or "
        f"{name}.grad_dtype = torch.float32; under fully_shard, whose parameters are its own, leave the flag out"
    )


def _checked(where: str, name: str, found: Tensor, weight: Tensor) -> Tensor:
    if type(found) not in PLAIN or found.layout is not torch.strided:
        raise ValueError(f"{where}: {name} must be a plain dense tensor, got a {type(found).__name__}")
    if found.dtype is not torch.float32 or found.shape != weight.shape or found.device != weight.device:
        raise ValueError(
            f"{where}: {name} must be float32 of {tuple(weight.shape)} on {weight.device}, as its weight is, got "
            f"{found.dtype} of {tuple(found.shape)} on {found.device}"
        )
    if found.requires_grad or found.is_inference():
        what = "an inference tensor" if found.is_inference() else "one that requires grad"
        raise ValueError(f"{where}: {name} must be a tensor that can be added to, got {what}; try {name}.detach()")
    return found


def add_product(into: Tensor | None, d: Tensor, h: Tensor) -> Tensor | None:
    """``into += dᵀ h`` in float32, no sum rounded to 16 bits on the way; without ``into``, dᵀ h itself.

    d (M, N) and h (M, K) of one dtype, into (N, K).
    """
    if into is None:
        return d.mT.mm(h)
    with _lock:
        if d.dtype is torch.float32:
            into.addmm_(d.mT, h)
        elif into.device.type != "cuda":
            rows = max(_CHUNK // max(d.shape[1] + h.shape[1], 1), 1)
            # float32 products may be made of bfloat16, by PyTorch's switch; it holds float16's digits no more.
            cut = d.dtype is torch.float16 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
            for dc, hc in zip(d.split(rows), h.split(rows), strict=True):
                if cut:
                    into.add_(dc.double().mT.mm(hc.double()))
                else:
                    into.addmm_(dc.float().mT, hc.float())
        elif 1 in into.shape or not _adds(into.device):
            # One row looks like a bias to addmm, which some versions then read in the wrong dtype.
            into.add_(torch.mm(d.mT, h, out_dtype=torch.float32))
        else:
            torch.addmm(into, d.mT, h, out_dtype=torch.float32, out=into)
        increment_version(into)  # which the backends' stop at autograd's kernels leaves out
    return None


@lru_cache(maxsize=64)
def _adds(device: torch.device) -> bool:
    """Whether this PyTorch adds a product of 16 bits to float32 in one step; some want all in one dtype."""
    wide, narrow = (torch.zeros(2, 2, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(wide, narrow, narrow, out_dtype=torch.float32, out=wide)
    except (RuntimeError, TypeError):
        return False
    return True
