"""Model surgery: ``fuse`` makes a model keep less for backward, ``unfuse`` takes it back, ``report`` says what was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fastbp import backends, known, readers, saving
from fastbp.fusion import sample, surgery
from fastbp.fusion.sites import FUSED, LEFT, NO_GAIN, WOULD_FUSE, FusionReport, Site
from fastbp.linear import OUTCOME, Settings
from fastbp.modules import LAYERS

__all__ = ["FusionReport", "fuse", "report", "unfuse"]

_GRAPHS = (torch.jit.ScriptModule, fx.GraphModule)  # their code would not look at a module again


def fuse(
    model: nn.Module,
    *,
    sample_inputs: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    save: str = "auto",
    backend: str | None = None,
    dry_run: bool = False,
    strict: bool = False,
) -> FusionReport:
    """Let a model keep less for backward, in place, and say what was done.

    Every ``nn.Linear`` (and transformers' ``Conv1D``) becomes one that reads in each call what its input was made of:
    where autograd's graph says that an activation or a gate made it, it is not kept (``fastbp.Linear``). The model's
    own code goes on to run. An ``nn.Dropout`` keeps a byte a number of its mask on a CPU, and a module that writes an
    activation in several operations, its code known, keeps z alone. On a CPU an activation module of PyTorch's, by
    exact class, runs our own pass over z where that takes less time. Blocks whose code is known to the last token (an
    ``nn.Sequential`` of PyTorch's classes, a short forward that its source explains) run as one call, where every name
    is looked up again each time, and otherwise by their own code. Outputs are equal to the bit but for these blocks and
    activations, which round in their own way. Parameters, their objects, state_dict keys, hooks and children stay as
    they are, so an optimizer made before stays valid. Nothing is run and no values are compared. Subclasses of
    nn.Linear, quantised, sparse and complex weights are left to PyTorch.

    ``sample_inputs``: a tensor, a tuple of arguments or a mapping of keyword arguments; with it the model is run once,
    on a copy with the same parameters, and the report has a row for each linear behind an activation. Without it
    ``fastbp.report(model)`` has them after a call. ``filter_fn(module, name)`` False leaves a module alone. ``save``
    and ``backend`` as in ``fastbp.linear_act``; another call of ``fuse`` changes them. Of the policies a single linear
    knows ``fp8``, and by all others keeps z (g and u), which is exact and no more than they do; of an input of less
    than 2 MiB only where a policy is named, for under ``auto`` the time counts too. ``dry_run`` changes nothing.
    ``strict`` raises RuntimeError, with the model as it was, where in the sample run a linear behind an activation
    was left to PyTorch.

    Raises TypeError where model is no nn.Module or a scripted one, ValueError for unknown names, for a captured graph,
    for ``strict`` without a sample, and where the model does not run with sample_inputs.
    """
    _check_model(model, "fastbp.fuse")
    saving.check_name(save, "fastbp.fuse")
    backends.check_name(backend, "fastbp.fuse")
    if strict and sample_inputs is None:
        raise ValueError("fastbp.fuse: strict needs sample_inputs, for what a linear does is known once the model runs")
    found = FusionReport()
    settings = (save, backend)
    twin = None if sample_inputs is None else sample.twin_of(model)
    if sample_inputs is not None and twin is not None:
        _swap(twin, filter_fn, settings, found)
        _run(twin, sample_inputs, found, strict)
    if dry_run:
        if not found.ran:
            _swap(model, filter_fn, settings, found, dry=True)
        found.sites = [replace(s, status=WOULD_FUSE) if s.status == FUSED else s for s in found.sites]
        return found
    result = FusionReport()
    undo = _swap(model, filter_fn, settings, result)
    if sample_inputs is not None and twin is None:
        try:
            _run(model, sample_inputs, result, strict)
            result.notes.append("The model could not be copied, so the sample ran on the model itself.")
        except Exception:
            for step in reversed(undo):
                step()
            raise
    return found if found.ran else result


def fuse_blocks(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None, backend: str | None
) -> FusionReport:
    """``fuse`` of the blocks whose code is known alone: of those a policy can be planned."""
    found = FusionReport()
    _swap(model, filter_fn, ("auto", backend), found, blocks_only=True)
    return found


def unfuse(model: nn.Module) -> list[str]:
    """Take back what ``fuse`` did to a model, in place; returns the names of the modules changed."""
    _check_model(model, "fastbp.unfuse")
    names = []
    for name, module in model.named_modules():
        if surgery.is_fused(module):
            surgery.swap_out(module)
            names.append(name)
        elif readers.swap_out(module):
            names.append(name)
    return names


def report(model: nn.Module) -> FusionReport:
    """What the last call of a model did: a row for each linear behind an activation, and for each known block.

    Raises TypeError where model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastbp.report: model must be an nn.Module, got {type(model).__name__}")
    found = FusionReport(linears=sum(map(readers.reads, model.modules())))
    _add_outcomes(model, found)
    return found


def _check_model(model: object, where: str) -> None:
    if not isinstance(model, nn.Module):
        hint = "; fuse the model before torch.export" if isinstance(model, torch.export.ExportedProgram) else ""
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{where}: model is a TorchScript module ({type(model).__name__}), whose graph is frozen and does not know "
            "fastbp's ops; give the nn.Module it was made from"
        )
    if isinstance(model, fx.GraphModule):
        raise ValueError(
            f"{where}: model is a captured graph ({type(model).__name__}), whose code would not look at a fused block "
            "again; fuse the model first and capture it then"
        )


def _swap(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    settings: Settings,
    found: FusionReport,
    dry: bool = False,
    blocks_only: bool = False,
) -> list[Callable[[], None]]:
    """Change every linear and known block, and note it; what takes each change back."""
    undo: list[Callable[[], None]] = []
    for name, module in list(_candidates(model)):
        linear = readers.is_linear(module)
        read = "" if linear else known.read(module)
        plan = None if isinstance(read, str) else read
        reason = plan.refuses(settings[0]) if plan is not None else None
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn said no"
        module.__dict__.pop(known.RAN, None)
        found.sites += _sites_of_experts(name, module) if plan is None else _sites_of_block(name, module, plan, reason)
        if reason is not None or (blocks_only and (plan is None or surgery.is_fused(module))):
            continue
        found.linears += linear
        if dry:
            continue
        undo.append(_undo_of(module))
        if plan is None:
            readers.swap_in(module, settings)
        else:
            surgery.swap_in(module, replace(plan, save=settings[0], backend=settings[1]))
    return undo


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that fuse may change: none of a captured graph's or of fastbp's own blocks."""
    closed: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (*_GRAPHS, *LAYERS)):
            closed.update(map(id, module.modules()))
        if id(module) not in closed:
            yield name, module


def _undo_of(module: nn.Module) -> Callable[[], None]:
    """What makes a module what it is now."""
    kind, state = type(module), dict(module.__dict__)

    def undo() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(state)

    return undo


def _run(model: nn.Module, sample_inputs: Any, found: FusionReport, strict: bool) -> None:
    """Run the changed model on the sample and note what it did; RuntimeError where ``strict`` forbids that."""
    sample.watch(model, sample_inputs)
    found.ran = True  # also where every linear is part of a block, and none was called
    found.sites = [site for site in found.sites if site.status == LEFT]
    _add_outcomes(model, found)
    if strict and found.left:
        raise RuntimeError(f"fastbp.fuse(strict=True): not everything was fused; the model is as it was\n{found}")


def _add_outcomes(model: nn.Module, found: FusionReport) -> None:
    """A row for each known block, and for each linear whose last input came from an activation."""
    uncalled: set[int] = set()  # linears of blocks that ran as one, which say what was before that
    for name, module in model.named_modules():
        if surgery.is_fused(module):
            plan, ran = surgery.plan_of(module), module.__dict__.get(known.RAN, ())
            found.sites += _sites_of_block(name, module, plan)
            found.ran = found.ran or bool(ran)
            for (names, _), as_one in zip(plan.calls, ran, strict=False):
                uncalled.update(id(module._modules.get(n)) for n in names if as_one)
        if OUTCOME not in module.__dict__ or id(module) in uncalled:
            continue
        found.ran = True
        outcome = module.__dict__[OUTCOME]
        if outcome is not None and outcome.what:
            what, reason = (outcome.what, "") if outcome.fused else ("", outcome.what)
            status = NO_GAIN if outcome.fused is None else FUSED if outcome.fused else LEFT
            found.sites.append(Site(name, type(module).__name__, what, status, reason, outcome.unkept))


def _sites_of_block(name: str, module: nn.Module, plan: known.Plan, reason: str | None = None) -> list[Site]:
    """A row for each call of the plan: of the last call of the module, if there was one."""
    ran = module.__dict__.get(known.RAN, (True,) * len(plan.calls))
    sites = []
    for i, (names, call) in enumerate(plan.calls):
        why = reason or (
            "" if i < len(ran) and ran[i] else "its own code ran, for something is not what it was read as"
        )
        sites.append(Site(name, f"{type(module).__name__} [{', '.join(names)}]", call, LEFT if why else FUSED, why))
    return sites


def _sites_of_experts(name: str, module: nn.Module) -> list[Site]:
    """A row for what nobody else would name: weights of three dimensions, the experts of a mixture.

    The token and the positions of a vision transformer, (1, n, width), have one expert each, which is none.
    """
    counts = [p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3 and p.shape[0] > 1]
    experts = len(counts) > len(set(counts))
    return [Site(name, type(module).__name__, "", LEFT, "weights of three dimensions, one per expert")] * experts
