"""The main job: it runs, its numbers fit together, and it notices a fused model that computes something else."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp import demo
from fastbp.demo import report, tasks, training

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", _GPU])
def test_quick_run(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert demo.main(["--quick", "--seed", "3", "--device", device, "--output-dir", str(folder)]) == 0
    assert (folder / "fastbp-demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "fastbp-demo.json").read_text())
    assert numbers["seed"] == 3
    assert [task["name"] for task in numbers["tasks"]] == ["digits", "text"]
    printed = capsys.readouterr().out
    for task in numbers["tasks"]:
        runs = task["runs"]
        stock, fused, again = runs["stock"], runs["fused"], runs["again"]
        assert task["failures"] == []
        for name, ratio in task["fused_to_stock"].items():
            assert ratio == fused[name] / stock[name]
        assert task["fused_to_stock"]["kept_bytes"] < 1
        assert (stock["kept_bytes_per_hidden"], fused["kept_bytes_per_hidden"]) == (8, 4)  # float32: z and y, z alone
        assert again["kept_bytes"] == stock["kept_bytes"]
        assert again["losses"] != stock["losses"]  # or nothing would be allowed but one rounding unit
        for run, words in ((fused, "fused"), (again, "stock again")):
            largest = max(abs(a - b) for a, b in zip(run["losses"], stock["losses"], strict=True))
            assert task["differences_from_stock"]["loss"][words] == largest
        assert stock["train_loss"] < stock["losses"][0]
        assert f"{stock['held_out_loss']:.6f}" in printed
        assert f"{fused['accuracy']:.2%}".rstrip("%") in printed
    assert str(folder / "fastbp-demo.png") in printed


class _Formula(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))


class _Split(nn.Module):
    """A linear that adds up its products in two halves."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., :half] @ self.weight[:, :half].T + (x[..., half:] @ self.weight[:, half:].T + self.bias)


class _TanhSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return F.gelu(z)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(dy, *ctx.saved_tensors, approximate="tanh")


class _WrongSlope(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return _TanhSlope.apply(z)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _names(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def _otherwise_rounded(model: nn.Module) -> None:
    for name in _names(model, nn.GELU):
        _replace(model, name, _Formula())
    for name in _names(model, nn.Linear):
        _replace(model, name, _Split(model.get_submodule(name)))


def _scaled_block(model: nn.Module) -> None:
    linear = next(m for n, m in model.named_modules() if n.endswith("fc1") or n == "2")
    for parameter in linear.parameters():
        parameter.register_hook(lambda gradient: gradient * 1.01)


def _scaled_bias(model: nn.Module) -> None:
    linear = next(m for n, m in model.named_modules() if n.endswith("fc1") or n == "2")
    linear.bias.register_hook(lambda gradient: gradient * 0.99)


def _scaled_input_gradient(model: nn.Module) -> None:
    block = next(m for n, m in model.named_modules() if n.endswith("1.feed_forward") or n == "2")
    block.register_full_backward_hook(lambda module, given, taken: (given[0] * 1.01,))


def _tanh_gelu(model: nn.Module) -> None:
    _replace(model, _names(model, nn.GELU)[0], nn.GELU(approximate="tanh"))


def _tanh_slope(model: nn.Module) -> None:
    for name in _names(model, nn.GELU):
        _replace(model, name, _WrongSlope())


def _not_a_number(model: nn.Module) -> None:
    calls = itertools.count()
    _replace(model, _names(model, nn.GELU)[0], _Formula())
    model.register_forward_hook(lambda module, args, out: out * math.nan if next(calls) == 5 else out)


def _instead_of_fused(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], None]) -> None:
    """Let the demo's fused model be a stock model with this change, after ``fuse`` has found nothing to say."""

    def fuse(model: nn.Module, **options: object) -> fastbp.FusionReport:
        found = fastbp.fuse(model, **options)
        fastbp.unfuse(model)
        change(model)
        return found

    monkeypatch.setattr(training, "fuse", fuse)


def _failures(make: Callable[[torch.device, int, bool], tasks.Task], steps: int, seed: int = 0) -> list[str]:
    torch.manual_seed(seed)
    task = make(torch.device("cpu"), seed, True)
    few = tuple(tensor[:32] for tensor in task.held_out)
    short = dataclasses.replace(task, batches=task.batches[:steps], held_out=few)
    return training.compare(short, lambda step, loss: None).failures()


@pytest.mark.parametrize("make", [tasks.digits, tasks.text])
def test_other_rounding_passes(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    _instead_of_fused(monkeypatch, _otherwise_rounded)
    assert _failures(make, steps=10) == []


SABOTAGE = [_scaled_block, _scaled_input_gradient, _tanh_gelu, _tanh_slope, _scaled_bias, _not_a_number]


@pytest.mark.parametrize(
    "make, change",
    [(tasks.digits, change) for change in SABOTAGE] + [(tasks.text, change) for change in SABOTAGE[:4]],
    ids=lambda value: value.__name__.strip("_"),
)
def test_sabotage_is_noticed(make: Callable, change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    _instead_of_fused(monkeypatch, change)
    assert any("part at step" in failure for failure in _failures(make, steps=12))


@pytest.mark.parametrize("change", [_scaled_block, _not_a_number], ids=lambda change: change.__name__.strip("_"))
def test_exit_code_when_losses_part(
    change: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _instead_of_fused(monkeypatch, change)
    monkeypatch.setattr(tasks, "text", tasks.digits)  # once is enough, and faster
    assert demo.main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path)]) == 1
    assert "FAILED: digits: the " in capsys.readouterr().out
    assert (tmp_path / "fastbp-demo.png").exists()


def test_nothing_fused_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training, "fuse", lambda model, **options: fastbp.fuse(model, filter_fn=lambda *_: False, **options)
    )
    assert "did not fuse" in _failures(tasks.digits, steps=8)[0]


@pytest.mark.parametrize("package, module", [("scikit-learn", "sklearn.datasets"), ("matplotlib", "matplotlib.figure")])
def test_missing_package(
    package: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main(["--quick", "--output-dir", str(tmp_path / "unused")]) == 2
    printed = capsys.readouterr()
    assert printed.err == f'fastbp demo: {package} not installed; pip install "fastbp[demo]"\n'
    assert printed.out == "" and not (tmp_path / "unused").exists()


def test_output_dir_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--quick", "--output-dir", str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "x"], ["--steps", "3"], ["--device", "tpu"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--device", "cuda"])
    assert "finds no GPU" in capsys.readouterr().err


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = report.Progress("digits", 3)
    for step in (1, 2, 3):
        progress(step, 0.5)
    assert terminal.getvalue().strip().count("\n") == 0
    assert "digits 3/3 [##############################] loss 0.5000" in terminal.getvalue()
