"""What ``fastbp.tune`` accepts, by its own road: of whole calls, and of the products of the Triton kernels."""

import random

import pytest
import torch
from support import each
from tuning_cases import CPU, spoiling

import fastbp
from fastbp import backends, cache
from fastbp.activations import TABLE, bind
from fastbp.backends import triton
from fastbp.forms import FORMS
from fastbp.problem import DTYPES
from fastbp.saving import POLICIES, legal_policies
from fastbp.tuning import race, tune_jobs
from fastbp.tuning.jobs import parse

pytestmark = pytest.mark.usefixtures("own_choices")
ROWS = 4096


def nan(t):
    t[...] = float("nan")


def last_row(t):
    t[-1] = 0


def one_column(t):
    t[:, 3] *= 0.9


def one_number(t):
    t[5, 3] += 1


def next_bias(t):
    t[:, 3] += 0.2


CALLS = [
    ("output", "float32", "gelu"),
    ("output", "bfloat16", "gelu"),
    ("gradient", "float32", "silu"),
    ("gradient", "bfloat16", "silu"),
    ("gradient", "float32", "relu"),
    ("gradient", "float16", "hardswish"),
    ("gradient", "bfloat16", "leaky_relu"),
]
SPOILT = {f.__name__: f for f in (nan, last_row, one_column, one_number, next_bias)}


@each("result, dtype, activation", CALLS)
def test_wrong_candidates_are_refused_and_the_fastest_right_one_is_taken(result, dtype, activation, monkeypatch):
    """They are as fast as anybody, and wrong in little: by the RMS of the whole most of them passed. A kink is no
    excuse: what z beside it make of gradients is computed."""
    for name, spoil in SPOILT.items():
        monkeypatch.setitem(backends.BACKENDS, name, spoiling(name, spoil, result))
    # Rows beyond number make the error of one nothing in the RMS; features few, so that it is quick.
    call = (
        f"linear_act {ROWS}x64x32 {activation} {dtype} preact"
        if result == "output"
        else f"mlp {ROWS}x32x16x8 {activation} {dtype} preact"
    )
    (found,) = tune_jobs([(parse("x", call, CPU), 1)], 0.001, again=True, quiet=True).calls
    assert set(SPOILT) <= set(found.refused), f"accepted: {set(SPOILT) & set(found.milliseconds)}"
    assert "reference" in found.milliseconds and found.fastest not in SPOILT
    assert "nan" in found.refused["nan"] and f"at row {ROWS - 1}" in found.refused["last_row"]
    assert "column 3, instead of" in found.refused["one_column"] and "row 5, column 3" in found.refused["one_number"]


def test_a_reference_backend_that_is_wrong_is_no_yardstick(monkeypatch):
    """It is a candidate as any other: what is right is what plain PyTorch computes."""
    broken = spoiling("reference", nan, "output")
    monkeypatch.setitem(backends.BACKENDS, "reference", broken)
    monkeypatch.setattr(backends, "reference", broken)
    outcome = race.run_race(parse("x", "linear_act 40x16x8 gelu float32 preact", CPU), 0.001)
    assert "nan" in outcome.refused["reference"] and "eager" not in outcome.refused


def test_what_nobody_wrote_is_seen_though_the_memory_holds_what_another_wrote(monkeypatch):
    right = backends.reference

    def forward(config, x, tensors):
        y, *kept = right.forward(config, x, tensors)
        mine = torch.empty_like(y)
        mine[:-1] = y[:-1]
        return [mine, *kept]

    unwritten = type(backends)("unwritten")
    unwritten.__dict__.update(vars(right), forward=forward)
    monkeypatch.setitem(backends.BACKENDS, "unwritten", unwritten)
    outcome = race.run_race(parse("x", "linear_act 64x16x8 gelu float32 preact", CPU), 0.001)
    assert "has nan at row 63" in outcome.refused["unwritten"] and "reference" in outcome.milliseconds


def test_no_right_candidate_is_refused(monkeypatch):
    """Of any form, activation, dtype, policy and size: the reference, and PyTorch where it does not keep too much."""
    monkeypatch.setattr(race, "run_off", lambda steps, *rest: dict.fromkeys(steps, 1.0))
    pick, judged = random.Random(0), 0
    for _ in range(150):
        form, activation = FORMS[pick.choice(list(FORMS))], bind(pick.choice(TABLE).name)
        save, dtype = pick.choice(legal_policies(activation, form)), pick.choice(DTYPES)
        if POLICIES[save].compressed and dtype == torch.float64:
            continue
        layers = len(form.parts) - (form.gated and not form.given) if form.parts else pick.choice((1, 2, 3))
        sizes = [pick.choice((1, 2, 7, 48, 130)), *(pick.choice((1, 2, 5, 24, 64)) for _ in range(layers + 1))]
        words = "x".join(map(str, sizes)), activation.name, str(dtype).removeprefix("torch."), save
        outcome = race.run_race(parse("x", " ".join((form.name, *words)), CPU), 0.001)
        refused = {name: why for name, why in outcome.refused.items() if not why.startswith("keeps ")}
        assert not refused, (form.name, words, refused)
        judged += len(outcome.milliseconds)
    assert judged > 150


@each("written", ["x", "weight", "dy"])
def test_who_writes_over_what_it_reads_is_refused_and_the_others_read_what_was_there(written, monkeypatch):
    right = backends.BACKENDS["reference"]

    def backward(config, dy, saved, needs, *rest, **options):
        grads = right.backward(config, dy, saved, needs, *rest, **options)
        {"x": saved[0], "weight": saved[2], "dy": dy}[written].data.mul_(1.5)
        return grads

    writing = type(backends)("writing")
    writing.__dict__.update(vars(right), backward=backward)
    others = dict(backends.BACKENDS)
    backends.BACKENDS.clear()
    backends.BACKENDS.update({"writing": writing} | others)
    try:
        outcome = race.run_race(parse("x", "linear_act 64x16x8 gelu float32 preact", CPU), 0.001)
    finally:
        backends.BACKENDS.clear()
        backends.BACKENDS.update(others)
    shape = {"x": (64, 16), "weight": (8, 16), "dy": (64, 8)}[written]
    assert outcome.refused["writing"] == f"it wrote over {shape} of float32, which it may only read"
    assert "reference" in outcome.milliseconds


def test_a_reference_that_does_not_fit_refuses_all_of_a_call_and_tuning_goes_on(monkeypatch, capsys):
    from fastbp.tuning import drawn

    compose = drawn.compose

    def small(form, activation, inputs, weights, biases):
        if inputs[0].shape[-1] == 24 and inputs[0].dtype == torch.float64:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 3 GiB\nand more")
        return compose(form, activation, inputs, weights, biases)

    monkeypatch.setattr(drawn, "compose", small)
    net = torch.nn.Sequential(fastbp.LinearAct(16, 24), fastbp.LinearAct(24, 16), fastbp.LinearAct(16, 8))
    report = fastbp.tune(net, torch.randn(5, 16), seconds=0.001)
    served = [call for call in report.calls if "x24x16 " not in call.call]
    (failed,) = [call for call in report.calls if call not in served]
    assert len(served) == 2 and all(call.milliseconds for call in served)
    said = "its reference in float64: OutOfMemoryError: out of memory. Tried to allocate 3 GiB"
    assert failed.milliseconds == {} and set(failed.refused.values()) == {said} and failed.fastest == failed.unmeasured
    printed = capsys.readouterr().out
    assert f"{failed.call}: not measured, {failed.unmeasured} stays: {said}" in printed
    assert "ms now" in report.summary and "nan" not in report.summary
    again = fastbp.tune(net, torch.randn(5, 16), seconds=0.001, quiet=True)
    assert [call.known for call in again.calls] == [call in served for call in report.calls]


if triton.unavailable is None:
    from fastbp.backends.triton import autotune, launch, layers, tuning

products = pytest.mark.skipif(
    triton.unavailable is not None or not triton.interpreting(), reason="kernels of Triton's that are interpreted"
)
RESULTS = {"forward": "y", "gated_forward": "up", "dgrad": "dz", "gated_dgrad": "dup"}
TALL = (ROWS, 16, 16)


@pytest.fixture
def few(monkeypatch):
    """PyTorch's own product, and two tiles, for the interpreter takes its time."""
    tuning.forget()
    real = autotune.candidates

    def first_three(kind, device, pingpong=False):
        return dict(list(real(kind, device, pingpong).items())[:3])

    monkeypatch.setattr(autotune, "candidates", first_three)
    yield
    tuning.forget()


def tuned(kind, sizes=TALL):
    times = lambda steps: dict.fromkeys(steps, 1.0)  # noqa: E731
    return autotune.tune(kind, "gelu", torch.bfloat16, sizes, CPU, times)


def spoil_launches(monkeypatch, kind, name, spoil):
    """One tile's result, as it comes from a launch, is spoilt."""
    real = getattr(launch, kind)

    def spoilt(how, tile, programs, *tensors):
        def run():
            real(how, tile, programs, *tensors)()
            if tile.name == name:
                spoil(tensors[{"forward": 3, "gated_forward": 5, "dgrad": 3, "gated_dgrad": 5}[kind]])

        return run

    monkeypatch.setattr(launch, kind, spoilt)


@products
@each("kind", RESULTS)
@each("fault", [nan, last_row, one_column, one_number])
def test_a_wrong_tile_is_refused(kind, fault, few, monkeypatch):
    _, wrong, right = autotune.candidates(kind, CPU)
    spoil_launches(monkeypatch, kind, wrong, fault)
    found = tuned(kind, (512, 16, 16))
    assert set(found.refused) == {wrong} and set(found.milliseconds) == {tuning.LIBRARY, right}
    assert f"{RESULTS[kind]}" in found.refused[wrong]


@products
@each("kind", RESULTS)
def test_elementwise_kernels_that_return_nan_make_nobody_right(kind, few, monkeypatch):
    """The library's candidate runs them too: they were the yardstick, and infinite errors are not above infinite."""
    for name in ("activation", "chain_rule", "gated_chain_rule"):
        real = getattr(launch, name)

        def spoilt(*arguments, real=real):
            def run():
                found = real(*arguments)
                found()
                for name in ("y", "dz", "h", "dgate", "dup"):
                    if found.arguments.get(name) is not None:
                        found.arguments[name].fill_(float("nan"))

            return run

        monkeypatch.setattr(launch, name, spoilt)
    found = tuned(kind, (40, 16, 16))
    assert "nan" in found.refused[tuning.LIBRARY] and tuning.LIBRARY not in found.milliseconds
    assert len(found.milliseconds) == 2, found.refused


@products
def test_a_tile_that_leaves_its_last_rows_is_seen_in_memory_that_another_wrote(few, monkeypatch):
    _, first, second = autotune.candidates("forward", CPU)
    real = launch.forward

    def spoilt(how, tile, programs, x, weight, bias, y, z, *rest):
        if tile.name == second:
            x, y, z = (t[:-1] for t in (x, y, z))
        return real(how, tile, programs, x, weight, bias, y, z, *rest)

    monkeypatch.setattr(launch, "forward", spoilt)
    found = tuned("forward", (64, 16, 16))
    assert "has nan at row 63" in found.refused[second] and first in found.milliseconds


@products
def test_a_reference_that_does_not_fit_refuses_every_candidate(few, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(autotune, "plain", full)
    found = tuned("forward", (40, 16, 16))
    assert found.milliseconds == {} and set(found.refused) == set(autotune.candidates("forward", CPU))
    assert set(found.refused.values()) == {"its reference in float64: OutOfMemoryError: out of memory"}
    assert tuning.recall(CPU, "forward", "gelu", torch.bfloat16, (40, 16, 16)) is None
    assert not list(cache.folder().glob("triton-*.json"))


@products
@each("kind", RESULTS)
def test_right_tiles_are_accepted_whatever_the_activation(kind, few):
    for activation in ("relu", "mish", "hardsigmoid", "relu2"):
        for sizes in ((1, 8, 16), (130, 24, 48)):
            found = autotune.tune(kind, activation, torch.float16, sizes, CPU, lambda s: dict.fromkeys(s, 1.0), False)
            assert not found.refused, (activation, sizes, found.refused)


@products
@each("kind", RESULTS)
def test_every_launch_of_tuning_is_on_the_device_of_the_tensors(kind, few, monkeypatch):
    """Triton launches on the current device, which need not be the one that is tuned."""
    inside, entered = [], []

    class On:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.pop()

    monkeypatch.setattr(layers, "on", On)
    launches = []
    for name in (kind, "activation", "chain_rule", "gated_chain_rule", "column_sum"):
        real = getattr(launch, name)

        def watched(*arguments, real=real):
            found = real(*arguments)

            def run():
                launches.append(bool(inside))
                found()

            return run

        monkeypatch.setattr(launch, name, watched)

    def clock(steps):
        for step in steps.values():
            step()
        return dict.fromkeys(steps, 1.0)

    autotune.tune(kind, "gelu", torch.bfloat16, (40, 16, 16), CPU, clock, remember=False)
    assert len(launches) >= 6 and all(launches) and set(entered) == {CPU}
