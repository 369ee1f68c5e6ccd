"""What blocks of the size of known models keep for backward, and the most that a step has in use at once.

Without a GPU the tensors are PyTorch's meta tensors, which have sizes and storages, no memory. What is kept is exact;
for ``torch.compile`` its partitioner settles that, and runs here as it does for Inductor. What is in use is counted
storage by storage, as operations of PyTorch's make them; that is what eager and fastbp's backend in plain torch need,
and not what generated code or fastbp's kernels do, which make fewer (benchmarks/memory.py measures those in processes).
On a GPU the figures are those of PyTorch's allocator.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastbp
from benchmarks.cases import Case
from benchmarks.rivals import KINDS, RIVALS, Run, make_linears
from fastbp import backends
from fastbp.activations import bind
from fastbp.forms import FORMS
from fastbp.problem import configure
from fastbp.saving import legal_policies


class InUse(TorchDispatchMode):
    """Count the bytes of all storages that operations make in here, while they live, and the most there were."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {StorageWeakRef(t.untyped_storage()) for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = StorageWeakRef(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: StorageWeakRef, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def has_kernels(case: Case, name: str) -> bool:
    """Whether it is this rival's kernels that run on the CPU, and not operations of PyTorch's in their place."""
    if not name.startswith("fastbp "):
        return True
    form, activation = FORMS[KINDS[case.kind]], bind(case.activation)
    policy = name.removeprefix("fastbp ")
    if policy not in legal_policies(activation, form):
        return False
    config = configure(form.name, activation.name, activation.params, policy, backends.AUTO)
    return backends.choose(config, torch.empty(1, dtype=case.dtype)).backend != backends.REFERENCE


def hidden_elements(case: Case) -> int:
    """Numbers in the hidden layers; a gated block has one hidden layer of two linears."""
    return case.rows * sum(case.features[1:] if case.kind in ("layer", "gated") else case.features[1:-1])


def measure(case: Case, name: str, device: torch.device, snapshot: Path | None = None) -> dict[str, int] | None:
    """Bytes kept for backward beyond parameters and input, and the most in use in a step beyond these and dy.

    ``kept`` by SavedBytes, ``in_use`` by the operations; on a GPU ``kept_allocated`` and ``peak`` by the allocator.
    None where this rival does not serve the case.
    """
    rival = RIVALS[name]
    if rival.refusal(case, "fwd_bwd", device):
        return None
    torch._dynamo.reset()
    with torch.device(device):
        linears = [linear.to(device) for linear in make_linears(case)]
        run = rival.make(case, linears)
        x = torch.randn(case.rows, case.features[0], dtype=case.dtype).requires_grad_()
        dy = torch.randn(case.rows, case.features[-1], dtype=case.dtype)
        params = [p for linear in linears for p in linear.parameters()]
        given = [x, *params]
        torch.autograd.grad(run(x), given, dy)  # compiles, and allocates what stays
        with fastbp.SavedBytes(exclude=given) as saved:
            y = run(x)
        del y
        found = {"kept": saved.total}
        if device.type == "cuda":
            found |= _by_allocator(run, given, dy, snapshot)
        elif not name.startswith("torch.compile"):
            with InUse([*given, dy]) as in_use:
                grads = torch.autograd.grad(run(x), given, dy)
            found["in_use"] = in_use.most
            del grads
    return found


def _by_allocator(run: Run, given: list[Tensor], dy: Tensor, snapshot: Path | None) -> dict[str, int]:
    """A step by the figures of PyTorch's allocator, with a file for https://pytorch.org/memory_viz where asked for."""
    gc.collect()
    torch.cuda.synchronize()
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = run(given[0])
    kept = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    grads = torch.autograd.grad(y, given, dy)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    if snapshot is not None:
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
    del grads
    return {"kept_allocated": kept, "peak": most}
