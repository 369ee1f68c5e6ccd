"""``plan_memory``: the save policies with which a model keeps no more for backward than a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fastbp.activations import Bound
from fastbp.forms import Form
from fastbp.fusion import FusionReport, fuse_blocks
from fastbp.fusion.sample import as_call
from fastbp.fusion.surgery import is_fused, swap_out
from fastbp.modules import LAYERS
from fastbp.planner.choice import Option, choose
from fastbp.planner.costs import STEPS, slope_error
from fastbp.planner.observe import WHERE, Call, Layer, Recorder, Sample, as_given
from fastbp.planner.plan import MemoryPlan, PlannedLayer, human
from fastbp.saving import POLICIES, resolve

__all__ = ["MemoryPlan", "PlannedLayer", "plan_memory"]

_ERROR_UNITS = 1 << 40  # squared relative errors as integers


def plan_memory(
    model: nn.Module,
    sample_inputs: Any,
    budget: int | float,
    *,
    allow_approximate: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str | None = None,
    dry_run: bool = False,
) -> MemoryPlan:
    """Choose save policies so that autograd keeps at most ``budget`` for the whole model, at the least cost.

    ::

        plan = fastbp.plan_memory(model, x, budget=0.6)    # of what the model keeps now
        print(plan)
        plan = fastbp.plan_memory(model, {"input_ids": ids}, budget=20 * 2**30, allow_approximate=True)

    ``sample_inputs`` is a tensor, a tuple of arguments or a dict of keyword arguments for the model, of the size and
    under the autocast of training. ``budget`` is in bytes (an int) or a fraction, above 0 and at most 1 (a float), of
    what the model as given keeps on this sample, by ``fastbp.SavedBytes`` without the model's and the inputs' own.

    Planned are the layers of fastbp and the blocks whose code is known, as ``fastbp.fuse`` runs them (``filter_fn`` and
    ``backend`` as there). Other linears stay what they are: after ``fuse`` they keep less, beside the plan. Exact
    policies alone are taken, of which ``recompute`` costs time: a product once more. With ``allow_approximate`` also
    the compressed ones, which cost next to no time and have an error: then the least time
    decides first, and after it the least error. The model is fused and its layers get their policies; with ``dry_run``
    it stays as it was. What a layer keeps under each policy is measured on the sample, each storage once whoever
    keeps it, and the total is measured again at the end.

    Layers inside checkpoints and the like keep nothing that is seen in forward; they are left alone. The model runs
    about three times, its layers of fastbp more often, and what autograd keeps is dropped at once, so that memory for
    inference is enough; meta and fake tensors take none. Mode, gradients, buffers and PyTorch's random state are left
    as they were; hooks of your own run as often as the model does.

    Raises ValueError, with the model as it was, where the budget cannot be met (the text names the least that can) or
    is out of range, where nothing can be fused or requires a gradient, where the sample does
    not fit, or where the model keeps something else in every run; TypeError for what is of a wrong type.
    """
    _check(model, budget)
    sample = Sample(model, *as_call(sample_inputs))
    layers, report = _find_layers(model, filter_fn, backend)
    original = [layer.save for layer in layers]
    done = False
    try:
        with as_given(layers):
            before = sample.measure(layers)
        _check_before(before)
        if not layers:
            left = "".join(f"\n  {site.name or '(model)'}: {site.reason}" for site in report.left)
            raise ValueError(f"{WHERE}: there is no layer of fastbp in the model, and nothing that fuse can fuse{left}")
        outside, operations = sample.probe(layers)
        planned = [layer for layer in layers if not layer.reason]
        for layer in layers:
            if layer.reason and layer.fresh:
                swap_out(layer.module)
        most = int(budget * before.total) if isinstance(budget, float) else int(budget)
        names = {id(layer): layer.save for layer in layers if layer.reason and not layer.fresh}
        chosen, predicted = _choose(planned, outside, most, allow_approximate)
        for layer, option in zip(planned, chosen, strict=True):
            names[id(layer)] = layer.save = option.policy
        after = sample.measure(layers)
        if after.total != predicted:
            again = sample.measure(layers)
            if again.total != after.total:
                raise ValueError(
                    f"{WHERE}: the model keeps something else in every run ({after.total} and {again.total} bytes with "
                    "nothing changed), so that no plan can hold"
                )
            raise AssertionError(
                f"{WHERE}: predicted {predicted} bytes and measured {after.total}; please report this, unless what the "
                "model keeps depends on the values that its layers compute"
            )
        rows = [
            _row(layer, save, names.get(id(layer)), before, after, STEPS * operations)
            for layer, save in zip(layers, original, strict=True)
        ]
        done = not dry_run
    finally:
        if not done:
            for layer, save in zip(layers, original, strict=True):
                if is_fused(layer.module) or not layer.fresh:
                    layer.save = save
                if layer.fresh and is_fused(layer.module):
                    swap_out(layer.module)
    extra = sum(row.extra_time for row in rows)
    lossy = [
        row.name for row, layer in zip(rows, layers, strict=True) if not layer.reason and _is_lossy(layer, row.after)
    ]
    return MemoryPlan(rows, most, before.total, after.total, extra, not dry_run, lossy)


def _check(model: Any, budget: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHERE}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{WHERE}: budget must be bytes (int) or a fraction (float), got {type(budget).__name__}")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise ValueError(
            f"{WHERE}: a budget that is a float is a fraction of what the model keeps now, above 0 and at most 1, got "
            f"{budget}; bytes are an int"
        )
    if budget < 0:
        raise ValueError(f"{WHERE}: budget must be 0 bytes or more, got {budget}")
    if not torch.is_grad_enabled():
        raise ValueError(f"{WHERE}: gradients are switched off here (torch.no_grad), and nothing would be kept")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{WHERE}: {name or 'the model'} is compiled; plan the model first and compile it then")


def _check_before(before: Recorder) -> None:
    if not before.differentiable:
        raise ValueError(
            f"{WHERE}: no output of the model requires a gradient, so nothing is kept; are all parameters frozen, or "
            "does its forward run under torch.no_grad?"
        )


def _find_layers(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None, backend: str | None
) -> tuple[list[Layer], FusionReport]:
    """The layers of fastbp in a model, after fusing it."""
    old = {id(module) for module in model.modules() if is_fused(module)}
    report = fuse_blocks(model, filter_fn, backend)
    layers = []
    for name, module in model.named_modules():
        fresh = is_fused(module) and id(module) not in old
        ours = is_fused(module) or isinstance(module, LAYERS)
        if ours and (fresh or filter_fn is None or filter_fn(module, name)):
            layers.append(Layer(name, module, fresh))
    return layers, report


def _is_exact(form: Form, activation: Bound, policy: str) -> bool:
    """Whether a policy's gradients are as good as those of ``auto``'s."""
    return not POLICIES[policy].compressed and (policy != "output" or activation.row.output_exact)


def _is_unnoticed(form: Form, activation: Bound, policy: str) -> bool:
    """Whether it is exact, and nothing that PyTorch allows is forbidden by it (``saving.resolve``)."""
    if policy == "output":
        return resolve("auto", activation, form, WHERE) == "output"
    return _is_exact(form, activation, policy)


def _is_lossy(layer: Layer, policy: str) -> bool:
    return not all(_is_exact(call.form, call.activation, policy) for call in layer.calls)


def _options(layer: Layer, approximate: bool) -> list[Option]:
    """What a layer can be told, at which cost: operations, squared error, and the distance from ``auto``'s choice."""
    calls = layer.calls
    found = []
    for rank, policy in enumerate(POLICIES, start=1):
        unasked = all(_is_unnoticed(call.form, call.activation, policy) for call in calls)
        if not all(policy in call.own for call in calls) or not (approximate or unasked):
            continue
        again = sum(call.repeated for call in calls) if policy == "recompute" else 0
        error = sum(_ERROR_UNITS * call.numbers * _error(call, policy) ** 2 for call in calls)
        usual = all(resolve("auto", call.activation, call.form, WHERE) == policy for call in calls)
        seen = [call for call in calls if call.saw_hooks]
        shared: frozenset[Hashable] = frozenset().union(*(call.shared[policy] for call in seen))
        own = sum(call.own[policy] for call in seen)
        found.append(Option(policy, own, shared, (again, round(error), 0 if usual else rank)))
    return found


def _error(call: Call, policy: str) -> float:
    if _is_exact(call.form, call.activation, policy):
        return 0.0
    return slope_error(call.form.gated, call.activation, policy, call.dtype)


def _choose(
    layers: Sequence[Layer], outside: dict[Any, int], budget: int, approximate: bool
) -> tuple[list[Option], int]:
    """The options of the layers, and the bytes kept in all."""
    sizes = {key: size for layer in layers for call in layer.calls for key, size in call.sizes.items()}

    def solve(approximate: bool, budget: int | None) -> tuple[int, list[Option]] | None:
        options = [_options(layer, approximate) for layer in layers]
        always = set(outside).union(*(frozenset.intersection(*(o.shared for o in each)) for each in options))
        kept = sum(outside.get(key, sizes.get(key, 0)) for key in always)
        free = [[Option(o.policy, o.own, o.shared - always, o.cost) for o in each] for each in options]
        return choose(free, sizes, kept, budget)

    found = solve(approximate, budget)
    if found is not None:
        return found[1], found[0]
    exact, lossy = solve(False, None), solve(True, None)
    assert exact is not None and lossy is not None
    hint = "allow_approximate=True, " if not approximate and lossy[0] < exact[0] else ""
    raise ValueError(
        f"{WHERE}: a budget of {budget} bytes ({human(budget)}) cannot be met: the model keeps at least {exact[0]} "
        f"({human(exact[0])}) with exact policies and {lossy[0]} ({human(lossy[0])}) with approximate ones, of which "
        f"{human(sum(outside.values()))} outside the layers of fastbp; try {hint}a larger budget, or "
        "torch.utils.checkpoint around its blocks"
    )


def _row(
    layer: Layer, save: str, chosen: str | None, before: Recorder, after: Recorder, operations: int
) -> PlannedLayer:
    calls = " + ".join(dict.fromkeys(f"{call.form.name}, {call.activation!r}" for call in layer.calls))
    names = {resolve(save, call.activation, call.form, WHERE) for call in layer.calls}
    now = "eager" if layer.fresh else " + ".join(sorted(names)) or save
    planned = not layer.reason and chosen is not None
    again = sum(call.repeated for call in layer.calls) if planned and chosen == "recompute" else 0
    error = max((_error(call, chosen) for call in layer.calls), default=0.0) if planned and chosen else 0.0
    return PlannedLayer(
        layer.name, calls, now, chosen if planned and chosen else now, before.bytes_of(layer), after.bytes_of(layer),
        again / max(operations, 1), error, layer.reason,
    )  # fmt: skip
