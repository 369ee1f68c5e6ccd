"""Errors of the save policies: ``python -m benchmarks.accuracy``.

Two tables, which ``tools/render.py`` puts into docs/numerics.md. For every policy, activation and dtype the slope that
backward computes from what was kept, against the slope at the unrounded z in float64; and the gradients of an MLP of
two hidden layers by every policy, beside eager PyTorch's own, against float64. z is normal: as wide as at the start of
training, wide, and far to the left of zero. The slopes are of the arithmetic in plain torch, the MLP's of the backend
that serves. Results go to benchmarks/results/<device>/accuracy.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import fastbp
from benchmarks.cases import name_of
from benchmarks.environment import CPU, results_of, write
from benchmarks.suites import ACCURACY
from fastbp.activations import ROWS, TABLE, Activation, bind
from fastbp.compression import DTYPES, decode_fp8
from fastbp.forms import LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.reference import compose
from fastbp.residuals import output_and_kept, read_kept, sides
from fastbp.saving import POLICIES, legal_policies

DISTRIBUTIONS = {"N(0, 1)": (0.0, 1.0), "N(0, 3²)": (0.0, 3.0), "N(−2, 1)": (-2.0, 1.0)}
COUNT = 1 << 17
SIZES = (ACCURACY[0].rows, *ACCURACY[0].features)  # of the MLP
KEPT = [save for save in POLICIES if save != "recompute"]  # which has nothing to lose


def slope(row: Activation, save: str, z: Tensor) -> Tensor:
    """The slope as backward computes it from what a policy keeps of z, in float64."""
    config = configure("linear_act", row.name, bind(row.name).params, save, "reference")
    y, kept = output_and_kept(config, z)
    one = torch.ones((), dtype=torch.float64, device=z.device)
    if save == "fp8":
        values, scales = kept
        return row.grad(one, decode_fp8(values, scales, torch.float64), *config.params)
    if save == "preact":
        return row.grad(one, z.double(), *config.params)
    read = read_kept(config, y, kept, z.dtype)[1][0]
    if save == "output":
        assert row.grad_from_output is not None
        return row.grad_from_output(one, read.double(), *config.params)
    assert row.grad_from_side is not None
    return row.grad_from_side(one, *(t.double() for t in sides(config, *read)))


def slopes(row: Activation, count: int, device: torch.device = CPU) -> list[dict[str, object]]:
    """Relative L2 and largest error of a row's slopes."""
    rows: list[dict[str, object]] = []
    for distribution, (mean, spread) in DISTRIBUTIONS.items():
        generator = torch.Generator().manual_seed(0)
        z = (torch.randn(count // 64, 64, generator=generator, dtype=torch.float64) * spread + mean).to(device)
        truth = row.grad(torch.ones((), dtype=torch.float64, device=device), z, *bind(row.name).params)
        for dtype in DTYPES:
            for save in legal_policies(bind(row.name), LINEAR_ACT):
                if save not in KEPT:
                    continue
                gap = slope(row, save, z.to(dtype)) - truth
                key = {"activation": row.name, "save": save, "dtype": name_of(dtype), "distribution": distribution}
                found = {"relative": (gap.norm() / truth.norm()).item(), "largest": gap.abs().max().item()}
                rows.append({"table": "slopes", **key, **found})
    return rows


def gradients(activation: str, dtype: torch.dtype, device: torch.device = CPU) -> list[dict[str, object]]:
    """Errors of the gradients of an MLP, over eager's own."""
    rows_of_x, *features = SIZES
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(device, dtype).requires_grad_()

    x = draw(rows_of_x, features[0])
    # Twice the usual weights: z is then as wide as N(0, 1) in the layers above too.
    weights = [draw(n, k, scale=(2 / k) ** 0.5) for k, n in pairwise(features)]
    biases = [draw(n, scale=0.1) for n in features[1:]]
    dy = torch.randn(rows_of_x, features[-1], generator=generator, dtype=torch.float64).to(device, dtype)
    inputs = [x, *weights, *biases]

    def grads(y: Tensor, leaves: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
        dx, *rest = torch.autograd.grad(y, leaves, dy)
        half = len(rest) // 2
        join = [torch.cat([t.double().flatten() for t in part]) for part in (rest[:half], rest[half:])]
        return {"dx": dx.double().flatten(), "dW": join[0], "db": join[1]}

    bound = bind(activation)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    half = 1 + len(weights)
    truth = grads(compose(MLP, bound, wide[:1], wide[1:half], wide[half:]), wide, dy.double())
    rows: list[dict[str, object]] = []
    for save in ("eager", *(s for s in legal_policies(bound, MLP) if s != "recompute")):
        if save == "eager":
            y = compose(MLP, bound, [x], weights, biases)
        else:
            y = fastbp.mlp(x, weights, biases, activation=activation, save=save)
        found = {k: ((g - truth[k]).norm() / truth[k].norm()).item() for k, g in grads(y, inputs, dy).items()}
        rows.append({"table": "gradients", "activation": activation, "dtype": name_of(dtype), "save": save, **found})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer numbers; nothing written without --output")
    parser.add_argument("--output", type=Path, help="a folder for the result file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    by_output = [row.name for row in TABLE if "output" in legal_policies(bind(row.name)) and row.name != "identity"]
    names = dict.fromkeys([case.activation for case in ACCURACY] + by_output)
    count = 1 << 12 if arguments.quick else COUNT
    rows = [row for name in names for row in slopes(ROWS[name], count, device)]
    blocks = ACCURACY[:1] if arguments.quick else ACCURACY
    rows += [row for case in blocks for row in gradients(case.activation, case.dtype, device)]
    output = arguments.output or (None if arguments.quick else results_of(device))
    if output is not None:
        command = ["benchmarks.accuracy", *(argv if argv is not None else sys.argv[1:])]
        write(output / "accuracy.jsonl", rows, command, device)
    else:
        print(f"{len(rows)} errors of slopes and gradients, written nowhere without --output")
    return 0


if __name__ == "__main__":
    sys.exit(main())
