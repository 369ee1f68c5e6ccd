"""A fused module is the module it was: its state, name, copies and pickles; fully_shard; fusing and unfusing."""

import copy
import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import threading

import cloudpickle
import pytest
import torch
from reading import WIDTH, assert_same, swap
from torch import nn

from fastbp import known
from fastbp.fusion.surgery import base_of, is_fused, plan_of, set_save, swap_in, swap_out

pytestmark = pytest.mark.usefixtures("seeded")


class Block(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Locked(Block):
    """Holds what cannot be copied, and says how it is."""

    def __init__(self):
        super().__init__()
        self.lock, self.made = threading.Lock(), "by hand"

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock, self.made = threading.Lock(), "by __setstate__"


class Reduced(Block):
    """Is made anew."""

    def __reduce__(self):
        return type(self), (), {**self.__dict__, "made": "by __reduce__"}


class Copied(Block):
    """Copies itself."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        new.made = "by __deepcopy__"
        return new

    def __copy__(self):
        new = Copied()
        new.made = "by __copy__"
        return new


class Slotted(Block):
    """Has an attribute outside of its __dict__."""

    __slots__ = ("note",)

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "note", ["slot"])

    def __getstate__(self):
        return {**self.__dict__, "note": self.note}

    def __setstate__(self, state):
        object.__setattr__(self, "note", state["note"])
        super().__setstate__({name: value for name, value in state.items() if name != "note"})


class Circular(Block):
    """A child knows its parent."""

    def __init__(self):
        super().__init__()
        self.act.__dict__["parent"] = self


def sequential():
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))


def nested():
    return nn.Sequential(Block(), sequential())


MAKERS = [Block, Locked, Reduced, Copied, Slotted, Circular, sequential, nested]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def pair(make):
    """A stock model, and one with the same parameters that runs whole."""
    stock, fused = make(), make()
    fused.load_state_dict(stock.state_dict())
    swap(fused)
    assert any(is_fused(m) for m in fused.modules())
    return stock, fused


def x():
    return torch.randn(4, WIDTH)


def assert_untouched(fused):
    """Pickling left the class alone and no answer behind."""
    for module in fused.modules():
        assert module.__class__ is type(module)
        assert is_fused(module) == (type(module) is not base_of(module))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps, cloudpickle.dumps], ids=["C", "Python", "cloudpickle"])
def test_a_pickle_is_the_stock_one(make, protocol, dumps):
    stock, fused = pair(make)
    data = dumps(fused, protocol)
    assert b"fastbp" not in data and (make is Reduced or len(data) == len(dumps(stock, protocol)))
    loaded = pickle.loads(data)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in stock.modules()]
    assert getattr(loaded, "made", None) in (getattr(stock, "made", None), "by __setstate__", "by __reduce__")
    assert (make is Locked) == (getattr(loaded, "made", None) == "by __setstate__")
    if make is Slotted:
        assert loaded.note == ["slot"]
    if make is Circular:
        assert loaded.act.parent is loaded
    assert_untouched(fused)
    assert_same(loaded, stock, x(), tolerance=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_deep_copies_stay_fused(make):
    stock, fused = pair(make)
    new = copy.deepcopy(fused)
    assert [type(m) for m in new.modules()] == [type(m) for m in fused.modules()]
    assert [is_fused(m) for m in new.modules()] == [is_fused(m) for m in fused.modules()]
    assert not {id(p) for p in new.parameters()} & {id(p) for p in fused.parameters()}
    expected = {Locked: "by __setstate__", Reduced: "by __reduce__", Copied: "by __deepcopy__"}.get(make)
    assert getattr(new, "made", None) == expected
    if make is Slotted:
        assert new.note == ["slot"] and new.note is not fused.note
    if make is Circular:
        assert new.act.parent is new
    assert_untouched(fused)
    assert_same(new, stock, x(), tolerance=1e-6)
    for module in new.modules():
        if is_fused(module):
            swap_out(module)
    assert [type(m) for m in new.modules()] == [type(m) for m in stock.modules()]
    assert any(is_fused(m) for m in fused.modules())


@pytest.mark.parametrize("make", MAKERS)
def test_shallow_copies_stay_fused_and_share(make):
    _, fused = pair(make)
    new = copy.copy(fused)
    assert type(new) is type(fused) and is_fused(new) == is_fused(fused)
    expected = {Locked: "by __setstate__", Reduced: "by __reduce__", Copied: "by __copy__"}.get(make)
    assert getattr(new, "made", None) == expected
    if make is not Copied:
        assert all(a is b for a, b in zip(new.parameters(), fused.parameters(), strict=True))
    assert plan_of(new) is plan_of(fused) if is_fused(fused) else True


def test_a_model_averages_over_copies():
    _, fused = pair(lambda: nn.Sequential(Locked()))
    averaged = torch.optim.swa_utils.AveragedModel(fused)
    assert is_fused(averaged.module[0])
    averaged.update_parameters(fused)
    torch.testing.assert_close(averaged(inputs := x()), fused(inputs))


@pytest.mark.parametrize("make", [Block, Locked, sequential, nested])
def test_a_saved_model_loads_with_weights_only(make):
    stock, fused = pair(make)
    classes = [type(m) for m in stock.modules()]
    outcomes = []
    for model in (stock, fused):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        file.seek(0)
        with torch.serialization.safe_globals([*classes, set]):
            loaded = torch.load(file, weights_only=True)
        outcomes.append((unsafe, [type(m) for m in loaded.modules()]))
        assert_same(loaded, stock, x(), tolerance=1e-6)
    assert outcomes[0] == outcomes[1] and outcomes[1][1] == classes


def test_a_saved_model_loads_without_fastbp(tmp_path):
    _, fused = pair(sequential)
    torch.save(fused, tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['fastbp'] = None\n"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"assert type(m) is torch.nn.Sequential, type(m); print(m(torch.ones(1, {WIDTH})).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), fused(torch.ones(1, WIDTH)).detach())


def _kind(model, queue):
    queue.put((type(model).__qualname__, model(torch.ones(1, WIDTH)).sum().item()))


def test_a_spawned_process_gets_the_stock_module():
    _, fused = pair(sequential)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_kind, args=(fused, queue))
    process.start()
    name, total = queue.get(timeout=120)
    process.join()
    assert name == "Sequential" and abs(total - fused(torch.ones(1, WIDTH)).sum().item()) < 1e-5


def test_pickling_that_fails_leaves_no_answer_behind():
    _, fused = pair(Block)
    fused.handle = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        pickle.dumps(fused)
    assert_untouched(fused)


def test_only_the_thread_that_pickles_is_told():
    """And it once."""
    _, fused = pair(Block)
    fused.__reduce_ex__(2)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(fused.__class__))
    thread.start()
    thread.join()
    assert seen == [type(fused)]
    assert [fused.__class__, fused.__class__] == [Block, type(fused)]


class Derived:
    """Stands for a class that others made of a fused one, under a name that can be found."""


def test_a_class_made_of_the_fused_one_pickles_as_itself(monkeypatch):
    _, fused = pair(Block)
    kind = type("Derived", (type(fused),), {"__module__": __name__, "__qualname__": "Derived"})
    monkeypatch.setattr(sys.modules[__name__], "Derived", kind)
    fused.__class__ = kind
    assert fused.__reduce_ex__(2)[1] == (kind,)
    assert type(pickle.loads(pickle.dumps(fused))) is kind


# What else a module is


def test_nothing_else_about_a_module_changes():
    stock, fused = pair(nested)
    assert list(stock.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in stock.named_modules()] == [n for n, _ in fused.named_modules()]
    for a, b in zip(stock.modules(), fused.modules(), strict=True):
        assert isinstance(b, type(a)) and type(b).__name__ == type(a).__name__ == b.__class__.__name__
        assert type(b).__qualname__ == type(a).__qualname__ and type(b).__module__ == type(a).__module__
    assert "FusedBlock(" in repr(fused) and "FusedSequential(" in repr(fused)
    objects = list(fused.parameters())
    for module in fused.modules():
        if is_fused(module):
            swap_out(module)
    assert all(a is b for a, b in zip(objects, fused.parameters(), strict=True))
    assert [type(m) for m in stock.modules()] == [type(m) for m in fused.modules()] and "Fused" not in repr(fused)
    assert not any("fastbp" in name for m in fused.modules() for name in m.__dict__)


def test_swapping_in_again_exchanges_the_plan():
    _, fused = pair(Block)
    kind = type(fused)
    set_save(fused, "recompute")
    assert plan_of(fused).save == "recompute"
    plan = known.read(fused)
    assert not isinstance(plan, str) and plan.save == "auto"
    swap_in(fused, plan)
    assert type(fused) is kind and plan_of(fused) is plan
    swap_out(fused)
    assert type(fused) is Block


def test_the_class_can_be_set():
    """As fully_shard and parametrize set it."""
    _, fused = pair(Block)
    other = type("Other", (type(fused),), {})
    fused.__class__ = other
    assert type(fused) is other and is_fused(fused) and base_of(fused) is Block
    inputs = x()
    before = fused(inputs)
    assert torch.equal(copy.deepcopy(fused)(inputs), before)
    swap_out(fused)
    assert type(fused) is other and not is_fused(fused)
    torch.testing.assert_close(fused(inputs), before)
    swap_in(fused, known.read(fused))
    assert type(fused) is other and is_fused(fused) and torch.equal(fused(inputs), before)


@pytest.mark.parametrize("order", ["fused first", "sharded first"])
def test_fully_shard(order, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        stock, model = Block(), Block()
        model.load_state_dict(stock.state_dict())
        steps = [lambda: swap_in(model, known.read(model)), lambda: fully_shard(model, mesh=mesh)]
        for step in steps if order == "fused first" else reversed(steps):
            step()
        assert is_fused(model) and isinstance(model, FSDPModule) and isinstance(model, Block)
        inputs = x()
        torch.testing.assert_close(model(inputs), stock(inputs))
        model(inputs).sum().backward()
        swap_out(model)
        assert not is_fused(model) and isinstance(model, FSDPModule)
        torch.testing.assert_close(model(inputs), stock(inputs))
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_forward_that_asks_for_its_class_compiles():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x) if self.block.__class__.__name__ == "Block" and isinstance(self.block, Block) else x

    model = Asking()
    stock = copy.deepcopy(model)
    swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled, stock, x(), tolerance=1e-5)
