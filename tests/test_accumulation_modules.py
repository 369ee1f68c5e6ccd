"""gradient_accumulation_fusion in modules, in compiled code and in fx graphs."""

import pytest
import torch
from support import assert_close, each, like

import fastbp

BF16 = torch.bfloat16
MODULES = {
    "LinearAct": (6, 8),
    "GatedLinear": (6, 8),
    "MLP": (6, 8, 5),
    "GatedMLP": (6, 8, 5),
}


def make_module(name, **options):
    module = getattr(fastbp, name)(*MODULES[name], gradient_accumulation_fusion=True, **options)
    for weight in weights_of(module):
        weight.main_grad = torch.zeros(weight.shape)
    return module


def weights_of(module):
    return [p for p in module.parameters() if p.dim() == 2]


@pytest.mark.usefixtures("fresh_dynamo")
@each("autocast", [False, True])
def test_compiled_code_breaks_the_graph_around_it(autocast):
    module = make_module("MLP")
    x = like(torch.empty(3, 6), 94)

    def run(x):
        with torch.autocast("cpu", enabled=autocast):
            return module(x.sin()).float().cos()

    torch.compile(run, backend="aot_eager")(x).sum().backward()
    assert all(w.grad is None for w in weights_of(module))
    mine = [w.main_grad.clone() for w in weights_of(module)]
    for weight in weights_of(module):
        weight.main_grad.zero_()
    run(x).sum().backward()
    assert_close(mine, [w.main_grad for w in weights_of(module)], rtol=1e-5, atol=1e-6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(lambda x: module(x).sin(), backend="aot_eager", fullgraph=True)(x)


def test_fx_graphs_keep_the_flag():
    module = make_module("MLP")
    torch.fx.symbolic_trace(module)(torch.randn(3, 6)).sum().backward()
    assert all(w.main_grad.any() and w.grad is None for w in weights_of(module))


@each("name", MODULES)
def test_modules(name):
    module = make_module(name, dtype=BF16)
    assert "gradient_accumulation_fusion=True" in repr(module)
    assert "gradient" not in repr(getattr(fastbp, name)(*MODULES[name]))
    module(torch.randn(2, 3, 6, dtype=BF16)).sum().backward()
    assert all(w.main_grad.any() and w.grad is None for w in weights_of(module))
    with pytest.raises(
        TypeError, match=rf"fastbp\.{name}: gradient_accumulation_fusion must be True or False, got int"
    ):
        getattr(fastbp, name)(*MODULES[name], gradient_accumulation_fusion=1)


@each("name", list(MODULES)[1:])
def test_blocks_that_run_in_parts_are_refused(name):
    module = make_module(name)
    next(module.children()).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"needs plain nn\.Linear modules, without hooks"):
        module(torch.randn(3, 6))
    with torch.no_grad():
        module(torch.randn(3, 6))
    module.requires_grad_(False)(torch.randn(3, 6))
