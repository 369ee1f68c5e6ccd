"""Measuring where a candidate can do no harm: on a GPU in a process of its own, which may crash or hang.

An illegal access of a kernel ends all work of its process on the GPU, and a kernel that waits for ever ends the process
itself. So on a GPU the candidates run in a child (``worker``), each with a deadline. One that crashes or does not
answer is refused for that reason, the child is ended, and another goes on with those that are left. This process
remembers what was measured; of the GPU it holds nothing of it.

On a CPU everything is measured here: C++ kernels that are tested on every CPU do neither, and another process would
have to be given the threads of this one and measure beside it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

import torch

from fastbp.tuning.jobs import Job, to_plain
from fastbp.tuning.race import Outcome, run_race

COMMAND = (sys.executable, "-m", "fastbp.tuning.worker")
DEADLINE = 120.0  # seconds for a candidate to be compiled and judged, or for a burst of it
STARTING = 300.0  # to start the process, or to make the reference of a call in float64
UNUSABLE = 70  # the exit code of a child whose GPU does nothing more
Product = tuple[str, tuple[int, int, int]]  # kind, and m, n, k


def isolated(device: torch.device) -> bool:
    """Whether the candidates on this device run in a process of their own."""
    return device.type == "cuda"


def settings() -> dict[str, Any]:
    """What decides how PyTorch computes products, and is to be the same in the child."""
    matmul = torch.backends.cuda.matmul
    return {
        "fp32_precision": matmul.fp32_precision,
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
    }


class Measuring:
    """Measures calls and their products, by one process for each GPU, which ends with the ``with`` block."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.children: dict[torch.device, Child] = {}

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self.children.values():
            child.end()

    def race(self, job: Job, seconds: float) -> Outcome:
        """``run_race``, for a GPU in the child."""
        if not isolated(job.device):
            return run_race(job, seconds)
        found = self._child(job.device).measure(job, seconds, None)
        return Outcome(found["done"], found["refused"], found.get("unmeasured", "unmeasured"))

    def product(self, job: Job, product: Product, seconds: float) -> dict[str, float]:
        """Milliseconds of the candidates for a product, in the child."""
        return dict(self._child(job.device).measure(job, seconds, product)["done"])

    def _child(self, device: torch.device) -> Child:
        if device not in self.children:
            self.children[device] = Child(self.where, device)
        return self.children[device]


class Child:
    """The process that measures on one GPU; started when it is first asked, and again whenever it ended."""

    def __init__(self, where: str, device: torch.device) -> None:
        self.where, self.device = where, device
        self.process: subprocess.Popen[str] | None = None

    def measure(self, job: Job, seconds: float, product: Product | None) -> dict[str, Any]:
        """What the child answers, with all that was refused: by the child, or for what it did to the child."""
        refused: dict[str, str] = {}
        request = {"job": to_plain(job), "seconds": seconds, "product": product, "settings": settings()}
        while True:
            before = len(refused)
            done = self._attempt(request, refused)
            if done is not None:
                return done | {"refused": done["refused"] | refused}
            if len(refused) == before:
                raise Unmeasurable(
                    f"{self.where}: the process that measures {job.key} ends again and again: {self.last}"
                )

    def _attempt(self, request: dict[str, Any], refused: dict[str, str]) -> dict[str, Any] | None:
        """Ask for those who are not refused yet; None where somebody was, and with him the process."""
        self._start()
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(request | {"without": list(refused)}) + "\n")
        self.process.stdin.flush()
        begun: str | None = None
        while True:
            try:
                answer = self._answer(STARTING if begun is None else DEADLINE)
            except Ended as reason:
                self.last = str(reason)
                if begun is not None:
                    refused[begun] = self.last
                return None
            if "begins" in answer:
                begun = answer["begins"]
            elif "reason" in answer:
                refused[answer["refused"]] = answer["reason"]
                begun = None
            elif "failed" in answer:
                self.last = answer["failed"]
                self.end()
                if begun is not None:
                    refused[begun] = self.last
                return None
            else:
                return answer

    def _start(self) -> None:
        """Start the process unless it runs; Unmeasurable where it does not start or cannot use the GPU."""
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what this process holds and does not use is room for the other
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 -- until ``end``
        self.answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [*COMMAND, str(self.device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            encoding="utf-8", start_new_session=True,  # compilers that it starts are ended with it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert self.process.stdout is not None
        threading.Thread(target=_read, args=(self.process.stdout, self.answers), daemon=True).start()
        try:
            reason = self._answer(STARTING).get("unusable")
        except Ended as ended:
            reason = str(ended)
        if reason is not None:
            self.end()
            raise Unmeasurable(
                f"{self.where}: nothing is measured, for on a GPU that takes a process of its own, in which a kernel "
                f"may crash, and that cannot use {self.device}: {reason}; a GPU in exclusive-process mode serves one "
                "process alone (`nvidia-smi -c DEFAULT` lets others in)"
            )

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next answer; Ended with the reason where there is none."""
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise Ended(f"no answer within {seconds:g} s") from None
        if line is None:
            raise Ended(self._how_it_ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _how_it_ended(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.end()
            return "its process gave no more answers"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        said = "" if code == UNUSABLE else self._last_words()
        return f"its process ended with exit code {code}{said}"

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return f": {lines[-1]}" if lines else ""

    def end(self) -> None:
        """End the process and all that it started, whatever they are at."""
        if self.process is None:
            return
        process, self.process = self.process, None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.errors.close()
        with suppress(OSError):  # of what it did not read
            process.stdin.close()  # type: ignore[union-attr]


class Unmeasurable(RuntimeError):
    """Nothing can be measured, for there is no process to do it in."""


class Ended(Exception):
    """The process gives no more answers."""


def _read(lines: IO[str], answers: queue.SimpleQueue[str | None]) -> None:
    """Hand on every line, and None at the end."""
    with lines:
        for line in lines:
            answers.put(line)
    answers.put(None)
