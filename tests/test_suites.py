"""The tables of suites and rivals: what they name is there, whoever is measured is right or says why it is not, and a
mode times what it says."""

import time
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from support import each
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastbp
from benchmarks import clock, cuda_clock, measure, model_memory, models, rivals
from benchmarks.cases import Case, flops, least_bytes
from benchmarks.rivals import KINDS, RIVALS, Rival
from benchmarks.steps import task_of
from benchmarks.suites import FLAGS, MODES, SUITES, TINY
from fastbp.activations import bind
from fastbp.backends import BACKENDS
from fastbp.forms import FORMS
from fastbp.saving import legal_policies

CPU = torch.device("cpu")
BLOCKS = (
    Case("layer", 16, (32, 48), "gelu"),
    Case("layer", 16, (32, 48), "relu"),
    Case("gated", 16, (32, 48), "silu"),
    Case("mlp", 16, (32, 48, 32), "gelu_tanh"),
    Case("gated_mlp", 16, (32, 48, 32), "silu"),
)


@each("name", SUITES)
def test_a_suite_names_what_is_there(name):
    suite = SUITES[name]
    assert suite.about and set(suite.modes) <= set(MODES) and set(suite.cases) == {"cpu", "cuda"}
    for device, cases in suite.cases.items():
        assert cases and len({case.name for case in cases}) == len(cases)
        for case in (*cases, *suite.quick):
            names = suite.rivals_of(case, device)
            assert names[0] == "eager" and set(names) <= set(RIVALS) and len(set(names)) == len(names)
    known = {f"{device}{dtype}" for device in suite.cases for dtype in ("", " float32", " bfloat16", " float16")}
    assert set(suite.rivals) <= known
    assert not suite.module or import_module(suite.module).main


def test_a_rival_of_each_backend_and_policy():
    for backend in BACKENDS:
        for save in ("preact", "fp8"):
            assert f"fastbp {backend} {save}" in RIVALS and f"fastbp {save}" in RIVALS


@pytest.fixture
def without_code(monkeypatch):
    """torch.compile that makes none."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend="aot_eager"))
    torch._dynamo.reset()


def serves(name, case, mode):
    """Whether a rival of PyTorch's or fastbp's must take part on a CPU."""
    if name == "torch addmm_activation":
        return mode == "fwd" and case.kind == "layer"
    first, *rest = name.split()
    if first != "fastbp" or name in ("fastbp library", "fastbp fused") or "native library" in name:
        return first in ("eager", "linears", "torch.compile", "torch.compile,", "fastbp") and "fastbp" not in name
    save = rest[-1] if rest and rest[-1] not in BACKENDS else "preact"
    backend = rest[0] if rest and rest[0] in BACKENDS else "reference"
    legal = save in legal_policies(bind(case.activation), FORMS[KINDS[case.kind]])
    return legal and not isinstance(BACKENDS[backend], str) and backend != "triton"


@each("case", BLOCKS, ids=lambda case: case.name)
def test_every_rival_is_right_or_left_out_with_a_reason(case, without_code):
    for mode in ("fwd_bwd", "fwd", "bwd"):
        names = [name for name in RIVALS if "triton" not in name and name not in ("fastbp library", "fastbp fused")]
        found = measure.prepare(case, names, CPU, mode)
        assert not found.broken and set(found.steps) | set(found.left_out) == set(names)
        assert all(found.left_out.values())
        for name in names:
            assert name in found.steps or not serves(name, case, mode), (name, found.left_out[name])
            rival = RIVALS[name]
            if name in found.steps and rival.same_function:
                assert found.accuracy[name]["accurate"] or not rival.exact, name
                assert found.accuracy[name]["error"] < 0.05
        for step in found.steps.values():
            step()


@each("name", ["fastbp triton", "fastbp triton output_bits", "fastbp library", "fastbp fused"])
def test_the_interpreted_ones_too(name):
    pytest.importorskip("triton")
    case = Case("layer", 16, (16, 32), "gelu", torch.bfloat16)
    found = measure.prepare(case, ["eager", name], CPU)
    assert found.accuracy[name]["error"] < 0.05 and not found.left_out and not found.broken


@each("case", TINY, ids=lambda case: case.kind)
def test_models_are_right_and_fused_as_a_whole(case, without_code):
    names = ["eager", "eager again", "torch.compile", "fastbp", "fastbp recompute", "linears alone"]
    for mode in ("fwd_bwd", "fwd", "bwd", "train"):
        found = measure.prepare(case, names, CPU, mode)
        assert list(found.left_out) == ["linears alone"] and "not" in found.left_out["linears alone"]
        assert all(row["accurate"] and row["error"] < 1e-5 for row in found.accuracy.values())
        for step in found.steps.values():
            step()
    model = models.build(case)
    fused = RIVALS["fastbp"].make(case, [model])
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    x, _ = models.batch(case, CPU, None)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_of_which_a_block_is_left_is_refused():
    model = models.build(TINY[0])
    model.blocks[1].mlp.act = nn.Softmax(-1)
    with pytest.raises(AssertionError, match="not every block was fused"):
        RIVALS["fastbp"].make(TINY[0], [model])


@each("case", TINY, ids=lambda case: case.kind)
def test_training_steps_train(case):
    task = task_of(case, CPU)
    before = [p.detach().clone() for p in task.params]
    found = measure.prepare(case, ["eager"], CPU, "train")
    found.steps["eager"]()
    torch.manual_seed(0)
    step = measure.step_of(task, RIVALS["eager"].make(case, task.parts), "train", None)
    step()
    assert all(p.grad is None and not torch.equal(p, b) for p, b in zip(task.params, before, strict=True))


@each("case", [*BLOCKS, *TINY], ids=lambda case: case.name)
def test_arithmetic_and_bytes_of_the_products(case):
    task = task_of(case, CPU)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        rivals.eager(case, task.parts)(task.inputs[0][0])
    found = counted.get_flop_counts()["Global"]
    products = sum(n for op, n in found.items() if any(word in str(op) for word in (".addmm", ".mm", "convolution")))
    assert products == sum(2 * m * k * n for m, k, n in case.products)
    assert flops(case, "fwd_bwd") == flops(case, "fwd") + flops(case, "bwd") == 3 * flops(case, "fwd") >= 3 * products
    assert least_bytes(case, "bwd") == 2 * least_bytes(case, "fwd") > 4 * case.rows * case.features[0]


class Slow(torch.autograd.Function):
    """A layer whose passes sleep so long."""

    forward_s, backward_s = 0.03, 0.0

    @staticmethod
    def forward(ctx, x):
        time.sleep(Slow.forward_s)
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        time.sleep(Slow.backward_s)
        return dy * 1


@each(("forward_s", "backward_s"), [(0.03, 0.0), (0.0, 0.03)])
def test_a_mode_times_what_it_says(forward_s, backward_s, monkeypatch):
    monkeypatch.setattr(Slow, "forward_s", forward_s)
    monkeypatch.setattr(Slow, "backward_s", backward_s)
    slow = Rival(lambda case, linears: lambda x: rivals.eager(case, linears)(Slow.apply(x)))
    monkeypatch.setitem(RIVALS, "eager again", slow)
    case = Case("layer", 4, (8, 8), "relu")
    for mode, seconds in (("fwd", forward_s), ("bwd", backward_s), ("fwd_bwd", 0.03)):
        step = measure.prepare(case, ["eager", "eager again"], CPU, mode).steps["eager again"]
        took = min(clock.burst(step, 1) for _ in range(3))
        assert seconds <= took < seconds + 0.02, mode


def test_events_are_around_the_timed_part(monkeypatch):
    """On a GPU, with events that read the host's clock."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    step = clock.Staged(lambda: time.sleep(0.03), lambda state: time.sleep(0.01))
    assert 0.02 <= cuda_clock.burst(step, 2) < 0.05
    assert 10 <= cuda_clock.host_milliseconds(step, 3) < 25
    assert cuda_clock.burst(lambda: step(), 1) >= 0.04
    prepared = measure.Prepared({"eager": step}, {}, {}, {}, 1)
    figures, without = measure.on_cuda(prepared, 0.01, "bwd")
    assert list(without) == ["every rival"] and "graph_ms" not in figures["eager"]


def test_a_result_of_another_shape_is_wrong(monkeypatch):
    wide = lambda case, linears: lambda x: rivals.eager(case, linears)(x)[:, :1] + torch.zeros(1, 1)  # noqa: E731
    monkeypatch.setitem(RIVALS, "eager again", Rival(wide))
    found = measure.prepare(BLOCKS[0], ["eager", "eager again"], CPU, "fwd")
    assert found.accuracy["eager again"] == {"error": None, "accurate": False}


@each(("activation", "right"), [("relu", True), ("gelu", True), ("gelu_tanh", False)])
def test_addmm_activation(activation, right, monkeypatch):
    name, case = "torch addmm_activation", Case("layer", 64, (32, 64), activation)
    found = measure.prepare(case, ["eager", name], CPU, "fwd")
    assert (name in found.steps) == right
    assert found.accuracy[name]["accurate"] if right else "erf" in found.left_out[name]
    # What is refused would be wrong, and would be seen.
    monkeypatch.setitem(RIVALS, name, replace(RIVALS[name], refuses=lambda case, device: None))
    assert measure.prepare(case, ["eager", name], CPU, "fwd").accuracy[name]["accurate"] == right


def test_a_setting_of_the_compiler_is_one_rivals_alone():
    """Dynamo would give the second what it compiled for the first."""
    case = Case("mlp", 64, (32, 64, 32), "gelu", torch.bfloat16)
    torch._dynamo.reset()
    with torch.device("meta"):
        linears = rivals.make_linears(case)
        x = torch.randn(64, 32, dtype=case.dtype).requires_grad_()
        kept = []
        for name in ("torch.compile", FLAGS[0], "torch.compile", FLAGS[0]):
            with fastbp.SavedBytes(exclude=[x, *(p for m in linears for p in m.parameters())]) as saved:
                RIVALS[name].make(case, linears)(x)
            kept.append(saved.total / model_memory.hidden_elements(case))
    assert kept == [4, 2, 4, 2]


@each(("size", "expected"), [(1, cuda_clock.MOST_COPIES), (10 << 20, 10), (1 << 30, 2)])
def test_copies_exceed_the_cache_twice(size, expected, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cuda_clock.copies(size, torch.device("cuda")) == expected
