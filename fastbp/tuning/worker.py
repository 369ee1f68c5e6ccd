"""The process that measures on a GPU: ``python -m fastbp.tuning.worker cuda:0``, which ``isolation`` starts.

It reads what is asked for from its input and answers in lines of JSON: which candidate it begins with, who is refused
and why, and at last the times. A candidate that crashes takes this process along, and its line says who it was. Where a
candidate left the GPU unusable, as an illegal access does, the process ends by itself.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastbp.acceptance import first_line
from fastbp.tuning.isolation import UNUSABLE
from fastbp.tuning.jobs import from_plain
from fastbp.tuning.race import Step, clock_of, run_off, run_race

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers and drivers print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    device = torch.device(sys.argv[1])
    try:
        torch.ones(1, device=device).add_(1).item()
    except Exception as error:  # no such GPU, or one that another process has to itself
        say({"unusable": first_line(error)})
        return
    say({"ready": os.getpid()})
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    while True:
        answer(json.loads(asked.get()), device, say)


def _listen(asked: queue.SimpleQueue[str]) -> None:
    """Read what is asked for; nobody is left to answer to when that ends, whatever a candidate is at."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def answer(request: dict[str, Any], device: torch.device, say: Say) -> None:
    """Measure one call, or one product of it."""

    def told(name: str, refused: str | None) -> None:
        if refused is None:
            say({"begins": name})
            return
        say({"refused": name, "reason": refused})
        if not usable(device):
            os._exit(UNUSABLE)

    try:
        for name, value in request["settings"].items():
            setattr(torch.backends.cuda.matmul, name, value)
        job, seconds, without = from_plain(request["job"]), request["seconds"], request["without"]
        if request["product"] is None:
            outcome = run_race(job, seconds, without, told)
            say({"done": outcome.milliseconds, "refused": outcome.refused, "unmeasured": outcome.unmeasured})
            return
        from fastbp.backends.triton import autotune  # imports Triton

        def clock(steps: Mapping[str, Step]) -> dict[str, float]:
            return run_off(steps, seconds, clock_of(device), told)

        (kind, sizes), activation = request["product"], job.config.row.name
        found = autotune.tune(
            kind, activation, job.dtype, tuple(sizes), device, clock, remember=False, without=without, told=told
        )
        say({"done": found.milliseconds, "refused": found.refused})
    except Exception as error:  # while it was timed: whoever began last
        say({"failed": first_line(error)})
        if not usable(device):
            os._exit(UNUSABLE)


def usable(device: torch.device) -> bool:
    """Whether the GPU still does what it is told: errors of kernels are told late, and some of them for ever."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
