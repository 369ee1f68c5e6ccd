"""Models for the tests of plan_memory, small, with their samples."""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbp

EXACT = ("preact", "output", "recompute")


def kept_by(model, sample) -> int:
    """What SavedBytes measures of one forward."""
    args = sample if isinstance(sample, tuple) else (sample,)
    with fastbp.SavedBytes(exclude=[model, *args]) as saved, torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(*args)
    del y
    return saved.total


def state_of(model) -> dict[str, torch.Tensor]:
    """Parameters, buffers and gradients."""
    grads = {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.clone() for name, t in model.state_dict().items()} | grads


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, width, mlp, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def BERT(layers, width=32):
    return nn.Sequential(
        *(
            Layer(width, nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)))
            for _ in range(layers)
        )
    )


def Llama(layers, width=32, hidden=88):
    return nn.Sequential(*(Layer(width, SwiGLU(width, hidden), nn.RMSNorm) for _ in range(layers)))


class Chain(nn.Module):
    """Layers one after another: the output of each is what the next one keeps."""

    def __init__(self, frozen=()):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                fastbp.LinearAct(16, 24, activation="relu"),
                fastbp.LinearAct(24, 40, activation="gelu"),
                fastbp.LinearAct(40, 24, activation="elu"),
                fastbp.MLP(24, 56, 8, activation="silu"),
            ]
        )
        for index in frozen:
            self.layers[index].requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Mixed(nn.Module):
    """Runs and other modules in one Sequential, statistics, dropout, a frozen part, tied weights, a skip."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.LayerNorm(16), nn.Linear(16, 20), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 16), nn.BatchNorm1d(16),
        )  # fmt: skip
        self.act = fastbp.LinearAct(16, 16, activation="tanh")
        self.gated = fastbp.GatedLinear(16, 32)
        self.frozen = fastbp.GatedMLP(32, 40, 16).requires_grad_(False)
        self.tied = fastbp.LinearAct(16, 16)
        self.tied.weight = self.act.weight

    def forward(self, x):
        h = self.act(self.head(x))
        return self.tied(self.frozen(self.gated(h + x)) * h)


class Checkpointed(nn.Module):
    def __init__(self, twice=False):
        super().__init__()
        self.twice = twice
        for name in ("open", "closed", "old", "never"):
            setattr(self, name, nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)))

    def forward(self, x):
        x = x + self.open(x)
        x = x + checkpoint(self.closed, x, use_reentrant=False)
        if self.twice:
            x = x + checkpoint(self.open, x, use_reentrant=False)
        return x + checkpoint(self.old, x, use_reentrant=True)


class Shared(nn.Module):
    """One block, used three times, once without autograd."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        with torch.no_grad():
            x = x + self.block(x)
        return self.block(x + self.block(x))


class NoGradInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = fastbp.MLP(4, 8)

    @torch.no_grad()
    def forward(self, x):
        return self.block(x)


MODELS = {
    "bert": lambda: (BERT(3), (torch.randn(2, 8, 32),)),
    "llama": lambda: (Llama(3), (torch.randn(2, 8, 32),)),
    "chain": lambda: (Chain(), (torch.randn(12, 16),)),
    "frozen chain": lambda: (Chain(frozen=(1, 3)), (torch.randn(12, 16),)),
    "input too": lambda: (Chain(frozen=(0, 1, 2)), (torch.randn(12, 16, requires_grad=True),)),
    "mixed": lambda: (Mixed(), (torch.randn(12, 16),)),
    "checkpointed": lambda: (Checkpointed(), (torch.randn(3, 4, 16),)),
    "checkpointed and not": lambda: (Checkpointed(twice=True), (torch.randn(3, 4, 16),)),
    "shared": lambda: (Shared(), (torch.randn(6, 16),)),
    "modules": lambda: (
        nn.Sequential(fastbp.Linear(16, 16), fastbp.GatedMLP(16, 40), fastbp.LinearAct(16, 32, activation="relu")),
        (torch.randn(12, 16),),
    ),
}


def least(model, sample, **options):
    """The plan that keeps least, not applied; the refusal of a budget of nothing names its bytes."""
    try:
        return fastbp.plan_memory(model, sample, 0, dry_run=True, **options)
    except ValueError as refused:
        exact, approximate = re.search(r"at least (\d+) .* exact policies and (\d+) ", str(refused)).groups()
        low = approximate if options.get("allow_approximate") else exact
        return fastbp.plan_memory(model, sample, int(low), dry_run=True, **options)


def budgets_of(model, sample, **options):
    """From what the layers keep at most down to the least there is."""
    most = fastbp.plan_memory(model, sample, 1.0, dry_run=True, **options).total_after
    low = least(model, sample, **options).total_after
    assert low < most
    return [most, (2 * most + low) // 3, (most + 2 * low) // 3, low]
