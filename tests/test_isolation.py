"""``fastbp.tune`` on a GPU: a candidate may crash, hang or poison its process, and takes nothing of the user's along.

There is no GPU here. The child is the real one, on a CPU, with backends that do all this (``tuning_worker.py``).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import each
from tuning_cases import CPU, spoiling

import fastbp
from fastbp import backends
from fastbp.backends import measured
from fastbp.tuning import isolation, jobs, race, tune_jobs
from fastbp.tuning.isolation import Measuring
from fastbp.tuning.jobs import parse

pytestmark = pytest.mark.usefixtures("own_choices")
CALL = "gated_linear_act 6x8x16 silu float32 preact"  # of which eager keeps too much
WORKER = str(Path(__file__).parent / "tuning_worker.py")


@pytest.fixture
def child(monkeypatch):
    """Tuning goes by a child, as on a GPU, with these candidates."""

    def with_candidates(*names, deadline=10.0):
        monkeypatch.setenv("FASTBP_TEST_CANDIDATES", " ".join((*names, "reference")))
        monkeypatch.setattr(isolation, "COMMAND", (sys.executable, WORKER))
        monkeypatch.setattr(isolation, "isolated", lambda device: True)
        monkeypatch.setattr(isolation, "DEADLINE", deadline)

    return with_candidates


def test_every_candidate_gets_its_verdict_and_the_good_one_wins(child, capfd):
    child("crashes", "raises", "hangs", "nan", "late", "exits", "poisons", "prints", "good")
    begun = time.monotonic()
    (call,) = tune_jobs([(parse("x", CALL, CPU), 1)], 0.02, again=True, quiet=True).calls
    took = time.monotonic() - begun
    assert call.fastest == "good" and set(call.milliseconds) == {"good", "prints", "reference"}
    reasons = dict(call.refused)
    assert reasons.pop("nan").startswith("y has nan at row 0, column 0")
    assert reasons.pop("eager").startswith("keeps ")
    assert reasons == {
        "crashes": "its process was ended by SIGSEGV",
        "raises": "ValueError: out of resources",
        "hangs": "no answer within 10 s",
        "late": "its process was ended by SIGSEGV",
        "exits": "its process ended with exit code 7: something went wrong",
        "poisons": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert call.unmeasured == "crashes", "what the rule takes, whoever was refused"
    entry = measured.inventory(backends.environment(CPU))[CALL]
    assert entry["fastest"] == "good" and entry["refused"] == call.refused, "this process remembers it"
    assert "speaks" not in capfd.readouterr().out
    assert took < 120, "a child for each that ended one, and a deadline for the one that hangs"


def children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes of this one are counted in /proc")
def test_nothing_of_the_child_is_left_whatever_happens(child):
    child("crashes", "good")
    before = children()
    tune_jobs([(parse("x", CALL, CPU), 1)], 0.01, again=True, quiet=True)
    assert children() == before
    with pytest.raises(KeyboardInterrupt), Measuring("x") as measuring:
        measuring.race(parse("x", CALL, CPU), 0.01)
        assert len(children() - before) == 1
        raise KeyboardInterrupt
    assert children() == before


def test_one_child_serves_all_calls_and_calls_measured_before_start_none(child, monkeypatch):
    child("good")
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or start(*a, **k))
    calls = [(parse("x", f"gated_linear_act 6x8x{n} silu float32 preact", CPU), 1) for n in (4, 8, 16)]
    first = tune_jobs(calls, 0.01, again=False, quiet=True)
    assert len(started) == 1 and {call.fastest for call in first.calls} == {"good"}
    assert all(call.known for call in tune_jobs(calls, 0.01, again=False, quiet=True).calls)
    assert len(started) == 1


@each("fault", ["does not start", "cannot use the device", "is silent"])
def test_where_the_child_cannot_work_nothing_is_measured_and_it_says_why(fault, child, monkeypatch):
    child("good")
    words = {"does not start": "exit code 1: no GPU for you", "cannot use the device": "cannot use"}
    job = parse("x", CALL, CPU)
    if fault == "does not start":
        monkeypatch.setattr(isolation, "COMMAND", (sys.executable, WORKER, "dead"))
    elif fault == "is silent":
        monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
        monkeypatch.setattr(isolation, "STARTING", 0.5)
    else:
        job = job._replace(device=torch.device("cuda", 7))
        monkeypatch.setattr(backends, "environment", lambda device: (("device", "none"),))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(isolation, "run_race", lambda *a: pytest.fail("it is measured in this process"))
    with pytest.raises(RuntimeError, match=r"fastbp\.tune: nothing is measured") as caught:
        tune_jobs([(job, 1)], 0.01, again=True, quiet=True)
    assert words.get(fault, "no answer within 0.5 s") in str(caught.value) and "exclusive-process" in str(caught.value)


def test_a_child_that_ends_before_any_candidate_is_an_error_and_no_endless_loop(child, monkeypatch):
    child("good")
    program = (
        "import sys, json; sys.argv = ['', 'cpu']; print(json.dumps({'ready': 1}), flush=True); input(); sys.exit(3)"
    )
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", program))
    with pytest.raises(RuntimeError, match=r"ends again and again: its process ended with exit code 3"):
        tune_jobs([(parse("x", CALL, CPU), 1)], 0.01, again=True, quiet=True)


def test_the_child_ends_with_the_process_that_asks(tmp_path, child):
    """Also where that is killed, and the candidate hangs."""
    child("hangs")
    program = f"""
import os, sys
from fastbp.tuning import isolation
from fastbp.tuning.jobs import parse
import torch
isolation.COMMAND = (sys.executable, {WORKER!r})
isolation.isolated = lambda device: True
child = isolation.Child("x", torch.device("cpu"))
child._start()
print(child.process.pid, flush=True)
child.measure(parse("x", {CALL!r}, torch.device("cpu")), 0.1, None)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(1.0)
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end, "the child is left behind"
        time.sleep(0.1)


def test_on_a_cpu_everything_is_measured_here(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert not isolation.isolated(CPU) and isolation.isolated(torch.device("cuda", 1))
    fastbp.tune(fastbp.MLP(8, 8), torch.ones(2, 8), seconds=0.001, quiet=True)


@each("call", ["mlp 6x8x16x4 relu bfloat16 output", "gated_act_linear 6x8x16 silu float16 fp8", CALL])
def test_a_job_travels_as_plain_values(call):
    job = parse("x", call, torch.device("cuda", 1))
    assert jobs.from_plain(json.loads(json.dumps(jobs.to_plain(job)))) == job


def test_how_products_are_computed_is_as_in_the_process_that_asks(child, monkeypatch):
    """Whoever allows TF32 is to have its times."""
    from fastbp.tuning import worker

    before = isolation.settings()
    other = dict(fp32_precision="tf32", allow_bf16_reduced_precision_reduction=False)
    request = {"settings": before | other, "job": None, "seconds": 0, "without": [], "product": None}
    try:
        worker.answer(request, CPU, lambda answer: None)  # which fails for want of a job
        assert isolation.settings() == before | other
    finally:
        for name, value in before.items():
            setattr(torch.backends.cuda.matmul, name, value)


def test_a_race_is_on_the_device_of_its_tensors(monkeypatch):
    inside, seen, entered = [], [], []

    class On:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    with race.on(torch.device("cuda", 1)):
        assert inside == [True] and entered == [torch.device("cuda", 1)]
    monkeypatch.setattr(race, "on", On)
    watching = spoiling("watching", lambda y: seen.append(bool(inside)), "output")
    monkeypatch.setitem(backends.BACKENDS, "watching", watching)
    race.run_race(parse("x", CALL, CPU), 0.001)
    assert len(seen) > 3 and all(seen) and entered[-1] == CPU
