"""fastbp: faster and smaller backpropagation through linear layers, their activations, MLPs and gated blocks."""

from fastbp import autograd, compiler
from fastbp.backends import available_backends
from fastbp.functional import (
    act_linear,
    available_activations,
    gated_act_linear,
    gated_linear_act,
    gated_mlp,
    linear_act,
    mlp,
)
from fastbp.fusion import FusionReport, fuse, report, unfuse
from fastbp.linear import Linear
from fastbp.memory import SavedBytes
from fastbp.modules import MLP, GatedLinear, GatedMLP, LinearAct
from fastbp.ops import decompositions
from fastbp.planner import MemoryPlan, plan_memory
from fastbp.settings import use
from fastbp.tuning import TuningReport, tune
from fastbp.version import __version__

compiler.register()  # torch.compile(model, backend="fastbp")

__all__ = [
    "MLP",
    "FusionReport",
    "GatedLinear",
    "GatedMLP",
    "Linear",
    "LinearAct",
    "MemoryPlan",
    "SavedBytes",
    "TuningReport",
    "__version__",
    "act_linear",
    "autograd",
    "available_activations",
    "available_backends",
    "decompositions",
    "fuse",
    "gated_act_linear",
    "gated_linear_act",
    "gated_mlp",
    "linear_act",
    "mlp",
    "plan_memory",
    "report",
    "tune",
    "unfuse",
    "use",
]
