"""What the Triton kernels touch: no number but those of their operands and results, and these beyond 2³¹ too.

Memory of which nothing is read or written costs nothing, so the matrices of which a few rows are used may be large.
"""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from routes import TRITON_DEVICE, TRITON_ROUTES
from support import DTYPES, RedZones, each

from fastbp.backends import triton
from fastbp.problem import configure

if triton.unavailable is None:
    from fastbp.backends.triton import configs, launch

pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
only_interpreted = pytest.mark.skipif(not triton.interpreting(), reason="test_gpu.py has real matrices as large")

# What each kernel reads and what it writes, with their sizes, in the order in which a launch takes them, those with a
# star last of all: t is one of the strips or of the rows of tiles that have sums of their own, b and s the bytes of a
# row's bits and scales. "none" is what is not there.
KERNELS = {
    "forward": ("x:mk weight:nk bias:n", "y:mn z:mn"),
    "gated_forward": ("x:mk gate_weight:nk up_weight:nk gate_bias:n up_bias:n", "y:mn gate:mn up:mn"),
    "dgrad": ("d:mk weight:kn residual:mn", "dz:mn h:mn sums:tn"),
    "gated_dgrad": ("d:mk weight:kn gate:mn up:mn", "dgate:mn dup:mn h:mn gate_sums:tn up_sums:tn"),
    "activation": ("gate:mn up:mn", "y:mn"),
    "chain_rule": ("dh:mn residual:mn", "dz:mn h:mn sums:tn"),
    "gated_chain_rule": ("dh:mn gate:mn up:mn", "dgate:mn dup:mn h:mn gate_sums:tn up_sums:tn"),
    "column_sum": ("sums:tn", "out:n"),
}
COMPRESSED = {
    ("forward", "output_bits"): ("x:mk weight:nk bias:n", "y:mn bits:mb"),
    ("forward", "fp8"): ("x:mk weight:nk bias:n", "y:mn codes:mn scales:ms"),
    ("gated_forward", "fp8"): (
        "x:mk gate_weight:nk up_weight:nk gate_bias:n up_bias:n",
        "y:mn gate_codes:mn up_codes:mn gate_scales:ms up_scales:ms",
    ),
    ("dgrad", "output_bits"): ("d:mk weight:kn residual:mn bits:mb*", "dz:mn none sums:tn"),
    ("dgrad", "output_lsb"): ("d:mk weight:kn residual:mn", "dz:mn none sums:tn"),
    ("dgrad", "fp8"): ("d:mk weight:kn codes:mn scales:ms*", "dz:mn h:mn sums:tn"),
    ("gated_dgrad", "fp8"): (
        "d:mk weight:kn gate_codes:mn up_codes:mn gate_scales:ms* up_scales:ms*",
        "dgate:mn dup:mn h:mn gate_sums:tn up_sums:tn",
    ),
    ("compress", "output_bits"): ("gate:mn none", "y:mn bits:mb none"),
    ("compress", "fp8"): ("gate:mn up:mn", "y:mn gate_codes:mn gate_scales:ms up_codes:mn up_scales:ms"),
    ("chain_rule", "output_bits"): ("dh:mn residual:mn bits:mb*", "dz:mn none sums:tn"),
    ("chain_rule", "fp8"): ("dh:mn codes:mn scales:ms*", "dz:mn h:mn sums:tn"),
    ("gated_chain_rule", "fp8"): (
        "dh:mn gate_codes:mn up_codes:mn gate_scales:ms* up_scales:ms*",
        "dgate:mn dup:mn h:mn gate_sums:tn up_sums:tn",
    ),
}
PRODUCTS = [kernel for kernel in KERNELS if "forward" in kernel or "dgrad" in kernel]
WAYS = [way for way in TRITON_ROUTES if way != "library"]
RUNS = [(kernel, way, dtype) for kernel, way, dtype in product(PRODUCTS, WAYS, DTYPES) if dtype.itemsize == 2]
STRIPS = ("compress", "chain_rule", "gated_chain_rule")
PASSES = [kernel for kernel in KERNELS if kernel not in PRODUCTS]
RUNS += [(kernel, "strips", dtype) for kernel, dtype in product(PASSES, DTYPES)]


class Call:
    """A kernel with random operands, contiguous until ``operands`` is changed, and results by ``new``."""

    def __init__(self, kernel, way, dtype, sizes, new=None, save="preact"):
        self.kernel, self.cut = kernel, configs.Strip(16, 32, 16)
        if kernel in PRODUCTS:
            self.cut = configs.Tile(**TRITON_ROUTES[way][1])
        m, n, k = sizes
        size = dict(m=m, n=n, k=k, t=-(-m // self.cut.block_m) if kernel != "column_sum" else m)
        size |= dict(b=-(-n // 2), s=-(-n // 32))
        generator = torch.Generator().manual_seed(61)
        words = COMPRESSED.get((kernel, save)) or KERNELS[kernel]
        self.order = sorted(" ".join(words).split(), key=lambda word: "*" in word)
        self.operands, self.results = {}, {}
        for tensors, row in zip((self.operands, self.results), words, strict=True):
            for name, letters in (word.strip("*").split(":") for word in row.split() if word != "none"):
                dtype_of = torch.float32 if "sums" in name and dtype.itemsize == 2 else dtype
                numbers = torch.randn([size[letter] for letter in letters], generator=generator, dtype=torch.float64)
                if name.split("_")[-1] in ("bits", "codes", "scales"):  # codes of no NaN, and scales near 1
                    dtype_of, numbers = torch.uint8, numbers.abs() * 8 + 0x70 * ("scales" in name)
                tensors[name] = numbers.to(TRITON_DEVICE, dtype_of)
        new = new or RedZones().new
        self.results = {name: new(t.shape, t) for name, t in self.results.items()}
        config = configure("mlp", "gelu", (), save, "triton")
        self.how = None if kernel == "column_sum" else launch.arithmetic(config, dtype)

    def launch(self):
        tensors = self.operands | self.results
        arguments = [tensors.get(word.strip("*").split(":")[0]) for word in self.order]
        if self.kernel == "gated_forward":
            arguments[1:5] = arguments[1:3], arguments[3:5]
        cut = [self.cut, 4] if self.kernel in PRODUCTS else [self.cut] if self.kernel in STRIPS else []
        return getattr(launch, self.kernel)(*[self.how] * (self.how is not None), *cut, *arguments)

    def run(self):
        self.launch()()
        return {name: t.clone() for name, t in self.results.items()}


def addresses(*tensors):
    """Where the numbers of these are."""
    found = []
    for t in tensors:
        offsets = [np.arange(size, dtype=np.int64) * stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        grid = np.add.reduce(np.meshgrid(*offsets, indexing="ij")) * t.itemsize + t.data_ptr()
        found.append(grid.ravel().astype(np.uint64))
    return np.concatenate(found)


@pytest.fixture
def guard(monkeypatch):
    """A function of what may be read and what may be written; all else is refused. Where there is a GPU, nothing is."""

    def start(operands, results):
        if not triton.interpreting():
            return
        from triton.runtime import interpreter

        memory = interpreter._interpreter
        readable, writable, load, store = addresses(*operands), addresses(*results), memory.load, memory.store

        def guarded_load(pointers, mask, *rest):
            assert np.isin(pointers[mask], readable).all(), "a read beside the operands"
            return load(pointers, mask, *rest)

        def guarded_store(pointers, value, mask):
            assert np.isin(pointers[mask], writable).all(), "a write beside the results"
            return store(pointers, value, mask)

        monkeypatch.setattr(memory, "load", guarded_load)
        monkeypatch.setattr(memory, "store", guarded_store)

    return start


def amid_nan(t, gap):
    """The same numbers with NaN before, after, and behind every row."""
    rows, cols = t.shape if t.dim() > 1 else (1, len(t))
    nan = 0x7F if t.dtype == torch.uint8 else float("nan")
    buffer = torch.full((64 + rows * (cols + gap) + 64,), nan, dtype=t.dtype, device=t.device)
    return buffer.as_strided(t.shape, (cols + gap, 1)[-t.dim() :], 64).copy_(t)


CODED = [
    (kernel, way, dtype, save)
    for kernel, save in COMPRESSED
    for way in (("fused", "fused by pointers") if kernel in PRODUCTS else ("strips",))
    for dtype in ((torch.bfloat16,) if kernel in PRODUCTS else (torch.bfloat16, torch.float32))
    if not ("forward" in kernel and save == "fp8" and "pointers" in way)  # whose tile is narrower than a block
]


@each(("kernel", "way", "dtype", "save"), [(*run, "preact") for run in RUNS] + CODED)
def test_nothing_beside_the_operands_is_read(kernel, way, dtype, save, guard):
    """Sizes that no tile divides, and with descriptors what they can describe: rows of 16 bytes."""
    described = "tma" in TRITON_ROUTES.get(way, ("", {}))[1]
    sizes = (37, 40, 24) if described else (37, 43, 19)
    expected = Call(kernel, way, dtype, sizes, save=save).run()
    zones = RedZones()
    call = Call(kernel, way, dtype, sizes, zones.new, save)
    for name, t in call.operands.items():
        adjacent = kernel in ("activation", "compress", "column_sum") or t.dim() == 1
        call.operands[name] = amid_nan(t, 0 if adjacent else 8 if described else 5)
    guard(call.operands.values(), call.results.values())
    found = call.run()
    zones.check()
    for name, t in found.items():
        assert not t.isnan().any() and torch.equal(t, expected[name]), name


def reserve(count, dtype):
    """Memory for so many numbers, none of which is touched yet."""
    try:
        return torch.empty(count, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not promise {count * dtype.itemsize >> 30} GiB: {error}")


def far(t, turned=False):
    """The same numbers, the last row (``turned``: column) 2³¹ of them or more behind the first, by an int32 stride."""
    t = t.mT if turned else t
    stride = 2**31 // (len(t) - 1) // 8 * 8 + 8
    assert stride < 2**31 <= stride * (len(t) - 1)
    copy = reserve((len(t) - 1) * stride + t.shape[1], t.dtype).as_strided(t.shape, (stride, 1)).copy_(t)
    return copy.mT if turned else copy


# The matrices of which each kernel is told a stride; those that share one together.
STRIDED = {
    "forward": ("x", "weight", "y z"),
    "gated_forward": ("x", "gate_weight", "up_weight", "y gate up"),
    "dgrad": ("d", "weight", "residual", "dz h"),
    "gated_dgrad": ("d", "weight", "gate up", "dgate dup h"),
    "chain_rule": ("dh", "residual"),
    "gated_chain_rule": ("dh", "gate up"),
}
TURNED = ("x", "weight", "gate_weight", "up_weight", "d", "dh")  # and those that have one for their columns
BY_POINTERS, BY_DESCRIPTORS = "fused by pointers", "fused, persistent"
FAR = [(k, w, names, False) for k in STRIDED for names in STRIDED[k] for w in (BY_POINTERS, BY_DESCRIPTORS)]
FAR += [(k, BY_POINTERS, name, True) for k in STRIDED for name in STRIDED[k] if name in TURNED]


@only_interpreted
@each(("kernel", "way", "names", "turned"), [run for run in FAR if run[0] in PRODUCTS or run[1] == BY_POINTERS])
def test_rows_and_columns_beyond_two_to_the_31_numbers(kernel, way, names, turned, guard):
    sizes = (5, 24, 8)
    expected = Call(kernel, way, torch.bfloat16, sizes).run()
    call = Call(kernel, way, torch.bfloat16, sizes)
    for name in names.split():
        tensors = call.operands if name in call.operands else call.results
        tensors[name] = far(tensors[name], turned)
    guard(call.operands.values(), call.results.values())
    for name, t in call.run().items():
        assert torch.equal(t, expected[name]), name


def run_last(found, monkeypatch):
    """The last program of a grid that is too large to be walked through."""
    from triton.runtime.interpreter import interpreter_builder as builder

    whole = (*found.grid, 1, 1)[:3]
    monkeypatch.setattr(builder, "set_grid_dim", lambda *dims: setattr(builder, "grid_dim", whole))
    last = tuple(size - 1 for size in whole)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *at: setattr(builder, "grid_idx", last))
    dataclasses.replace(found, grid=(1,))()


BIG = 2**31


@only_interpreted
@each("dtype", [torch.bfloat16, torch.float32])
def test_the_last_program_of_the_flat_kernel(dtype, guard, monkeypatch):
    small = Call("activation", "strips", dtype, (1, 100, 1))
    expected = small.run()["y"]
    call = Call("activation", "strips", dtype, (1, 100, 1))
    for tensors in (call.operands, call.results):
        for name, t in tensors.items():
            tensors[name] = reserve(BIG + 100, dtype)
            tensors[name][-100:] = t[0]
    tails = [[t[-100:] for t in tensors.values()] for tensors in (call.operands, call.results)]
    guard(*tails)
    run_last(call.launch(), monkeypatch)
    assert torch.equal(tails[1][0], expected[0])


def last_rows(call, names, shape):
    """Room for matrices of this shape in place of small ones, which are copied into their last corners; these."""
    corners = []
    for tensors in (call.operands, call.results):
        found = []
        for name, t in tensors.items():
            if name in names:
                tensors[name] = reserve(torch.Size(shape).numel(), t.dtype).view(shape)
                tensors[name][-t.shape[0] :, -t.shape[1] :] = t
            found.append(tensors[name][-t.shape[0] :, -t.shape[1] :])
        corners.append(found)
    return corners


@only_interpreted
@each("kernel", ["chain_rule", "gated_chain_rule"])
def test_the_last_program_of_the_strips(kernel, guard, monkeypatch):
    """A strip for each row, so the row of sums is as far away as that of the matrices."""
    call = Call(kernel, "strips", torch.bfloat16, (1, 24, 1))
    expected = call.run()
    call.cut = configs.Strip(16, 32, 1)
    corners = last_rows(call, {*call.operands, *call.results}, (2**16 + 1, 2**15 + 24))
    guard(*corners)
    run_last(call.launch(), monkeypatch)
    for (name, t), corner in zip(expected.items(), corners[1], strict=True):
        assert torch.equal(t, corner), name


@only_interpreted
@each("kernel", ["dgrad", "gated_dgrad"])
def test_the_sums_of_the_last_tile(kernel, guard, monkeypatch):
    """As many rows of tiles as make the sums alone too large; all rows of a matrix are one and the same."""
    call = Call(kernel, BY_POINTERS, torch.bfloat16, (1, 8, 8))
    expected = call.run()
    tiles, n = 2**16 + 1, 2**15 + 8
    last_rows(call, {name for name in call.results if "sums" in name}, (tiles, n))
    weight = reserve(8 * n, torch.bfloat16).view(8, n)
    weight[:, -8:] = call.operands["weight"]
    call.operands["weight"] = weight
    for tensors in (call.operands, call.results):
        for name, t in tensors.items():
            if name != "weight" and "sums" not in name:
                wide = torch.zeros(1, t.shape[1] if name == "d" else n, dtype=t.dtype)
                wide[:, -8:] = t
                tensors[name] = wide.expand((tiles - 1) * call.cut.block_m + 1, -1)
    guard(*([t[-8:, -8:] for t in tensors.values()] for tensors in (call.operands, call.results)))
    run_last(call.launch(), monkeypatch)
    for name, t in expected.items():
        assert torch.equal(t, call.results[name][-1:, -8:]), name


@only_interpreted
def test_the_last_program_of_the_column_sums(guard, monkeypatch):
    call = Call("column_sum", "strips", torch.float32, (35, 24, 1))
    expected = call.run()["out"]
    numbers, n = call.operands["sums"], 2**26 + 24
    sums, out = reserve(35 * n, torch.float32).view(35, n), reserve(n, torch.float32)
    sums[:, -24:] = numbers
    call.operands, call.results = {"sums": sums}, {"out": out}
    guard([sums[:, -24:]], [out[-24:]])
    run_last(call.launch(), monkeypatch)
    assert torch.equal(out[-24:], expected)
