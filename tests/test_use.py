"""no_grad and inference mode; ``use``; which backend serves forward, backward and batched gradients."""

import threading
import types

import pytest
import torch
from autograd_cases import CASES, FORM_CASES, assert_all_close, kept_tensors, ours_of
from support import (
    call,
    cases,
    each,
    flatten,
    grads,
    like,
    on_flat,
    tensors,
)

import fastbp
from fastbp import backends, settings
from fastbp.activations import bind
from fastbp.forms import LINEAR_ACT


@each("mode", [torch.no_grad, torch.inference_mode])
@each(("form", "activation", "save"), CASES)
def test_without_grad_nothing_is_kept(form, activation, save, mode):
    inputs = flatten(*tensors(form, seed=59))
    function = ours_of(form, activation, save)
    with mode():
        y, packed = kept_tensors(function, inputs)
        y.mul_(1)  # nobody else holds it
    assert not packed and not y.requires_grad
    assert torch.equal(y, function(*inputs))


def _bytes(**options):
    """What linear_act + gelu keeps beyond its inputs: z under preact, nothing under recompute."""
    x, weights, biases = tensors(LINEAR_ACT, seed=60)
    with fastbp.SavedBytes(exclude=[x, *weights, *biases]) as saved:
        y = fastbp.linear_act(x, *weights, *biases, **{"activation": "gelu", **options})
    return saved.total // (y.numel() * y.element_size())


def test_use_sets_what_a_call_leaves_open():
    assert _bytes() == 1
    with fastbp.use(save="recompute"):
        assert _bytes() == 0
        assert _bytes(save="preact") == 1
        with fastbp.use(save="preact"):
            assert _bytes() == 1
            with fastbp.use(backend="reference"):
                assert _bytes() == 1
        assert _bytes() == 0
    assert _bytes() == 1


def test_use_ends_with_an_exception():
    with pytest.raises(KeyError), fastbp.use(save="recompute"):
        raise KeyError
    assert _bytes() == 1


def test_use_may_be_entered_again(monkeypatch):
    monkeypatch.setattr(settings.defaults, "both", (None, None))  # and is so again for the tests that follow
    recompute = fastbp.use(save="recompute")
    with recompute, recompute:
        assert _bytes() == 0
    assert _bytes() == 1


def test_use_is_per_thread():
    seen = {}

    def other():
        seen["default"] = _bytes()
        with fastbp.use(save="recompute"):
            inside.set()
            done.wait(60)
            seen["used"] = _bytes()

    inside, done = threading.Event(), threading.Event()
    with fastbp.use(save="recompute"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
    assert _bytes() == 1
    done.set()
    thread.join(60)
    assert seen == {"default": 1, "used": 0}


def test_use_refuses_what_a_call_would():
    with pytest.raises(ValueError, match=r"fastbp\.use: neither backend nor save"):
        fastbp.use()
    with pytest.raises(ValueError, match=r"fastbp\.use: unknown save policy 'preakt'; did you mean 'preact'"):
        fastbp.use(save="preakt")
    with pytest.raises(ValueError, match=r"fastbp\.use: unknown backend 'referense'; did you mean 'reference'"):
        fastbp.use(backend="referense")
    with fastbp.use(save="output"), pytest.raises(ValueError, match="save='output' cannot serve gelu"):
        _bytes()


@pytest.fixture
def spies(monkeypatch):
    """Two backends made of the reference, and two lists: who did what, and the problems they were asked about."""
    done, problems = [], []

    def spy(name):
        def noting(step):
            return lambda *args: done.append((name, step)) or getattr(backends.reference, step)(*args)

        backend = types.ModuleType(name)
        backend.CHECKS_TENSORS = False
        backend.supports = problems.append  # whose None means yes
        backend.identity = lambda device: "a spy"
        backend.forward, backend.backward = noting("forward"), noting("backward")
        return backend

    for name in ("native", "triton"):
        monkeypatch.setitem(backends.BACKENDS, name, spy(name))
    monkeypatch.setattr(backends, "_chosen", {})  # no choice of these backends outlives the test
    return done, problems


def test_use_names_the_backend(spies):
    _bytes()
    with fastbp.use(backend="triton"):
        _bytes()
        _bytes(backend="native")
        _bytes(backend="reference")
    assert [name for name, _ in spies[0]] == ["native", "triton", "native"]


@each(("form", "activation", "save"), FORM_CASES)
def test_backward_goes_where_forward_went(form, activation, save, spies):
    done, problems = spies
    leaves = flatten(*tensors(form, seed=64, requires_grad=False))
    for trained in range(len(leaves)):
        inputs = [t.detach().requires_grad_(i == trained) for i, t in enumerate(leaves)]
        y = on_flat(call, form, activation=activation, save=save, backend="triton")(*inputs)
        grads(y, inputs, like(y, 65))
    assert done == [("triton", "forward"), ("triton", "backward")] * len(leaves)
    assert len(problems) == 1  # asked once, whatever backward was left of it


@each(("form", "activation", "save"), cases([bind("gelu")]))
def test_batched_gradients_reach_no_backend(form, activation, save, spies):
    """Kernels know nothing of vmap, nor of the older one behind is_grads_batched."""
    inputs = flatten(*tensors(form, seed=68))
    y = on_flat(call, form, activation=activation, save=save, backend="triton")(*inputs)
    dys = torch.stack([like(y, 69), like(y, 70)])
    older = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    newer = torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)
    assert [step for _, step in spies[0]] == ["forward"]
    for batched in (older, newer):
        for index, dy in enumerate(dys):
            assert_all_close([g[index] for g in batched], grads(y, inputs, dy, retain_graph=True))
