"""Activation checkpointing of a transformer, stock and fused: what is kept for backward, and what it costs.

``torch.utils.checkpoint`` around whole layers (use_reentrant=False), and selectively, where attention is kept and all
else computed again, fused MLPs too. Beside them ``fastbp.fuse(model, save="recompute")``: the MLPs alone keep nothing
but their input, at the cost of one more product in each. It goes together with either. All of this is for blocks that
run as one call, because their code is known; a linear elsewhere keeps z, and inside a checkpoint it is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import Record, compare, english, parse, require, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastbp
from fastbp.demo.tasks import Transformer


class Checkpointed(nn.Module):
    """A module that keeps its input for backward and is computed again there, but for what ``contexts`` caches."""

    def __init__(self, inner: nn.Module, contexts: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.inner, self.options = inner, {} if contexts is None else {"context_fn": contexts}

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False, **self.options)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; see ``common.compare`` for what comes back."""
    options = parse(argv, __doc__, steps=40, quick=12)
    text = english(options.device)
    window = torch.arange(65, device=options.device)
    cached: list[int] = []  # the bytes of each tensor that selective checkpointing keeps, which autograd does not see

    def keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if "scaled_dot_product" not in str(op):
            return CheckpointPolicy.PREFER_RECOMPUTE
        if not context.is_recompute:
            queries = args[0]  # of the size of the output, which comes with a float32 for each query and head
            cached.append(queries.nbytes + 4 * queries[..., 0].numel())
        return CheckpointPolicy.MUST_SAVE

    def draw() -> tuple[Tensor, Tensor]:
        piece = text[torch.randint(len(text) - 64, (8, 1)).to(options.device) + window]
        return piece[:, :-1], piece[:, 1:]

    torch.manual_seed(options.seed)
    sample = draw()

    def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def train(model: nn.Module, record: Record) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(options.steps):
            loss = loss_of(model, *draw())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record(loss.item())

    def stock(checkpointed: bool = False, contexts: Callable[[], Any] | None = None) -> Transformer:
        model = Transformer(width=64, layers=3, context=64).to(options.device)
        if checkpointed:
            model.layers = nn.Sequential(*(Checkpointed(layer, contexts) for layer in model.layers))
        return model

    def fused(save: str = "auto", **how: Any) -> tuple[nn.Module, fastbp.FusionReport]:
        model = stock(**how)
        return model, fastbp.fuse(model, sample_inputs=sample[0], save=save)

    selective = partial(create_selective_checkpoint_contexts, keep_attention)
    variants = {
        "checkpoint": lambda: (stock(checkpointed=True), None),
        "fused": fused,
        'fused, "recompute"': partial(fused, "recompute"),
        "fused, checkpoint": partial(fused, checkpointed=True),
        "fused, selective": partial(fused, checkpointed=True, contexts=selective),
    }
    result = compare(
        options, stock=stock, variants=variants, train=train, forward=lambda m: loss_of(m, *sample), cached=cached
    )
    kept = {name: run.kept for name, run in result["runs"].items()}
    order = ["stock", "fused", 'fused, "recompute"', "fused, selective", "fused, checkpoint"]
    falls = all(kept[a] > kept[b] for a, b in pairwise(order))
    require(result, falls, f"from the most to the least bytes kept: {'; '.join(order)}")
    same = kept["fused, checkpoint"] == kept["checkpoint"]
    require(result, same, "a checkpoint around a fused layer keeps what one around a stock layer keeps")
    return result


if __name__ == "__main__":
    run(main)
