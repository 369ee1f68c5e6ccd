"""A LightningModule that fuses itself, an autoencoder of scikit-learn's digits, stock and fused.

``configure_model`` is the place: Lightning calls it before the optimizer is made and before a checkpoint is loaded. It
may do so more than once, and ``fastbp.fuse`` may be called more than once. The checkpoint of the fused run is loaded
into a stock module.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from common import Record, compare, packages, parse, require, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastbp

with packages("lightning", "scikit-learn"):
    import lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from sklearn.datasets import load_digits


class AutoEncoder(lightning.LightningModule):
    """Scans of 64 pixels through 3 numbers."""

    def __init__(self, fuse: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 256), nn.GELU(), nn.Linear(256, 64))

    def configure_model(self) -> None:
        if self.hparams["fuse"]:
            fastbp.fuse(self)

    def forward(self, scans: Tensor) -> Tensor:
        return self.decoder(self.encoder(scans))

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Recorder(Callback):
    """Passes the loss of every step on."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.record(outputs["loss"].item())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; see ``common.compare`` for what comes back."""
    options = parse(argv, __doc__, steps=200, quick=40)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scans = torch.from_numpy(load_digits().data).float() / 16
    batch = [scans[:64].to(options.device)]

    with tempfile.TemporaryDirectory() as folder:
        saved: list[str] = []  # the checkpoint of each run, in order

        def train(model: nn.Module, record: Record) -> None:
            checkpoint = ModelCheckpoint(f"{folder}/{len(saved)}", every_n_train_steps=options.steps)
            trainer = lightning.Trainer(
                accelerator="gpu" if options.device == "cuda" else "cpu",
                devices=1,
                max_steps=options.steps,
                logger=False,
                enable_checkpointing=True,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[Recorder(record), checkpoint],
            )
            assert isinstance(model, AutoEncoder)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*does not have many workers")
                trainer.fit(model, DataLoader(TensorDataset(scans), batch_size=64, shuffle=True))
            model.to(options.device)
            saved.append(checkpoint.best_model_path)

        def fused() -> tuple[nn.Module, fastbp.FusionReport]:
            model = AutoEncoder(fuse=True).to(options.device)
            return model, fastbp.fuse(model, sample_inputs=batch[0])  # Lightning would do it; the report is wanted here

        result = compare(
            options,
            stock=lambda: AutoEncoder().to(options.device),
            variants={"fused": fused},
            train=train,
            forward=lambda model: model.training_step(batch),
        )
        reloaded = AutoEncoder.load_from_checkpoint(saved[-1], fuse=False).to(options.device)
        by_itself = AutoEncoder.load_from_checkpoint(saved[-1]).to(options.device)
    with torch.no_grad():
        expected = result["runs"]["fused"].model(batch[0])
        same = torch.allclose(reloaded(batch[0]), expected, rtol=1e-4, atol=1e-5)
        fused_too = torch.equal(by_itself(batch[0]), expected)
    require(
        result, same and not fastbp.unfuse(reloaded), "the fused run's checkpoint in a stock module: the same scans"
    )
    both = {"encoder", "decoder"} <= set(fastbp.unfuse(by_itself))
    require(result, fused_too and both, "loaded as it was saved, the module fuses itself")
    return result


if __name__ == "__main__":
    run(main)
