"""The commands: ``python -m fastbp``, and what setup.py says to ``FASTBP_BUILD``."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastbp
from fastbp import __main__ as cli
from fastbp import backends, doctor
from fastbp.backends import triton

ROOT = Path(fastbp.__file__).parents[1]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_python_m_fastbp_doctor():
    outcome = python("-W", "error", "-m", "fastbp", "doctor")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert f"fastbp {fastbp.__version__}\n" in outcome.stdout
    assert f"torch {torch.__version__} " in outcome.stdout


def test_doctor_names_every_backend_with_its_state_or_reason(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for name, status in fastbp.available_backends().items():
        assert f"  {name}: {status}" in printed
    assert "  reference: available" in printed
    missing = [name for name, status in fastbp.available_backends().items() if status != "available"]
    assert all(len(fastbp.available_backends()[name]) > 20 for name in missing), "a reason is a sentence"


def test_doctor_reports_what_a_backend_says_of_itself(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "native", "the compiler is out to lunch")
    assert "  native: the compiler is out to lunch" in doctor.report().splitlines()


def test_doctor_says_what_is_missing_and_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    lines = [line for line in doctor.report().splitlines() if "missing" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["triton", "sklearn", "matplotlib"]
    assert all("pip install" in line for line in lines)


def test_doctor_on_a_machine_with_gpus(monkeypatch, tmp_path):
    choice = pytest.importorskip("fastbp.backends.triton.choice", reason="triton is not installed")
    tuning = pytest.importorskip("fastbp.backends.triton.tuning", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    index = lambda device: getattr(device, "index", device)  # noqa: E731
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Wonder {index(device)}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (7, 5)][index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "builds", lambda: None)
    try:
        lines = doctor.report().splitlines()
        monkeypatch.setattr(triton, "builds", lambda: "no C compiler")
        assert "  GPU 0: no C compiler" in doctor.report().splitlines()
    finally:
        choice.device_of.cache_clear()
        tuning.environment.cache_clear()
    assert "  GPU 0: Wonder 0, sm_90" in lines
    assert "  GPU 1: Wonder 1, sm_75" in lines
    served = (
        "  GPU 0: 132 multiprocessors, tiles of sm_90; products of ours taken unmeasured: none yet; measured: 0, in "
    )
    assert any(line.startswith(f"{served}{tmp_path}/fastbp/triton-") for line in lines)
    assert "  GPU 1: Wonder 1 has compute capability 7.5, and the Triton kernels need 8.0 or newer" in lines


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"{fastbp.__version__}\n"


@pytest.mark.parametrize("arguments", [["docter"], [], ["doctor", "--quick"]], ids=" ".join)
def test_bad_arguments_exit_with_2_and_the_reason(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "usage: python -m fastbp" in output.err
    assert (arguments or ["command"])[-1] in output.err


def test_python_m_fastbp_with_an_unknown_command():
    outcome = python("-m", "fastbp", "docter")
    assert outcome.returncode == 2
    assert "invalid choice: 'docter'" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("mode", ["auto", "none", "NONE", "cpu", "cuda", None])
def test_build_modes_that_install(mode):
    environment = {} if mode is None else {"FASTBP_BUILD": mode}
    outcome = python("setup.py", "--version", **environment)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines()[-1] == fastbp.__version__


@pytest.mark.parametrize("mode", ["bogus", ""])
def test_build_modes_that_fail_say_so_in_one_line(mode):
    """Who asks for kernels gets kernels or an error, never a package that silently lacks them."""
    outcome = python("setup.py", "--version", FASTBP_BUILD=mode)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("fastbp: FASTBP_BUILD")
    assert len(outcome.stderr.splitlines()) == 1
    assert (mode or "''") in outcome.stderr
    assert "auto" in outcome.stderr
    assert "none" in outcome.stderr
