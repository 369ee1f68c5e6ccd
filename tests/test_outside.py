"""Rivals from other packages, which are not here: stand-ins in their places, in plain PyTorch, with their names, their
arguments and their layouts of the weights. So what a rival hands over, and which gradients come of it, is executed."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support import each
from torch import nn

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.rivals import RIVALS

CPU, CUDA = torch.device("cpu"), SimpleNamespace(type="cuda")
BFLOAT = torch.bfloat16
PLAIN = {"relu": F.relu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}


def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None, recompute=False, concat_layout=False):
    """quack.mlp's: gate and up in turn, row by row."""
    gates = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu"}
    z = F.linear(x, weight1, bias1)
    if activation in gates:
        h = PLAIN[gates[activation]](z[..., ::2]) * z[..., 1::2]
    else:
        h = PLAIN[{"gelu_tanh_approx": "gelu_tanh"}.get(activation, activation)](z)
    return F.linear(h, weight2, bias2)


class Overwriting(torch.autograd.Function):
    """As Liger's: backward writes over what forward saved, so that a second one of the same graph is wrong."""

    act = None

    @classmethod
    def forward(cls, ctx, a, b):
        ctx.save_for_backward(a, b)
        return cls.act(a) * b

    @classmethod
    def backward(cls, ctx, dc):
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (a, b)]
            found = torch.autograd.grad(cls.act(leaves[0]) * leaves[1], leaves, dc)
        return tuple(t.data.copy_(gradient) for t, gradient in zip((a, b), found, strict=True))


class LigerSiLUMulFunction(Overwriting):
    act = staticmethod(PLAIN["silu"])


class LigerGELUMulFunction(Overwriting):
    act = staticmethod(PLAIN["gelu_tanh"])


def op(act, gated):
    """A module of te.ops: a gated one applies the activation to the first half."""

    class Op(nn.Module):
        def forward(self, x):
            if not gated:
                return act(x)
            first, second = x.chunk(2, -1)
            return act(first) * second

    return Op


OPS = SimpleNamespace(
    Linear=nn.Linear,
    Sequential=nn.Sequential,
    **{name: op(PLAIN[key], False) for name, key in (("ReLU", "relu"), ("GELU", "gelu_tanh"), ("SiLU", "silu"))},
    **{name: op(PLAIN[key], True) for name, key in (("ReGLU", "relu"), ("GEGLU", "gelu_tanh"), ("SwiGLU", "silu"))},
)


class FusedMLP(nn.Module):
    """flash_attn.ops.fused_dense's; ``seen`` is whether each call was to save what backward needs."""

    seen: ClassVar = []

    def __init__(self, in_features, hidden_features, out_features, activation, device, dtype):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, device=device, dtype=dtype)
        self.act = {"gelu_approx": PLAIN["gelu_tanh"], "relu": F.relu}[activation]

    def forward(self, x):
        FusedMLP.seen.append(self.training)
        return self.fc2(self.act(self.fc1(x)))


MODULES = {
    "quack": {},
    "quack.mlp": {"mlp_func": mlp_func},
    "liger_kernel": {},
    "liger_kernel.ops": {
        "LigerSiLUMulFunction": LigerSiLUMulFunction,
        "LigerGELUMulFunction": LigerGELUMulFunction,
    },
    "transformer_engine": {},
    "transformer_engine.pytorch": {"ops": OPS},
    "fused_dense_lib": {},
    "flash_attn": {},
    "flash_attn.ops": {},
    "flash_attn.ops.fused_dense": {"FusedMLP": FusedMLP},
}
PACKAGES = ("quack", "liger", "transformer-engine", "flash-attn")
SIZES = {"layer": (128, 64), "gated": (128, 64), "mlp": (128, 64, 32), "gated_mlp": (128, 64, 32)}
# What each serves: of every kind, these activations.
SERVED = {
    "quack": {"mlp": PLAIN, "gated_mlp": PLAIN},
    "liger": {kind: ("gelu_tanh", "silu") for kind in ("gated", "gated_mlp")},
    "transformer-engine": dict.fromkeys(SIZES, PLAIN),
    "flash-attn": {"mlp": ("relu", "gelu_tanh")},
}


@pytest.fixture
def installed(monkeypatch):
    """All of them, and on a CPU in float32."""
    for name, contents in MODULES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in PACKAGES:
        anywhere = replace(RIVALS[name], devices=("cpu",), dtypes=(torch.float32,))
        monkeypatch.setitem(RIVALS, name, anywhere)


@each("kind", SIZES)
@each("activation", [*PLAIN, "gelu"])
@each("name", PACKAGES)
def test_outputs_and_gradients_are_those_of_the_case(name, activation, kind, installed):
    case = Case(kind, 16, SIZES[kind], activation)
    serves = activation in SERVED[name].get(kind, ())
    for mode in ("fwd_bwd", "fwd", "bwd"):
        found = measure.prepare(case, ["eager", name], CPU, mode)
        assert (name in found.steps) == serves, found.left_out
        assert found.accuracy[name]["accurate"] if serves else found.left_out[name].startswith("serves ")
        for step in found.steps.values():
            step()
            step()


def test_a_layout_that_is_not_the_packages_is_seen(installed, monkeypatch):
    """Or the stand-ins would agree with anything: one that takes the halves, and one of gate and up swapped."""
    case = Case("gated_mlp", 16, SIZES["gated_mlp"], "silu")

    def halves(x, weight1, weight2, activation, bias1, bias2):
        gate, up = F.linear(x, weight1, bias1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, weight2, bias2)

    monkeypatch.setattr(sys.modules["quack.mlp"], "mlp_func", halves)
    swapped = {**vars(OPS), "SwiGLU": op(lambda z: z, True)}
    monkeypatch.setattr(sys.modules["transformer_engine.pytorch"], "ops", SimpleNamespace(**swapped))
    found = measure.prepare(case, ["eager", "quack", "transformer-engine"], CPU)
    assert not found.accuracy["quack"]["accurate"] and not found.accuracy["transformer-engine"]["accurate"]
    assert list(found.steps) == ["eager", "quack", "transformer-engine"]


def test_a_forward_pass_alone_saves_nothing_in_flash_attention(installed):
    case = Case("mlp", 16, SIZES["mlp"], "relu")
    for mode, saves in (("fwd", False), ("fwd_bwd", True)):
        FusedMLP.seen.clear()
        measure.prepare(case, ["eager", "flash-attn"], CPU, mode).steps["flash-attn"]()
        assert FusedMLP.seen == [saves, saves]


REFUSED = [
    ("quack", Case("mlp", 16, (64, 64, 64, 64), "relu", BFLOAT), "has 1 hidden layer, not 2"),
    ("quack", Case("mlp", 16, (60, 64, 60), "relu", BFLOAT), "multiples of 8"),
    ("quack", Case("mlp", 16, (64, 64, 64), "relu"), "float16, not float32"),
    ("liger", Case("gated", 16, (64, 64), "relu", BFLOAT), "serves gelu_tanh and silu, not relu"),
    ("flash-attn", Case("mlp", 16, (64, 64, 64), "relu", BFLOAT), "multiples of 128"),
    ("quack", Case("mlp", 16, (64, 64, 64), "relu", BFLOAT), "quack is not installed; pip install quack-kernels"),
    ("liger", Case("gated", 16, (64, 64), "silu", BFLOAT), "liger_kernel is not installed; pip install liger-kernel"),
    ("transformer-engine", Case("layer", 16, (64, 64), "relu", BFLOAT), "transformer_engine is not installed; pip"),
    ("flash-attn", Case("mlp", 16, (128, 64, 64), "relu", BFLOAT), "fused_dense_lib is not installed; it is built"),
]


@each(("name", "case", "reason"), REFUSED)
def test_who_does_not_take_part_says_why(name, case, reason, monkeypatch):
    module, _ = RIVALS[name].needs
    if "installed" not in reason:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    elif find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    assert reason in RIVALS[name].refusal(case, "fwd_bwd", CUDA)


@each("name", PACKAGES)
def test_they_are_for_gpus(name):
    case = Case("gated_mlp" if name == "liger" else "mlp", 16, (128, 64, 64), "gelu_tanh", BFLOAT)
    assert RIVALS[name].refusal(case, "fwd", CPU) == "serves cuda, not cpu"


def test_a_package_that_does_not_load_is_left_out_with_its_reason(installed, monkeypatch):
    monkeypatch.setattr(sys.modules["quack.mlp"], "mlp_func", None)
    case = Case("mlp", 16, SIZES["mlp"], "relu")
    found = measure.prepare(case, ["eager", "quack"], CPU)
    assert "TypeError" in found.left_out["quack"]
    monkeypatch.delitem(sys.modules, "quack.mlp")
    found = measure.prepare(case, ["eager", "quack"], CPU)
    assert "quack.mlp" in found.left_out["quack"]
