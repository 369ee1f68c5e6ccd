"""Swapping a module's class for one that runs fused, and back.

The module object, its children, parameters, hooks and state_dict keys stay what they are. The fused class is a subclass
of the module's own; its forward decides on every call, and calls the module's own forward where a call or the module is
not what was fused.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from fastbp.fusion.sequential import SequentialPlan, run_sequential
from fastbp.fusion.templates import Plan

_PLAN = "_fastbp_plan"


def is_fused(module: nn.Module) -> bool:
    """Whether ``fuse`` changed this module."""
    return _PLAN in module.__dict__


def swap_in(module: nn.Module, plan: Plan | SequentialPlan) -> None:
    """Make the module run by the plan."""
    module.__dict__[_PLAN] = plan
    module.__class__ = _fused_class(type(module))  # type: ignore[arg-type]  # mypy: a class is not Hashable


def plan_of(module: nn.Module) -> Plan | SequentialPlan:
    """How a fused module runs."""
    return module.__dict__[_PLAN]  # type: ignore[no-any-return]


def set_save(module: nn.Module, save: str) -> None:
    """Give a fused module another save policy."""
    module.__dict__[_PLAN] = replace(plan_of(module), save=save)


def swap_out(module: nn.Module) -> None:
    """Give the module back the class it came with."""
    del module.__dict__[_PLAN]
    module.__class__ = type(module).__mro__[1]


@cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__[_PLAN]
        if len(args) == 1 and not kwargs:
            if isinstance(plan, SequentialPlan):
                return run_sequential(self, plan, args[0])  # type: ignore[arg-type]
            if plan.holds(self):
                return plan.run(self, args[0])
        return base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickle as the class the module came with, so that a saved model loads without fastbp."""
        stock = copy.copy(self)
        swap_out(stock)
        # From protocol 2 on, pickle insists that the class it writes is the object's own; the older form does not.
        return stock.__reduce_ex__(1)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy that is fused too: copy.deepcopy would go by way of ``__reduce_ex__``."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def shallow(self: nn.Module) -> nn.Module:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__copy__": shallow,
        "__module__": base.__module__,
    }
    if not hasattr(base, "__deepcopy__"):
        body["__deepcopy__"] = deepcopy
    return type(f"Fused{base.__name__}", (base,), body)
