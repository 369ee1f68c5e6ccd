"""Another version of fastbp beside this tree: which one, where it lies, and a process for each that makes its calls.

A version is unpacked into build/bench-check with a native library of its own, and stays there for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.cases import Case, name_of
from benchmarks.environment import results_of
from fastbp.backends import native

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "build" / "bench-check"
MEASURED = ("fastbp", "csrc", "setup.py")
OF_THE_LIBRARY = ("csrc", "setup.py", "fastbp/version.py")


class Unusable(Exception):
    """A version that cannot be measured."""


class Failed(Unusable):
    """What a process of a version did not do."""

    def __init__(self, worker: Worker, reason: str) -> None:
        super().__init__(f"{worker.name}: {reason}")
        self.worker = worker


def git(*arguments: str) -> str:
    """What git says; Unusable with its words where it refuses."""
    try:
        outcome = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unusable(f"git cannot be run, and other versions come from it: {error}") from None
    if outcome.returncode:
        raise Unusable(f"git {' '.join(arguments)}: {outcome.stderr.strip()}")
    return outcome.stdout.strip()


def commit_of(reference: str) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{reference}^{{commit}}")
    except Unusable:
        names = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags").split()
        last = git("log", "--format=%h %s", "-5").splitlines()
        raise Unusable(
            f"--base {reference!r} is no commit that git has here; there are {', '.join(names) or 'no branches'}, "
            "and the last commits are\n" + "\n".join(f"  {line}" for line in last)
        ) from None


def default_base(suites: Sequence[str], device: torch.device) -> tuple[str, str]:
    """The newest commit of the results that there are of this machine, and in words why it is taken."""
    found: dict[str, str] = {}
    unknown: list[str] = []
    for path in (results_of(device) / f"{suite}.jsonl" for suite in suites):
        if path.is_file():
            name, commit = path.relative_to(ROOT), str(records.read(path).environment.get("commit", ""))
            try:
                found.setdefault(commit_of(commit), f"that of {name}")
            except Unusable:
                unknown.append(f"{name} is of {commit or 'no commit'}, which git does not have here")
    if found:
        newest = commit_of(git("rev-list", "--no-walk", "--max-count=1", *found))
        return newest, found[newest]
    none = f"there are no results in {results_of(device).relative_to(ROOT)}"
    return commit_of("HEAD"), f"HEAD, for {unknown[0] if unknown else none}"


def same(commit: str, *places: str) -> bool:
    """Whether this tree has there what the commit has, and nothing else."""
    changed = git("diff", "--name-only", commit, "--", *places)
    return not changed and not git("ls-files", "--others", "--exclude-standard", "--", *places)


def unpacked(commit: str, device: torch.device, store: Path = STORE) -> Path:
    """The tree of a commit with the kernels that this tree has. Made under another name first, so that half a tree is
    never taken."""
    kernels = "none" if not native.LIBRARY.is_file() else "cpu"
    if kernels == "cpu" and device.type == "cuda" and native.unavailable is None and native.cuda_architectures():
        kernels = "cuda"
    tree, half = store / f"{commit}-{kernels}", store / f"{commit}-{kernels}.{os.getpid()}"
    if tree.is_dir():
        return tree
    half.mkdir(parents=True)
    try:
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract", "--directory", str(half)], input=packed, check=True)
        give_library(commit, half, kernels)
        half.rename(tree)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return tree


def give_library(commit: str, tree: Path, kernels: str) -> None:
    """This tree's library where both have the same sources, else one built from its own."""
    if kernels == "none":
        print(f"this tree has no native library, so {commit} gets none")
        return
    if native.unavailable is None and same(commit, *OF_THE_LIBRARY):
        print(f"{commit} has the same C++ sources as this tree, and gets its native library")
        shutil.copy2(native.LIBRARY, tree / "fastbp")
        return
    print(f"building the native library of {commit}, a minute or more", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FASTBP_BUILD": kernels}
    outcome = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise Unusable(f"the native library of {commit} does not build:\n{outcome.stderr[-2000:]}")
    shutil.rmtree(tree / "build", ignore_errors=True)


class Worker:
    """A process of one version (benchmarks/version_worker.py), stopped while nothing is asked of it.

    Threads of OpenMP spin for some milliseconds after a parallel loop, on the cores that the other version is timed on
    next. To forbid it would be to time other programs than people run; a stopped process does not spin, and what runs
    is as it always is. ``cache`` is a folder without measured choices: they may be those of one version alone.
    """

    def __init__(self, name: str, tree: Path, cache: Path) -> None:
        self.name, self.tree = name, tree
        self.environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        self.backends: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        """A new process, which is to be greeted. In a session of its own: Ctrl-C comes to who started it alone."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.version_worker", str(self.tree)],
            cwd=ROOT, env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def greet(self) -> None:
        """Wait until the process is there, and see that it is of this version."""
        found = self.ask()
        if Path(found["fastbp"]).resolve() != (self.tree / "fastbp" / "__init__.py").resolve():
            raise Failed(self, f"a process for {self.tree} imports {found['fastbp']}")
        self.backends = found["backends"]

    def prepare(self, case: Case, device: str) -> dict[str, Any]:
        """What it says of a case that ``ask(calls=n)`` is to make from now on; by a new process if one died."""
        if self.process.poll() is not None:
            restart([self])
        return self.ask(case=asdict(case) | {"dtype": name_of(case.dtype)}, device=device)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer; Failed where it has none, or its process ends."""
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(self, f"its process ended with exit code {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(self, answer["failed"])
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with suppress(BrokenPipeError):  # a request that nobody read
                pipe.close()


def restart(workers: Sequence[Worker]) -> None:
    """New processes for all of them, which start at once and stop one after another."""
    for worker in workers:
        worker.end()
        worker.start()
    for worker in workers:
        worker.greet()


def check_alike(base: Worker, mine: Worker) -> None:
    """Unusable where the C++ kernels serve one version and not the other."""
    states = [worker.backends.get("native", "") for worker in (base, mine)]
    if all(states) and len({state == "available" for state in states}) > 1:
        said = "; ".join(f"{worker.name}: {state}" for worker, state in zip((base, mine), states, strict=True))
        raise Unusable(f"the native kernels serve one version alone, so that there is nothing to compare: {said}")
