"""A character-level GPT in the manner of nanoGPT, on English text, stock and fused.

The training loop is the usual one: AdamW with weight decay on matrices only, a learning rate that warms up and decays,
gradient accumulation, clipped gradients, and with --bf16 autocast. The model is written without fastbp; one call of
``fastbp.fuse`` finds its MLPs.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Record, compare, english, parse, run
from torch import Tensor, nn

import fastbp


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of the next character."""
        x = self.drop(self.wte(idx) + self.wpe.weight[: idx.shape[1]])
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; see ``common.compare`` for what comes back."""
    extras = {
        "--bf16": dict(action="store_true", help="autocast to bfloat16"),
        "--dropout": dict(type=float, default=0.0, help="everywhere in the model (default: 0)"),
        "--accumulate": dict(type=int, default=2, help="micro-batches for a step (default: 2)"),
    }
    options = parse(argv, __doc__, steps=60, quick=16, extras=extras)
    text = english()
    characters, data = text.unique(return_inverse=True)
    config = GPTConfig(vocab_size=len(characters), dropout=options.dropout)

    generator = torch.Generator().manual_seed(options.seed)
    window = torch.arange(config.block_size + 1)

    def get_batch() -> tuple[Tensor, Tensor]:
        start = torch.randint(len(data) - config.block_size, (8, 1), generator=generator)
        piece = data[start + window].to(options.device)
        return piece[:, :-1], piece[:, 1:]

    batches = [[get_batch() for _ in range(options.accumulate)] for _ in range(options.steps)]

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(options.device, torch.bfloat16) if options.bf16 else contextlib.nullcontext()

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor] = batches[0][0]) -> Tensor:
        with autocast():
            return model(*batch)

    def train(model: nn.Module, record: Record) -> None:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        warm_up = max(1, options.steps // 10)

        def factor(step: int) -> float:
            return min((step + 1) / warm_up, 0.1 + 0.45 * (1 + math.cos(math.pi * step / options.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for micro_batches in batches:
            total = 0.0
            for batch in micro_batches:
                loss = forward(model, batch) / len(micro_batches)
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            record(total)

    def stock() -> nn.Module:
        return GPT(config).to(options.device)

    def fused() -> tuple[nn.Module, fastbp.FusionReport]:
        model = stock()
        return model, fastbp.fuse(model, sample_inputs=batches[0][0])

    precision = torch.bfloat16 if options.bf16 else torch.float32
    return compare(options, stock=stock, variants={"fused": fused}, train=train, forward=forward, precision=precision)


if __name__ == "__main__":
    run(main)
