"""Models of blocks, fused and stock, and the batches they train on."""

import torch
from fusible import WIDTH, Gated, TwoLinears
from support import like
from torch import nn

import fastbp


def stock_model():
    """Of blocks that people have; the same numbers each time."""
    torch.manual_seed(5)
    return nn.Sequential(TwoLinears(nn.GELU()), Gated(), TwoLinears(nn.ReLU()))


def fused_model():
    model = stock_model()
    assert {site.name for site in fastbp.fuse(model).fused} >= {"0", "1", "2"}
    return model


def flagged_model():
    """Blocks that add to main_grad and, as there are in every model, others that do not."""
    torch.manual_seed(6)
    flag = dict(gradient_accumulation_fusion=True)
    model = nn.Sequential(
        fastbp.LinearAct(WIDTH, 20, activation="gelu", **flag),
        fastbp.MLP(20, 24, WIDTH, activation="relu", **flag),
        TwoLinears(nn.Tanh()),
        fastbp.GatedMLP(WIDTH, 16, **flag),
    )
    assert "2" in {site.name for site in fastbp.fuse(model).fused}
    return model


class Twin(nn.Module):
    """``flagged_model`` in plain PyTorch, with the same parameters in the same order."""

    def __init__(self):
        super().__init__()
        self.model = flagged_model()
        fastbp.unfuse(self.model)
        for module in self.model:
            module.gradient_accumulation_fusion = False

    def forward(self, x):
        layer, block, tanh, gated = self.model
        h = nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias))
        h = tanh(block.fc2(block.fc1(h).relu()))
        return gated.down_proj(nn.functional.silu(gated.gate_proj(h)) * gated.up_proj(h))


def batch(step, dtype):
    return like(torch.empty(24, WIDTH, dtype=torch.float64), 60 + step).to(dtype), like(
        torch.empty(24, WIDTH), 90 + step
    )
