"""What the examples share: one training of the same model stock and fused, from the same seed, held side by side.

A further run, *stock again*, starts from weights that are moved within their rounding. It is the stock run but for
rounding, and so shows what rounding does to this training on this machine. A fused run is as good as stock where its
loss is, at every step, no further from stock's than ``MARGIN`` times what rounding has done up to there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbp
from fastbp.demo.training import MARGIN, Difference

# A small Llama of bytes, as transformers' LlamaConfig takes it.
LLAMA = dict(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

Record = Callable[[float], None]  # a training calls it after each step with the loss
Variant = Callable[[], tuple[nn.Module, fastbp.FusionReport | None]]  # None: a variant that fuses nothing


@dataclass
class Run:
    """One training: the loss and the time of every step, the bytes kept for backward, and the model it made."""

    model: nn.Module
    report: fastbp.FusionReport | None = None
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    kept: int = 0

    def record(self, loss: float) -> None:
        """A step is done."""
        self.losses.append(loss)
        self.times.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """The shortest, from the end of a step to the end of the next: the runs come one after the other, and what
        else the machine does meanwhile only adds."""
        return min(b - a for a, b in itertools.pairwise(self.times))


def parse(
    argv: list[str] | None,
    about: str | None,
    *,
    steps: int,
    quick: int,
    extras: dict[str, dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """The options that every example has, and its own ``extras``: keyword arguments of ``add_argument`` by name."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=_at_least_two, help=f"of training (default: {steps}; with --quick {quick})")
    parser.add_argument("--quick", action="store_true", help="fewer steps: does it run at all?")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    for name, settings in (extras or {}).items():
        parser.add_argument(name, **settings)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; python -m fastbp doctor says more")
    options.steps = options.steps or (quick if options.quick else steps)
    return options


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number from 2 on, got {text!r}")
    return int(text)


@contextmanager
def packages(*names: str) -> Iterator[None]:
    """Around the imports of optional packages: says what to install and ends the program where one cannot be had."""
    try:
        yield
    except Exception as error:  # a package that does not fit to another raises what it likes
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = f"{type(cause).__name__}: {cause}"
        print(f"{Path(sys.argv[0]).name}: needs {' and '.join(names)}: pip install {' '.join(names)}", file=sys.stderr)
        print(f"(the import failed with {why})", file=sys.stderr)
        raise SystemExit(2) from error


def compare(
    options: argparse.Namespace,
    *,
    stock: Callable[[], nn.Module],
    variants: Mapping[str, Variant],
    train: Callable[[nn.Module, Record], None],
    forward: Callable[[nn.Module], Tensor],
    precision: torch.dtype = torch.float32,
    cached: list[int] | None = None,
) -> dict[str, Any]:
    """Train ``stock()`` and every variant from the same seed, print the comparison, and return it.

    ``train(model, record)`` calls ``record(loss)`` after each step. ``forward(model)`` computes a loss, for the count
    of the bytes that autograd keeps of it. ``precision`` is what the products are computed in, and so what rounding is.
    ``cached`` is where a model notes the bytes it keeps for backward itself, besides those that autograd keeps.
    The result has ``runs`` and ``differences`` by name, and ``failures``, a line for each reason to distrust fastbp.
    """
    runs: dict[str, Run] = {}
    for name in ("stock", "stock again", *variants):
        torch.manual_seed(options.seed)
        run = Run(*variants[name]()) if name in variants else Run(stock())
        if run.report is not None:
            print(f"\n{name}:\n{run.report}")
        if cached is not None:
            cached.clear()
        with fastbp.SavedBytes(exclude=[run.model]) as kept, torch.random.fork_rng():
            forward(run.model)
        run.kept = kept.total + sum(cached or ())
        if name == "stock again":
            _nudge(run.model, torch.finfo(precision).eps)
        torch.manual_seed(options.seed)
        train(run.model, run.record)
        runs[name] = run
    result: dict[str, Any] = {"runs": runs, "failures": []}
    unit = torch.finfo(min(precision, torch.float32, key=lambda d: torch.finfo(d).eps)).eps  # of the loss itself
    losses = {name: run.losses for name, run in runs.items()}
    result["differences"] = {
        name: Difference.between(losses["stock"], losses["stock again"], losses[name], unit) for name in variants
    }
    _print_table(runs, result["differences"])
    for name in variants:
        _judge(name, runs[name].report, result["differences"][name], result)
    return result


def _nudge(model: nn.Module, unit: float) -> None:
    """Move every weight by a part of a rounding unit of its own size, at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter * (2 * torch.rand_like(parameter) - 1) * unit


def _judge(name: str, report: fastbp.FusionReport | None, difference: Difference, result: dict[str, Any]) -> None:
    if report is not None:
        require(result, bool(report.fused), f"{name}: something is fused")
    step = difference.parts_at()
    where = "" if step is None else f", but it parts at step {step}"
    require(result, step is None, f"{name}: the losses are stock's within {MARGIN:g} times what rounding does{where}")


def require(result: dict[str, Any], holds: bool, what: str) -> None:
    """Print what should hold and whether it does; where not, the example fails."""
    print(f"{'ok    ' if holds else 'FAILED'}  {what}")
    if not holds:
        result["failures"].append(what)


def _print_table(runs: dict[str, Run], differences: dict[str, Difference]) -> None:
    def cells(form: Callable[[Run], str]) -> list[str]:
        return [form(run) for run in runs.values()]

    stock = runs["stock"].losses
    rows = [
        ["", *runs],
        ["loss, first step", *cells(lambda run: f"{run.losses[0]:.6g}")],
        [f"loss, step {len(stock)}", *cells(lambda run: f"{run.losses[-1]:.6g}")],
        ["largest relative difference from stock", *cells(lambda run: f"{_relative(run.losses, stock):.1e}")],
        [
            "of what rounding explains",
            *(f"{100 * differences[n].share:.0f} %" if n in differences else "" for n in runs),
        ],
        ["kept for backward, KiB", *cells(lambda run: f"{run.kept / 1024:.1f}")],
        ["of stock's", *cells(lambda run: f"{run.kept / runs['stock'].kept:.2f}")],
        ["fastest step, ms (a note, no benchmark)", *cells(lambda run: f"{1e3 * run.step_seconds:.2f}")],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    print("\n" + "\n".join(line.rstrip() for line in lines) + "\n")


def _relative(losses: list[float], stock: list[float]) -> float:
    return max(abs(a - s) / max(abs(s), 1e-300) for a, s in zip(losses, stock, strict=True))


def english(device: torch.device | str = "cpu") -> Tensor:
    """The reference texts in English that come with Python, as bytes."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics.values()).encode()), device=device)


def run(main: Callable[[], dict[str, Any]]) -> None:
    """The program: exit code 1 where something failed."""
    sys.exit(1 if main()["failures"] else 0)
