"""Accesses without an order: in shared memory, in global memory, and between the proxies."""

import numpy as np
import pytest

from ptxsim import Device, Fault

from .small_kernels import LOAD, kernel

EXCHANGE = (
    LOAD.format(step=4, out=4)
    + """
ld.global.u32 %r10, [%rd4]; shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r10;
{sync}
xor.b32 %r5, %r2, {other}; add.u32 %r6, %r3, %r5; ld.shared.u32 %r20, [%r6]; st.global.u32 [%rd6], %r20;
"""
)


def outcome(made, grid, threads, params, device, seed, **options) -> str:
    try:
        device.launch(made, grid, threads, params, schedule=seed, **options)
    except Fault as fault:
        return fault.kind
    return ""


@pytest.mark.parametrize(
    ("sync", "other", "wanted"),
    [("bar.sync 0;", 252, ""), ("", 252, "race"), ("bar.warp.sync -1;", 124, ""), ("", 124, "race"),
     ("bar.warp.sync -1;", 252, "race")],
)  # fmt: skip
def test_shared_memory(sync, other, wanted):
    made = kernel(EXCHANGE.format(sync=sync, other=other), shared=256)
    for seed in range(8):
        device = Device(1 << 16)
        source, out = device.put(np.arange(64, dtype=np.uint32)), device.empty(64, np.uint32)
        assert outcome(made, 1, 64, [source, out], device, seed) == wanted
        if not wanted:
            assert np.array_equal(device.get(out), np.arange(64) ^ other // 4)


# Each thread's number over the grid is in %r3, and its address at %rd4; that of another at %rd6.
IN_PLACE = """
ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; shl.b32 %r3, %r2, 6; add.u32 %r3, %r3, %r1;
mul.wide.u32 %rd3, %r3, 4; add.s64 %rd4, %rd1, %rd3; xor.b32 %r4, %r3, {other}; mul.wide.u32 %rd5, %r4, 4;
add.s64 %rd6, %rd1, %rd5; {body}
"""
SWAP = "ld.global.u32 %r5, [%rd6]; {sync} st.global.u32 [%rd4], %r5;"


@pytest.mark.parametrize(
    ("body", "other", "cluster", "wanted"),
    [
        (SWAP.format(sync=""), 0, 1, ""),  # in place, each its own
        (SWAP.format(sync=""), 32, 1, "global race"),  # another warp's, which it overwrites meanwhile
        (SWAP.format(sync="bar.sync 0;"), 32, 1, ""),
        (SWAP.format(sync="bar.sync 0;"), 64, 1, "global race"),  # another cluster's: nothing orders them
        (SWAP.format(sync="barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"), 64, 2, ""),
        (SWAP.format(sync="bar.sync 0;"), 64, 2, "global race"),
        ("st.global.u32 [%rd4], 1; bar.sync 0; ld.global.u32 %r5, [%rd6];", 32, 1, ""),
        ("st.global.u32 [%rd4], 1; ld.global.u32 %r5, [%rd6];", 32, 1, "global race"),
        ("st.global.u32 [%rd1], 1;", 0, 1, "global race"),  # all write one place
        ("red.global.add.u32 [%rd1], 1;", 0, 1, ""),
        ("red.global.add.u32 [%rd1], 1; ld.global.u32 %r5, [%rd1];", 0, 1, "global race"),
        ("ld.global.u32 %r5, [%rd1];", 0, 1, ""),
        ("ld.global.u32 %r5, [%rd1]; setp.eq.u32 %p1, %r3, 70; @%p1 st.global.u32 [%rd1], 2;", 0, 1, "global race"),
    ],
)
def test_global_memory(body, other, cluster, wanted):
    made = kernel(IN_PLACE.format(other=other, body=body), params=("u64",))
    for seed in range(6):
        device = Device(1 << 16)
        x = device.put(np.arange(128, dtype=np.uint32), writable=True)
        assert outcome(made, 2, 64, [x], device, seed, cluster=cluster) == wanted


LATE = "mov.u32 %r9, 400; Z: sub.u32 %r9, %r9, 1; setp.ne.u32 %p7, %r9, 0; bar.warp.sync -1; @%p7 bra Z;"
READ = "ld.global.u32 %r5, [%rd1];"


@pytest.mark.parametrize(
    ("grid", "body"),
    [
        # the first warp reads, and long after the second writes
        (1, f"setp.lt.u32 %p1, %r1, 32; @%p1 bra E; {LATE} st.global.u32 [%rd1], 1; bra X; E: {READ} X:"),
        # the first CTA reads; long after both warps of the second do, come together, and one of them writes
        (2, f"setp.eq.u32 %p1, %r2, 0; @%p1 bra E; {LATE} {READ} bar.sync 0; setp.eq.u32 %p2, %r1, 0;"
         f"@%p2 st.global.u32 [%rd1], 1; bra X; E: {READ} X:"),
    ],
    ids=["warps", "clusters"],
)  # fmt: skip
def test_a_write_over_what_others_have_read(grid, body):
    made = kernel(IN_PLACE.format(other=0, body=body), params=("u64",))
    for seed in range(8):
        device = Device(1 << 16)
        x = device.put(np.arange(128, dtype=np.uint32), writable=True)
        assert outcome(made, grid, 64, [x], device, seed) == "global race"


def test_bytes_beside_each_other_are_no_race():
    body = """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; and.b32 %r3, %r1, 31;
    shl.b32 %r3, %r3, 1;
    add.u32 %r3, %r3, %r2; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3; st.global.u8 [%rd4], %r1;"""
    device = Device(1 << 14)
    device.launch(kernel(body, params=("u64",)), 1, 64, [device.empty(64, np.uint8)])


def test_launches_are_ordered():
    device = Device(1 << 16)
    x = device.put(np.arange(128, dtype=np.uint32), writable=True)
    for other in (0, 64):
        body = "ld.global.u32 %r5, [%rd6]; st.global.u32 [%rd4], %r5;" if not other else "ld.global.u32 %r5, [%rd6];"
        device.launch(kernel(IN_PLACE.format(other=other, body=body), params=("u64",)), 2, 64, [x])
