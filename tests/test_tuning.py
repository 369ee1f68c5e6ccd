"""``fastbp.tune``: what it sees, what it measures and refuses, what it says and remembers; and the command."""

import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from support import each
from torch import nn
from tuning_cases import CPU, KEYS

import fastbp
from fastbp import __main__ as cli
from fastbp import backends, cache
from fastbp.backends import measured
from fastbp.backends.measured import EAGER
from fastbp.forms import FORMS
from fastbp.tuning import TunedCall, tune_jobs
from fastbp.tuning.jobs import parse, watch

pytestmark = pytest.mark.usefixtures("own_choices")


def model():
    """Three calls of two sizes, one of which names its backend."""
    return nn.Sequential(
        fastbp.MLP(8, 16, activation="relu"),
        fastbp.MLP(8, 16, activation="relu"),
        fastbp.LinearAct(8, 4, bias=False, activation="gelu", backend="reference"),
        fastbp.GatedLinear(4, 3),
    )


@each("form", FORMS)
def test_a_problem_is_read_as_it_is_written(form):
    key = KEYS[form]
    subject, sizes = measured.parse_key(key)
    assert measured.key_of(subject, sizes) == key == parse("x", key, CPU).key
    assert subject.form == form and sizes.rows == 6 and sizes.features[:2] == (8, 16)


@each(
    ("text", "words"),
    [
        ("mlp 4 gelu", "one is like 'mlp"),
        ("mlp 4x8xa gelu float32 auto", "one is like 'mlp"),
        ("dense 4x8x8 gelu float32 auto", "there are linear_act"),
        ("mlp 0x8x8 gelu float32 auto", "at least 1 row"),
        ("linear_act 4x8 gelu float32 auto", "2 features"),
        ("linear_act 4x8x8x8 gelu float32 auto", "must have 2 features after the rows, got 3"),
        ("gated_mlp 4x8x8 silu float32 auto", "must have 3 features after the rows, got 2"),
        ("mlp 4x8x8 glu float32 auto", "must have an activation of identity, relu"),
        ("mlp 4x8x8 gelu int8 auto", "a dtype of float64, float32"),
        ("mlp 4x8x8 gelu float32 half", "unknown save policy 'half'"),
        ("mlp 4x8x8 gelu float32 output", "cannot serve gelu"),
        ("mlp 4x8x8 gelu float64 fp8", "is for float32"),
    ],
)
def test_what_is_no_problem_is_refused(text, words):
    with pytest.raises(ValueError) as caught:
        parse("fastbp.tune", text, CPU)
    assert words in str(caught.value)


def test_the_calls_of_a_model_are_seen():
    net = model()
    net[0].fc1.weight.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    seen = watch("x", net, torch.randn(5, 2, 8))
    found = {job.key: (count, job.biases, job.needs) for job, count in seen.jobs.items()}
    assert found == {
        # Both MLPs are one problem; x of the second takes a gradient, and so does the first weight of the second.
        "mlp 10x8x16x8 relu float32 output": (2, (True, True), (True,) * 5),
        "gated_linear_act 10x4x3 silu float32 preact": (1, (True, True), (True,) * 5),
    }
    assert seen.named == 1
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_calls_without_gradients_are_measured_with_all():
    layer = fastbp.LinearAct(8, 4, bias=False).requires_grad_(False)
    (job,) = watch("x", layer, torch.randn(3, 8)).jobs
    assert job.needs == (True, True, False) and job.biases == (False,)


def test_calls_in_a_graph_are_seen(fresh_dynamo):
    net = torch.compile(fastbp.MLP(8, 16), backend="aot_eager")
    (job,) = watch("x", net, torch.randn(3, 8)).jobs
    assert job.key == "mlp 3x8x16x8 gelu float32 preact"


def test_under_autocast_the_dtype_is_the_products():
    with torch.autocast("cpu", torch.bfloat16):
        (job,) = watch("x", fastbp.MLP(8, 16), torch.randn(3, 8)).jobs
    assert job.dtype == torch.bfloat16


def test_tune_measures_prints_remembers_and_knows_it_again(own_choices, capsys):
    x = torch.randn(10, 8)
    report = fastbp.tune(model(), x, seconds=0.001)
    printed = capsys.readouterr().out
    assert [(call.call, call.count, call.known) for call in report.calls] == [
        ("mlp 10x8x16x8 relu float32 output", 2, False),
        ("gated_linear_act 10x4x3 silu float32 preact", 1, False),
    ]
    for call in report.calls:
        assert str(call) in printed and f": {call.fastest}, {call.milliseconds[call.fastest]:.3f} ms" in str(call)
    assert "1 calls name their backend" in str(report) and report.path in str(report)
    (path,) = own_choices.glob("*.json")
    assert str(path) == report.path and stat.S_IMODE(own_choices.stat().st_mode) == 0o700
    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert {key: entry["fastest"] for key, entry in content["problems"].items()} == {
        call.call: call.fastest for call in report.calls
    }
    again = fastbp.tune(model(), x, quiet=True)
    assert all(call.known for call in again.calls) and capsys.readouterr().out == ""
    assert [call.milliseconds for call in again.calls] == [call.milliseconds for call in report.calls]
    anew = fastbp.tune(model(), x, seconds=0.001, again=True, quiet=True)
    assert not any(call.known for call in anew.calls)


def test_the_report_says_by_how_much():
    call = TunedCall("mlp 1x2x3 gelu float32 preact", 3, {"native": 1.5, "reference": 1.0, EAGER: 1.25}, {}, "native")
    words = (
        "3 × mlp 1x2x3 gelu float32 preact: reference, 1.000 ms instead of native: 1.50 times as fast, then eager 1.25"
    )
    assert str(call).startswith(words)
    report = fastbp.TuningReport([call], path="somewhere")
    assert "4.500 ms before, 3.000 ms now" in str(report) and "remembered in somewhere" in str(report)
    refused = TunedCall("c", 1, {"reference": 1.0}, {"native": "error 3"}, "native")
    assert "native was refused: error 3" in str(refused) and "nan" not in fastbp.TuningReport([refused]).summary


REFUSED = {
    "nothing of fastbp": (nn.Linear(8, 8), torch.ones(2, 8), ValueError, "makes no call of fastbp; fastbp.fuse"),
    "a backend is named": (
        fastbp.MLP(8, 8, backend="reference"),
        torch.ones(2, 8),
        ValueError,
        "all 1 calls of fastbp",
    ),
    "inputs do not fit": (fastbp.MLP(8, 8), torch.ones(2, 9), ValueError, "does not run with sample_inputs"),
    "no module": (fastbp.linear_act, torch.ones(2, 9), TypeError, "must be an nn.Module, got function"),
}


@each("fault", REFUSED)
def test_what_cannot_be_tuned_is_refused(fault):
    model, inputs, error, words = REFUSED[fault]
    with pytest.raises(error, match=r"fastbp\.tune: ") as caught:
        fastbp.tune(model, inputs)
    assert words in str(caught.value)


def test_seconds_are_positive():
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        fastbp.tune(fastbp.MLP(8, 8), torch.ones(2, 8), seconds=0)


@each("surroundings", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_is_measured_is_a_step_of_training_whatever_surrounds_it(surroundings):
    job = parse("x", KEYS["linear_act"], CPU)
    with surroundings():
        (call,) = tune_jobs([(job, 1)], 0.001, again=True, quiet=True).calls
    assert "reference" in call.milliseconds and EAGER in call.milliseconds and not call.refused


def test_a_user_without_a_home(monkeypatch):
    def homeless():
        raise OSError("this user has no home")

    monkeypatch.setattr(cache, "folder", homeless)
    with pytest.warns(RuntimeWarning, match="this user has no home"):
        report = fastbp.tune(fastbp.MLP(8, 8), torch.ones(2, 8), seconds=0.001, quiet=True)
    assert report.path == "" and "not remembered" in str(report)


def test_a_cache_that_cannot_be_written_warns_once_and_serves_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "deeper"))
    with pytest.warns(RuntimeWarning, match="fastbp's cache is not used") as caught:
        report = fastbp.tune(model(), torch.randn(10, 8), seconds=0.001, quiet=True)
    assert len(caught) == 1 and "not remembered" in str(report)
    assert set(measured.inventory(backends.environment(CPU))) == {call.call for call in report.calls}
    subject, sizes = measured.parse_key(report.calls[0].call)
    backend, _, route = report.calls[0].fastest.partition(" ")
    assert measured.recall(subject, backends.environment(CPU))[sizes] == (backend, route)


def test_the_command(capsys, tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.ones(5, 8)\n"
        "def alone():\n    return nn.Linear(8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    call = "linear_act 3x8x8 gelu float32 auto"
    assert cli.main(["tune", "net:make", "--call", call, "--seconds", "0.001", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mlp 5x8x16x8 relu float32 output: " in printed and "linear_act 3x8x8 gelu float32 preact: " in printed
    assert cli.main(["tune", "--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert "mlp 5x8x16x8 relu" in listed and listed.splitlines()[-1].startswith("2 calls, in ")
    assert Path(listed.splitlines()[-1].partition(", in ")[2]).is_file()


@each(
    ("arguments", "words"),
    [
        ([], "nothing to measure"),
        (["--list", "--call", "mlp"], "--list shows what is remembered"),
        (["--call", "mlp"], "'mlp' is no problem"),
        (["nowhere"], "must be named as MODULE:FUNCTION, got 'nowhere'"),
        (["no.such.module:make"], "cannot be imported"),
        (["json:dumps_it"], "cannot be imported"),
        (["fastbp:available_backends"], "must return a model and its sample inputs, got dict"),
        (["--call", "mlp 1x2x2 gelu float32 auto", "--seconds", "-1"], "must be a number of seconds above 0"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, words, capsys):
    try:
        code = cli.main(["tune", "--device", "cpu", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err
