"""Casts of weights under autocast: none stale, none kept after the region, none where they belong to others."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from autocast_cases import BF16, F16, F32, Casts, layer, linear, region
from graphs import compiled
from support import each, grads, like, tensors
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastbp
from fastbp import casts
from fastbp.forms import MLP


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert casts._current() is None, "casts outlive their region"


# A weight that is changed inside a region: F.linear goes on with the cast from before, which nobody wants.


def change_in_place(weight, bias):
    with torch.no_grad():
        weight.mul_(2)


def change_by_step(make):
    def change(weight, bias):
        make([weight, bias]).step()

    return change


def change_as_trainers_do(weight, bias):
    """The optimizer has a copy, which goes back past the counter of versions."""
    copy = weight.detach().clone().requires_grad_()
    copy.grad = weight.grad.clone()
    torch.optim.SGD([copy], lr=0.5).step()
    weight.data.copy_(copy.detach())


def change_storage(weight, bias):
    weight.data = weight.data * 2


def change_by_load(weight, bias):
    module = nn.Linear(*weight.shape[::-1])
    state = {name: t.clone() for name, t in module.state_dict().items()}
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    module.weight, module.bias = weight, bias
    module.load_state_dict(state)


CHANGES = {
    "in place": change_in_place,
    "sgd": change_by_step(lambda p: torch.optim.SGD(p, lr=0.5)),
    "foreach": change_by_step(lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True)),
    "fused": change_by_step(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)),
    "copy": change_as_trainers_do,
    "storage": change_storage,
    "load": change_by_load,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_anew(change):
    x, weight, bias = layer()
    weight, bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    with region():
        before = linear(x, weight, bias)
        before.sum().backward()
        CHANGES[change](weight, bias)
        after = linear(x, weight, bias)
    with region(cache_enabled=False):
        fresh = linear(x, weight, bias)
    assert torch.equal(after, fresh) and not torch.equal(after, before)
    for found, expected in zip(*(grads(y, [weight, bias], like(y, 5)) for y in (after, fresh)), strict=True):
        assert torch.equal(found, expected)


def test_a_cast_that_pytorch_keeps_is_not_taken():
    """A plain linear has left it in PyTorch's cache, where nobody can tell how old it is."""
    x, weight, bias = layer()
    with region(), Casts() as seen:
        F.linear(x, weight, bias)
        change_in_place(weight, bias)
        y = linear(x, weight, bias)
    assert seen.count == 6  # both of them each
    with region():
        assert torch.equal(y, linear(x, weight, bias))


def test_gradients_of_several_uses_meet_in_the_narrow_dtype_as_stocks_do():
    x, weight, bias = layer()

    def gradient(seeds, f=linear):
        with region():
            ys = [f(like(x, seed), weight, bias) for seed in seeds]
        return torch.autograd.grad(ys, weight, [like(y, 8 + seed) for y, seed in zip(ys, seeds, strict=True)])[0]

    one, two, both = gradient([1]), gradient([2]), gradient([1, 2])
    assert torch.equal(both, (one.bfloat16() + two.bfloat16()).float())
    assert not torch.equal(both, one + two)
    stock = gradient([1, 2], F.linear)
    assert torch.equal(stock, stock.bfloat16().float())


def test_training_in_one_region_follows_the_weights():
    """Also with the optimizer's step inside, where stock PyTorch trains with the weights of the first step."""
    target = like(torch.empty(37, 23), 4)

    def train(enter_each_step, **options):
        x, weight, bias = layer(seed=11)
        optimizer = torch.optim.AdamW([weight, bias], lr=0.02, fused=True)
        losses = []
        with region(enabled=not enter_each_step, **options):
            for _ in range(5):
                with region(**options):
                    loss = (linear(x, weight, bias).float() - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    inside = train(False)
    assert inside == train(True) == train(True, cache_enabled=False)
    assert inside == sorted(inside, reverse=True)


def test_the_other_dtype_inside_a_region_gets_its_own_cast():
    x, weight, bias = layer()
    with region():
        linear(x, weight, bias)
        with region(F16):
            y = linear(x, weight, bias)
        z = linear(x, weight, bias)
    with region(F16):
        assert torch.equal(y, linear(x, weight, bias))
    assert (y.dtype, z.dtype) == (F16, BF16)


@each("end", ["exit", "exception", "clear"])
def test_nothing_is_kept_after_the_end(end):
    x, weight, bias = layer()
    of_weight = weakref.ref(weight)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        try:
            with region():
                with mode():
                    linear(x, weight, bias)
                kept = [weakref.ref(cast) for *_, cast in casts._current().values()]
                assert len(kept) == 2 and all(ref() is not None for ref in kept)
                if end == "clear":
                    torch.clear_autocast_cache()
                    assert not any(ref() is not None for ref in kept)
                if end == "exception":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert casts._current() is None and not any(ref() is not None for ref in kept)
    del weight
    gc.collect()
    assert of_weight() is None


def test_memory_that_is_taken_again_has_no_old_cast():
    """Ids of tensors that are gone come back."""
    x, seen, met_again = layer()[0], set(), 0
    with region():
        for seed in range(1000):
            weight = like(torch.empty(23, 19, dtype=F32), seed).requires_grad_()
            with torch.inference_mode():  # no graph, which would hold the weight
                found = linear(x, weight, None)
            assert torch.equal(found, linear(x, weight.detach(), None))
            met_again += id(weight) in seen
            seen.add(id(weight))
            del weight
            if met_again == 20:
                break
    assert met_again


def test_threads_share_casts_and_do_not_mind_when_one_ends():
    x, weight, bias = layer()
    with region(cache_enabled=False):
        expected = linear(x, weight, bias)
    found, inside, ended = [], threading.Event(), threading.Event()

    def other():
        with region():
            found.append(linear(x, weight, bias))
            inside.set()
            ended.wait(30)
            found.append(linear(x, weight, bias))

    with region():
        with Casts() as seen:
            linear(x, weight, bias)
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30) and seen.count == 3
    assert casts._current() is None  # PyTorch's are gone as well, for all threads
    ended.set()
    thread.join()
    assert len(found) == 2 and all(torch.equal(y, expected) for y in found)


def test_other_modes_see_nothing_of_it():
    """Neither an operation, nor a tensor that is saved, more than of a call without a cache."""
    x, weight, bias = layer()

    def seen(**options):
        operations, saved = [], []

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                operations.append(func)
                return func(*args, **kwargs or {})

        def pack(tensor):
            saved.append((tensor.shape, tensor.dtype))
            return tensor

        with Operations(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), region(**options):
            linear(x, weight, bias)
        return operations, saved

    assert seen() == seen(cache_enabled=False)


TRANSFORMS = {
    "grad": lambda x, w, b: torch.func.grad(lambda w: linear(x, w, b).float().sum())(w.detach()),
    "grad of another": lambda x, w, b: torch.func.grad(lambda x: linear(x, w, b).float().sum())(x),
    "vmap": lambda x, w, b: torch.vmap(lambda row: linear(row, w, b))(x),
    "jvp": lambda x, w, b: torch.func.jvp(lambda x: linear(x, w, b), (x,), (like(x, 6),))[1],
    "make_fx": lambda x, w, b: make_fx(linear)(x, w, b)(x, w + 1, b),
    "compiled": lambda x, w, b: compiled(linear)(x, w, b),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_and_graphs_have_casts_of_their_own(transform):
    x, weight, bias = layer()
    run = TRANSFORMS[transform]
    with region(cache_enabled=False):
        expected, plain = run(x, weight, bias), linear(x, weight, bias)
    with region():
        first = run(x, weight, bias)  # where it could keep what only it understands
        between = linear(x, weight, bias)
        second = run(x, weight, bias)  # where it could meet what it did not make
    for found in (first, second):
        assert torch.equal(found, expected)
    assert torch.equal(between, plain) and between.requires_grad


def test_a_captured_cuda_graph_casts_for_itself(monkeypatch):
    """It would read a cast from before its own time at every replay, and give away memory of its own."""
    assert not casts._passing("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert casts._passing("cuda") and not casts._passing("cpu")


def test_data_parallel_training_with_two_forwards_in_a_region(tmp_path):
    """DistributedDataParallel finds the weights behind a cast that two calls share."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = tensors(MLP, F32, seed=3)[0]

        def train(wrap):
            torch.manual_seed(0)
            block = fastbp.MLP(19, 23, 11)
            model = wrap(block)
            with region():
                loss = model(x).sum() + model(x * 2).square().sum()
            loss.backward()
            return [p.grad for p in block.parameters()]

        for found, expected in zip(train(nn.parallel.DistributedDataParallel), train(lambda block: block), strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.distributed.destroy_process_group()
