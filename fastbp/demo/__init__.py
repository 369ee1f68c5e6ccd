"""The main job: train on real data twice, stock PyTorch and fused, and see that the losses agree and what it saves.

``python -m fastbp demo`` runs it. Exit code 0: the two runs agree. 1: they part, or nothing could be fused. 2: it could
not start, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch

from fastbp.demo import report, tasks, training


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parse(argv)
    problem = _missing() or _unwritable(options.output_dir)
    if problem:
        print(f"fastbp demo: {problem}", file=sys.stderr)
        return 2
    from fastbp.demo import picture  # needs matplotlib

    began = time.perf_counter()
    device = torch.device(options.device)
    machine = report.machine(device)
    print(machine)
    outcomes = []
    for make in (tasks.digits, tasks.text):
        torch.manual_seed(options.seed)
        task = make(device, options.seed, options.quick)
        print(f"\n{task.name}: {task.about}\n")
        outcome = training.compare(task, report.Progress(task.name, task.steps))
        print(f"{outcome.fusion}\n\n{report.table(outcome)}")
        outcomes.append(outcome)
    files = [options.output_dir / f"fastbp-demo.{kind}" for kind in ("png", "json")]
    picture.draw(outcomes, machine, files[0])
    report.write_json(outcomes, machine, options.seed, files[1])

    failures = [f"{outcome.task.name}: {failure}" for outcome in outcomes for failure in outcome.failures()]
    print("\n" + "\n".join(f"FAILED: {failure}" for failure in failures) if failures else f"\n{report.AGREE}")
    print(f"{time.perf_counter() - began:.0f} s; picture: {files[0]}, numbers: {files[1]}")
    return 1 if failures else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastbp demo",
        description="Train a classifier of handwritten digits and a small language model, each with stock PyTorch and "
        "with fastbp; compare losses, step time and the bytes kept for backward. Downloads nothing.",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each, in seconds instead of a minute")
    parser.add_argument("--seed", type=_seed, default=0, help="for weights, split and batches (default: 0)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo-output"), help="for picture and numbers (default: demo-output)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; python -m fastbp doctor says more")
    return options


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _missing() -> str | None:
    """Which of the demo's own packages are absent, and how to get them."""
    absent = []
    for package, module in (("scikit-learn", "sklearn.datasets"), ("matplotlib", "matplotlib.figure")):
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(package)
    return f'{" and ".join(absent)} not installed; pip install "fastbp[demo]"' if absent else None


def _unwritable(folder: Path) -> str | None:
    """Make the folder; why nothing can be written there, asked before the training and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make the folder {folder}: {error.strerror}"
    return None if os.access(folder, os.W_OK) else f"cannot write into the folder {folder}"
