"""What was measured: calls of these sizes take it and no others, and it costs them little."""

import os
import subprocess
import sys
import timeit

import pytest
import support
import torch
from support import each
from tuning_cases import CPU, KEYS, put, with_native

import fastbp
from fastbp import __main__ as cli
from fastbp import backends
from fastbp.backends import measured, native
from fastbp.backends.measured import EAGER, Sizes, Subject
from fastbp.forms import FORMS
from fastbp.tuning.drawn import draw
from fastbp.tuning.jobs import parse

pytestmark = pytest.mark.usefixtures("own_choices")


@with_native
@each("form", FORMS)
def test_calls_of_these_sizes_take_what_was_measured(form):
    """Told by the node of autograd that they leave, and by the config that it was given."""
    job = parse("x", KEYS[form], CPU)
    call = draw(job)
    first, *others = call.inputs

    def taken(change=lambda t: t, config=job.config):
        tensors = (*map(change, others), *call.weights, *call.biases)
        config = backends.choose(config, change(first), tensors, call.weights)
        return config.backend, config.route

    rule = taken()
    for fastest, expected in (
        ("native wide", ("native", "wide")),
        ("reference", ("reference", "")),
        (EAGER, (EAGER, "")),
    ):
        put(job.key, fastest)
        assert taken() == expected
        assert taken(lambda x: x.view(2, 3, -1)) == expected, "rows are what counts, however they are arranged"
        assert taken(lambda x: x[:5]) == rule, "other sizes were not measured"
        assert taken(config=backends.with_backend(job.config, "reference"))[1] == ""
    put(job.key, "native")
    assert taken() == rule


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@each("form", FORMS)
@each("fastest", ["native", "reference", EAGER])
def test_what_is_refused_is_refused_where_sizes_were_measured(form, fastest):
    """With the sizes of the call that was measured, or none, before and after a call that is served."""
    job = parse("x", KEYS[form], CPU)
    call = draw(job)
    weights, biases = list(call.weights), list(call.biases)
    put(job.key, "reference" if fastest == "native" and native.unavailable else fastest)

    name, (first, *others) = FORMS[form].names_of_inputs[0], call.inputs

    def made(x=first, weights=weights, biases=biases):
        names = dict(activation=job.config.row.name, save=job.config.save)
        return support.call(FORMS[form], x, [*others, *weights], biases, **names)

    def refused(words, error=ValueError, **spoilt):
        with pytest.raises(error, match=words) as caught:
            made(**spoilt)
        assert str(caught.value).startswith(f"fastbp.{form}: ")

    for _ in range(2):
        refused(r"must be \(16,\)", biases=[biases[0].detach()[:1], *biases[1:]])
        refused(r"must be \(16,\)", biases=[biases[0].detach().expand(6, 16), *biases[1:]])
        refused(r"must be \(out_features, 8\)", weights=[weights[0].detach()[0], *weights[1:]])
        refused("at least one dimension", x=first.detach()[0, 0])
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            for words, error, spoil in (
                (f"must have the dtype of {name}", TypeError, torch.Tensor.double),
                (f"must be on the device of {name}", ValueError, lambda t: t.to("meta")),
                ("must be a dense tensor", TypeError, torch.Tensor.to_sparse),
            ):
                refused(words, error, weights=[*weights[:i], spoil(weight.detach()), *weights[i + 1 :]])
                refused(words, error, biases=[*biases[:i], spoil(bias.detach()), *biases[i + 1 :]])
        refused("must be a dense tensor", TypeError, x=first.detach().to_sparse())
        refused("nested", TypeError, x=torch.nested.nested_tensor([first.detach()]))
        if others:
            refused("must have the same shape", x=first.detach()[:1])
        if len(weights) > 1 and job.config.form.gated:
            narrow = [biases[0], biases[1].detach()[:1], *biases[2:]]  # would be spread over the gate's
            refused(
                "must have the same shape", weights=[weights[0], weights[1].detach()[:1], *weights[2:]], biases=narrow
            )
        made()


def test_a_backward_call_does_not_vouch_for_the_shapes_of_a_forward_one():
    job = parse("x", KEYS["linear_act"], CPU)
    call = draw(job)
    eager = backends.with_choice(job.config, measured.Choice(EAGER))
    choice = measured.by_sizes(job.config, {job.sizes: eager})
    (weight,), bias = call.weights, call.biases[0][:1]
    assert choice(*call.inputs, (weight.clone(), bias), (weight,)) is eager
    with pytest.raises(ValueError, match=r"must be \(16,\)"):
        choice(*call.inputs, (weight, bias), (weight,))


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
    for route in ("narrow", "library"):
        torch.ops.fastbp_native.set_debug(False, route)
        forced, _ = results(layer, x, dy)
        torch.ops.fastbp_native.set_debug(False, "")
        put(key, f"native {route}")
        found[route], node = results(layer, x, dy)
        assert node.startswith("LinearActFunction") and all(map(torch.equal, found[route], forced))
        with torch.no_grad():
            assert torch.equal(layer(x), forced[0]), "without gradients too"
    assert not all(map(torch.equal, found["narrow"], found["library"])), (
        "the ways differ in rounding, or this tests nothing"
    )
    put(key, EAGER)
    plain, node = results(layer, x, dy)
    assert not node.startswith("LinearActFunction")
    torch.testing.assert_close(plain, found["library"])
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
    call = draw(job)
    rule = "native" if native.unavailable is None else "reference"
    taken = backends.choose(job.config, call.inputs[0], (*call.weights, *call.biases), call.weights)
    assert (taken.backend, taken.route) == (rule, "")
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


def test_a_warm_cache_costs_nothing_at_import_and_little_a_call(own_choices):
    """0.6 µs, where looking up an unmeasured call takes as much: a ratio, for a busy machine is slower in both."""
    key = "linear_act 4x8x8 gelu float32 preact"
    job = parse("x", key, CPU)
    call = draw(job)
    tensors = (*call.weights, *call.biases)

    def nanoseconds():
        def look():
            backends.choose(job.config, call.inputs[0], tensors, call.weights)

        return min(timeit.repeat(look, number=20_000, repeat=7)) / 20_000 * 1e9

    unmeasured = nanoseconds()
    put(key, "reference")
    assert nanoseconds() < 3 * unmeasured
    program = f"""
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import fastbp
print([name for name in opened if {str(own_choices)!r} in name])
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert outcome.stdout.strip() == "[]"
