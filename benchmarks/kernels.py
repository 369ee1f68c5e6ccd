"""Each kernel of the Triton backend by itself: ``python -m benchmarks.kernels``.

Every product with an epilogue of ours is tuned (``fastbp.backends.triton.autotune``): each candidate is checked against
float64 and timed, all in turn, each call on a cold L2 cache. Beside them stand ``library again`` (the noise), ``eager``
(PyTorch's operations for the same; in backward it reads the h that ours rebuild) and ``gemm`` (the product alone). The
elementwise kernels are compared with a copy of as many bytes. ``--remember`` makes the fastest candidates what calls of
these sizes take from now on.

Results go to benchmarks/results/<device>/kernels.jsonl. On a CPU, with TRITON_INTERPRET=1, small matrices go the same
way: a rehearsal, whose times mean nothing and which writes only to --output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda_clock
from benchmarks.environment import NOT_MEASURED, results_of, write
from benchmarks.measure import burst, bursts, quantiles
from benchmarks.suites import ACTIVATIONS, BFLOAT, GATED_WIDTHS, HALF, WIDTHS
from fastbp.activations import bind
from fastbp.backends import triton
from fastbp.problem import Config, configure

Steps = Mapping[str, Callable[[], object]]
Row = dict[str, object]
PLAIN, GATED = ("forward", "dgrad"), ("gated_forward", "gated_dgrad")
ELEMENTWISE = {"value": 2, "chain_rule": 4, "gated_value": 3, "gated_chain_rule": 6}  # matrices read and written


class Product(NamedTuple):
    """One product of ours; sizes are m, n, k."""

    kind: str
    activation: str
    dtype: torch.dtype
    sizes: tuple[int, int, int]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.activation} {dtype} {'×'.join(map(str, self.sizes))}"


def products(device: torch.device, quick: bool) -> Iterator[Product]:
    """What is tuned, the most telling first."""
    if device.type != "cuda" or quick:
        sizes = (8192, 3072, 768) if device.type == "cuda" else (40, 48, 32)
        yield from (Product(kind, "gelu", BFLOAT, sizes) for kind in (*PLAIN, *GATED))
        return
    for rows in (8192, 16384):
        for kind in PLAIN:
            for activation in ACTIVATIONS:
                yield from (Product(kind, activation, BFLOAT, (rows, 4 * width, width)) for width in WIDTHS)
        for kind in GATED:
            yield from (Product(kind, "silu", BFLOAT, (rows, hidden, width)) for width, hidden in GATED_WIDTHS)
    for kind in PLAIN:
        yield from (Product(kind, activation, HALF, (8192, 4096, 1024)) for activation in ACTIVATIONS)


class Passes(NamedTuple):
    """An elementwise kernel on an m by n matrix."""

    kernel: str
    activation: str
    sizes: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.kernel} {self.activation} bfloat16 {'×'.join(map(str, self.sizes))}"


def passes(device: torch.device, quick: bool) -> Iterator[Passes]:
    """The elementwise kernels that are timed."""
    if device.type != "cuda" or quick:
        sizes = (8192, 3072) if device.type == "cuda" else (40, 48)
        yield from (Passes(kernel, "gelu", sizes) for kernel in ELEMENTWISE)
        return
    for kernel in ELEMENTWISE:
        hidden = [hidden for _, hidden in GATED_WIDTHS] if kernel.startswith("gated") else [4 * w for w in WIDTHS]
        for activation in ("silu",) if kernel.startswith("gated") else ACTIVATIONS:
            yield from (Passes(kernel, activation, (8192, n)) for n in hidden)


def timed(steps: Steps, device: torch.device, seconds: float) -> dict[str, tuple[float, float, float]]:
    """The 20th percentile, the median and the 80th of the milliseconds of each, taken in turn."""
    if device.type == "cuda":
        times = bursts(dict(steps), seconds, cuda_clock.cold_burst)
    else:  # of interpreted kernels, one call each
        times = {name: [burst(step, 1) * 1e3] for name, step in steps.items()}
    return {name: quantiles(found) for name, found in times.items()}


def beside(product: Product, config: Config, device: torch.device) -> Steps:
    """``eager`` and ``gemm`` for a product, on random matrices."""
    m, n, k = product.sizes
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(product.dtype)

    gated, value, grad = product.kind.startswith("gated"), config.value, config.grad
    a, biases = draw(m, k), (draw(n), draw(n))
    if not product.kind.endswith("dgrad"):
        weights = [draw(n, k) / k**0.5 for _ in range(2 if gated else 1)]

        def forward() -> Tensor:
            h = value(F.linear(a, weights[0], biases[0]))
            return h * F.linear(a, weights[1], biases[1]) if gated else h

        return {"eager": forward, "gemm": lambda: [a.mm(weight.mT) for weight in weights]}
    weight, z, up = draw(k, n) / k**0.5, draw(m, n), draw(m, n) if gated else None
    kept = value(z) if gated else None

    def backward() -> object:
        dh = a.mm(weight)
        if up is None or kept is None:
            dz = grad(dh, z)
            return dz, dz.sum(0)
        dup, dgate = dh * kept, grad(dh * up, z)
        return dgate, dup, dgate.sum(0), dup.sum(0)

    return {"eager": backward, "gemm": lambda: a.mm(weight)}


def measure_product(product: Product, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Tune a product, with what stands beside it timed in the same turns."""
    from fastbp.backends.triton import autotune, tuning

    form, activation = autotune.FORMS[product.kind], product.activation
    others = beside(product, configure(form, activation, bind(activation).params, "preact", "triton"), device)
    found: dict[str, tuple[float, float, float]] = {}

    def clock(candidates: Steps) -> dict[str, float]:
        again = {"library again": candidates[tuning.LIBRARY]} if tuning.LIBRARY in candidates else {}
        found.update(timed({**candidates, **again, **others}, device, arguments.seconds))
        return {name: found[name][1] for name in candidates}

    outcome = autotune.tune(*product, device, clock, arguments.remember, arguments.pingpong)
    m, n, k = product.sizes
    flop = 2 * m * n * k * (2 if product.kind == "gated_forward" else 1)
    times = {
        name: {"ms": middle, "ms_p20": low, "ms_p80": high, "tflops": flop / middle / 1e9}
        for name, (low, middle, high) in found.items()
    }
    row: Row = {
        "case": str(product),
        "times": {name: {key: float(f"{v:.4g}") for key, v in figures.items()} for name, figures in times.items()},
        "errors": {name: float(f"{error:.3g}") for name, error in outcome.errors.items()},
        "refused": outcome.refused,
    }
    tiles = [name for name in outcome.milliseconds if name != tuning.LIBRARY]
    if tiles:
        best = min(tiles, key=lambda name: found[name][1])
        row["best_tile"] = best
        for name in ("library", "library again", "eager", "gemm"):
            if name in found:
                row[f"over_{name.replace(' ', '_')}"] = round(found[name][1] / found[best][1], 3)
    return row


def measure_passes(case: Passes, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Time an elementwise kernel beside a copy that reads and writes as many bytes."""
    from fastbp.backends.triton import layers

    m, n = case.sizes
    generator = torch.Generator(device).manual_seed(2)
    dh, *z = (torch.randn(m, n, generator=generator, device=device).to(BFLOAT) for _ in range(3))
    kept = [layers.Kept(t) for t in z]
    form = "gated_linear_act" if case.kernel.startswith("gated") else "linear_act"
    config = configure(form, case.activation, bind(case.activation).params, "preact", "triton")
    both = (True, True)
    step: Callable[[], object] = {
        "value": lambda: layers.value(config, BFLOAT, kept[0]),
        "gated_value": lambda: layers.value(config, BFLOAT, *kept),
        "chain_rule": lambda: layers.chain_rule(config, dh, kept[0], True, True),
        "gated_chain_rule": lambda: layers.gated_chain_rule(config, dh, *kept, both, both, True),
    }[case.kernel]
    size = ELEMENTWISE[case.kernel] * dh.nbytes
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = timed({"kernel": step, "copy": lambda: target.copy_(source)}, device, arguments.seconds)
    kernel, copy = times["kernel"][1], times["copy"][1]
    return {
        "case": str(case),
        "ms": round(kernel, 4),
        "copy_ms": round(copy, 4),
        "of_copy": round(copy / kernel, 3),
        "gb_per_s": round(size / kernel / 1e6, 1),
    }


def print_row(row: Row) -> None:
    print(row["case"])
    if "of_copy" in row:
        print(f"  {row['ms']:.4f} ms, {row['gb_per_s']:.0f} GB/s, {row['of_copy']:.3f} of a copy", flush=True)
        return
    times: dict[str, dict[str, float]] = row["times"]  # type: ignore[assignment]
    refused: dict[str, str] = row["refused"]  # type: ignore[assignment]
    for name, t in times.items():
        mark = "  best tile" if name == row.get("best_tile") else ""
        print(f"  {name:36}{t['ms']:9.4f} ms ({t['ms_p20']:.4f} to {t['ms_p80']:.4f}) {t['tflops']:7.1f} TFLOP/s{mark}")
    for name, reason in refused.items():
        print(f"  {name:36} refused: {reason}")
    sys.stdout.flush()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one size of each kind, nothing written")
    parser.add_argument("--remember", action="store_true", help="calls of these sizes take the fastest from now on")
    parser.add_argument("--pingpong", action="store_true", help="also the kernel whose warps wait for each other")
    parser.add_argument("--seconds", type=float, default=0.05, help="of measuring, for each candidate")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new begins")
    parser.add_argument("--output", type=Path, help="a folder for the result file, also for --quick")
    arguments = parser.parse_args(argv)
    if triton.unavailable:
        parser.error(triton.unavailable)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; with TRITON_INTERPRET=1, --device cpu --quick is a rehearsal")
    if triton.interpreting() == (arguments.device == "cuda"):
        parser.error("TRITON_INTERPRET=1 goes with --device cpu, where kernels are interpreted, and with nothing else")
    if arguments.device == "cpu" and (arguments.remember or not arguments.quick):
        parser.error("--device cpu is a rehearsal on the interpreter: it needs --quick, and remembers nothing")
    return arguments


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = parse(argv)
    device = torch.device(arguments.device, 0 if arguments.device == "cuda" else None)
    if device.type == "cpu":
        print("a rehearsal on the interpreter: the times mean nothing")
    output = arguments.output or (None if arguments.quick else results_of(device))
    command = ["benchmarks.kernels", *(argv if argv is not None else sys.argv[1:])]
    rows: list[Row] = []
    failed = False
    for case in (*passes(device, arguments.quick), *products(device, arguments.quick)):
        if time.monotonic() - start > arguments.limit:
            print(f"{case}{NOT_MEASURED}", flush=True)
            continue
        try:
            run = measure_product if isinstance(case, Product) else measure_passes
            rows.append(run(case, arguments, device))  # type: ignore[arg-type]
        except Exception as error:  # the others are still worth measuring
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        print_row(rows[-1])
        if output is not None:  # now, should this process be ended before the last case
            write(output / "kernels.jsonl", rows, command, device, quiet=True)
    if output is not None and rows:
        print(f"written to {output / 'kernels.jsonl'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
