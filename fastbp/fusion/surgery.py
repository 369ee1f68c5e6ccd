"""Swapping a module's class for one that runs fused, and back.

The module object, its children, parameters, hooks and state_dict keys stay what they are. The fused class is a subclass
of the module's own; its forward decides on every call, and calls the module's own forward where a call or the module is
not what was fused.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from functools import cache
from typing import Any, NoReturn

from torch import nn

from fastbp.capture import refuse_torchscript
from fastbp.fusion.chain import ChainPlan
from fastbp.fusion.inside import PLAN, TWINS, InsidePlan, make_twins
from fastbp.fusion.sequential import SequentialPlan

AnyPlan = ChainPlan | SequentialPlan | InsidePlan
_BASE = "_fastbp_base"  # of a fused class: the class it was made of


def is_fused(module: nn.Module) -> bool:
    """Whether ``fuse`` changed this module."""
    return PLAN in module.__dict__


def swap_in(module: nn.Module, plan: AnyPlan) -> None:
    """Make the module run by the plan."""
    base = type(module)
    module.__dict__[PLAN] = plan
    if isinstance(plan, InsidePlan):
        module.__dict__[TWINS] = make_twins(module, base, plan.pairs)
    module.__class__ = _fused_class(base)  # type: ignore[arg-type]  # mypy: a class is not Hashable


def plan_of(module: nn.Module) -> AnyPlan:
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
    module.__dict__.pop(TWINS, None)
    if _BASE in type(module).__dict__:
        module.__class__ = type(module).__dict__[_BASE]


@cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)  # what reads the signature, as symbolic tracing and trainers do, sees the module's
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(PLAN)
        if plan is None:
            return base.forward(self, *args, **kwargs)
        return plan.forward(self, base, args, kwargs)

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
        return _filled(new, copy.deepcopy({k: v for k, v in self.__dict__.items() if k != TWINS}, memo), base)

    def shallow(self: nn.Module) -> nn.Module:
        return _filled(type(self).__new__(type(self)), self.__dict__, base)

    def script(self: nn.Module) -> NoReturn:
        refuse_torchscript("fuse", "torch.jit.script")

    body: dict[str, Any] = {
        _BASE: base,
        "forward": forward,
        "__reduce_ex__": reduce,
        "__copy__": shallow,
        "__prepare_scriptable__": script,
        "__module__": base.__module__,
        # Others go by the name: what is written into a model's config, which layers are to be wrapped or kept whole.
        "__qualname__": base.__qualname__,
        "_get_name": lambda self: f"Fused{base.__name__}" if is_fused(self) else base.__name__,  # for repr
    }
    if not hasattr(base, "__deepcopy__"):
        body["__deepcopy__"] = deepcopy
    return type(base.__name__, (base,), body)


def _filled(new: nn.Module, attributes: dict[str, Any], base: type[nn.Module]) -> nn.Module:
    """A copy with these attributes, and twins of its own where it needs them."""
    new.__dict__.update(attributes)
    plan = new.__dict__.get(PLAN)
    if isinstance(plan, InsidePlan):
        new.__dict__[TWINS] = make_twins(new, base, plan.pairs)
    return new
