"""docs/gpu-status.md shows of each kernel what its result files say, and "not yet" of what they do not."""

import pytest

from benchmarks import compiled, records
from benchmarks.report import emulated
from benchmarks.static_cuda import Kernel, plain_name

RUN = {
    "kernel": "hopper dgrad", "family": "sm_90a", "cases": 3, "of": 4, "runs": 7, "faults": {"race": 2}, "met": 0.915,
    "shapes": ["1x8x8", "256x128x64"], "activations": ["gelu"], "dtypes": ["bfloat16"], "policies": ["fp8"],
    "date": "2026-11-30", "commit": "abc1234", "nvcc": "13.0", "triton": "3.6.0",
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FILE", tmp_path / "compiled.jsonl")
    monkeypatch.setattr(emulated, "FILE", tmp_path / "emulated.jsonl")
    records.write(emulated.FILE, {}, [RUN])


def tally(*kernels):
    found = compiled.Tally()
    for kernel, faulty in kernels:
        found.add(kernel, "sm_90a", faulty)
    return found


def row_of(kernel):
    return next(line for line in emulated.table().splitlines() if line.startswith(f"| {kernel} |"))


def test_a_kernel_has_what_its_files_say(files):
    tally(("hopper dgrad", False), ("hopper dgrad", True), ("cuda value", False)).write("static --record", False)
    row = row_of("hopper dgrad")
    assert "1 of 2 without a fault;" in row and "7 runs of 3 of 4 cases: race 2; 2 shapes, 1 activation;" in row
    assert "bf16; fp8; 91.5% of its instructions; 2026-11-30, abc1234" in row and row.endswith("| not yet |")
    assert row_of("cuda value").endswith("| not yet | not yet |")


def test_a_part_replaces_its_own_rows_alone(files):
    tally(("hopper dgrad", False), ("cuda value", False)).write("static --record", False)
    tally(("cuda value", False), ("cuda value", False)).write("static --record --quick", True)
    assert "1 of 1 without a fault; 2" in row_of("hopper dgrad")
    assert "2 of 2 without a fault, a part; 2" in row_of("cuda value")


@pytest.mark.parametrize(("name", "plain"), [
    ("product gated_dgrad", "hopper gated_dgrad"), ("gated_value", "cuda value"), ("value", "cuda value"),
    ("chain_rule from y and side gathered", "cuda chain_rule"), ("compressed_value gathered", "cuda compressed_value"),
])  # fmt: skip
def test_variants_of_a_kernel_have_one_name(name, plain):
    assert plain_name(Kernel("sm_80", name, "bf16", "gelu", True)) == plain
