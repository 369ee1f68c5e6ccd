"""Did something become slower? ``make bench-check``: this tree beside a committed version, in one run in turns.

The other version is by default the commit that the committed results of this machine belong to. It is unpacked into
build/bench-check/<commit> with a native library of its own, and stays there for the next run. Of each version a process
makes the calls (benchmarks/version_worker.py), the older one twice: what differs between those two is the noise. They
take turns in bursts, the order reversed in every round. A case is slower where the ratio of times, round by round, is
above 1 from its 20th percentile on, and its median by more than the noise and 2 %; who seems so is measured once more,
three times as long, before it counts.

Exit code 1 where something became slower or a result is wrong, 2 where the arguments name nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.cases import Case, Model, name_of
from benchmarks.environment import CPU, progress, results_of
from benchmarks.measure import quantiles
from benchmarks.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("version_worker.py")
TIMED = tuple(name for name, suite in SUITES.items() if not suite.module and name != "models")
DEFAULT = ("layers", "blocks", "small", "overhead")
OF_THE_LIBRARY = ("csrc", "setup.py", "fastbp/version.py")
LEAST, ROUNDS, BURST = 0.02, 7, 0.01
# libgomp's threads go on spinning for about a millisecond after a parallel loop, on the cores that the next one needs.
PAUSE = 0.005
WRONG = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # an error that no rounding makes
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}  # see environment.py


class Unusable(Exception):
    """A version that cannot be measured."""


def git(*arguments: str) -> str:
    """What git says; Unusable with its words where it refuses."""
    outcome = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise Unusable(f"git {' '.join(arguments)}: {outcome.stderr.strip()}")
    return outcome.stdout.strip()


def commit_of(reference: str) -> str:
    try:
        return git("rev-parse", "--verify", "--short", f"{reference}^{{commit}}")
    except Unusable:
        known = git("log", "--format=%h %s", "-5").splitlines()
        raise Unusable(f"--base {reference!r} is no commit of this repository; the last ones are {known}") from None


def default_base(suites: Sequence[str], device: torch.device) -> tuple[str, str]:
    """The commit of the results that there are of this machine, and in words why it is taken."""
    for suite in suites:
        path = results_of(device) / f"{suite}.jsonl"
        if path.is_file():
            commit = records.read(path).environment.get("commit", "")
            try:
                return commit_of(commit), f"that of {path.relative_to(ROOT)}"
            except Unusable:
                return commit_of("HEAD"), f"HEAD, for {path.relative_to(ROOT)} is of {commit}, which is not here"
    return commit_of("HEAD"), f"HEAD, for there are no results in {results_of(device).relative_to(ROOT)}"


def unpacked(commit: str, store: Path) -> Path:
    """The tree of a commit with its library. Made under another name first, so that half a tree is never taken."""
    tree = store / commit
    if tree.is_dir():
        return tree
    half = store / f"{commit}.part"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(half, filter="data")
        give_library(commit, half)
        half.rename(tree)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return tree


def give_library(commit: str, tree: Path) -> None:
    """This tree's library where both have the same sources, else one built from its own."""
    ours = sorted((ROOT / "fastbp").glob("_native*.so"))
    same = not git("diff", "--name-only", commit, "--", *OF_THE_LIBRARY)
    if same and ours:
        for library in ours:
            shutil.copy2(library, tree / "fastbp")
        return
    print(f"building the native library of {commit}, a minute or more", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    outcome = subprocess.run(
        command, cwd=tree, env=os.environ | {"FASTBP_BUILD": "cpu"}, capture_output=True, text=True
    )
    if outcome.returncode:
        raise Unusable(f"the native library of {commit} does not build:\n{outcome.stderr[-2000:]}")


class Worker:
    """A process of one version."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | KEEP_FREED | {"PYTHONPATH": str(tree)}
        # Not as a file, whose folder would come before the tree on the path.
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER.read_text(encoding="utf-8")], env=environment, cwd=tree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        found = self.ask()
        if Path(found["fastbp"]).resolve() != (tree / "fastbp" / "__init__.py").resolve():
            raise Unusable(f"a process for {tree} imports {found['fastbp']}")
        self.backends: dict[str, str] = found["backends"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{json.dumps(request)}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Unusable(f"the process ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Unusable(answer["failed"])
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Verdict:
    """Of one case: the time of this tree over that of the other version, round by round, and the same of the noise."""

    name: str
    ratio: tuple[float, float, float]  # 20th percentile, median, 80th
    noise: tuple[float, float, float]
    milliseconds: float
    fault: str = ""

    @property
    def margin(self) -> float:
        low, middle, high = self.noise
        return max(LEAST, abs(middle - 1), (high - low) / 2)

    @property
    def slower(self) -> bool:
        return self.ratio[0] > 1 and self.ratio[1] > 1 + self.margin

    @property
    def faster(self) -> bool:
        return self.ratio[2] < 1 and self.ratio[1] < 1 - self.margin

    def __str__(self) -> str:
        if self.fault:
            return f"{self.name}: {self.fault}"
        low, middle, high = self.ratio
        words = "SLOWER" if self.slower else "faster" if self.faster else "same"
        return (
            f"{words:6}  {middle:.3f} ({low:.3f} to {high:.3f}), noise {self.noise[1]:.3f} "
            f"({self.noise[0]:.3f} to {self.noise[2]:.3f}), {self.milliseconds:.3f} ms  {self.name}"
        )


def compare(case: Case, device: str, workers: Sequence[Worker], seconds: float) -> Verdict:
    """Bursts of the other version, of it again and of this tree, in turn; checked first."""
    wanted = asdict(case) | {"dtype": name_of(case.dtype), "device": device}
    errors = []
    for index, worker in enumerate(workers):
        try:
            errors.append(worker.ask(case=wanted)["error"])
        except Unusable as error:
            which = "this tree" if index == len(workers) - 1 else "the other version"
            return Verdict(case.name, (1, 1, 1), (1, 1, 1), 0, f"{which} does not compute it: {error}")
    for found, which in ((errors[0], "the other version"), (errors[-1], "this tree")):
        if not found <= WRONG[name_of(case.dtype)]:
            return Verdict(case.name, (1, 1, 1), (1, 1, 1), 0, f"{which} is WRONG: relative error {found:.2g}")
    once = max(min(workers[0].ask(calls=1)["seconds"] for _ in range(3)), 1e-9)
    calls = max(1, min(200, round(BURST / once)))
    times: list[list[float]] = [[] for _ in workers]
    order = list(range(len(workers)))
    while len(times[0]) < ROUNDS or sum(map(sum, times)) * calls < seconds * len(workers):
        for index in order:
            time.sleep(PAUSE)
            times[index].append(workers[index].ask(calls=calls)["seconds"] / calls)
        order.reverse()
    base, again, mine = times
    ratio, noise = ([t / b for t, b in zip(other, base, strict=True)] for other in (mine, again))
    return Verdict(case.name, quantiles(ratio), quantiles(noise), quantiles(mine)[1] * 1e3)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit, tag or branch; if not given that of the machine's committed results")
    parser.add_argument("--suite", choices=TIMED, action="append", help=f"if not given {', '.join(DEFAULT)}")
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of the three processes, of a case")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of a second, and one case of each suite and dtype"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    arguments.suite = arguments.suite or DEFAULT
    every = [case for name in arguments.suite for case in SUITES[name].cases[arguments.device]]
    cases = [case for case in dict.fromkeys(every) if arguments.case in case.name and not isinstance(case, Model)]
    if not cases:
        parser.error(f"--case {arguments.case!r} is in no name of {', '.join(case.name for case in every)}")
    if arguments.quick:
        arguments.seconds = 0.1
        cases = list({(case.kind, case.dtype): case for case in reversed(cases)}.values())
    arguments.cases = cases
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else CPU
    workers: list[Worker] = []
    try:
        if arguments.base is None:
            commit, why = default_base(arguments.suite, device)
        else:
            commit, why = commit_of(arguments.base), "as asked for"
        print(f"this tree beside {commit} ({why})", flush=True)
        if not git("diff", "--name-only", commit, "--", "fastbp", "csrc"):
            print("their fastbp/ and csrc/ are the same, so what is measured is noise")
        tree = unpacked(commit, ROOT / "build" / "bench-check")
        for place in (tree, tree, ROOT):
            workers.append(Worker(place))
            print(f"{place}: {', '.join(f'{name} {state}' for name, state in workers[-1].backends.items())}")
        return report(measured(arguments, workers))
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for worker in workers:
            worker.end()


def measured(arguments: argparse.Namespace, workers: Sequence[Worker]) -> list[Verdict]:
    """The verdicts, each on the terminal when it is there."""
    verdicts = []
    for case in progress(arguments.cases, len(arguments.cases), end="\n"):
        found = compare(case, arguments.device, workers, arguments.seconds)
        if found.slower:
            print(f"{found}; once more, three times as long", flush=True)
            found = compare(case, arguments.device, workers, 3 * arguments.seconds)
        print(found, flush=True)
        verdicts.append(found)
    return verdicts


def report(verdicts: list[Verdict]) -> int:
    """What is slower or wrong, the slowest first; the exit code."""
    slower = sorted((v for v in verdicts if v.slower), key=lambda v: -v.ratio[1])
    faster = [v for v in verdicts if v.faster]
    wrong = [v for v in verdicts if v.fault]
    print(f"\n{len(verdicts)} cases: {len(slower)} slower, {len(faster)} faster, {len(wrong)} not compared")
    for verdict in (*wrong, *slower):
        print(verdict)
    fatal = [v for v in wrong if "this tree" in v.fault]
    return int(bool(slower or fatal))


if __name__ == "__main__":
    sys.exit(main())
