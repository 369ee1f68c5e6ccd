"""Small kernels of PTX for the emulator's own tests."""

from __future__ import annotations

import numpy as np

from ptxsim import Device, load_module

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = (
    ".reg .b32 %r<96>;\n.reg .b64 %rd<64>;\n.reg .f32 %f<96>;\n.reg .f64 %fd<32>;\n"
    ".reg .pred %p<16>;\n.reg .b16 %h<16>;\n"
)
# Each thread's: its number in %r1, its words at %rd4, its result at %rd6.
LOAD = """
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, {step}; add.s64 %rd4, %rd1, %rd3; mul.wide.u32 %rd5, %r1, {out}; add.s64 %rd6, %rd2, %rd5;
"""
WORDS = "ld.global.u32 %r10, [%rd4]; ld.global.u32 %r11, [%rd4+4]; ld.global.u32 %r12, [%rd4+8];\n"


def kernel(body: str, params=("u64", "u64"), shared: int = 0, before: str = ""):
    """A kernel k of these parameters; `u64` and the like, or the size in bytes of a tensor map."""
    kinds = [
        f".param .align 64 .b8 p{i}[{k}]" if isinstance(k, int) else f".param .{k} p{i}" for i, k in enumerate(params)
    ]
    static = f".shared .align 1024 .b8 s[{shared}];\n" if shared else ""
    text = f"{HEAD}{before}.visible .entry k({', '.join(kinds)})\n{{\n{REGISTERS}{static}{body}\nret;\n}}\n"
    return load_module(text).find("k")


def run(operations: str, inputs: np.ndarray, threads: int = 32, seed: int = 0, out=np.uint32, result="%r20", **options):
    """Operations from %r10, %r11, %r12 (three words of each thread) to a result of each."""
    device, out = Device(1 << 16), np.dtype(out)
    source, to = device.put(inputs.astype(np.uint32)), device.empty(threads, out)
    store = f"\nst.global.u{8 * out.itemsize} [%rd6], {result};"
    made = kernel(LOAD.format(step=12, out=out.itemsize) + WORDS + operations + store, **options)
    device.launch(made, 1, threads, [source, to], schedule=seed)
    return device.get(to)


def random_words(seed: int, rows: int = 32, edges=(0xFFFFFFFF, 0, 1, 0x80000000, 0x7FFFFFFF)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, (rows, 3), dtype=np.uint64)
    small = rng.integers(0, 64, (rows, 3), dtype=np.uint64)
    edge = rng.choice(np.array(edges, np.uint64), (rows, 3))
    return np.select([rng.random((rows, 3)) < 0.5, rng.random((rows, 3)) < 0.6], [words, small], edge).astype(np.uint32)
