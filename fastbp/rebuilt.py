"""The Functions of ``fastbp.Linear``: a linear that makes its input again in backward.

``MadeBackward`` takes the place of the nodes that made h = f(g) · u, which keep f(g) beside g and u; or, where z is to
be kept in fewer bits, of the activation's. h itself becomes its output, so hooks, ``retain_grad``, other readers of h
and gradients that are asked of h find it where they look.

``ActLinearBackward`` is y = h Wᵀ + b. It has an edge to h, and where they were read, to z, or to g and u. In backward
it makes h again for dW, and sends the gradient along one of the two: dz = (dy W) · f'(z) in one pass where nobody looks
at h, else dh = dy W to h, as PyTorch's own node would.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _AutoDispatchBelowADInplaceOrView
from torch._C import _is_any_autocast_enabled as any_autocast
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]

from fastbp import autograd, producers, reference
from fastbp.activations import Bound
from fastbp.autograd import c_apply, is_special
from fastbp.backends import BACKENDS
from fastbp.forms import FORMS
from fastbp.problem import Config
from fastbp.producers import Node, Producer, nobody
from fastbp.residuals import kept_of_given, read_kept
from fastbp.saving import POLICIES
from fastbp.saving import kept as kept_by

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Seen = Callable[[], bool]


class _Anchor(torch.autograd.Function):
    """A tensor of h's shape that holds one element, and whose gradient goes to h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # else zeros of h's size go through what made h
        return h.new_empty(1).expand(h.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


class _Attached(torch.autograd.Function):
    """``value``, made again, as if it were what the anchor is of: its gradient goes there, by way of hooks and all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _again(make: Callable[[], Tensor], anchor: Tensor) -> Tensor:
    """A tensor made again in backward: to a gradient that is differentiated, it is the tensor of forward."""
    if not is_grad_enabled():
        return make()
    with torch.no_grad():
        value = make()
    return _Attached.apply(value, anchor)  # type: ignore[no-any-return]


class Made(torch.autograd.Function):
    """h = f(g) · u, or f(z): ``apply(config, seen, anchor, kept, h, a, *inputs)`` gives h this node.

    It keeps ``kept``: the inputs, or their codes by the policy of the config. The gradient goes to the inputs, or to
    a = f(g) in place of g where somebody looks at that: ``seen`` tells, and ``anchor`` is a's. Without an anchor
    nobody held a when the linear ran, and nobody can look at it.
    """

    @staticmethod
    def forward(
        ctx: Any, config: Config, seen: Seen, anchor: Tensor, codes: Sequence[Tensor], h: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.config, ctx.seen, ctx.anchor = config, seen, anchor
        ctx.save_for_backward(*(codes or others[1:]))
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        config: Config = ctx.config
        none = (None,) * 5
        if dh is None:
            return (*none, None, *[None] * config.form.inputs)
        _check_once(config)
        inputs = _inputs_of(config, ctx.saved_tensors, dh.dtype)
        special = is_special(dh)
        grad: Any = partial(reference.formula_grad, config) if special else config.grad
        if not config.form.gated:
            return (*none, None, grad(dh, inputs[0]))
        g, u = inputs
        da, dg = dh * u, None
        if ctx.anchor is None or not (special or ctx.seen()):
            da, dg = None, grad(da, g)
        a = config.value(g) if ctx.anchor is None else _again(lambda: config.value(g), ctx.anchor)
        return (*none, da, dg, dh * a)


class How(NamedTuple):
    """What ``ActLinear`` is told: the product; and what made h, or the config of the fused call and whether somebody
    looks at h when backward comes."""

    product: Product
    node: Node = None
    config: Config | None = None
    seen: Seen = lambda: True


class ActLinear(torch.autograd.Function):
    """``y = h Wᵀ + b``: ``apply(how, anchor, codes, h, weight, bias, *inputs)`` gives y and None.

    h (..., N), weight (O, N), bias (O,) or None. ``inputs``: z, or g and u, where the gradient may go straight to them;
    ``codes``: what is kept in their place. Without an ``anchor`` of h the second output is one, whose gradient this
    node sends to h. It is kept by the node, so it is asked for only where no saved-tensor hook would see it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        anchor: Tensor | None,
        codes: Sequence[Tensor],
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        with _AutoDispatchBelowADInplaceOrView():  # a view in the eyes of autograd would forbid ``y += residual``
            y = how.product(h, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.how, ctx.anchor = how, anchor
        own = None if anchor is not None else h.new_empty_strided(h.shape, [0] * h.dim())
        ctx.save_for_backward(own, weight, *(codes or inputs))
        return y, own

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, danchor: Tensor | None) -> tuple[Tensor | None, ...]:
        how: How = ctx.how
        config = how.config
        count = 0 if config is None else config.form.inputs
        if dy is None:
            return (None, None, None, danchor, None, None, *[None] * count)
        if any_autocast():  # whoever calls backward inside a region wants the gradients of outside
            with torch.autocast(dy.device.type, enabled=False):
                return ActLinear.backward(ctx, dy, danchor)
        own, weight, *saved = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad[3:6]
        if count and danchor is None and not how.seen() and not is_special(dy):
            needs = (*[True] * count, need_weight, need_bias)
            codes = config.save != "preact"  # type: ignore[union-attr]
            flat = (*[None] * (count + 1), weight, None, *saved) if codes else (*saved, None, weight, None)
            *dinputs, dw, db = BACKENDS[config.backend].backward(config, dy, flat, needs, False)  # type: ignore[union-attr]
            return (None, None, None, None, dw, db, *dinputs)
        dw = None
        count_rows = prod(dy.shape[:-1])  # and not -1, of which nothing says what it is where a row is empty
        rows = dy.reshape(count_rows, dy.shape[-1])
        if need_weight:
            _check_once(config)
            made = (
                (lambda: producers.rebuild(how.node))
                if config is None
                else (lambda: _value_of(config, saved, dy.dtype))
            )
            h = _again(made, own if ctx.anchor is None else ctx.anchor)
            dw = reference.weight_grad(rows, h.reshape(count_rows, h.shape[-1]), weight)
        dh = dy.matmul(weight)
        db = rows.sum(0) if need_bias else None
        return (None, None, None, dh if danchor is None else dh + danchor, dw, db, *[None] * count)


_anchor, _act_linear, _made = c_apply(_Anchor), c_apply(ActLinear), c_apply(Made)  # where no transform is active


def act_linear(
    product: Product,
    config: Config,
    h: Tensor,
    weight: Tensor,
    bias: Any,
    producer: Producer,
    kept: Sequence[Tensor],
) -> Tensor:
    """y of an h whose producer was read; ``kept`` are ``codes_of`` the producer's inputs."""
    seen, of_a = watcher_of(h), producer.seen
    if of_a is not nobody:
        of_h = seen
        seen = lambda: of_h() or of_a()  # noqa: E731
    return _linear(How(product, None, config, seen), kept, h, weight, bias, *producer.inputs)


def rebuilt_linear(product: Product, node: Node, h: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """y of an h that its node makes again."""
    return _linear(How(product, node), (), h, weight, bias)


def _linear(how: How, codes: Sequence[Tensor], h: Tensor, *others: Tensor | None) -> Tensor:
    anchor = None if top_hooks(True) is None else _anchor(h)
    return _act_linear(how, anchor, codes, h, *others)[0]  # type: ignore[no-any-return]


def make_anew(config: Config, h: Tensor, producer: Producer, kept: Sequence[Tensor]) -> Producer:
    """Let h be the output of a ``Made``, and not of the nodes that made it and keep more; and what made it now."""
    seen, anchor = nobody, None
    a = producer.activated.pop() if producer.activated is not None else None
    alive = None if a is None else weakref.ref(a)
    if a is not None and a._backward_hooks:  # hooks outlive a
        seen, anchor = watcher_of(a), _anchor(a)
    del a
    h.detach_()  # and the node of a product goes, and f(g) with it, if nobody else holds that
    if anchor is None and alive is not None and (held := alive()) is not None:
        seen, anchor = watcher_of(held), _anchor(held)
    with _unsafe_preserve_version_counter(h):  # readers that kept h before kept what it still is
        _made(config, seen, anchor, kept, h, anchor, *producer.inputs)
    return producer._replace(activated=None, seen=seen)


def watcher_of(h: Tensor) -> Seen:
    """What tells in backward whether somebody looks at h: who holds it, or has put a hook on it since."""
    if h._backward_hooks is None:  # the place where later ones are put, as register_hook makes it
        h._backward_hooks = OrderedDict()
        h.grad_fn._register_hook_dict(h)  # type: ignore[union-attr]
    hooks, alive = h._backward_hooks, weakref.ref(h)
    return lambda: bool(hooks) or alive() is not None


def codes_of(config: Config, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the policy keeps in place of the inputs; nothing where it keeps them."""
    if not POLICIES[config.save].compressed:
        return ()
    with torch.no_grad():
        return kept_of_given(config, inputs)


def _inputs_of(config: Config, saved: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Any]:
    return read_kept(config, None, saved, dtype)[0] if POLICIES[config.save].compressed else saved


def _value_of(config: Config, saved: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """f(z), or f(g) · u."""
    inputs = _inputs_of(config, saved, dtype)
    h = config.value(inputs[0])
    return h * inputs[1] if config.form.gated else h


def _check_once(config: Config | None) -> None:
    """Codes are no function of z in the eyes of autograd: RuntimeError for a gradient of a gradient."""
    if config is not None and POLICIES[config.save].compressed and is_grad_enabled():
        raise RuntimeError(
            f"fastbp.Linear: a gradient that is differentiated again (create_graph=True) takes what "
            f"save={config.save!r} keeps less of; use save='auto'"
        )


def _read_made(node: Node) -> Producer | None:
    config = node.config
    if POLICIES[config.save].compressed:
        return None
    return Producer(Bound(config.row, config.params), config.form, node.saved_tensors, seen=node.seen)


producers.OWN["MadeBackward"] = producers.Own(
    Made._backward_cls,
    lambda node: True,
    lambda node: _value_of(node.config, node.saved_tensors, node._input_metadata[0].dtype),
    _read_made,
)


def _keeps_z(node: Node) -> bool:
    """Whether the node of a layer keeps z, or g and u, for a gradient that is asked for."""
    config = node.config
    return config.save == "preact" and all(kept_by(config.form, config.save, True, node.needs)[-config.form.width :])


def _value_of_layer(node: Node) -> Tensor:
    form = node.config.form
    return _value_of(node.config, node.saved_tensors[-form.width :], node._input_metadata[0].dtype)


for _form in FORMS.values():
    if not _form.projected:
        _node = autograd.NODES[_form.name]
        producers.OWN[_node.__name__] = producers.Own(_node, _keeps_z, _value_of_layer, lambda node: None)
