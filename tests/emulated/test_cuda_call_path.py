"""Whole calls of csrc/cuda as a GPU gets them: the real host code launches the real kernels, which the emulator runs.

Arguments, grids, clusters, shared memory, tensor maps and strides are those of nvcc's objects; fake_cudart.cpp is what
stands for CUDA's runtime. Memory is poisoned, inputs cannot be written, and every access is held to its allocation.
"""

import re

import cxx
import pytest
from cxx import Change
from standin import take_calls
from support import each

from emulated import cuda_runtime
from emulated.emulator import emulator
from emulated.whole_calls import BF16, F32, GELU, TANH, run
from fastbp.backends import native

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
UNALIGNED = 16  # where dynamic shared memory begins, beyond the KiB that CUDA keeps: PTX promises no more
KINDS = ("forward", "gated_forward", "dgrad", "gated_dgrad")  # of Product, by number


def short(launched):
    """The name of a kernel in one word."""
    product = re.search(r"product_kernel.*?Product4KindE(\d)", launched.kernel)
    return KINDS[int(product[1])] if product else re.match(r"_ZN6fastbp4cuda\d+(\w+?)_kernel", launched.kernel)[1]


@pytest.fixture
def call(monkeypatch):
    """Runs a call by a route, of a library with these changes; returns what was launched."""

    def run_by(route, *case, changes=((), ()), **options):
        try:
            ops = cuda_runtime.ops(*changes)
        except cxx.Unable as reason:
            pytest.skip(str(reason))
        with emulator().allocates(1024 + UNALIGNED) as launches:
            take_calls(ops, monkeypatch)
            ops.new_process()
            ops.set_cuda_route(route)
            run("native", *case, **options)
            return launches

    return run_by


LIBRARY = [  # every form and policy; odd sizes, so that no row begins where packs do, and sizes that packs fit
    ("linear_act", GELU, "preact", BF16, (3, 7), (19, 23), dict(x="gapped"), "value chain_rule column_sum"),
    ("linear_act", TANH, "output", F32, (37,), (20, 24), dict(dy="expanded"), "value chain_rule column_sum"),
    ("mlp", GELU, "recompute", BF16, (21,), (19, 264, 17, 11), dict(bias=False),
     "value value value chain_rule chain_rule"),
    ("mlp", GELU, "output_bits", BF16, (37,), (19, 40, 17, 11), {},
     "compressed_value compressed_value chain_rule column_sum chain_rule column_sum"),
    ("act_linear", GELU, "preact", BF16, (37,), (0, 23, 17, 11), dict(x="gapped", dy="gapped"), "value chain_rule"),
    ("gated_linear_act", GELU, "preact", BF16, (37,), (19, 23), dict(dy="expanded"),
     "value gated_chain_rule column_sum column_sum"),
    ("gated_mlp", GELU, "fp8", BF16, (37,), (19, 72, 17), {},
     "compressed_value gated_chain_rule column_sum column_sum"),
    ("gated_act_linear", TANH, "preact", F32, (5, 4), (0, 24, 11), dict(x="shifted"), "value gated_chain_rule"),
]  # fmt: skip
FUSED = [  # sizes that tiles do not fit; in the first and the gated ones more tiles than the two clusters at a time
    ("linear_act", GELU, "preact", BF16, (300,), (72, 200), dict(x="gapped"), "forward chain_rule column_sum"),
    ("mlp", TANH, "output", BF16, (150,), (40, 136, 264, 24), {}, "forward forward dgrad column_sum dgrad column_sum"),
    ("mlp", GELU, "output_bits", BF16, (150,), (40, 136, 72, 24), dict(dy="gapped"),
     "forward forward dgrad column_sum dgrad column_sum"),
    ("act_linear", GELU, "preact", BF16, (2, 75), (0, 136, 40, 24), dict(bias=False), "value dgrad"),
    ("gated_linear_act", GELU, "preact", BF16, (150,), (72, 136), dict(bias=False), "gated_forward gated_chain_rule"),
    ("gated_mlp", GELU, "preact", BF16, (150,), (328, 136, 72), dict(x="gapped"),
     "gated_forward gated_dgrad column_sum column_sum"),
    ("gated_mlp", TANH, "fp8", BF16, (150,), (40, 72, 24), dict(dy="gapped"),
     "gated_forward gated_dgrad column_sum column_sum"),
    ("gated_act_linear", GELU, "preact", BF16, (150,), (0, 136, 40), {}, "value gated_dgrad"),
]  # fmt: skip


@each(
    ("route", "form", "activation", "save", "dtype", "rows", "features", "options", "kernels"),
    [(route, *case) for route, cases in (("library", LIBRARY), ("fused", FUSED)) for case in cases],
)
def test_calls(call, route, form, activation, save, dtype, rows, features, options, kernels):
    launches = call(route, form, activation, save, dtype, rows, features, **options)
    assert " ".join(short(launched) for launched in launches) == kernels


def test_the_gpu_is_served():
    """What `supports` asks of a library and its driver, of a GPU that is there and of one that is not."""
    ops = cuda_runtime.ops()
    assert ops.cuda_refusal(0) == ""
    assert ops.cuda_refusal(1) == "CUDA sees 1 devices, and no number 1"


def faulty(file, *replaced):
    """Changes to a file: (text, what stands in its place), both with the fault's name."""
    return tuple(Change(file, old, new) for old, new in replaced)


FAULTY = (
    *faulty(
        "cuda/layers.cpp",
        ("product.gate = data(gate), product.up = data(up);\n  product.gate_beside",
         "product.gate = data(FAULT(swapped, gate, up)), product.up = data(FAULT(swapped, up, gate));\n"
         "  product.gate_beside"),
        ("sums[part] = make({(m + kTileRows - 1) / kTileRows, n}, Dtype::float32)",
         "sums[part] = make({FAULT(few_sums, (m + kTileRows - 1) / kTileRows, m / kTileRows), n}, Dtype::float32)"),
        ("rule.m = m, rule.n = n, rule.dh_stride = strides[0], rule.dh_column_stride = strides[1];\n"
         "    rule.stride = coded",
         "rule.m = m, rule.n = n, rule.dh_stride = FAULT(dense_dh, strides[0], n);\n"
         "    rule.dh_column_stride = strides[1];\n    rule.stride = coded"),
    ),
    *faulty(
        "cuda/elementwise.cuh",
        ("static_cast<unsigned>((v.size + each - 1) / each)",
         "static_cast<unsigned>(FAULT(short_grid, (v.size + each - 1) / each, v.size / each))"),
        ("rule.n % width == 0 && rule.dh_stride % width == 0 && rule.stride % width == 0",
         "FAULT(packs, rule.n % width == 0 && rule.dh_stride % width == 0 && rule.stride % width == 0, true)"),
    ),
    *faulty(
        "cuda/elementwise.cu",
        ("return {rows, std::max<int64_t>(1, (m + rows - 1) / rows)}",
         "return {rows, std::max<int64_t>(1, FAULT(short_strips, (m + rows - 1) / rows, m / rows))}"),
    ),
    *faulty("cuda/hopper.cu", ("(matrix.stride) * 2", "(FAULT(wrong_stride, matrix.stride, matrix.columns)) * 2")),
    *faulty(
        "cuda/hopper_launch.cuh",
        ("stream, a, b, b2,", "stream, FAULT(swapped_maps, a, b), FAULT(swapped_maps, b, a), b2,"),
        ("kProductThreads, kSharedBytes, stream",
         "kProductThreads, FAULT(short_shared, kSharedBytes, kSharedBytes - 1024), stream"),
        ("check_cuda(cudaFuncSetAttribute(kernel",
         "if (FAULT(not_granted, true, false)) check_cuda(cudaFuncSetAttribute(kernel"),
        ("2 * clusters, kProduct", "FAULT(odd_grid, 2 * clusters, 2 * clusters - 1), kProduct"),
        ("map_of(product.a, D, kTile)", "map_of(product.a, D, FAULT(half_a_box, kTile, kTile / 2))"),
    ),
)  # fmt: skip
CHANGED = ("layers.cpp", "elementwise_bfloat16.cu", "elementwise.cu", "hopper.cu", "hopper_forward.cu")
FORWARD, GATED = ("fused", *FUSED[0][:-1]), ("fused", *FUSED[6][:-1])
CHAIN, VALUE = ("library", *LIBRARY[0][:-1]), ("library", *LIBRARY[2][:-1])


@each(
    ("fault", "case", "seen"),
    [
        ("swapped", GATED, "not close"),
        ("few_sums", GATED, "write to 4 bytes"),
        ("dense_dh", ("library", *LIBRARY[1][:-1]), "RMS error"),
        ("short_grid", VALUE, "RMS error"),
        ("packs", CHAIN, "misaligned"),
        ("short_strips", CHAIN, "NaN or inf"),
        ("wrong_stride", FORWARD, "NaN or inf"),
        ("swapped_maps", FORWARD, "deadlock"),
        ("short_shared", FORWARD, "barrier: .* an mbarrier at"),
        ("not_granted", FORWARD, "bytes of shared memory, 49152 granted"),
        ("odd_grid", FORWARD, "3 blocks in clusters of 2"),
        ("half_a_box", FORWARD, "deadlock"),
        ("", FORWARD, None),
    ],
)
def test_faults_put_in_are_seen(call, fault, case, seen):
    """A launch that is wrong in one argument, grid, size or map fails; the same library without a fault does not."""
    *case, options = case
    emulator().library.emulated_set_fault(fault.encode())
    if seen is None:
        call(*case, changes=(FAULTY, CHANGED), **options)
        return
    with pytest.raises((AssertionError, RuntimeError), match=seen):
        call(*case, changes=(FAULTY, CHANGED), **options)


def test_a_first_launch_inside_a_graph_capture_says_what_to_do(call):
    """Of a kernel that no other test takes of this library. Once it was launched, a capture may have it."""
    *case, options = ("library", *LIBRARY[3][:-1])

    def run_in(capture):
        emulator().library.emulated_set_fault(b"capturing" if capture else b"")
        return call(*case, changes=(FAULTY, CHANGED), **options)

    with pytest.raises(RuntimeError, match=r"inside a CUDA graph capture.* once before the capture"):
        run_in(True)
    assert len(run_in(False)) == len(run_in(True)) > 0
    emulator().library.emulated_set_fault(b"")
