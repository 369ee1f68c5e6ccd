"""Does training notice the save policies? ``python -m benchmarks.training``.

The demo's two tasks and a deep MLP are trained from several seeds: by stock PyTorch, with z kept exactly, and with each
compressed policy on every block; in bfloat16 by autocast, at a rate that falls to zero. A seed draws the weights and
the batches, which all runs share. What counts is the loss on held-out data at the end: the policies' against the spread
of stock PyTorch's over the seeds. Results go to benchmarks/results/<device>/training.jsonl; ``tools/render.py`` makes
docs/training.md and its picture from it.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from benchmarks.environment import CPU, results_of, write
from fastbp.demo.tasks import Task, digits, text
from fastbp.saving import POLICIES

RUNS = ("stock", "preact", *(save for save, policy in POLICIES.items() if policy.compressed))
DEEP, WIDTH = 8, 256  # hidden layers of the deep MLP, and their width
STEPS = {"text": 100}  # of the demo's 300, which take minutes where a CPU has no products of bfloat16


def deep(device: torch.device, seed: int, quick: bool) -> Task:
    """The digits again, by an MLP with eight hidden layers."""
    task = digits(device, seed, quick)
    hidden = [part for _ in range(DEEP - 1) for part in (nn.GELU(), nn.Linear(WIDTH, WIDTH))]
    model = nn.Sequential(nn.Linear(64, WIDTH), *hidden, nn.GELU(), nn.Linear(WIDTH, 10))
    about = task.about.replace("MLP 64-512-512-10", f"MLP 64-{DEEP} × {WIDTH}-10")
    return replace(task, name="deep", about=about, model=model.to(device), hidden=DEEP * WIDTH)


TASKS: dict[str, Callable[[torch.device, int, bool], Task]] = {"digits": digits, "deep": deep, "text": text}


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def train(task: Task, save: str) -> dict[str, float]:
    """Losses of one run at its end, and what it keeps."""
    model = copy.deepcopy(task.model)
    if save != "stock":
        report = fastbp.fuse(model, save=save)
        assert report.fused and not report.left, report
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    batches, losses = task.batches[: STEPS.get(task.name)], []
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for inputs, targets in batches:
        loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = loss_of(model, *task.held_out).item()
    with fastbp.SavedBytes(exclude=[model]) as kept:
        loss_of(model, *task.batches[0])
    return {"train": sum(losses[-10:]) / 10, "held_out": held_out, "kept": kept.total}


def runs_of(name: str, seed: int, quick: bool) -> list[dict[str, object]]:
    """The rows of a task and a seed, a run for each policy."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[name](CPU, seed, quick)
    key = {"task": name, "about": task.about, "unit": task.unit, "seed": seed}
    return [{**key, "save": save, **train(task, save)} for save in RUNS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="few steps; nothing written without --output")
    parser.add_argument("--output", type=Path, help="a folder for the result file")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        keys = [(name, seed) for name in arguments.tasks for seed in range(arguments.seeds)]
        jobs = [pool.submit(runs_of, *key, arguments.quick) for key in keys]
        for job in jobs:
            for row in job.result():
                rows.append(row)
                print(
                    f"{row['task']:8}seed {row['seed']}  {row['save']:12}held out {row['held_out']:.4f} {row['unit']}"
                )
            sys.stdout.flush()
    output = arguments.output or (None if arguments.quick else results_of(CPU))
    if output is not None:
        write(output / "training.jsonl", rows, ["benchmarks.training", *(argv if argv is not None else sys.argv[1:])])
    return 0


if __name__ == "__main__":
    sys.exit(main())
