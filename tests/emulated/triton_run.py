"""A ``Launch`` of the Triton and Gluon kernels executed from its PTX, on CPU tensors, as a GPU of a family would."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from ptxsim import Device, Schedule, TensorMap, load_module
from torch import Tensor

from benchmarks import static
from fastbp.backends.triton.launch import Launch

FAMILIES = ("sm_80", "sm_90")  # sm_100 multiplies by tcgen05, which the emulator does not know
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by what Triton's metadata call them

# What each kernel may write to. All else that it is given must stay as it is, and may not even be written over.
RESULTS = {
    "forward_kernel": {"y", "kept", "z", "scales"},
    "gated_forward_kernel": {"y", "gate", "up", "gate_scales", "up_scales"},
    "dgrad_kernel": {"dz", "h", "sums"},
    "gated_dgrad_kernel": {"dgate", "dup", "h", "gate_sums", "up_sums"},
    "activation_kernel": {"y"},
    "compress_kernel": {"y", "gate_kept", "gate_scales", "up_kept", "up_scales"},
    "chain_rule_kernel": {"dz", "h", "sums"},
    "gated_chain_rule_kernel": {"dgate", "dup", "h", "gate_sums", "up_sums"},
    "column_sum_kernel": {"out"},
}

_compiled: dict[Any, Any] = {}


def compiled(family: str, made: Launch) -> Any:
    """What Triton makes of a launch; once, for its cache on disk costs a tenth of a second."""
    source = static.source_of(made)
    key = family, source.hash(), str(sorted(made.options.items()))
    if key not in _compiled:
        _compiled[key] = static.compile_for(family, made)
    return _compiled[key]


@lru_cache(maxsize=64)
def _module(text: str) -> Any:
    return load_module(text)


def spread(t: Tensor) -> Tensor:
    """All memory from the first number of a tensor to the last, gaps between its rows too."""
    return torch.as_strided(t, (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1,), (1,))


class Placed:
    """The tensors of a launch in the memory of the device. What shares memory here shares it there."""

    def __init__(self, device: Device, made: Launch):
        self.device, self.tensors = device, dict[int, tuple[int, Tensor]]()
        writes = RESULTS[made.kernel.fn.__name__]
        tensors = {name: getattr(value, "base", value) for name, value in made.arguments.items()}
        self.named = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        written = {t.data_ptr() for name, t in self.named.items() if name in writes}
        for name, t in self.named.items():
            key = t.data_ptr()
            if key not in self.tensors:
                numbers = spread(t).contiguous().view(torch.uint8).numpy()
                at = device.put(numbers, name, writable=key in written, skew=key % 16)
                self.tensors[key] = at, t
        self.written = written

    def __getitem__(self, t: Tensor) -> int:
        return self.tensors[t.data_ptr()][0]

    def fetch(self) -> None:
        """What was written, back into the tensors."""
        for key in self.written:
            at, t = self.tensors[key]
            spread(t).view(torch.uint8).copy_(torch.from_numpy(self.device.get(at)))


def _parameters(made: Launch, found: Any, placed: Placed, count: int) -> list[Any]:
    """The arguments as Triton's launcher passes them: a descriptor is a tensor map, and its sizes and strides."""
    params, described = list[Any](), list(found.metadata.tensordesc_meta or ())
    for name, kind in static.source_of(made).signature.items():
        value = made.arguments[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            meta, item = described.pop(0), value.base.element_size()
            sizes, strides = tuple(reversed(value.shape)), tuple(s * item for s in reversed(value.strides[:-1]))
            box, swizzle = tuple(reversed(meta["block_size"])), SWIZZLES[meta["swizzle"]]
            params += [TensorMap(placed[value.base], item, sizes, strides, box, swizzle), *value.shape, *value.strides]
        elif isinstance(value, Tensor):
            params.append(placed[value])
        else:
            params.append(float(value) if kind == "fp64" else int(value))
    return params + [0] * (count - len(params))  # scratch memory, which none of these kernels asks for


def execute(
    made: Launch, family: str, seed: int | Schedule = 0, change: Callable[[str], str] | None = None, label: str = ""
) -> Any:
    """Run the launch: its results are in its tensors then. ``Fault`` on anything wrong; ``change`` alters the PTX."""
    found = compiled(family, made)
    text = found.asm["ptx"]
    kernel = _module(change(text) if change else text).find(found.metadata.name)
    device = Device(sum(-(-spread(t).nbytes // 256) * 256 + 4096 for t in _tensors(made)) + (1 << 16))
    placed = Placed(device, made)
    params = _parameters(made, found, placed, len(kernel.params))
    threads = kernel.directives.get("reqntid", (32 * found.metadata.num_warps,))[0]
    shared = found.metadata.shared
    result = device.launch(kernel, made.grid, threads, params, shared=shared, cluster=1, schedule=seed, label=label)
    assert device.red_zones_whole(), f"{label}: written between the allocations"
    placed.fetch()
    return result


def _tensors(made: Launch) -> list[Tensor]:
    values = (getattr(value, "base", value) for value in made.arguments.values())
    return [value for value in values if isinstance(value, Tensor)]
