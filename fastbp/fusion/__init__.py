"""Model surgery: ``fuse`` makes the MLP blocks of a model run in fastbp, ``unfuse`` takes it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbp import backends, saving
from fastbp.activations import Bound
from fastbp.forms import LINEAR_ACT, MLP, Form
from fastbp.fusion.dryrun import Candidate, find_candidate, look
from fastbp.fusion.linears import may_idle, not_plain
from fastbp.fusion.members import Members, members_of
from fastbp.fusion.report import FUSED, LEFT, ROLLED_BACK, WOULD_FUSE, FusionReport, Site
from fastbp.fusion.sequential import Run, SequentialPlan, find_runs, find_unplain, recognise_children
from fastbp.fusion.surgery import is_fused, swap_in, swap_out
from fastbp.fusion.templates import OTHERWISE, find_plan
from fastbp.fusion.verify import agree, compare, observe
from fastbp.modules import LAYERS

__all__ = ["FusionReport", "fuse", "unfuse"]

_GRAPHS = (torch.jit.ScriptModule, fx.GraphModule)
_Found = tuple[nn.Module, Any, list[Site]]


def fuse(
    model: nn.Module,
    *,
    sample_inputs: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    save: str = "auto",
    backend: str | None = None,
    verify: bool = True,
    dry_run: bool = False,
    strict: bool = False,
) -> FusionReport:
    """Make the MLP blocks of a model run in fastbp, in place, and say what was and what was not fused.

    Found are, whatever the names, modules that compute ``act(fc(x))``, ``fc2(act(fc1(x)))``, ``act(gate(x)) * up(x)``
    or ``down(act(gate(x)) * up(x))`` of their children, gate and up perhaps in one linear, with dropouts and norms
    before, between or after, which stay where they are; runs of linears and activations in an ``nn.Sequential``; and
    fc1, act, fc2 in the midst of a larger module. What a module computes is decided by running it on small stand-ins
    in float64, and for the last kind by a dry run of the model on ``sample_inputs`` (without them, of the module on
    random numbers, where it takes one or two tensors). Linears are nn.Linear and what computes the same of a ``weight``
    and a ``bias``, as transformers' Conv1D. Parameters, their objects, state_dict keys, hooks and children stay as they
    are, so an optimizer made before stays valid; a block whose linears are later wrapped (LoRA, quantised, hooked)
    runs its own forward again.

    ``sample_inputs``: a tensor, a tuple of arguments or a dict of keyword arguments for the model; with it ``verify``
    compares outputs and parameter gradients of the whole model before and after, evaluating and training, and takes
    everything back where they differ. ``filter_fn(module, name)`` False leaves a module alone. ``save`` and ``backend``
    as in ``fastbp.linear_act``. ``dry_run`` reports and changes nothing. ``strict`` raises RuntimeError, with the model
    as it was, where a block was left or verifying failed.

    Raises TypeError where model is no nn.Module or a scripted one, ValueError for unknown names, for a captured graph,
    and where the model does not run with sample_inputs.
    """
    _check_model(model, "fastbp.fuse")
    saving.check_name(save, "fastbp.fuse")
    backends.check_name(backend, "fastbp.fuse")
    report = FusionReport(dry_run=dry_run)
    before = observe(model, sample_inputs) if verify and sample_inputs is not None else None
    found = _find(model, sample_inputs, filter_fn, save, backend, report)
    changed: list[tuple[nn.Module, list[Site]]] = []
    for module, plan, sites in [] if dry_run else found:
        if plan is not None:
            swap_in(module, plan)
            changed.append((module, sites))
            for site in sites:
                site.status = FUSED if site.status == WOULD_FUSE else site.status
    if before is not None and not dry_run:
        errors, reason = _compare_again(before, model, sample_inputs)
        report.errors |= errors
        report.verified = not reason
        if reason:
            _roll_back(changed, f"the model's {reason}")
    if strict and (report.left or report.verified is False):
        _roll_back(changed, "strict, and not everything could be fused")
        raise RuntimeError(f"fastbp.fuse(strict=True): not everything was fused; the model is as it was\n{report}")
    return report


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


def _find(
    model: nn.Module,
    sample_inputs: Any,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    save: str,
    backend: str | None,
    report: FusionReport,
) -> list[_Found]:
    """Every site with the plan of its module, in the order of the model; the sites go into the report."""
    found: list[_Found] = []
    candidates: list[tuple[int, Candidate]] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, (*_GRAPHS, *LAYERS)):
            continue  # a graph's code would not look at a fused block again; what is fastbp's has settings of its own
        if is_fused(module):
            found.append((module, None, [Site(name, type(module).__name__, "", FUSED, "fused before")]))
            continue
        if isinstance(module, nn.Sequential):
            plan, sites = _plan_sequential(module, name, save, backend)
        else:
            members = members_of(module)
            plan, sites = _plan_chain(module, members, name, save, backend)
            candidate = None if plan is not None else find_candidate(name, module, members)
            if candidate is not None:
                candidates.append((len(found), candidate))
        found.append((module, plan, sites))
    look([candidate for _, candidate in candidates], model, sample_inputs)
    for index, candidate in candidates:
        found[index] = _plan_inside(candidate, found[index], save, backend, report)
    for i, (module, plan, sites) in enumerate(found):
        if plan is not None and filter_fn is not None and not filter_fn(module, sites[0].name):
            found[i] = (module, None, sites)
            for site in sites:
                if site.status == WOULD_FUSE:
                    site.status, site.reason = LEFT, "filter_fn said no"
        report.sites += sites
    return found


def unfuse(model: nn.Module) -> list[str]:
    """Take back what ``fuse`` did to a model, in place; returns the names of the modules changed."""
    _check_model(model, "fastbp.unfuse")
    names = []
    for name, module in model.named_modules():
        if is_fused(module):
            swap_out(module)
            names.append(name)
    return names


def _plan_chain(
    module: nn.Module, members: Members, name: str, save: str, backend: str | None
) -> tuple[Any, list[Site]]:
    """How to fuse a module as a chain of its children, and its sites for the report."""
    kind = type(module).__name__
    plan = find_plan(module, members, save, backend)
    if plan is None:
        return None, []
    if isinstance(plan, str):
        return None, [Site(name, kind, "", LEFT, plan)]
    reason = _illegal(save, plan.activation, plan.forms)
    if reason:
        return None, [Site(name, kind, plan.call, LEFT, reason)]
    return plan, [Site(name, f"{kind} [{', '.join(plan.linears)}]", plan.call, WOULD_FUSE)]


def _plan_inside(candidate: Candidate, found: _Found, save: str, backend: str | None, report: FusionReport) -> _Found:
    """What the dry run found in a module whose forward is more than a block."""
    module, _, sites = found
    plan = candidate.plan(save, backend)
    if plan is None and candidate.is_no_block and all(site.reason == OTHERWISE for site in sites):
        return module, None, []
    if plan is None:
        for site in sites:
            site.reason = f"{site.reason}; {candidate.missing}" if candidate.missing else site.reason
        return found
    kind, name = type(module).__name__, candidate.name
    sites = [Site(name, f"{kind} [{', '.join(pair.linears)}]", pair.call, WOULD_FUSE) for pair in plan.pairs]
    reasons = [_illegal(save, pair.activation, pair.forms) for pair in plan.pairs]
    if candidate.own_sample is not None and not any(reasons):
        before = observe(module, candidate.own_sample)
        swap_in(module, plan)  # type: ignore[arg-type]
        errors, reason = _compare_again(before, module, candidate.own_sample)
        swap_out(module)
        report.errors[f"{name or '(model)'} alone"] = max(errors.values(), default=float("inf"))
        reasons = [f"its {reason}" if reason else None]
    if any(reasons):  # one policy for the whole module, so all or nothing
        for site in sites:
            site.status, site.reason = LEFT, next(r for r in reasons if r)
        return module, None, sites
    return module, plan, sites


def _compare_again(before: dict[str, Tensor], module: nn.Module, sample: Any) -> tuple[dict[str, float], str | None]:
    """How far a module that was just fused is from what it was, and what is wrong with that, if anything."""
    try:
        after = observe(module, sample)
    except ValueError as error:
        return {}, f"forward or backward failed once it was fused: {error.__cause__ or error}"
    errors = compare(before, after)
    if before.keys() == after.keys() and agree(errors, before):
        return errors, None
    name = max(errors, key=errors.__getitem__)
    return errors, f"outputs or gradients changed when it was fused (most of all {name}, by {errors[name]:.1e})"


def _plan_sequential(module: nn.Sequential, name: str, save: str, backend: str | None) -> tuple[Any, list[Site]]:
    kind = type(module).__name__
    plan = SequentialPlan(recognise_children(module), save, backend)
    runs = [run for run in find_runs(module, plan, may_idle) if isinstance(run, Run)]
    if runs and type(module).forward is not nn.Sequential.forward:
        return None, [Site(name, kind, "", LEFT, "an nn.Sequential with a forward of its own")]
    sites = []
    for run in runs:
        reason = _illegal(save, run.activation, (MLP, LINEAR_ACT) if run.projected else (LINEAR_ACT,))
        where = f"{kind} [{run.names[0]}:{run.names[-1]}]"
        sites.append(Site(name, where, run.call, LEFT if reason else WOULD_FUSE, reason or ""))
    unplain = find_unplain(module, plan)
    named = [Site(name, kind, "", LEFT, not_plain(unplain))] if unplain else []
    if any(site.status == LEFT for site in sites):  # one policy for the whole Sequential, so all or nothing
        for site in sites:
            site.status, site.reason = LEFT, site.reason or "another run of this Sequential cannot take the policy"
        return None, sites + named
    return (plan if runs else None), sites + named


def _illegal(save: str, activation: Bound, forms: Sequence[Form]) -> str | None:
    if save == "auto":
        return None
    return next((why for form in forms if (why := saving.POLICIES[save].illegal(activation, form))), None)


def _roll_back(changed: list[tuple[nn.Module, list[Site]]], reason: str) -> None:
    for module, sites in changed:
        if is_fused(module):
            swap_out(module)
        for site in sites:
            if site.status == FUSED:
                site.status, site.reason = ROLLED_BACK, reason
