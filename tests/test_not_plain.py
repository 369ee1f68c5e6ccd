"""Blocks whose children are no longer plain nn.Linears call them as they are."""

import torch
from module_pairs import BLOCKS, Doubled, K, assert_same_run, draw, make, run
from support import assert_close, each
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import fastbp


class Lora(nn.Linear):
    """A low-rank update beside the frozen layer, as adapters add it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(draw(2, base.in_features))
        self.up = nn.Parameter(draw(base.out_features, 2))

    def forward(self, input):
        return super().forward(input) + input @ self.down.t() @ self.up.t()


class Wrapper(nn.Module):
    """Not an nn.Linear at all, and without a weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, input):
        return self.base(input).sin()


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output.sin())
    return linear


def pre_hooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return linear


def backward_hooked(linear):
    linear.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0].sin(),))
    return linear


def backward_pre_hooked(linear):
    linear.register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0].sin(),))
    return linear


def patched(linear):
    forward = linear.forward
    linear.forward = lambda input: forward(input).sin()
    return linear


def parametrised(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


CHANGES = {
    change.__name__: change
    for change in (hooked, pre_hooked, backward_hooked, backward_pre_hooked, patched, parametrised, Lora, Wrapper)
}
CHILDREN = [(name, child) for name in BLOCKS for child, _ in make(name)[0].named_children()]


@each(("name", "child"), CHILDREN)
@each("change", CHANGES)
def test_a_changed_child_is_called_as_it_is(name, child, change):
    ours, stock = make(name, dtype=torch.float64)
    plain = ours(draw(4, K))
    for block in (ours, stock):
        setattr(block, child, CHANGES[change](getattr(block, child)))
    assert_same_run(ours, stock, draw(4, K))
    if "backward" not in change:
        assert not torch.equal(ours(draw(4, K)), plain), "the change had no effect, so this shows nothing"


@each(("name", "child"), CHILDREN)
def test_hooks_that_only_look_are_run(name, child):
    ours, _ = make(name)
    seen = []
    handles = [
        getattr(ours, child).register_forward_hook(lambda *_: seen.append("forward")),
        getattr(ours, child).register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    ours(draw(4, K, dtype=torch.float32).requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    ours(draw(4, K, dtype=torch.float32).requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


@each("name", BLOCKS)
def test_global_hooks_see_the_children(name):
    ours, _ = make(name)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(draw(4, K, dtype=torch.float32))
    finally:
        handle.remove()
    assert {id(m) for m in seen} == {id(m) for m in ours.modules()}


@each(("name", "child"), CHILDREN)
@each("part", ["weight", "bias"])
def test_tensor_subclasses_as_parameters(name, child, part, monkeypatch):
    """As sharded and quantised weights are; TwoTensor computes everything on two tensors at once."""
    ours, stock = make(name, dtype=torch.float64)
    for block in (ours, stock):
        tensor = getattr(getattr(block, child), part).detach()
        setattr(getattr(block, child), part, nn.Parameter(TwoTensor(tensor.clone(), 2 * tensor)))
    x, called, forward = draw(4, K), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: called.append(self) or forward(self, input))
    mine, expected = ours(x), stock(x)
    assert part == "bias" or getattr(ours, child) in called, "a sharded weight is its own module's to use"
    for half in ("a", "b"):
        assert_close(getattr(mine, half), getattr(expected, half))
    mine.sum().backward()
    expected.sum().backward()
    grads = [getattr(getattr(block, child), part).grad for block in (ours, stock)]
    for half in ("a", "b"):
        assert_close(getattr(grads[0], half), getattr(grads[1], half))


def test_what_is_still_plain_is_still_fused(monkeypatch):
    block, stock = make("GatedMLP", dtype=torch.float64)
    calls = []
    call = fastbp.functional.call
    monkeypatch.setattr(fastbp.functional, "call", lambda form, *a: calls.append(form.name) or call(form, *a))
    for module in (block, stock):
        hooked(module.down_proj)
    assert_same_run(block, stock, draw(4, K))
    assert calls == ["gated_linear_act"]


@each("name", BLOCKS)
@each("part", ["weight", "bias"])
def test_parts_that_are_attributes_and_no_parameters_are_used(name, part):
    """As wrappers do that keep the parameters elsewhere and lend the module its tensors."""
    ours, stock = make(name, dtype=torch.float64)
    for block in (ours, stock):
        for child in block.children():
            if isinstance(child, nn.Linear):
                lent = getattr(child, part).detach() * 2
                delattr(child, part)
                setattr(child, part, lent)
    x = draw(4, K)
    assert_close(ours(x), stock(x))


@each("name", BLOCKS)
def test_children_replaced_by_fastbp_linear_stay_fused(name, monkeypatch):
    ours, stock = make(name, dtype=torch.float64)
    for child, linear in list(ours.named_children()):
        new = fastbp.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
        new.load_state_dict(linear.state_dict())
        setattr(ours, child, new)
    expected = run(stock, draw(4, K))
    monkeypatch.setattr(fastbp.Linear, "forward", None)
    assert_close(run(ours, draw(4, K))["y"], expected["y"])
