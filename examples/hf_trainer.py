"""Hugging Face's Trainer with a small Llama on bytes of English text, stock and fused.

``fastbp.fuse(model)`` comes before the Trainer is made; nothing else changes. What the Trainer saves is an ordinary
checkpoint: ``from_pretrained`` loads it into a stock model, which computes the same logits.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import LLAMA, Record, compare, english, packages, parse, require, run
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import fastbp

with packages("transformers", "accelerate"):
    import accelerate  # noqa: F401  # the Trainer asks for it only when it is made
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
    from transformers.utils import logging


class Pieces(Dataset[dict[str, Tensor]]):
    """A text in pieces of equal length, its bytes as tokens."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.pieces = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; see ``common.compare`` for what comes back."""
    options = parse(argv, __doc__, steps=60, quick=16)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = LlamaConfig(**LLAMA)
    data = Pieces(english(), 64)
    batch = {name: piece.to(options.device) for name, piece in default_collate([data[i] for i in range(8)]).items()}

    def forward(model: nn.Module) -> Tensor:
        return model(**batch).loss

    def train(model: nn.Module, record: Record) -> None:
        class Recording(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                loss = super().training_step(*args, **kwargs)
                record(loss.item())
                return loss

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                seed=options.seed,
                use_cpu=options.device == "cpu",
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            )
            trainer = Recording(model=model, args=arguments, train_dataset=data)
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def stock() -> nn.Module:
        return LlamaForCausalLM(config).to(options.device)

    def fused() -> tuple[nn.Module, fastbp.FusionReport]:
        model = stock()
        return model, fastbp.fuse(model, sample_inputs=batch)

    result = compare(options, stock=stock, variants={"fused": fused}, train=train, forward=forward)
    trained = result["runs"]["fused"].model
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained.save_pretrained(folder)
        reloaded = LlamaForCausalLM.from_pretrained(folder).to(options.device)
        plain = not fastbp.unfuse(reloaded)
        same = torch.allclose(reloaded(**batch).logits, trained.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    require(result, plain and same, "the fused model's checkpoint, loaded into a stock model, gives the same logits")
    return result


if __name__ == "__main__":
    run(main)
