"""Fused models whose code does what it likes: they give what they gave before, whatever is changed afterwards."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp.linear import of_any_size

WIDTH, HIDDEN = 12, 20
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def any_size():
    with of_any_size():
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Limited(Gated):
    """Does something else with large numbers only."""

    limit = 6.0

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate(x).clamp(max=self.limit), self.up(x).clamp(-self.limit, self.limit)
        h = F.silu(g) * u
        return self.down(h if h.detach().abs().max() < 30 else h * 0.5)


class Optional(Gated):
    """Has arguments that are given sometimes."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, skip: bool = False) -> Tensor:
        if skip:
            return x
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h if mask is None else h * mask)


class Settings(Gated):
    """Reads numbers from wherever they may lie."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.config, self.masks, self.adapter, self.gamma = SimpleNamespace(offset=0.0, limit=None), [None], None, None
        self.activation, self.power = F.silu, 1

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate(x), self.up(x)
        if self.config.limit is not None:
            g = g.clamp(max=self.config.limit)
        h = self.activation(g) * (u + self.config.offset)
        h = h if self.masks[0] is None else h * self.masks[0]
        y = self.down(h) * self.scale * self.power
        y = y if self.adapter is None else y + self.adapter(x)
        y = y if self.gamma is None else y * self.gamma
        return y * self.late if hasattr(self, "late") else y


class Casts(Gated):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gate.weight.dtype)
        return self.down((F.silu(self.gate(x).float()) * self.up(x).float()).to(x.dtype))


class AutocastOff(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Checkpointed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Effects(Gated):
    """Leaves things behind."""

    def __init__(self) -> None:
        super().__init__()
        self.log, self.calls, self.kept = [], 0, None

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        self.calls += 1
        self.log.append(float(h.detach().sum()))
        self.kept = h.square().mean()
        return self.down(h) + 0.1 * self.kept


class Loop(nn.Module):
    """Linears in a list, and activations in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.activations = [F.gelu, torch.tanh, F.silu, lambda h: h]

    def forward(self, x: Tensor) -> Tensor:
        for linear, activation in zip(self.linears, self.activations, strict=True):
            x = activation(linear(x))
        return x


class Devices(Block):
    """Goes to where the next weight is."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x.to(self.fc1.weight.device)))
        return self.fc2(h.to(self.fc2.weight.device))


def pair(make) -> tuple[nn.Module, nn.Module]:
    stock = make()
    fused = copy.deepcopy(stock)
    fastbp.fuse(fused)
    return stock, fused


def results(model: nn.Module, *args, **kwargs) -> list[Tensor]:
    torch.manual_seed(3)
    y = model(*args, **kwargs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)]


def assert_same(stock: nn.Module, fused: nn.Module, *args, tolerance: float = 1e-5, **kwargs) -> None:
    expected, got = results(stock, *args, **kwargs), results(fused, *args, **kwargs)
    assert expected[0].dtype == got[0].dtype and torch.equal(expected[0], got[0])
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("size", [0.1, 5.0, 500.0])
def test_values_of_every_size(size):
    stock, fused = pair(Limited)
    assert_same(stock, fused, torch.randn(9, WIDTH) * size)
    rows = fastbp.report(fused).sites
    expected = "gated_act_linear, silu" if size < 500 else "linear of mul"
    assert [s.what for s in rows if s.name == "down"] == [expected]


def test_arguments_given_sometimes():
    stock, fused = pair(Optional)
    x, mask = torch.randn(9, WIDTH, requires_grad=True), (torch.rand(HIDDEN) > 0.5).float()
    for kwargs in ({}, {"mask": mask}, {"skip": True}, {}):
        assert_same(stock, fused, x, **kwargs)


CHANGES = {
    "number": lambda m: setattr(m, "power", 3),
    "function": lambda m: setattr(m, "activation", F.gelu),
    "config": lambda m: setattr(m.config, "offset", 1.0),
    "config that was None": lambda m: setattr(m.config, "limit", 0.5),
    "list": lambda m: m.masks.__setitem__(0, (torch.arange(HIDDEN) % 2).float()),
    "None to a module": lambda m: setattr(m, "adapter", nn.Linear(WIDTH, WIDTH)),
    "None to a parameter": lambda m: setattr(m, "gamma", nn.Parameter(torch.full((WIDTH,), 0.3))),
    "new name": lambda m: setattr(m, "late", 0.5),
    "class": lambda m: setattr(Settings, "scale", 0.25),
    "child": lambda m: setattr(m, "up", nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh())),
    "child of another class": lambda m: setattr(m, "down", Doubled(HIDDEN, WIDTH)),
    "weight": lambda m: setattr(m.down, "weight", nn.Parameter(torch.ones(WIDTH, HIDDEN))),
    "no bias": lambda m: setattr(m.down, "bias", None),
    "frozen": lambda m: m.down.requires_grad_(False),
    "dtype": lambda m: m.double(),
    "method": lambda m: setattr(m, "forward", lambda x: m.down(torch.relu(m.gate(x)) * m.up(x))),
    "forward of a child": lambda m: setattr(m.down, "forward", lambda h: h.sum(-1, keepdim=True)),
    "hook": lambda m: m.down.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward hook": lambda m: m.down.register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,)),
}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_is_seen(change, monkeypatch):
    monkeypatch.setattr(Settings, "scale", 1.0)
    stock, fused = pair(Settings)
    x = torch.randn(9, WIDTH)
    assert_same(stock, fused, x)
    before = fused(x)
    for model in (stock, fused):
        torch.manual_seed(5)
        CHANGES[change](model)
    x = x.to(fused.gate.weight.dtype)
    assert_same(stock, fused, x)
    assert change in ("frozen", "dtype", "backward hook") or not torch.equal(fused(x), before)


def test_side_effects_happen():
    stock, fused = pair(Effects)
    x = torch.randn(9, WIDTH)
    for _ in range(2):
        assert_same(stock, fused, x)
    assert fused.calls == stock.calls == 2 and fused.log == stock.log
    for model in (stock, fused):
        model(x)
        model.grads = torch.autograd.grad(model.kept, model.gate.weight)[0]
    torch.testing.assert_close(fused.grads, stock.grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts(dtype):
    stock, fused = pair(Casts)
    for model in (stock, fused):
        model.to(dtype)
    assert_same(stock, fused, torch.randn(64, WIDTH), tolerance=1e-5 if dtype is torch.float32 else 3e-2)
    assert fastbp.report(fused).fused


@pytest.mark.parametrize("make", [AutocastOff, Block, Gated, Casts, Loop])
def test_autocast_regions(make):
    """In one, and out of it again."""
    stock, fused = pair(make)
    x = torch.randn(64, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_or_close(stock, fused, x)
    assert_same_or_close(stock, fused, x)


def assert_same_or_close(stock: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Blocks that run whole are as exact as PyTorch's and not equal to the bit."""
    expected, got = results(stock, x), results(fused, x)
    assert expected[0].dtype == got[0].dtype
    tolerance = 1e-5 if expected[0].dtype is torch.float32 and not torch.is_autocast_enabled("cpu") else 2e-2
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_a_block_that_checkpoints_itself():
    stock, fused = pair(Checkpointed)
    x = torch.randn(64, WIDTH, requires_grad=True)
    assert_same(stock, fused, x)
    with fastbp.SavedBytes(exclude=[x, fused]) as saved:
        y = fused(x)
    assert saved.total == 0 and y.requires_grad


def test_loops_over_lists():
    stock, fused = pair(Loop)
    x = torch.randn(9, WIDTH)
    assert_same(stock, fused, x)
    assert [(s.name, s.status) for s in fastbp.report(fused).sites] == [
        *(("linears.1", "fused"), ("linears.2", "no gain"), ("linears.3", "fused"))
    ]
    for model in (stock, fused):
        model.activations[0] = torch.sin
        model.activations.reverse()
    assert_same(stock, fused, x)


PATCHES = {
    "F.silu": (F, "silu", lambda z, inplace=False: torch.tanh(z)),
    "F.linear": (F, "linear", lambda x, w, b=None: x @ w.T * 2),
    "nn.Linear.forward": (nn.Linear, "forward", lambda self, x: x @ self.weight.T * 3),
    "forward of the class": (Gated, "forward", lambda self, x: self.down(torch.sigmoid(self.gate(x)) * self.up(x))),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_are_obeyed(patch, monkeypatch):
    stock, fused = pair(Gated)
    x = torch.randn(9, WIDTH)
    before = fused(x)
    monkeypatch.setattr(*PATCHES[patch])
    assert_same(stock, fused, x)
    assert not torch.allclose(fused(x), before)


def test_several_devices():
    stock, fused = pair(Devices)
    for model in (stock, fused):
        model.fc2.to("meta")
    for model in (stock, fused):
        y = model(torch.randn(2, WIDTH))
        assert y.is_meta and y.shape == (2, WIDTH)
        (dw,) = torch.autograd.grad(y.sum(), model.fc2.weight)
        assert dw.is_meta


def test_complex_numbers():
    kwargs = {"dtype": torch.complex64}
    stock = nn.Sequential(nn.Linear(8, 32, **kwargs), nn.Tanh(), nn.Linear(32, 2, **kwargs))
    fused = copy.deepcopy(stock)
    assert not fastbp.fuse(fused, sample_inputs=torch.randn(4, 8, **kwargs)).fused
    x = torch.randn(4, 8, **kwargs)
    y, expected = fused(x), stock(x)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(out.abs().sum(), m[0].weight)[0] for m, out in ((fused, y), (stock, expected))]
    assert torch.equal(*grads)


def test_sparse_weights_and_inputs():
    stock = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    fused = copy.deepcopy(stock)
    fastbp.fuse(fused)
    sparse = torch.randn(4, WIDTH).relu().to_sparse()
    assert torch.allclose(fused(sparse), stock(sparse), atol=1e-6)
    for model in (stock, fused):
        for i in (0, 2):
            pruned = model[i].weight.detach() * (model[i].weight.abs() > 0.05)
            model[i].weight = nn.Parameter(pruned.to_sparse_csr(), requires_grad=False)
    x = torch.randn(4, WIDTH)
    assert torch.allclose(fused(x), stock(x), atol=1e-6)


def test_nested_inputs():
    stock, fused = pair(lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)))
    parts = [torch.randn(n, WIDTH) for n in (2, 5, 3)]
    for model in (stock, fused):
        y = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
        model.found = [y.values().detach(), *torch.autograd.grad(y.values().square().sum(), list(model.parameters()))]
    for a, b in zip(fused.found, stock.found, strict=True):
        torch.testing.assert_close(a, b)


def test_quantised_linears():
    """Dynamic int8, before and after fuse, as of the model that was not fused."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).eval()
    x = torch.randn(4, WIDTH)
    quantise = torch.ao.quantization.quantize_dynamic
    expected = quantise(copy.deepcopy(model), {nn.Linear})(x)
    before = quantise(copy.deepcopy(model), {nn.Linear})
    assert fastbp.fuse(before).linears == 0
    assert torch.equal(before(x), expected)
    after = copy.deepcopy(model)
    fastbp.fuse(after)
    fastbp.unfuse(after)  # for it looks modules up by their very class
    assert torch.equal(quantise(after, {nn.Linear})(x), expected)
