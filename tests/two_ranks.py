"""Two processes joined by gloo. They are started once and run one case after another, each by its name."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

RANKS = 2
STUCK = 120.0  # seconds that a case may take on a busy machine
GRACE = 5.0  # seconds for the other rank once one has failed: it may be waiting for it


def serve(rank, pipe, folder):
    """What a rank does: cases as they are asked for, ``None`` or a traceback as the answer."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, open(stack_file(folder, rank), "w"), all_threads=False)  # noqa: SIM115
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=2 * STUCK))
    while True:
        module, case, arguments = pipe.recv()
        try:
            getattr(importlib.import_module(module), case)(*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


def stack_file(folder, rank):
    return folder / f"stack-{rank}"


class TwoRanks:
    """The processes, and the way to have a case run in both. They are made anew after a case that failed."""

    def __init__(self, new_folder):
        self.new_folder = new_folder
        self.processes, self.pipes = [], []

    def run(self, case, *arguments, timeout=STUCK):
        """Run a module's function in both ranks; a failure of either fails the test with its traceback."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((case.__module__, case.__name__, arguments))
        failures = self._failures(timeout)
        if failures:
            self.stop()
            what = ", ".join(map(str, arguments))
            pytest.fail("\n".join([f"{case.__module__}.{case.__name__}({what})", *failures]), pytrace=False)

    def _start(self):
        self.folder = Path(self.new_folder())
        context = torch.multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs, self.folder), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def _failures(self, timeout):
        failures, waiting, end = [], dict(zip(self.pipes, range(RANKS), strict=True)), time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0))
            if not ready:
                return failures + [self._stack(rank) for rank in waiting.values()]
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    text = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    text = f"died, exit code {self.processes[rank].exitcode}"
                if text is not None:
                    failures.append(f"rank {rank}: {text}")
                    end = min(end, time.monotonic() + GRACE)
        return failures

    def _stack(self, rank):
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return f"rank {rank}: no answer, it stands here:\n{stack_file(self.folder, rank).read_text()}"

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def one_fails(words):
    """One rank raises; the other waits for it."""
    if dist.get_rank() == 1:
        raise ValueError(words)
    dist.barrier()


def one_dies():
    """One rank is gone without a word."""
    if dist.get_rank() == 0:
        os._exit(3)
