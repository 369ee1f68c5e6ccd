"""Swapping a module's class for one that runs by a plan, and back.

The module object, its children, parameters, hooks and state_dict keys stay what they are. The fused class is a subclass
of the module's own; its forward hands each call to the plan, which runs the module's own forward where it must.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import cache
from typing import Any, NoReturn

from torch import nn

from fastbp.capture import refuse_torchscript
from fastbp.copies import BASE, base_of, derived_copy, shown_class, stock_copy, stock_reduce
from fastbp.known import RAN, Plan

PLAN = "_fastbp_plan"


def is_fused(module: nn.Module) -> bool:
    """Whether the module runs by a plan."""
    return PLAN in module.__dict__


def swap_in(module: nn.Module, plan: Plan) -> None:
    """Make the module run by the plan, in place of the one it has if it has one."""
    module.__dict__[PLAN] = plan
    if not issubclass(type(module), _fused_class(base_of(module))):
        module.__class__ = _fused_class(type(module))  # type: ignore[arg-type]


def plan_of(module: nn.Module) -> Plan:
    """How a fused module runs."""
    return module.__dict__[PLAN]  # type: ignore[no-any-return]


def set_save(module: nn.Module, save: str) -> None:
    """Give a fused module another save policy."""
    module.__dict__[PLAN] = replace(plan_of(module), save=save)


def swap_out(module: nn.Module) -> None:
    """Give the module back the class it came with.

    Where others have made a class of their own from the fused one since, as fully_shard does, theirs stays; without a
    plan it runs the module's own forward.
    """
    del module.__dict__[PLAN]
    module.__dict__.pop(RAN, None)
    if BASE in type(module).__dict__:
        module.__class__ = base_of(module)


@cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)  # what reads the signature, as symbolic tracing and trainers do, sees the module's
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(PLAN)
        if plan is None:
            return base.forward(self, *args, **kwargs)
        return plan.forward(self, base, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        kind = base if type(self) is fused else type(self)  # a class that others made of this one stays
        if kind is not base and not is_fused(self):
            return base.__reduce_ex__(self, protocol)
        return stock_reduce(self, kind, protocol, (PLAN, RAN))

    def copied(self: nn.Module, name: str, *memo: dict[int, Any]) -> Any:
        """A copy that runs by the same plan, made by the method of this name if the base has one."""
        if type(self) is not fused and getattr(base, name, None) is None:  # a class that others made of this one
            return derived_copy(self, memo[0] if memo else None)
        own = getattr(base, name, None)
        new = own(self, *memo) if own is not None else stock_copy(self, base, memo[0] if memo else None, (PLAN, RAN))
        if is_fused(self) and new is not self and type(new) in (base, fused):
            swap_in(new, plan_of(self))
        return new

    def script(self: nn.Module) -> NoReturn:
        refuse_torchscript("fuse", "torch.jit.script")

    body: dict[str, Any] = {
        BASE: base,
        "forward": forward,
        "__class__": shown_class,
        "__reduce_ex__": reduce,
        "__copy__": lambda self: copied(self, "__copy__"),
        "__deepcopy__": lambda self, memo: copied(self, "__deepcopy__", memo),
        "__prepare_scriptable__": script,
        "__module__": base.__module__,
        # Others go by the name: what is written into a model's config, which layers are to be wrapped or kept whole.
        "__qualname__": base.__qualname__,
        "_get_name": lambda self: f"Fused{base.__name__}" if is_fused(self) else base.__name__,  # for repr
    }
    fused = type(base.__name__, (base,), body)
    return fused
