"""In which order: adapters, wrapped and parametrised weights, compilation, checkpointing and copies around fuse.

Whatever the order, results are those of the same steps without fastbp; what runs fused is counted.
"""

import copy

import pytest
import torch
import torchvision_ops
from fusible import WIDTH, Gated, TwoLinears
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp import functional
from fastbp.linear import of_any_size

pytestmark = pytest.mark.usefixtures("seeded")
X = torch.linspace(-2, 2, 3 * 5 * WIDTH, dtype=torch.float64).sin().view(3, 5, WIDTH)


class Block(nn.Module):
    """An attention of one head, an MLP and a gated MLP that are known, and fc1, act, fc2 in the forward itself."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp, self.gated = TwoLinears(nn.GELU()), Gated()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 20), nn.SiLU(), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.mlp(x)
        x = x + self.fc2(self.act(self.fc1(x)))
        return x + self.gated(x)


BLOCKS = {"mlp", "gated"}  # of a Block, known whole
ATTENTION, MLPS = ["qkv", "proj"], ["fc1", "fc2", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def calls(monkeypatch):
    """The blocks that ran whole."""
    made, call = [], functional.call

    def counted(form, *args, **kwargs):
        made.append(form.name)
        return call(form, *args, **kwargs)

    monkeypatch.setattr(functional, "call", counted)
    return made


def make() -> nn.Module:
    torch.manual_seed(0)
    return Block().double()


def run(model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


def assert_agree(model: nn.Module, stock: nn.Module) -> None:
    with of_any_size():
        for a, b in zip(run(model), run(stock), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def fused_linears(model: nn.Module) -> dict[str, str]:
    """The linears whose last call kept less, and what it was."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sites = fastbp.report(model).fused
    return {s.name.removeprefix("base_model.model."): s.what for s in sites if s.name in linears}


def add_lora(model: nn.Module, targets: list[str]) -> nn.Module:
    torchvision_ops.declare()  # PEFT imports transformers, which imports it
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("targets", [ATTENTION, MLPS], ids=["attention", "mlps"])
@pytest.mark.parametrize("first", ["fuse", "lora"])
def test_lora(targets, first, calls):
    """Adapters on the attention leave the blocks whole; of blocks with adapters each linear reads its own input."""
    model, stock = make(), add_lora(make(), targets)
    if first == "fuse":
        report = fastbp.fuse(model, sample_inputs=X)
        model = add_lora(model, targets)
    else:
        model = add_lora(model, targets)
        report = fastbp.fuse(model, sample_inputs=X)
    whole = 2 if first == "fuse" or targets is ATTENTION else 0
    assert sum(s.name.split(".")[-1] in BLOCKS for s in report.fused) == whole, str(report)
    calls.clear()
    assert_agree(model, stock)
    assert len(calls) == (2 if targets is ATTENTION else 0)
    if targets is MLPS and first == "lora":
        found = fused_linears(model)
        lora = {name for name in found if "lora_A" in name}
        assert lora == {f"{block}.lora_A.default" for block in ("fc2", "mlp.fc2", "gated.down_proj")}, found
    merged, stock = model.merge_and_unload(), stock.merge_and_unload()
    calls.clear()
    assert_agree(merged, stock)
    assert len(calls) == whole
    if first == "lora":  # the blocks that were left can be fused once the adapters are merged
        fastbp.fuse(merged, sample_inputs=X)
        assert_agree(merged, stock)


def test_adapters_that_come_and_go(calls):
    """Added to a fused model, disabled, enabled, and taken off again."""
    model, stock = make(), make()
    fastbp.fuse(model, sample_inputs=X)
    model, stock = add_lora(model, MLPS), add_lora(stock, MLPS)
    with model.disable_adapter(), stock.disable_adapter():
        assert_agree(model, stock)
    assert_agree(model, stock)
    calls.clear()
    assert_agree(model.unload(), stock.unload())
    assert len(calls) == 2


@pytest.mark.parametrize("where", ["fc1", "mlp.fc2", "gated.up_proj"])
@pytest.mark.parametrize("first", ["fuse", "parametrize"])
def test_parametrised_weights(where, first, calls):
    model, stock = make(), make()

    def norm(m: nn.Module) -> None:
        parametrize.register_parametrization(m.get_submodule(where), "weight", nn.Softplus())

    for step in ("fuse", "parametrize") if first == "fuse" else ("parametrize", "fuse"):
        fastbp.fuse(model, sample_inputs=X) if step == "fuse" else norm(model)
    norm(stock)
    calls.clear()
    assert_agree(model, stock)
    # The block of this weight runs its own forward, and its linears read; or what comes before this weight is a block.
    assert len(calls) == (2 if where == "fc1" or (where == "mlp.fc2" and first != "fuse") else 1)
    for m in (model, stock):
        parametrize.remove_parametrizations(m.get_submodule(where), "weight")
    assert_agree(model, stock)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    """Recomputed in backward, in the fused module and outside of it."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = make()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model = Checkpointed()
    stock = copy.deepcopy(model)
    assert len(fastbp.fuse(model, sample_inputs=X).fused) == 2  # whole; linears alone leave checkpoints as they are
    mine, wanted = (m(X.clone().requires_grad_()) for m in (model, stock))
    for m, y in ((model, mine), (stock, wanted)):
        y.sin().sum().backward()
        assert all(p.grad is not None for p in m.parameters())
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("first", ["fuse", "compile"])
def test_compile(first, fresh_dynamo):
    model, stock = make(), make()
    if first == "fuse":
        fastbp.fuse(model, sample_inputs=X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compile":
        assert_agree(compiled, stock)
        fastbp.fuse(model, sample_inputs=X)  # guards see the new classes
    assert_agree(compiled, stock)
    fastbp.unfuse(model)
    assert_agree(compiled, stock)


def test_functional_call_and_ema(calls):
    """Other tensors for one call, and an averaged copy."""
    model, stock = make(), make()
    fastbp.fuse(model, sample_inputs=X)
    others = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    torch.testing.assert_close(*(torch.func.functional_call(m, others, (X,)) for m in (model, stock)))
    calls.clear()
    averaged = [torch.optim.swa_utils.AveragedModel(m) for m in (model, stock)]
    for m, average in zip((model, stock), averaged, strict=True):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(0.9)
        average.update_parameters(m)
        average.update_parameters(m)
    assert_agree(*averaged)
    assert len(calls) == 2 and fused_linears(averaged[0]) == {"module.fc2": "act_linear, silu"}
