"""``python -m fastbp tune``: measure, for a model's calls or for some that are named, and remember."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from fastbp import backends, cache
from fastbp.backends.measured import file_name, inventory
from fastbp.fusion import fuse
from fastbp.tuning import SECONDS, TunedCall, tune, tune_jobs
from fastbp.tuning.isolation import Unmeasurable
from fastbp.tuning.jobs import parse as parse_job

WHERE = "python -m fastbp tune"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; python -m fastbp doctor says more")
    if options.list and (options.model or options.call):
        parser.error("--list shows what is remembered, and takes no model and no --call")
    if not (options.list or options.model or options.call):
        parser.error("nothing to measure: name a model, or calls with --call; --list shows what is remembered")
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if options.list:
        return _list(device)
    try:
        reports = []
        if options.model:
            model, inputs = _load(options.model)
            print(fuse(model))
            reports.append(tune(model, inputs, seconds=options.seconds, again=options.again))
        if options.call:
            jobs = [(parse_job(WHERE, text, device), 1) for text in options.call]
            reports.append(tune_jobs(jobs, options.seconds, options.again, quiet=False))
    except (ValueError, TypeError, Unmeasurable) as error:
        print(error, file=sys.stderr)
        return 2
    for report in reports:
        print(report.summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=WHERE,
        description="Measure which backend is the fastest for calls of exactly these sizes on this machine, forward "
        "and backward together, and remember it: from then on calls that do not name a backend take it.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODULE:FUNCTION",
        help="a function without arguments that returns a model, on its device, and sample inputs for it (a tensor, a "
        "tuple or a dict); its blocks are fused first, as fastbp.fuse does",
    )  # fmt: skip
    parser.add_argument(
        "--call", action="append", metavar="CALL",
        help="a call in one argument: form, rows and features, activation, dtype, save policy, as in "
        "'mlp 2048x768x3072x768 gelu float32 auto'; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=_positive, default=SECONDS, help="for each candidate near the fastest (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what is remembered")
    parser.add_argument(
        "--list", action="store_true", help="show what is remembered for this device and these versions"
    )
    return parser


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return number


def _load(text: str) -> tuple[nn.Module, Any]:
    """The model and the sample inputs that ``module:function`` returns; ValueError where that does not work."""
    name, colon, function = text.partition(":")
    if not (name and colon and function):
        raise ValueError(f"{WHERE}: the model must be named as MODULE:FUNCTION, got {text!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, and the console does not
    try:
        make = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{WHERE}: {text!r} cannot be imported: {error}") from error
    made = make()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(f"{WHERE}: {text!r} must return a model and its sample inputs, got {type(made).__name__}")
    return made


def _list(device: torch.device) -> int:
    environment = backends.environment(device)
    entries = inventory(environment)
    for key in sorted(entries):
        call = TunedCall.of(key, 1, entries[key])
        print(call or f"{key}: cannot be read, and is not used")
    try:
        print(f"{len(entries)} calls, in {cache.folder() / file_name(environment)}")
    except OSError as error:
        print(f"nothing is remembered: {error}")
    return 0
