"""torchvision beside a torch it was not built for: the wheel from PyPI with the CPU's torch."""

import importlib
import sys

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")  # kept: what it declares goes when it does


def declare() -> None:
    """Make ``import torchvision`` work here, as timm and transformers do it; call this before they are imported.

    Where its library of operators does not load, its Python code fails for want of their names. Nobody here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass  # nothing here needs it but its own models
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
