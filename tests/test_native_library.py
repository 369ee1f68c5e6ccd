"""A library or a build that cannot serve is explained, not called and not fatal."""

import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastbp
from fastbp.activations import TABLE
from fastbp.backends import native
from fastbp.problem import Problem, configure

ROOT = Path(fastbp.__file__).parents[1]


def test_an_unknown_capability_is_explained():
    program = "import fastbp; print(fastbp.available_backends()['native'])"
    environment = {"FASTBP_CPU_CAPABILITY": "sse9", "PATH": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "FASTBP_CPU_CAPABILITY=sse9 is not a capability of this CPU; there are" in found.stdout


def test_a_missing_library(tmp_path):
    reason = native.load(tmp_path / "none.so")
    assert "were not built" in reason and "FASTBP_BUILD=cpu pip install" in reason


def test_a_file_that_is_no_library(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"\x7fELF, but no more")
    reason = native.load(path)
    assert "does not load into torch" in reason and "\n" not in reason and "FASTBP_BUILD=cpu pip install" in reason


def fake_ops(monkeypatch, info):
    fake = types.SimpleNamespace(build_info=lambda: info, capability=lambda: "generic")
    monkeypatch.setattr(native.library, "ops", lambda: fake)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)


NAMES = " ".join(row.name for row in TABLE)


def test_a_library_of_another_version_is_refused(monkeypatch):
    fake_ops(monkeypatch, f"0.0.9 0123 {NAMES}")
    assert "belongs to fastbp 0.0.9, and this is" in native.load()


def test_a_library_of_another_table_is_refused(monkeypatch):
    fake_ops(monkeypatch, f"{fastbp.__version__} 0123 {NAMES.replace('relu6', 'relu7')}")
    assert "belongs to fastbp" in native.load()


def test_a_library_of_other_sources_is_refused(monkeypatch):
    fake_ops(monkeypatch, f"{fastbp.__version__} 0123 {NAMES}")
    assert "was built from other sources" in native.load()


@pytest.fixture
def gpu_problem():
    native.cuda_refusal.cache_clear()
    yield Problem(configure("mlp", "gelu", (), "preact", "auto"), torch.device("cuda", 1), torch.bfloat16)
    native.cuda_refusal.cache_clear()


def test_a_library_without_cuda_kernels_leaves_gpus_to_others(monkeypatch, gpu_problem):
    monkeypatch.setattr(native.library, "ops", lambda: types.SimpleNamespace())
    reason = native.supports(gpu_problem)
    assert "was built without CUDA kernels" in reason and "FASTBP_BUILD=cuda pip install" in reason


@pytest.mark.parametrize("said", ["CUDA: no kernel image is available for execution on the device", ""])
def test_a_gpu_is_served_or_refused_in_the_words_of_the_library(monkeypatch, gpu_problem, said):
    """It is asked about the device of the tensors, and once."""
    asked = []
    fake = types.SimpleNamespace(
        cuda_architectures=lambda: "sm_80", cuda_refusal=lambda index: asked.append(index) or said
    )
    monkeypatch.setattr(native.library, "ops", lambda: fake)
    assert [native.supports(gpu_problem) for _ in range(2)] == [said or None] * 2
    assert asked == [1]


def test_without_the_library_the_reference_serves(tmp_path):
    program = (
        "import fastbp, torch; y = fastbp.MLP(8, 16)(torch.randn(3, 8)); print(fastbp.available_backends()['native'])"
    )
    environment = {"FASTBP_NATIVE_LIBRARY": str(tmp_path / "none.so"), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "were not built" in found.stdout and found.stderr == ""


def test_a_build_without_a_compiler_says_so_in_a_line(tmp_path):
    """auto goes on without the kernels; cpu fails."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "fastbp", tmp_path / "fastbp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for mode, code in (("auto", 0), ("cpu", 1)):
        outcome = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            env={"FASTBP_BUILD": mode, "PATH": ""}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert outcome.returncode == code, outcome.stderr
        said = [line for line in outcome.stderr.splitlines() if line.startswith("fastbp:")]
        assert len(said) == 1 and "no C++ compiler was found" in said[0] and "apt-get install g++" in said[0]
        assert not list((tmp_path / "fastbp").glob("*.so"))


def build_cuda(folder, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(folder), "--build-lib", str(folder)],
        env=dict(os.environ, FASTBP_BUILD="cuda", **environment), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_cuda_kernels_without_nvcc_are_refused_in_a_line(tmp_path):
    """Before anything is compiled."""
    outcome = build_cuda(tmp_path, NVCC="/nowhere/nvcc")
    assert outcome.returncode == 1 and not list(tmp_path.rglob("*.o"))
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("fastbp:")]
    assert "no CUDA compiler was found" in line and "NVCC=/path" in line


@pytest.mark.parametrize(("release", "served"), [("11.8", False), ("12.4", False), ("12.5", True), ("13.0", True)])
def test_the_oldest_nvcc(tmp_path, monkeypatch, release, served):
    """12.4 has no cudaGetDriverEntryPointByVersion, and fails in the middle of a build."""
    fake = tmp_path / "nvcc"
    fake.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("NVCC", str(fake))
    monkeypatch.delenv("FASTBP_CUDA_ARCHITECTURES", raising=False)
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
    if served:
        assert setup["nvcc"]() == ([str(fake)], ["80", "90a"] + ["100"] * (release == "13.0"))
    else:
        with pytest.raises(setup["Unable"], match=f"is of CUDA {release}, and 12.5 or newer is needed"):
            setup["nvcc"]()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize(("names", "reason"), [("75 90a", "names 75"), ("80", "must have 90a")])
def test_architectures_that_cannot_be(tmp_path, names, reason):
    outcome = build_cuda(tmp_path, FASTBP_CUDA_ARCHITECTURES=names)
    assert outcome.returncode == 1 and not list(tmp_path.rglob("*.o"))
    assert f"FASTBP_CUDA_ARCHITECTURES {reason}" in outcome.stderr
