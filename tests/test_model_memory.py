"""The benchmark of models' blocks: what it counts, on small blocks, and that the committed figures are found again."""

import weakref
from itertools import product

import pytest
import torch
from torch import nn

import fastbp
from benchmarks import memory, model_memory, records, rivals
from benchmarks.cases import Case
from benchmarks.model_memory import InUse, has_kernels, hidden_elements, measure
from benchmarks.rivals import RIVALS
from benchmarks.suites import MODEL_BLOCKS
from fastbp.backends import native
from fastbp.residuals import IN_A_BLOCK
from fastbp.saving import POLICIES

META, CPU = torch.device("meta"), torch.device("cpu")
MLP = Case("mlp", 256, (32, 64, 32), "gelu", torch.bfloat16)
GATED = Case("gated_mlp", 256, (32, 64, 32), "silu", torch.bfloat16)
RELU = Case("mlp", 256, (32, 64, 32), "relu", torch.bfloat16)
BUDGET = "torch.compile, activation_memory_budget=0.5"
REBUILD = "torch.compile, ban_recompute_materialized_backward=False"
KEPT = [
    (
        MLP,
        {"eager": 4, "torch.compile": 4, REBUILD: 2, "fastbp preact": 2, "fastbp recompute": 0, "fastbp output": None},
    ),
    (MLP, {"fastbp output_bits": 2.5, "fastbp output_lsb": 2, "fastbp fp8": 1 + 1 / 32}),
    (RELU, {"eager": 2, "fastbp output": 2, "fastbp fp8": None, "fastbp output_lsb": None}),
    (GATED, {"eager": 8, "torch.compile": 6, REBUILD: 4, "fastbp preact": 4, "fastbp fp8": 2 + 1 / 16}),
]


@pytest.mark.parametrize(("case", "name", "expected"), [(c, n, e) for c, all in KEPT for n, e in all.items()])
def test_kept(case, name, expected):
    found = measure(case, name, META)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found["kept"] == expected * hidden_elements(case)


def test_the_compilers_settings_are_in_force_only_there():
    before = torch._functorch.config.activation_memory_budget
    assert measure(MLP, BUDGET, META)["kept"] < measure(MLP, "torch.compile", META)["kept"]
    assert torch._functorch.config.activation_memory_budget == before


@pytest.mark.parametrize("name", ["eager", "torch.compile", *(f"fastbp {policy}" for policy in POLICIES)])
@pytest.mark.parametrize("case", [MLP, GATED])
def test_meta_tensors_keep_what_real_ones_do(case, name, monkeypatch):
    # As of meta tensors: the real one would be compiled by Inductor.
    partitioned = rivals.Rival(lambda *made: torch.compile(rivals.eager(*made), backend=rivals.PARTITIONED))
    monkeypatch.setitem(RIVALS, "torch.compile", partitioned)
    on_cpu, on_meta = measure(case, name, CPU), measure(case, name, META)
    assert (on_cpu is None) == (on_meta is None)
    assert on_cpu is None or on_cpu["kept"] == on_meta["kept"]


def test_in_use_counts_storages_while_they_live():
    x = torch.empty(1000)
    with InUse([x]) as in_use:
        y = x + 1  # 4000 bytes
        view = y[:10]
        z = (y * 2).exp_()  # 8000
        z = z + 1  # 12000 for a moment
        assert (in_use.now, in_use.most) == (8000, 12000)
        del y
        assert in_use.now == 8000, "the view holds it"
        del view, z
        assert (in_use.now, in_use.most) == (0, 12000)
        x.mul_(2)
        assert in_use.now == 0, "what was given does not count"


def test_in_use_of_a_step():
    """Of relu between two linears without biases: y, h, z, and in backward dh, dz, then the gradients."""
    rows, k, n = 64, 8, 32
    case = Case("mlp", rows, (k, n, k), "relu", torch.float32)
    found = measure(case, "eager", META)["in_use"]
    z = rows * n * 4
    most = 2 * z + 2 * (n * k + n + k) * 4 + 3 * rows * k * 4 + z
    assert 2 * z < found <= most
    assert measure(case, "fastbp output", META)["in_use"] <= found + n * k * 4


@pytest.mark.parametrize("save", [save for save, policy in POLICIES.items() if policy.compressed])
def test_compressed_policies_have_little_more_in_use_than_preact(save):
    """Also in plain torch, where no kernel serves: what is made on the way is of blocks, not of whole tensors."""
    case = Case("mlp", 4096, (256, 1024, 256), "gelu", torch.bfloat16)
    preact, found = (measure(case, f"fastbp {name}", META)["in_use"] for name in ("preact", save))
    assert found < preact + 80 * IN_A_BLOCK < preact + 10 * hidden_elements(case)  # without blocks it is 70 of them


@pytest.mark.parametrize(
    ("block", "name"),
    [
        *product(MODEL_BLOCKS, ["eager", *(f"fastbp {save}" for save, p in POLICIES.items() if not p.compressed)]),
        # which take some seconds a block
        *product(["bert", "llama"], [f"fastbp {save}" for save, p in POLICIES.items() if p.compressed]),
    ],
)
def test_the_committed_figures_are_what_is_found(block, name):
    rows = records.read(records.RESULTS / "cpu-amd-avx512-bf16" / "model_memory.jsonl").rows
    assert [row["block"] for row in rows] == list(MODEL_BLOCKS)
    row = next(row for row in rows if row["block"] == block)
    assert row["case"] == MODEL_BLOCKS[block].name
    found = measure(MODEL_BLOCKS[block], name, META)
    assert (found is None) == (name not in row["rivals"])
    if found is not None:
        assert row["rivals"][name]["kept"] == found["kept"]
        assert row["rivals"][name]["kept_per_hidden"] == round(found["kept"] / hidden_elements(MODEL_BLOCKS[block]), 3)


def test_main_writes_and_prints(tmp_path, capsys):
    arguments = ["--suite", "models", "--block", "t5", "--rival", "eager", "--rival", "fastbp output"]
    assert memory.main([*arguments, "--output", str(tmp_path)]) == 0
    environment, (row,) = records.read(tmp_path / "model_memory.jsonl")
    assert environment["command"].startswith("python -m benchmarks.memory --suite models --block t5")
    assert list(row["rivals"]) == ["eager", "fastbp output"] and row["auto"] == "fastbp output"
    assert "kept   2.000" in capsys.readouterr().out
    assert memory.main([*arguments, "--limit", "0"]) == 0
    assert "t5: not measured, the time is up" in capsys.readouterr().out


def test_who_raises_is_left_out_unless_it_is_eager_or_fastbp(monkeypatch, capsys):
    def refuse(case, name, device, picture):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(model_memory, "measure", refuse)
    row = memory.measure_block("bert", ["torch.compile"], META, False, None)
    assert row["left_out"] == {"torch.compile": "RuntimeError: no compiler"}
    memory.print_block(row)
    assert "left out: RuntimeError: no compiler" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no compiler"):
        memory.measure_block("bert", ["fastbp preact"], META, False, None)


@pytest.mark.parametrize("name", ["eager", "fastbp recompute"])
def test_a_step_raises_the_memory_of_a_process(name, monkeypatch):
    """In this process, where other tests have left memory behind: no more than that it counts at all."""
    monkeypatch.setitem(MODEL_BLOCKS, "bert", Case("mlp", 8192, (64, 1024, 64), "gelu", torch.float32))
    risen = memory.here("models", "bert", name)
    assert 0 <= risen < 400


@pytest.mark.skipif(native.unavailable is not None, reason="no native library")
def test_kernels_are_told_from_what_stands_in_for_them():
    assert has_kernels(MLP, "eager") and has_kernels(MLP, "fastbp preact") and has_kernels(RELU, "fastbp output")
    assert not has_kernels(MLP, "fastbp output") and not has_kernels(GATED, "fastbp output_bits")


class Allocator:
    """PyTorch's, as far as the benchmark asks it: what storages there are is counted by InUse."""

    def __init__(self, in_use):
        self.in_use, self.calls = in_use, []

    def install(self, monkeypatch):
        cuda, used = torch.cuda, self.in_use
        monkeypatch.setattr(cuda, "synchronize", lambda: None)
        monkeypatch.setattr(cuda, "memory_allocated", lambda: used.now + 500)
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda: used.most + 500)
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: setattr(used, "most", used.now))
        record = self.calls.append
        monkeypatch.setattr(cuda.memory, "_record_memory_history", lambda **k: record(k))
        monkeypatch.setattr(cuda.memory, "_dump_snapshot", lambda path: record(path))


def test_the_figures_of_an_allocator(monkeypatch, tmp_path):
    """On meta tensors, with an allocator that is made up."""
    linears = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to("meta")
    x, dy = (torch.empty(256, 32, device="meta") for _ in range(2))
    given = [x.requires_grad_(), *linears.parameters()]
    with InUse([*given, dy]) as in_use:
        allocator = Allocator(in_use)
        allocator.install(monkeypatch)
        found = model_memory._by_allocator(linears, given, dy, tmp_path / "snapshots" / "a.pickle")
    with fastbp.SavedBytes(exclude=given) as saved:
        linears(x)
    assert found["kept_allocated"] == saved.total == 256 * 64 * 4 and found["peak"] == in_use.most > saved.total
    assert allocator.calls == [
        {"max_entries": 100_000}, str(tmp_path / "snapshots" / "a.pickle"), {"enabled": None},
    ]  # fmt: skip
    allocator.calls.clear()
    with in_use:
        model_memory._by_allocator(linears, given, dy, None)
    assert not allocator.calls


def test_storages_that_die_are_seen_by_weak_references():
    """What InUse rests on: the Python object of a storage lives as long as the storage."""
    x, died = torch.empty(4), []
    weakref.finalize(x.untyped_storage(), died.append, 1)
    assert not died
    del x
    assert died == [1]
