"""``fastbp.tune``: what it measures, what it refuses to take, what is remembered, and that calls take it."""

import json
import os
import stat
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch
from support import each
from torch import nn

import fastbp
from fastbp import __main__ as cli
from fastbp import backends, cache
from fastbp.backends import measured, native
from fastbp.backends.measured import EAGER, Choice, Sizes, Subject
from fastbp.forms import FORMS
from fastbp.tuning import TunedCall, race, tune_jobs
from fastbp.tuning.jobs import parse, watch
from fastbp.tuning.race import Outcome, candidates, run_off

CPU = torch.device("cpu")
KEYS = {
    "linear_act": "linear_act 6x8x16 gelu float32 preact",
    "gated_linear_act": "gated_linear_act 6x8x16 silu bfloat16 preact",
    "mlp": "mlp 6x8x16x4 relu float32 output",
    "gated_mlp": "gated_mlp 6x8x16x4 silu float32 recompute",
}
with_native = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own, and nothing known from another test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(measured, "_unwritten", {})
    backends.forget()
    yield tmp_path / "fastbp"
    backends.forget()


def put(key, fastest, **entry):
    backends.remember(CPU, key, {"fastest": fastest} | entry)


def model():
    """Three calls of two sizes, one of which names its backend."""
    return nn.Sequential(
        fastbp.MLP(8, 16, activation="relu"),
        fastbp.MLP(8, 16, activation="relu"),
        fastbp.LinearAct(8, 4, bias=False, activation="gelu", backend="reference"),
        fastbp.GatedLinear(4, 3),
    )


class Fake:
    """Steps that take given milliseconds by a clock of its own, and how many calls each had."""

    def __init__(self, **milliseconds):
        self.calls = dict.fromkeys(milliseconds, 0)
        self.steps = {name: self.step(name, ms) for name, ms in milliseconds.items()}
        self.now = 0.0

    def step(self, name, ms):
        def run():
            self.now += ms / 1e3
            self.calls[name] += 1

        return run

    def clock(self, step, calls):
        start = self.now
        for _ in range(calls):
            step()
        return self.now - start


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


@each("form", FORMS)
def test_every_candidate_is_measured_or_refused_and_the_fastest_is_taken(form, place):
    job = parse("x", KEYS[form], CPU)
    before = torch.random.get_rng_state()
    outcome = race.run_race(job, 0.001)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = [choice.name for choice in candidates(job)]
    assert set(outcome.milliseconds) | set(outcome.refused) == set(names) and outcome.unmeasured == names[0]
    assert outcome.fastest in outcome.milliseconds and all(ms > 0 for ms in outcome.milliseconds.values())
    # What eager keeps is more than a block's policy, but for ReLU, where both keep the output.
    assert (EAGER in outcome.refused) is (form not in ("linear_act", "mlp")), outcome.refused


@with_native
def test_the_candidates_on_a_cpu():
    found = {choice.name for choice in candidates(parse("x", "linear_act 1x8x8 gelu float32 auto", CPU))}
    ways = {"native", "native narrow", "native wide", "native library"}
    assert found == ways | {"native row", "reference", EAGER}
    two = {choice.name for choice in candidates(parse("x", "linear_act 2x8x8 gelu bfloat16 auto", CPU))}
    pairs = {"native narrow_pairs"} if native.capability() == "avx512_bf16" else set()
    assert two == ways | pairs | {"reference", EAGER}


def test_a_wrong_candidate_and_one_that_raises_are_refused(monkeypatch):
    def wrong(config, x, tensors):
        y, *kept = backends.reference.forward(config, x, tensors)
        return [y * 1.001, *kept]

    broken = type(backends)("broken")
    broken.__dict__.update(vars(backends.reference), forward=wrong)
    raising = type(backends)("raising")
    raising.__dict__.update(vars(backends.reference), forward=lambda *arguments: 1 / 0)
    nan = type(backends)("nan")
    nan.__dict__.update(
        vars(backends.reference),
        backward=lambda *a, **k: [g if g is None else g * float("nan") for g in backends.reference.backward(*a, **k)],
    )
    for name, module in {"broken": broken, "raising": raising, "nan": nan}.items():
        monkeypatch.setitem(backends.BACKENDS, name, module)
    outcome = race.run_race(parse("x", KEYS["linear_act"], CPU), 0.001)
    assert "error 0.001 against float64" in outcome.refused["broken"]
    assert outcome.refused["raising"] == "ZeroDivisionError: division by zero"
    assert "error inf" in outcome.refused["nan"]
    assert "reference" in outcome.milliseconds


def test_no_candidate_at_all_is_an_error_with_the_reasons(monkeypatch):
    monkeypatch.setattr(race, "candidates", lambda job: [Choice("nobody")])
    with pytest.raises(RuntimeError, match=r"no candidate serves linear_act 6x8x16.*nobody: "):
        race.run_race(parse("x", KEYS["linear_act"], CPU), 0.001)


def test_losers_drop_out_and_winners_get_their_time():
    fake = Fake(best=1.0, near=1.03, far=1.2, lost=3.0)
    times = run_off(fake.steps, 1.0, fake.clock)
    assert times == pytest.approx({"best": 1.0, "near": 1.03, "far": 1.2, "lost": 3.0})
    assert fake.calls["lost"] < fake.calls["far"] / 3 < fake.calls["near"] / 10
    assert fake.calls["best"] >= 900  # a second


def test_slow_steps_get_few_turns():
    """Ten times their seconds, or eight turns; two calls more warm up and count how many make a burst."""
    for milliseconds, turns in ((100.0, 24), (200.0, 15), (5000.0, 8)):
        fake = Fake(one=milliseconds, other=1.01 * milliseconds)
        run_off(fake.steps, 0.3, fake.clock)
        assert fake.calls == {"one": turns + 2, "other": turns + 2}


def test_of_equals_the_written_rule_stays():
    def fastest(**times):
        return Outcome(times, {}, "rule").fastest

    assert fastest(other=1.0, rule=1.004) == "rule"
    assert fastest(other=1.0, rule=1.01) == "other"
    assert fastest(other=1.0) == "other"


@with_native
@each("form", FORMS)
def test_calls_of_these_sizes_take_what_was_measured(form):
    """Told by the node of autograd that they leave, and by the config that it was given."""
    job = parse("x", KEYS[form], CPU)
    call = race._draw(job)
    parts = (call.x, call.weights, call.biases, (*call.weights, *call.biases))

    def taken(x=call.x):
        config = backends.choose(job.config, x, parts[3], call.weights)
        return config.backend, config.route

    rule = taken()
    for fastest, expected in (
        ("native wide", ("native", "wide")),
        ("reference", ("reference", "")),
        (EAGER, (EAGER, "")),
    ):
        put(job.key, fastest)
        assert taken() == expected
        assert taken(call.x.view(2, 3, -1)) == expected, "rows are what counts, however they are arranged"
        assert taken(call.x[:5]) == rule, "other sizes were not measured"
        assert backends.choose(backends.with_backend(job.config, "reference"), *parts[::3], call.weights).route == ""
    put(job.key, "native")
    assert taken() == rule


@each("form", FORMS)
@each("fastest", ["native", "reference", EAGER])
def test_what_is_refused_is_refused_where_sizes_were_measured(form, fastest):
    """With the sizes of the call that was measured, or none."""
    job = parse("x", KEYS[form], CPU)
    call = race._draw(job)
    weights, biases = list(call.weights), list(call.biases)
    put(job.key, "reference" if fastest == "native" and native.unavailable else fastest)

    def refused(words, x=call.x, weights=weights, biases=biases, error=ValueError):
        with pytest.raises(error, match=words) as caught:
            names = dict(activation=job.config.row.name, save=job.config.save)
            function = getattr(fastbp, form)
            function(x, weights, biases, **names) if form == "mlp" else function(x, *weights, *biases, **names)
        assert str(caught.value).startswith(f"fastbp.{form}: ")

    refused(r"must be \(16,\)", biases=[biases[0].detach()[:1], *biases[1:]])
    refused(r"must be \(16,\)", biases=[biases[0].detach().expand(6, 16), *biases[1:]])
    refused("must have the dtype of x", biases=[biases[0].detach().double(), *biases[1:]], error=TypeError)
    refused("must have the dtype of x", weights=[weights[0].detach().double(), *weights[1:]], error=TypeError)
    refused("must be on the device of x", weights=[weights[0].detach().to("meta"), *weights[1:]])
    refused(r"must be \(out_features, 8\)", weights=[weights[0].detach()[0], *weights[1:]])
    refused("at least one dimension", x=call.x.detach()[0, 0])
    refused("must be a dense tensor", x=call.x.detach().to_sparse(), error=TypeError)
    if job.config.form.gated:
        narrow = [biases[0], biases[1].detach()[:1], *biases[2:]]  # would be spread over the gate's
        refused("must have the same shape", weights=[weights[0], weights[1].detach()[:1], *weights[2:]], biases=narrow)


def results(layer, x, dy):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)], type(y.grad_fn).__name__


@with_native
def test_a_tuned_module_computes_the_same_another_way():
    """By the bits: what a route computes is what the same route forced on every call does."""
    torch.manual_seed(0)
    layer = fastbp.LinearAct(300, 40)
    x, dy = torch.randn(64, 300, requires_grad=True), torch.randn(64, 40)
    key = "linear_act 64x300x40 gelu float32 preact"
    found = {}
    for route in ("narrow", "wide"):
        torch.ops.fastbp_native.set_debug(False, route)
        forced, _ = results(layer, x, dy)
        torch.ops.fastbp_native.set_debug(False, "")
        put(key, f"native {route}")
        found[route], node = results(layer, x, dy)
        assert node.startswith("LinearActFunction") and all(map(torch.equal, found[route], forced))
    assert not all(map(torch.equal, found["narrow"], found["wide"])), (
        "the ways differ in rounding, or this tests nothing"
    )
    put(key, EAGER)
    plain, node = results(layer, x, dy)
    assert not node.startswith("LinearActFunction")
    torch.testing.assert_close(plain, found["wide"])
    with fastbp.use(backend="native"):
        assert results(layer, x, dy)[1].startswith("LinearActFunction")
    x64 = x[:4].detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(layer.double(), x64)


@with_native
def test_graphs_take_what_was_measured_too(fresh_dynamo):
    """And where that is PyTorch under its own autograd, the same operations beneath it."""
    torch.manual_seed(0)
    layer = fastbp.LinearAct(300, 40)
    x, dy = torch.randn(64, 300, requires_grad=True), torch.randn(64, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for fastest in ("native narrow", EAGER):
        put("linear_act 64x300x40 gelu float32 preact", fastest)
        ours, plain = results(compiled, x, dy)[0], results(layer, x, dy)[0]
        if fastest == EAGER:
            torch.testing.assert_close(ours, plain)
        else:
            assert all(map(torch.equal, ours, plain))


def test_eager_needs_no_more_memory_than_the_policy():
    """The promise of bytes holds whatever is the fastest."""
    for activation, save in (("gelu", "preact"), ("relu", "output"), ("silu", "preact"), ("tanh", "output")):
        layer = fastbp.LinearAct(16, 32, activation=activation)
        x = torch.randn(8, 16)
        key = f"linear_act 8x16x32 {activation} float32 {save}"

        def kept(layer=layer, x=x):
            with fastbp.SavedBytes(exclude=[layer, x]) as saved:
                layer(x)
            return saved.total

        before = kept()
        put(key, EAGER)
        assert kept() == before


def test_tune_measures_prints_remembers_and_knows_it_again(place, capsys):
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
    (path,) = place.iterdir()
    assert str(path) == report.path and stat.S_IMODE(place.stat().st_mode) == 0o700
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


@each(
    "entry",
    [
        {"fastest": "nobody"},
        {"fastest": "native nowhere"},
        {"fastest": "triton"},
        {"fastest": ["native"]},
        {"slowest": "native"},
        "native",
        None,
    ],
)
def test_an_entry_that_says_nothing_usable_is_as_if_not_there(entry, capsys):
    key = KEYS["linear_act"]
    backends.remember(CPU, key, entry)
    backends.remember(CPU, "no problem at all", {"fastest": "reference"})
    job = parse("x", key, CPU)
    call = race._draw(job)
    rule = "native" if native.unavailable is None else "reference"
    assert backends.choose(job.config, call.x, (*call.weights, *call.biases), call.weights).backend == rule
    assert cli.main(["tune", "--list"]) == 0
    assert f"{key}: cannot be read" in capsys.readouterr().out


def test_what_was_measured_elsewhere_is_not_found(monkeypatch):
    """Another device, version, library or number of threads is another file."""
    found = backends.environment(CPU)
    names = {measured.file_name(found)}
    for index, (key, value) in enumerate(found):
        changed = (*found[:index], (key, f"{value}!"), *found[index + 1 :])
        names.add(measured.file_name(changed))
    assert len(names) == 1 + len(found)
    assert dict(found)["threads"] == str(torch.get_num_threads())
    put(KEYS["linear_act"], "reference")
    subject, sizes = measured.parse_key(KEYS["linear_act"])
    assert sizes in measured.recall(subject, found)
    assert measured.recall(subject, (*found[:-1], ("reference", "9.9"))) == {}
    assert measured.recall(Subject(subject.form, "silu", subject.dtype, subject.save), found) == {}
    assert Sizes(7, sizes.features) not in measured.recall(subject, found)


def test_a_warm_cache_costs_nothing_at_import_and_little_a_call(place):
    """0.6 µs, where looking up an unmeasured call takes as much: a ratio, for a busy machine is slower in both."""
    key = "linear_act 4x8x8 gelu float32 preact"
    job = parse("x", key, CPU)
    call = race._draw(job)
    tensors = (*call.weights, *call.biases)

    def nanoseconds():
        def look():
            backends.choose(job.config, call.x, tensors, call.weights)

        return min(timeit.repeat(look, number=20_000, repeat=7)) / 20_000 * 1e9

    unmeasured = nanoseconds()
    put(key, "reference")
    assert nanoseconds() < 3 * unmeasured
    program = f"""
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import fastbp
print([name for name in opened if {str(place)!r} in name])
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert outcome.stdout.strip() == "[]"


def test_the_command(place, capsys, tmp_path, monkeypatch):
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
