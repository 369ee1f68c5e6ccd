"""Host time of one small call, forward and backward, over eager PyTorch's: ``python -m benchmarks.overhead``.

The problem is 4 rows of 8 features, so that the time is Python's and the dispatcher's and not the arithmetic's. Eager
and fastbp alternate within each repeat; reported are the medians over the repeats in µs, and the median of the ratios
repeat by repeat with its 20th and 80th percentile. Each result is compared with eager's before it is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import fastbp

ROWS, FEATURES = 4, 8
RESULTS = Path(__file__).parent / "results"


def cases() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each case: the eager module and the fastbp module with the same parameters."""
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for activation, module in (("gelu", nn.GELU()), ("silu", nn.SiLU()), ("relu", nn.ReLU())):
        eager = nn.Sequential(nn.Linear(FEATURES, FEATURES), module)
        layer = fastbp.LinearAct(FEATURES, FEATURES, activation=activation)
        layer.load_state_dict(eager[0].state_dict())
        pairs[f"LinearAct {activation}"] = (eager, layer)
        eager = nn.Sequential(nn.Linear(FEATURES, FEATURES), module, nn.Linear(FEATURES, FEATURES))
        block = fastbp.MLP(FEATURES, FEATURES, activation=activation)
        block.fc1.load_state_dict(eager[0].state_dict())
        block.fc2.load_state_dict(eager[2].state_dict())
        pairs[f"MLP {activation}"] = (eager, block)
    return pairs


def check(eager: nn.Module, ours: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Same output and gradients, or an error: a wrong result is not worth timing."""
    results = []
    for module in (eager, ours):
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def microseconds(step: Callable[[], None], calls: int) -> float:
    """The time of one call of ``step``, from a loop of them."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls * 1e6


def measure(repeats: int, calls: int) -> list[dict[str, object]]:
    """One row for each case."""
    rows: list[dict[str, object]] = []
    for name, (eager, ours) in cases().items():
        x = torch.randn(ROWS, FEATURES, requires_grad=True)
        dy = torch.randn(ROWS, FEATURES)
        check(eager, ours, x, dy)
        steps = [lambda m=m, x=x, dy=dy: m(x).backward(dy) for m in (eager, ours)]
        for step in steps:
            microseconds(step, calls)  # warm-up
        times = [[microseconds(step, calls) for step in steps] for _ in range(repeats)]
        ratios = sorted(b / a for a, b in times)
        rows.append(
            {
                "case": name,
                "eager_us": round(statistics.median(a for a, _ in times), 1),
                "fastbp_us": round(statistics.median(b for _, b in times), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_p20": round(ratios[repeats // 5], 3),
                "ratio_p80": round(ratios[-1 - repeats // 5], 3),
            }
        )
    return rows


def environment() -> dict[str, object]:
    """What the figures belong to."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": date.today().isoformat(),
        "commit": git.stdout.strip(),
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastbp": fastbp.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=181)
    parser.add_argument("--calls", type=int, default=200, help="calls in each repeat")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "overhead.json")
    arguments = parser.parse_args()
    result = {"environment": environment(), "rows": measure(arguments.repeats, arguments.calls)}
    print(f"{'forward + backward, 4x8':24}{'eager µs':>10}{'fastbp µs':>11}{'ratio':>8}{'p20 to p80':>16}")
    for row in result["rows"]:
        spread = f"{row['ratio_p20']} to {row['ratio_p80']}"
        print(f"{row['case']:24}{row['eager_us']:>10}{row['fastbp_us']:>11}{row['ratio']:>8}{spread:>16}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
