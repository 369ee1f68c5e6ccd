"""The emulator itself, on small kernels: `pytest tests`."""

import random
import sys

import numpy as np
import pytest

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
from ptxsim import Device, Fault, Schedule, TensorMap, load_module
from ptxsim.floats import E4M3, to_bf16, to_e4m3

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def kernel(body: str, params=("u64", "u64"), shared: int = 0):
    names = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(params))
    static = f".shared .align 1024 .b8 s[{shared}];" if shared else ""
    text = f"{HEAD}.visible .entry k({names})\n{{\n.reg .b32 %r<64>;\n.reg .b64 %rd<64>;\n.reg .f32 %f<32>;\n.reg .pred %p<16>;\n.reg .b16 %h<16>;\n{static}\n"
    return load_module(text + body + "\nret;\n}\n").find("k")


LOAD = """
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, {step};
add.s64 %rd4, %rd1, %rd3; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd2, %rd5;
"""


def run(operations: str, inputs: np.ndarray, threads=32, seed=0, **options) -> np.ndarray:
    """Operations from %r10, %r11, %r12 (three words of each thread) to %r20."""
    device = Device(1 << 16)
    source, out = device.put(inputs.astype(np.uint32)), device.empty(threads, np.uint32)
    body = (
        LOAD.format(step=12)
        + "ld.global.u32 %r10, [%rd4]; ld.global.u32 %r11, [%rd4+4]; ld.global.u32 %r12, [%rd4+8];\n"
    )
    made = kernel(body + operations + "\nst.global.u32 [%rd6], %r20;", **options)
    device.launch(made, 1, threads, [source, out], schedule=seed)
    return device.get(out)


M32 = 0xFFFFFFFF
signed = lambda x: x - (1 << 32) if x >> 31 else x  # noqa: E731


def prmt(a, b, c):
    data = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        n = c >> 4 * i & 15
        byte = data[n & 7]
        out |= ((255 if byte & 128 else 0) if n & 8 else byte) << 8 * i
    return out


def bfe_s(a, b, c):
    pos, n = b & 255, c & 255
    if n == 0:
        return 0
    sign = a >> min(pos + n - 1, 31) & 1
    return sum(((a >> pos + i & 1) if i < n and pos + i < 32 else sign) << i for i in range(32)) & M32


CASES = {
    "add.s32 %r20, %r10, %r11;": lambda a, b, c: a + b,
    "sub.s32 %r20, %r10, %r11;": lambda a, b, c: a - b,
    "mul.hi.s32 %r20, %r10, %r11;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r20, %r10, %r11;": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 %r20, %r10, %r11, %r12;": lambda a, b, c: a * b + c,
    "div.s32 %r20, %r10, 7;": lambda a, b, c: int(signed(a) / 7) if abs(signed(a)) < 1 << 52 else 0,
    "rem.s32 %r20, %r10, 7;": lambda a, b, c: signed(a) - 7 * int(signed(a) / 7),
    "and.b32 %r13, %r11, 63; shl.b32 %r20, %r10, %r13;": lambda a, b, c: a << (b & 63),
    "and.b32 %r13, %r11, 63; shr.s32 %r20, %r10, %r13;": lambda a, b, c: signed(a) >> (b & 63),
    "and.b32 %r13, %r11, 63; shr.u32 %r20, %r10, %r13;": lambda a, b, c: a >> (b & 63),
    "prmt.b32 %r20, %r10, %r11, %r12;": prmt,
    "bfe.s32 %r20, %r10, %r11, %r12;": bfe_s,
    "bfe.u32 %r20, %r10, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfi.b32 %r20, %r10, %r11, 7, 12;": lambda a, b, c: b & ~(4095 << 7) | (a & 4095) << 7,
    "shf.l.wrap.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "lop3.b32 %r20, %r10, %r11, %r12, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %r20, %r10, %r11, %r12, 0xCA;": lambda a, b, c: (a & b) | (~a & c),
    "popc.b32 %r20, %r10;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r20, %r10;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r20, %r10;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, %r12, 5, %p1;": lambda a, b, c: c if signed(a) < signed(b) else 5,
    "setp.lo.u32 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 2, %p2;": lambda a, b, c: 2 if a < b else 1,
    "max.s32 %r20, %r10, %r11;": lambda a, b, c: max(signed(a), signed(b)),
    "mov.b32 {%h1, %h2}, %r10; mov.b32 %r20, {%h2, %h1};": lambda a, b, c: a >> 16 | (a & 0xFFFF) << 16,
    "cvt.s64.s32 %rd20, %r10; shr.u64 %rd20, %rd20, 32; cvt.u32.u64 %r20, %rd20;": lambda a, b, c: M32 if a >> 31 else 0,
    "cvt.u16.u32 %h1, %r10; cvt.s32.s16 %r20, %h1;": lambda a, b, c: (a & 0xFFFF) - ((a & 0x8000) << 1),
    "@%p9 mov.u32 %r20, 1; mov.u32 %r20, %r12; setp.ge.u32 %p3, %r1, 9; @%p3 mov.u32 %r20, %r10;": None,
}  # fmt: skip


@pytest.mark.parametrize("operations", CASES)
def test_integers(operations):
    rng = random.Random(1)
    words = [[rng.choice([rng.getrandbits(32), rng.getrandbits(5), M32, 0]) for _ in range(3)] for _ in range(32)]
    found = run(operations, np.array(words, dtype=np.uint64))
    for lane, (a, b, c) in enumerate(words):
        wanted = CASES[operations](a, b, c) if CASES[operations] else (a if lane >= 9 else c)
        assert int(found[lane]) == wanted & M32, (lane, a, b, c)


def test_lanes_that_part_and_meet():
    loop = "mov.u32 %r20, 0; and.b32 %r13, %r10, 15; L1: setp.eq.u32 %p1, %r13, 0; @%p1 bra L2; add.u32 %r20, %r20, %r13; sub.u32 %r13, %r13, 1; bra L1; L2: shl.b32 %r20, %r20, 1;"
    words = np.arange(96).reshape(32, 3)
    for seed in range(6):
        found = run(loop, words, seed=seed)
        assert [int(x) for x in found] == [2 * sum(range((int(a) & 15) + 1)) for a in words[:, 0]]


@pytest.mark.parametrize(("mode", "by", "clamp", "where"), [
    ("bfly", 5, 31, lambda i: i ^ 5), ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i),
    ("up", 2, 0, lambda i: i - 2 if i >= 2 else i), ("idx", 7, 31, lambda i: 7), ("bfly", 8, 0x1807, lambda i: i ^ 8 if i & 8 else i),
])  # fmt: skip
def test_shuffles(mode, by, clamp, where):
    words = np.arange(96).reshape(32, 3)
    found = run(f"shfl.sync.{mode}.b32 %r20|%p1, %r10, {by}, {clamp}, -1;", words)
    assert [int(x) for x in found] == [3 * where(i) for i in range(32)]


def test_numbers_of_few_bits():
    for code in range(256):
        x = E4M3[code]
        if not np.isnan(x):
            assert int(to_e4m3(np.array([x], np.float32))[0]) == code
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4000) * 100).astype(np.float32)
    torch = pytest.importorskip("torch")
    wanted = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(to_e4m3(x).astype(np.uint8), wanted)
    assert np.array_equal(to_bf16(x).view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())


@pytest.mark.parametrize(("offset", "kind"), [(128, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")])
def test_accesses(offset, kind):
    device = Device(1 << 16)
    source, out = device.put(np.arange(32, dtype=np.uint32)), device.empty(32, np.uint32)
    made = kernel(LOAD.format(step=0) + f"ld.global.u32 %r20, [%rd4{offset:+}]; st.global.u32 [%rd6], %r20;")
    with pytest.raises(Fault, match=kind):
        device.launch(made, 1, 32, [source, out])


def test_results_that_may_not_be_written():
    device = Device(1 << 16)
    made = kernel(LOAD.format(step=4) + "st.global.u32 [%rd4], %r1;")
    with pytest.raises(Fault, match="write to"):
        device.launch(made, 1, 32, [device.put(np.zeros(32, np.uint32)), 0])


EXCHANGE = (
    LOAD.format(step=4)
    + """
ld.global.u32 %r10, [%rd4]; shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r10; {sync}
xor.b32 %r5, %r2, 252; add.u32 %r6, %r3, %r5; ld.shared.u32 %r20, [%r6]; st.global.u32 [%rd6], %r20;
"""
)


def test_a_barrier_too_few():
    made = {sync: kernel(EXCHANGE.format(sync=sync), shared=256) for sync in ("", "bar.sync 0;")}
    for seed in range(8):
        for sync, k in made.items():
            device = Device(1 << 16)
            source, out = device.put(np.arange(64, dtype=np.uint32)), device.empty(64, np.uint32)
            if sync:
                device.launch(k, 1, 64, [source, out], schedule=seed)
                assert np.array_equal(device.get(out), 63 - np.arange(64))
            else:
                with pytest.raises(Fault, match="race"):
                    device.launch(k, 1, 64, [source, out], schedule=seed)


def test_deadlock():
    made = kernel("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra L; bar.sync 1, 64; L: bar.sync 2, 64;")
    with pytest.raises(Fault, match="deadlock"):
        Device(1 << 16).launch(made, 1, 64, [0, 0])


COPY = """
mov.u32 %r1, %tid.x; mov.u32 %r2, s; add.u32 %r3, %r2, 8192; setp.ne.u32 %p1, %r1, 0; mov.u64 %rd1, p0; mov.u64 %rd2, p1;
cvta.param.u64 %rd1, %rd1; cvta.param.u64 %rd2, %rd2;
@%p1 bra L1; mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster; L1: bar.sync 0;
@%p1 bra L2; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {{{column}, {row}}}], [%r3];
L2: {wait} @%p1 bra L3;
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{8, 3}}], [%r2]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
L3: ret;
"""
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra W;"


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("column", "row"), [(0, 0), (-5, -2), (40, 30)])
def test_tensor_copies(swizzle, column, row):
    columns = {0: 64, 128: 64, 64: 32, 32: 16}[swizzle]
    numbers = np.arange(60 * 72, dtype=np.uint16).reshape(60, 72)
    for wait in (WAIT, ""):
        body = COPY.format(bytes=columns * 16 * 2, column=column, row=row, wait=wait)
        text = f"{HEAD}.visible .entry k(.param .align 64 .b8 p0[128], .param .align 64 .b8 p1[128])\n{{\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n.reg .pred %p<4>;\n.shared .align 1024 .b8 s[8200];\n{body}}}"
        made = load_module(text).find("k")
        for seed in range(4):
            device = Device(1 << 17)
            source, out = device.put(numbers), device.empty((40, 80), np.uint16)
            maps = [TensorMap(at, 2, size, (stride,), (columns, 16), swizzle) for at, size, stride in
                    ((source, (70, 60), 144), (out, (80, 40), 160))]  # fmt: skip
            try:
                device.launch(made, 1, 32, maps, schedule=seed)
            except Fault as fault:
                assert not wait and fault.kind in ("exited", "barrier", "race")
                continue
            wanted = np.full((40, 80), 0xFFFF, np.uint16)
            for i in range(16):
                for j in range(columns):
                    inside = 0 <= row + i < 60 and 0 <= column + j < 70
                    wanted[3 + i, 8 + j] = numbers[row + i, column + j] if inside else 0
            assert wait and np.array_equal(device.get(out), wanted)


def test_schedules_differ():
    assert len({str(Schedule.of(seed)) for seed in range(20)}) == 20
