"""Model surgery: ``fuse`` makes the MLP blocks of a model run in fastbp, ``unfuse`` takes it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastbp import backends, saving
from fastbp.activations import Bound
from fastbp.forms import GATED_MLP, LINEAR_ACT, MLP, Form
from fastbp.fusion.report import FUSED, LEFT, ROLLED_BACK, WOULD_FUSE, FusionReport, Site
from fastbp.fusion.sequential import Run, SequentialPlan, find_runs, recognise_children
from fastbp.fusion.surgery import is_fused, swap_in, swap_out
from fastbp.fusion.templates import Plan, find_plan
from fastbp.fusion.verify import agree, compare, observe

__all__ = ["FusionReport", "fuse", "unfuse"]


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

    Found are runs of nn.Linear and activation in an ``nn.Sequential``, and modules that compute fc2(act(fc1(x))) or
    down(act(gate(x)) * up(x)) of their children, whatever the names; what a module computes is decided by running it on
    small random weights in float64. Parameters, their objects, state_dict keys, hooks and children stay as they are, so
    an optimizer made before stays valid; a block whose linears are later wrapped (LoRA, quantised, hooked) runs its own
    forward again.

    ``sample_inputs``: a tensor, a tuple of arguments or a dict of keyword arguments for the model; with it ``verify``
    compares outputs and parameter gradients of the whole model before and after, and takes everything back where they
    differ. ``filter_fn(module, name)`` False leaves a module alone. ``save`` and ``backend`` as in
    ``fastbp.linear_act``. ``dry_run`` reports and changes nothing. ``strict`` raises RuntimeError, with the model as it
    was, where a block was left or verifying failed.

    Raises TypeError where model is no nn.Module, ValueError for unknown names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastbp.fuse: model must be an nn.Module, got {type(model).__name__}")
    saving.check_name(save, "fastbp.fuse")
    backends.check_name(backend, "fastbp.fuse")
    report = FusionReport(dry_run=dry_run)
    before = observe(model, sample_inputs) if verify and sample_inputs is not None else None
    changed: list[tuple[nn.Module, list[Site]]] = []
    for name, module in list(model.named_modules()):
        if is_fused(module):
            report.sites.append(Site(name, type(module).__name__, "", FUSED, "fused before"))
            continue
        plan, sites = _plan(module, name, save, backend)
        if plan is not None and filter_fn is not None and not filter_fn(module, name):
            plan = None
            for site in sites:
                site.status, site.reason = LEFT, "filter_fn said no"
        if plan is not None and not dry_run:
            swap_in(module, plan)
            changed.append((module, sites))
            for site in sites:
                site.status = FUSED
        report.sites += sites
    if before is not None and not dry_run:
        after = observe(model, sample_inputs)
        report.errors = compare(before, after)
        report.verified = before.keys() == after.keys() and agree(report.errors, before)
        if not report.verified:
            _roll_back(changed, "the model's outputs or gradients changed")
    if strict and (report.left or report.verified is False):
        _roll_back(changed, "strict, and not everything could be fused")
        raise RuntimeError(f"fastbp.fuse(strict=True): not everything was fused; the model is as it was\n{report}")
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Take back what ``fuse`` did to a model, in place; returns the names of the modules changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastbp.unfuse: model must be an nn.Module, got {type(model).__name__}")
    names = []
    for name, module in model.named_modules():
        if is_fused(module):
            swap_out(module)
            names.append(name)
    return names


def _plan(
    module: nn.Module, name: str, save: str, backend: str | None
) -> tuple[Plan | SequentialPlan | None, list[Site]]:
    """How to fuse a module, and its sites for the report."""
    if isinstance(module, nn.Sequential):
        return _plan_sequential(module, name, save, backend)
    kind = type(module).__name__
    plan = find_plan(module, save, backend)
    if plan is None:
        return None, []
    if isinstance(plan, str):
        return None, [Site(name, kind, "", LEFT, plan)]
    reason = _illegal(save, plan.activation, GATED_MLP if plan.gated else MLP)
    if reason:
        return None, [Site(name, kind, plan.call, LEFT, reason)]
    return plan, [Site(name, f"{kind} [{', '.join(plan.linears)}]", plan.call, WOULD_FUSE)]


def _plan_sequential(
    module: nn.Sequential, name: str, save: str, backend: str | None
) -> tuple[SequentialPlan | None, list[Site]]:
    kind = type(module).__name__
    plan = SequentialPlan(recognise_children(module), save, backend)
    runs = [run for run in find_runs(module, plan) if isinstance(run, Run)]
    if runs and type(module).forward is not nn.Sequential.forward:
        return None, [Site(name, kind, "", LEFT, "an nn.Sequential with a forward of its own")]
    sites = []
    for run in runs:
        reason = _illegal(save, run.activation, MLP if run.projected else LINEAR_ACT)
        where = f"{kind} [{run.names[0]}:{run.names[-1]}]"
        sites.append(Site(name, where, run.call, LEFT if reason else WOULD_FUSE, reason or ""))
    if any(site.status == LEFT for site in sites):  # one policy for the whole Sequential, so all or nothing
        for site in sites:
            site.status, site.reason = LEFT, site.reason or "another run of this Sequential cannot take the policy"
        return None, sites
    return (plan if runs else None), sites


def _illegal(save: str, activation: Bound, form: Form) -> str | None:
    return None if save == "auto" else saving.POLICIES[save].illegal(activation, form)


def _roll_back(changed: list[tuple[nn.Module, list[Site]]], reason: str) -> None:
    for module, sites in changed:
        if is_fused(module):
            swap_out(module)
        for site in sites:
            site.status, site.reason = ROLLED_BACK, reason
