"""The examples: each runs, its losses are stock's, its own point holds, and it notices a fused model that is wrong."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torchvision_ops
from torch import nn

import fastbp

EXAMPLES = Path(__file__).parents[1] / "examples"

# How far a loss may be from stock's, relative to it. Rounding, 1e-7 in float32, grows with the steps of a training: in
# these to 1.2e-6 over three seeds, to 4e-4 in bfloat16, to 6e-14 in float64. A block off by 1e-3 is past them in three.
FLOAT32, BFLOAT16, FLOAT64 = 2e-5, 2e-3, 1e-11


def vit(result: dict[str, Any]) -> None:
    assert result["runs"]["fused"].report.left == []  # token and positions have three dimensions, and are no experts
    accuracy = result["accuracy"]
    assert accuracy["fused"] == pytest.approx(accuracy["stock"], abs=1 / 300)  # one scan on the boundary
    assert accuracy["fused"] > 0.3  # guessing: 0.1


def lora(result: dict[str, Any]) -> None:
    """Of each MLP, whose weights are frozen, the gate is not kept; beside adapters silu(gate) · up is kept without."""
    last = {site.name.partition("layers.")[2]: site for site in result["runs"]["LoRA, then fuse"].report.fused}
    read = ["0.mlp.down_proj.base_layer", "0.mlp.down_proj.lora_A.default"]
    assert set(last) == {"1.mlp", "2.mlp", *read}
    hidden = 8 * 64 * 256 * 4  # bytes of a hidden layer: 8 x 64 rows of 256 elements in float32
    assert [last[name].unkept for name in read] == [hidden, hidden]
    assert len(result["runs"]["fuse, then LoRA"].report.fused) == 3
    kept = {name: run.kept for name, run in result["runs"].items()}
    assert kept["stock"] - kept["fuse, then LoRA"] == 3 * hidden
    assert kept["stock"] - kept["LoRA, then fuse"] == 4 * hidden
    merged = result["merged"]
    assert merged["LoRA, then fuse"] == merged["fuse, then LoRA"]
    assert merged["stock"] - merged["fuse, then LoRA"] == 3 * 2 * hidden  # trained: eager keeps 4 of each, fused 2


def checkpointing(result: dict[str, Any]) -> None:
    """The bytes, by what each way keeps of 3 layers, 8 x 64 rows, width 64, float32."""
    kept = {name: run.kept for name, run in result["runs"].items()}
    rows, hidden = 3 * 8 * 64, 4 * 64
    assert kept["stock"] - kept["fused"] == rows * hidden * 4  # y is not kept beside z
    assert kept["fused"] - kept['fused, "recompute"'] == rows * hidden * 4  # nor z
    assert kept["fused, checkpoint"] == kept["checkpoint"] < kept["stock"] / 5
    # attention's output and a number for each of 4 heads; its input comes back with the layer
    assert kept["fused, selective"] - kept["fused, checkpoint"] == rows * (64 + 4) * 4


def pinn(result: dict[str, Any]) -> None:
    assert set(result["errors"]) == {"stock", "stock again", "fuse", "fuse, torch.func", "fastbp.MLP"}
    assert max(result["errors"].values()) < 1e-2  # of a solution of size 1


def gradient_penalty(result: dict[str, Any]) -> None:
    assert result["distances"]["fused"] == pytest.approx(2.5, rel=0.1)


def neural_field(result: dict[str, Any]) -> None:
    assert result["errors"]["fused"] < 0.04  # of distances up to 0.6


def nothing_else(result: dict[str, Any]) -> None:
    """What the example itself requires is all there is."""


# The arguments, how near the losses are, the part of its first value that the loss falls below, fused sites, its point.
CASES: dict[str, tuple[list[str], float, float, int, Callable[[dict[str, Any]], None]]] = {
    "nanogpt": ([], FLOAT32, 0.8, 3, nothing_else),
    "nanogpt --bf16": (["--bf16", "--steps", "10"], BFLOAT16, 0.8, 3, nothing_else),
    "vit": ([], FLOAT32, 0.8, 2, vit),
    "hf_trainer": ([], FLOAT32, 0.8, 3, nothing_else),
    "lightning_module": ([], FLOAT32, 0.5, 2, nothing_else),
    "lora": ([], FLOAT32, 0.8, 2, lora),
    "checkpointing": ([], FLOAT32, 0.8, 3, checkpointing),
    "pinn": ([], FLOAT64, 0.01, 1, pinn),
    "gradient_penalty": ([], FLOAT32, 0.0, 1, gradient_penalty),
    "neural_field": ([], FLOAT32, 0.3, 1, neural_field),
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """An example as a module; skipped where a package that it needs is not there."""
    torchvision_ops.declare()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except SystemExit as exit:
            pytest.skip(f"{name}: {exit.__cause__}")

    return load


def test_every_example_is_tested_and_listed() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    assert files == {name.split()[0] for name in CASES}
    listed = (EXAMPLES / "README.md").read_text()
    assert [name for name in files if f"`python examples/{name}.py`" not in listed] == []


@pytest.mark.parametrize("case", CASES)
def test_example(case: str, load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, near, falls_to, sites, its_point = CASES[case]
    result = load(case.split()[0]).main(["--quick", *arguments])
    assert result["failures"] == []
    runs = result["runs"]
    stock = runs["stock"].losses
    assert len(stock) >= 10
    assert sum(stock[-3:]) / 3 < falls_to * stock[0]
    assert runs["stock again"].losses != stock  # or it would not show what rounding does
    reports = {name: run.report for name, run in runs.items() if run.report is not None}
    assert reports
    for name, report in reports.items():
        assert len(report.fused) >= sites, name
        assert report.ran and not report.left, name
    for name, run in runs.items():
        apart = [abs(a - b) / abs(b) for a, b in zip(run.losses, stock, strict=True)]
        assert max(apart) <= near, name
    its_point(result)
    assert f"{stock[-1]:.6g}" in capsys.readouterr().out


def _off_by_a_thousandth(model: nn.Module, **options: Any) -> fastbp.FusionReport:
    report = _fuse(model, **options)
    for site in report.fused:
        model.get_submodule(site.name).register_forward_hook(lambda module, args, out: out * 1.001)
    return report


def _fuse_nothing(model: nn.Module, **options: Any) -> fastbp.FusionReport:
    return _fuse(model, **{**options, "filter_fn": lambda module, name: False})


_fuse = fastbp.fuse


@pytest.mark.parametrize("name", [name for name in CASES if " " not in name])
def test_a_wrong_block_is_noticed(
    name: str, load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load(name)
    monkeypatch.setattr(fastbp, "fuse", _off_by_a_thousandth)
    failures = example.main(["--steps", "3"])["failures"]
    assert any("it parts at step" in failure for failure in failures)


def test_nothing_fused_is_noticed(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("gradient_penalty")
    monkeypatch.setattr(fastbp, "fuse", _fuse_nothing)
    assert example.main(["--steps", "3"])["failures"] == ["fused: something is fused"]


def test_not_a_number_is_noticed(load: Callable[[str], ModuleType]) -> None:
    common = load("common")
    options = common.parse([], None, steps=3, quick=3)

    def train(model: nn.Module, record: Callable[[float], None]) -> None:
        for step in range(options.steps):
            record(math.nan if step and hasattr(model, "wrong") else 1.0)

    def wrong() -> tuple[nn.Module, None]:
        model = nn.Linear(2, 1)
        model.wrong = True
        return model, None

    result = common.compare(
        options,
        stock=lambda: nn.Linear(2, 1),
        variants={"wrong": wrong},
        train=train,
        forward=lambda model: model(model.weight).square().sum(),
    )
    assert ["parts at step 2" in failure for failure in result["failures"]] == [True]


def test_picture(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load("neural_field").main(["--steps", "2", "--out", str(tmp_path / "field.png")])
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")


def test_as_a_program(tmp_path: Path) -> None:
    """From any folder; the exit code says whether stock and fused agree."""
    command = [sys.executable, str(EXAMPLES / "gradient_penalty.py"), "--steps", "2"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "Wasserstein distance" in outcome.stdout


@pytest.mark.parametrize("failures, code", [([], 0), (["the losses part"], 1)])
def test_exit_code(failures: list[str], code: int, load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit) as exit:
        load("common").run(lambda: {"failures": failures})
    assert exit.value.code == code


def test_missing_package(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "vit", raising=False)
    monkeypatch.setattr(sys, "argv", ["examples/vit.py"])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("vit")
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("vit.py: needs scikit-learn: pip install scikit-learn\n(the import failed with ")


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--steps", "x"], ["--device", "tpu"], ["--depth", "3"]])
def test_bad_arguments(
    arguments: list[str], load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("pinn").main(arguments)
    assert arguments[0] in capsys.readouterr().err
