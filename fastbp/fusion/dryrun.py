"""A dry run: which activations take exactly the output of which linear, inside modules that compute more than a block.

The model runs once evaluating and once training, on the caller's sample or, for a module alone, on random numbers.
Seen is every call of the candidates' linears, activations and dropouts, and every torch function that is given what
passed between them: a pair counts where nothing else touched it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastbp.activations import Bound
from fastbp.fusion.inside import InsidePlan, Pair
from fastbp.fusion.linears import LinearKind, may_idle, settings_of
from fastbp.fusion.members import Members
from fastbp.fusion.verify import run_sample, undisturbed

_HARMLESS = (F.dropout, torch.dropout)  # they hand on the very tensor when they drop nothing, which is looked at


@dataclass(eq=False)
class Candidate:
    """A module with linears and activations among its members, and what was seen of it."""

    name: str
    module: nn.Module
    members: Members
    seen: dict[bool, list[dict[str, Pair]]] = field(default_factory=lambda: {True: [], False: []})
    own_sample: tuple[Tensor, ...] | None = None  # of random numbers, where it was looked at alone
    missing: str = ""  # why nothing was seen

    @property
    def kinds(self) -> Mapping[str, LinearKind]:
        """Its linears."""
        return self.members.kinds

    @property
    def acts(self) -> Mapping[str, Bound]:
        """Its activations, children and functions."""
        return {**self.members.acts, **self.members.functions}

    @property
    def is_no_block(self) -> bool:
        """Whether its one linear and its activation have nothing to do with each other, as in other networks."""
        more = any(next(c.parameters(), None) is not None for c in self.members.strangers)
        return len(self.kinds) == 1 and (more or bool(self.seen[False]))

    def plan(self, save: str, backend: str | None) -> InsidePlan | None:
        """The plan by what every call of the module agreed on; None where there is nothing to fuse."""
        if not self.seen[False]:
            return None
        first, *others = self.seen[False]
        pairs = []
        for linear, pair in first.items():
            if any(other.get(linear) != pair for other in others):
                continue
            trained = [other.get(linear) for other in self.seen[True]]
            if any(p is None or p.act != pair.act for p in trained):
                continue  # another forward in training
            pairs.append(replace(pair, in_training=bool(trained) and all(p == pair for p in trained)))
        return InsidePlan(tuple(pairs), settings_of(self.module), save, backend) if pairs else None


def find_candidate(name: str, module: nn.Module, members: Members) -> Candidate | None:
    """The module as a candidate; None where it has no linear or no activation of its own."""
    if not members.kinds or not (members.acts or members.functions) or "forward" in module.__dict__:
        return None
    return Candidate(name, module, members)


def look(candidates: list[Candidate], model: nn.Module, sample_inputs: Any) -> None:
    """Fill in what is seen of the candidates in a run of the model, or without a sample of each alone."""
    if sample_inputs is not None:
        if candidates:
            _watch(candidates, model, sample_inputs)
        for candidate in candidates:
            candidate.missing = "" if candidate.seen[False] else "sample_inputs do not reach it"
        return
    for candidate in candidates:
        x = _random_input(candidate)
        for sample in [] if x is None else [(x,), (x, x)]:
            try:
                _watch([candidate], candidate.module, sample)
            except Exception:  # a stranger's forward on inputs that are not its own
                continue
            candidate.own_sample = sample
            break
        else:
            candidate.missing = "pass sample_inputs, to see what it does with its linears"


def _random_input(candidate: Candidate) -> Tensor | None:
    name, kind = next(iter(candidate.kinds.items()))
    weight = cast(Tensor, candidate.module._modules[name].weight)  # type: ignore[union-attr]
    if weight.device.type == "meta":
        return None
    x = torch.randn(2, 3, weight.shape[0 if kind.transposed else 1], generator=torch.Generator().manual_seed(0))
    return x.to(weight.device, weight.dtype)


def _watch(candidates: list[Candidate], model: nn.Module, sample: Any) -> None:
    """See the candidates' calls while the model runs, evaluating and then training.

    What training raises is taken for not seen; what evaluating raises is raised.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    drops = [(m, m.p) for c in candidates for m in c.module.children() if type(m) is nn.Dropout]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would not call the children
        for training in (False, True):
            model.train(training)
            for dropout, _ in drops:
                dropout.p = 0.0  # what a dropout does is known; whether anything else is in between is looked at
            try:
                with undisturbed(model), torch.no_grad(), ExitStack() as stack:
                    watch = _Watch()
                    for candidate in candidates:
                        stack.enter_context(watch.looking_at(candidate, training))
                    stack.enter_context(watch)
                    run_sample(model, sample)
            except Exception:
                if not training:
                    raise
                for candidate in candidates:
                    candidate.seen[True].clear()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for dropout, p in drops:
            dropout.p = p
        for module, training in modes:
            module.training = training


@dataclass(eq=False)
class _Step:
    """A call of a child: what it got and gave, with the versions the tensors had."""

    name: str
    input: Tensor | None
    input_version: int
    output: Tensor | None = None
    output_version: int = 0


@dataclass(eq=False)
class _Frame:
    """One call of a candidate that is under way."""

    candidate: Candidate
    steps: list[_Step] = field(default_factory=list)
    open: list[_Step] = field(default_factory=list)
    touched: dict[int, Tensor] = field(default_factory=dict)  # what others were given, held so that ids stay theirs

    def touch(self, values: Any) -> None:
        self.touched |= {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}


class _Watch(TorchFunctionMode):
    """Sees the calls of children by hooks, and everything else that is given their tensors as a mode."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: list[_Frame] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for frame in self._frames:
            if not frame.open and func not in _HARMLESS:
                frame.touch((args, kwargs))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def looking_at(self, candidate: Candidate, training: bool) -> Iterator[None]:
        """Watch a candidate's calls while in here."""
        module = candidate.module

        def enter(*_: Any) -> None:
            self._frames.append(_Frame(candidate))

        def leave(_: Any, __: Any, output: Any) -> None:
            frame = self._frames.pop()
            frame.touch(output)
            candidate.seen[training].append(_pairs(frame))

        with ExitStack() as stack:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            for name, child in module._modules.items():
                if child is not None and (name in candidate.kinds or name in candidate.acts or may_idle(child)):
                    stack.enter_context(self._hooked(candidate, name, child))
            for name in candidate.acts.keys() - module._modules.keys():
                stack.enter_context(self._wrapped(candidate, name))
            yield

    @contextmanager
    def _hooked(self, candidate: Candidate, name: str, child: nn.Module) -> Iterator[None]:
        def before(_: Any, args: Any, kwargs: Any) -> None:
            self._begin(candidate, name, args, kwargs)

        def after(_: Any, __: Any, output: Any) -> None:
            self._end(candidate, output)

        with ExitStack() as stack:
            stack.callback(child.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(child.register_forward_hook(after).remove)
            yield

    @contextmanager
    def _wrapped(self, candidate: Candidate, name: str) -> Iterator[None]:
        attributes = candidate.module.__dict__
        function = attributes[name]

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._begin(candidate, name, args, kwargs)
            output = function(*args, **kwargs)
            self._end(candidate, output)
            return output

        attributes[name] = noted
        try:
            yield
        finally:
            attributes[name] = function

    def _frame_of(self, candidate: Candidate) -> _Frame | None:
        """The innermost call of the candidate; None where a child of its is called by somebody else."""
        return next((frame for frame in reversed(self._frames) if frame.candidate is candidate), None)

    def _begin(self, candidate: Candidate, name: str, args: Any, kwargs: Any) -> None:
        frame = self._frame_of(candidate)
        if frame is not None:
            given = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
            step = _Step(name, given, _version(given))
            frame.steps.append(step)
            frame.open.append(step)

    def _end(self, candidate: Candidate, output: Any) -> None:
        frame = self._frame_of(candidate)
        if frame is not None:
            step = frame.open.pop()
            step.output = output if isinstance(output, Tensor) else None
            step.output_version = _version(step.output)


def _version(tensor: Tensor | None) -> int:
    with torch._C.DisableTorchFunction():  # reading it is nobody's use of the tensor
        return 0 if tensor is None else tensor._version


def _pairs(frame: _Frame) -> dict[str, Pair]:
    """The pairs of one call of a candidate, by their linear."""
    candidate, often = frame.candidate, [step.name for step in frame.steps]
    found = {}
    for step in frame.steps:
        act = _taker(frame, step) if step.name in candidate.kinds else None
        if act is None or act.name not in candidate.acts or {often.count(s.name) for s in (step, act)} != {1}:
            continue
        between: list[str] = []
        last = _taker(frame, act)
        while last is not None and last.name not in candidate.kinds:
            child = candidate.module._modules.get(last.name)
            between.append(last.name)
            last = _taker(frame, last) if may_idle(child) else None
        if last is None or often.count(last.name) != 1:
            last, between = None, []
        child = candidate.module._modules.get(act.name)
        kinds = tuple(candidate.kinds[s.name] for s in (step, last) if s is not None)
        found[step.name] = Pair(
            linear=step.name,
            act=act.name,
            activation=candidate.acts[act.name],
            act_type=None if child is None else type(child),
            last=None if last is None else last.name,
            between=tuple(between),
            in_training=False,
            kinds=kinds,
        )
    return found


def _taker(frame: _Frame, step: _Step) -> _Step | None:
    """The one step that took exactly what this one gave; None where that was given to anything else too."""
    y = step.output
    if y is None or id(y) in frame.touched:
        return None
    later = frame.steps[frame.steps.index(step) + 1 :]
    takers = [s for s in later if s.input is y and s.input_version == step.output_version]
    if len(takers) > 1 and takers[0].output is not y:
        return None
    return takers[0] if takers else None
