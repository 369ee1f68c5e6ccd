"""Runs of the sample: what each layer keeps, storage by storage, now and under every policy.

No memory is held for it: what autograd wants to keep is noted and dropped.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastbp import functional, recognition, saving
from fastbp.activations import Bound
from fastbp.forms import FORMS, Form
from fastbp.fusion.sample import undisturbed
from fastbp.fusion.surgery import is_fused, plan_of, set_save, swap_in, swap_out
from fastbp.memory import SavedBytes
from fastbp.planner.costs import ProductCounter, forward_operations, repeated_operations, rows_of

WHERE = "fastbp.plan_memory"
FUNCTIONS = {getattr(functional, name): form for name, form in FORMS.items()}
NO_GRADIENTS = "it runs under torch.no_grad, as inside a reentrant checkpoint"
OTHER_HOOKS = "what it keeps goes to other saved-tensor hooks, as inside a checkpoint"
NOT_RUN = "the sample does not run it in fastbp"


@dataclass(frozen=True)
class Call:
    """One call of a layer's in the sample: what it keeps under each policy that serves it."""

    form: Form
    activation: Bound
    dtype: torch.dtype
    numbers: int  # hidden elements
    repeated: int  # operations of recompute
    saw_hooks: bool
    own: dict[str, int]  # bytes nobody else can keep
    shared: dict[str, frozenset[Hashable]]  # storages that were there before the call, or are its output
    sizes: dict[Hashable, int]  # of those


@dataclass(eq=False)
class Layer:
    """A module whose policy can be chosen, and what was seen of it."""

    name: str
    module: nn.Module
    fresh: bool  # fused for this plan, and to be taken back should it not be applied
    calls: list[Call] = field(default_factory=list)
    reason: str = ""  # why it is left alone

    @property
    def save(self) -> str:
        """The policy's name it has now."""
        return plan_of(self.module).save if is_fused(self.module) else self.module.save  # type: ignore[return-value]

    @save.setter
    def save(self, save: str) -> None:
        if is_fused(self.module):
            set_save(self.module, save)
        else:
            self.module.save = save  # type: ignore[assignment]


class Marked(str):
    """The name of a policy, and the layer that passes it to its calls: so a call tells whose it is."""

    layer: Layer


class Recorder(SavedBytes):
    """``SavedBytes`` that keeps nothing, and knows on behalf of which layer each storage was first kept."""

    def __init__(self, exclude: Sequence[Tensor | nn.Module] = ()) -> None:
        super().__init__(exclude)
        self._running: list[Layer | None] = [None]
        self._owners: dict[Any, Layer | None] = {}
        self.differentiable = False  # whether an output of the run requires a gradient

    def nested(self) -> Recorder:
        """A new one with the same exclusions."""
        other = Recorder()
        other._excluded = self._excluded
        return other

    def _pack(self, tensor: Tensor) -> Any:
        for key, size in self.keys(tensor).items():
            self._kept.setdefault(key, size)
            owner = self._running[-1]
            if self._owners.setdefault(key, owner) is not owner and owner is None:
                self._owners[key] = None  # kept by the rest of the model as well
        return None

    _gives_at_once = False

    def _unpack(self, packed: Any) -> Tensor:
        raise ValueError(
            f"{WHERE}: the model takes gradients inside its forward, and planning keeps nothing to take "
            "them from; plan the part that does not"
        )

    def keys(self, tensor: Tensor) -> dict[Any, int]:
        """The storages of a tensor that count."""
        found: dict[Any, int] = {}
        self._add(tensor, found)
        return found

    def holds_now(self) -> bool:
        """Whether what an operation keeps at this moment comes here."""
        probe = torch.ones((), requires_grad=True).exp()
        key = next(iter(self.keys(probe)))
        self._owners.pop(key, None)
        return self._kept.pop(key, None) is not None

    def bytes_of(self, layer: Layer) -> int:
        """The bytes of the storages that this layer was the first to keep, and that only layers keep."""
        return sum(size for key, size in self._kept.items() if self._owners[key] is layer)

    @contextmanager
    def attributing(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Ascribe what is kept while one of these modules runs to it."""
        with ExitStack() as stack:
            for layer in layers:

                def enter(module: nn.Module, inputs: Any, layer: Layer = layer) -> None:
                    self._running.append(layer)

                def leave(module: nn.Module, inputs: Any, output: Any) -> None:
                    self._running.pop()

                for handle in (
                    layer.module.register_forward_pre_hook(enter, prepend=False),
                    layer.module.register_forward_hook(leave, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield


class Prober(TorchFunctionMode):
    """Runs every call of a layer's once under each policy, and notes what is kept."""

    only_watches = True  # to linears that read what their input was made of

    def __init__(self, outside: Recorder, counter: ProductCounter) -> None:
        super().__init__()
        self._outside, self._counter = outside, counter
        self.forward_operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        save = kwargs.get("save")
        if not isinstance(save, Marked):
            return func(*args, **kwargs)
        seen = self._outside.holds_now()
        self._counter.paused = True
        try:
            return self._probe(func, args, kwargs, save, seen)
        finally:
            self._counter.paused = False

    def _probe(self, func: Any, args: Any, kwargs: dict[str, Any], save: Marked, seen: bool) -> Any:
        form = FUNCTIONS[func]
        inputs, weights, biases = form.split(args) if form.parts else ((args[0],), *args[1:])
        x = inputs[0]
        activation = recognition.resolve(kwargs["activation"])

        def run(policy: str) -> tuple[Any, Recorder]:
            recorder = self._outside.nested()
            with recorder:
                return func(*args, **kwargs | {"save": policy}), recorder

        y, _ = run(str(save))  # which the model goes on with
        before: dict[Any, int] = {}
        for tensor in (*inputs, *weights, *biases):
            before |= self._outside.keys(tensor) if tensor is not None else {}
        output = self._outside.keys(y)
        own: dict[str, int] = {}
        shared: dict[str, frozenset[Hashable]] = {}
        for policy in saving.legal_policies(activation, form):
            try:
                again, recorder = run(policy)
            except ValueError:
                if not saving.POLICIES[policy].compressed:
                    raise
                continue  # not for this dtype or backend
            same = dict(zip(self._outside.keys(again), output, strict=True))
            kept = {same.get(key, key): size for key, size in recorder._kept.items()}
            shared[policy] = frozenset(key for key in kept if key in before or key in output)
            own[policy] = sum(size for key, size in kept.items() if key not in shared[policy])
        self.forward_operations += forward_operations(x, weights)
        layers = 0 if form.given else form.hidden(len(weights)) * form.width
        features = [t.shape[-1] for t in inputs] if form.given else [w.shape[0] for w in weights[:layers]]
        save.layer.calls.append(
            Call(
                form, activation, y.dtype, rows_of(x) * sum(features),
                repeated_operations(form, x, weights, biases), seen, own, shared, before | output,
            )
        )  # fmt: skip
        if not seen and not save.layer.reason:
            save.layer.reason = OTHER_HOOKS if torch.is_grad_enabled() else NO_GRADIENTS
        return y


class Sample:
    """A model and the arguments it is run with."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._exclude: list[Tensor | nn.Module] = [model, *given]

    def _run(self, recorder: Recorder, *modes: Any) -> None:
        with undisturbed(self._model), recorder, ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            outputs = tree_leaves(self._model(*self._args, **self._kwargs))
        recorder.differentiable = any(isinstance(t, Tensor) and t.requires_grad for t in outputs)

    def measure(self, layers: Sequence[Layer]) -> Recorder:
        """What the model keeps as it is now."""
        recorder = Recorder(self._exclude)
        try:
            self._run(recorder, recorder.attributing(layers))
        except Exception as error:
            if str(error).startswith(WHERE):
                raise
            raise ValueError(
                f"{WHERE}: the model does not run with sample_inputs ({type(error).__name__}: {error}); they are a "
                "tensor, a tuple of arguments or a dict of keyword arguments for it"
            ) from error
        return recorder

    def probe(self, layers: Sequence[Layer]) -> tuple[dict[Any, int], int]:
        """Fill in the layers' calls; what the rest of the model keeps, and the operations of a step."""
        outside, counter = Recorder(self._exclude), ProductCounter()
        prober, before = Prober(outside, counter), [layer.save for layer in layers]
        try:
            for layer in layers:
                layer.save = mark = Marked(layer.save)
                mark.layer = layer
            self._run(outside, counter, prober)
        finally:
            for layer, save in zip(layers, before, strict=True):
                layer.save = save
        for layer in layers:
            if not layer.calls:
                layer.reason = NOT_RUN
            elif any(call.saw_hooks for call in layer.calls):
                layer.reason = ""
        return outside._kept, counter.total + prober.forward_operations


@contextmanager
def as_given(layers: Sequence[Layer]) -> Iterator[None]:
    """The model as it was before layers were fused for this plan."""
    plans = [(layer.module, plan_of(layer.module)) for layer in layers if layer.fresh]
    for module, _ in plans:
        swap_out(module)
    try:
        yield
    finally:
        for module, plan in plans:
            swap_in(module, plan)
