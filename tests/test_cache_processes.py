"""Several processes that remember at once: nobody's entry is lost, and nobody waits for ever."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from support import each

from fastbp import backends, cache
from fastbp.backends import measured, triton

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
ENTRIES, PROCESSES = 40, 4

WRITER = f"""
import sys
import torch
from fastbp.backends import measured
which, rank = sys.argv[1:]
for i in range({ENTRIES}):
    if which == "calls":
        measured.remember((("device", "one"),), f"problem {{rank}} {{i}}", {{"fastest": "reference"}})
    else:
        from fastbp.backends.triton import tuning
        tuning.remember(torch.device("cpu"), f"problem {{rank}} {{i}}", {{"library": 1.0}})
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own, and nobody warned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(measured, "_unwritten", {})
    yield tmp_path / "fastbp"
    backends.forget()


@each("which", ["calls", "products"])
def test_ranks_that_remember_at_once_lose_nothing(which, place):
    if which == "products" and triton.unavailable is not None:
        pytest.skip(f"triton: {triton.unavailable}")
    command = [sys.executable, "-W", "error", "-c", WRITER, which]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(PROCESSES)]
    said = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, said
    (path,) = place.glob("*.json")
    found = json.loads(path.read_text())["problems" if which == "calls" else "fastest"]
    wanted = {f"problem {rank} {i}" for rank in range(PROCESSES) for i in range(ENTRIES)}
    assert set(found) == wanted, f"{len(wanted - set(found))} of {len(wanted)} entries are lost"


HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_that_is_never_given_back_costs_a_warning_and_serves_this_process(place, monkeypatch):
    assert measured.remember((("device", "one"),), "first", {"fastest": "reference"})
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    command = [sys.executable, "-c", HOLDER, str(place / cache.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.warns(RuntimeWarning, match="another process has held .* for 0.2 s"):
                assert measured.remember((("device", "one"),), "second", {"fastest": "reference"}) is False
            assert set(measured.inventory((("device", "one"),))) == {"first", "second"}
            assert cache.read(measured.file_name((("device", "one"),)))["problems"].keys() == {"first"}
        finally:
            holder.kill()
    assert measured.remember((("device", "one"),), "third", {"fastest": "reference"})
    written = cache.read(measured.file_name((("device", "one"),)))["problems"]
    assert written.keys() == {"first", "second", "third"}, "what was not written is, as soon as that works"


@each("fault", ["no fcntl", "no locks"])
def test_without_locks_it_is_said_and_written_all_the_same(fault, monkeypatch):
    if fault == "no fcntl":
        monkeypatch.setattr(cache, "fcntl", None)
    else:

        def flock(handle, how):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(cache.fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match="without a lock.*processes that tune at once may lose entries") as caught:
        assert cache.change("a.json", lambda content: content | {"a": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.change("a.json", lambda content: content | {"b": 2})
    assert len(caught) == 1 and cache.read("a.json") == {"a": 1, "b": 2}


def of_gpu(monkeypatch, capability=(9, 0), api=13000, release="580.65.06"):
    """A machine with this GPU, as far as what a measurement belongs to goes."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Wonder")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: api, raising=False)
    monkeypatch.setattr(cache, "driver_release", lambda: release)
    if triton.unavailable is None:
        from fastbp.backends.triton import tuning

        tuning.environment.cache_clear()


def files_of_gpu():
    found = [measured.file_name(backends.environment(GPU))]
    if triton.unavailable is None:
        from fastbp.backends.triton import tuning

        found.append(tuning.file_name(tuning.environment(GPU)))
        tuning.environment.cache_clear()
    return found


@each("other", [{"capability": (9, 1)}, {"api": 12080}, {"release": "575.1.1"}])
def test_what_another_driver_or_architecture_measured_is_not_found(other, monkeypatch):
    of_gpu(monkeypatch)
    here = files_of_gpu()
    of_gpu(monkeypatch)
    assert files_of_gpu() == here
    of_gpu(monkeypatch, **other)
    assert not set(files_of_gpu()) & set(here)


def test_another_drivers_choice_is_not_taken(monkeypatch):
    of_gpu(monkeypatch)
    backends.remember(GPU, "linear_act 6x8x16 gelu float32 preact", {"fastest": "reference"})
    subject, sizes = measured.parse_key("linear_act 6x8x16 gelu float32 preact")
    assert sizes in measured.recall(subject, backends.environment(GPU))
    of_gpu(monkeypatch, release="1.2")
    assert measured.recall(subject, backends.environment(GPU)) == {}


def test_the_release_of_the_driver_is_what_the_kernel_module_says(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(cache, "DRIVER", tmp_path / "version")
    assert cache.driver_release() == "580.65.06"
    monkeypatch.setattr(cache, "DRIVER", tmp_path / "nothing")
    assert cache.driver_release() == "unknown"
