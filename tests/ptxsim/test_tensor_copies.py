"""Tensor copies, bulk-groups and cp.async: what they move, and what must wait for them."""

from dataclasses import replace

import numpy as np
import pytest

from ptxsim import Device, Fault, Schedule, TensorMap

from .small_kernels import LOAD, kernel

START = """
mov.u32 %r1, %tid.x; mov.u32 %r2, s; add.u32 %r3, %r2, 8192; setp.ne.u32 %p1, %r1, 0; mov.u64 %rd1, p0;
mov.u64 %rd2, p1;
cvta.param.u64 %rd1, %rd1; cvta.param.u64 %rd2, %rd2;
@%p1 bra L1; mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster; L1: bar.sync 0;
"""
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};"
GET = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%r2], [%rd1, {{{column}, {row}}}], [%r3];"
)
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra W;"
PUT = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{8, 3}}], [%r2]; cp.async.bulk.commit_group;"
DONE = "cp.async.bulk.wait_group 0;"


def copy_kernel(columns: int, column: int, row: int, *, expect=None, wait=WAIT, between="", done=DONE, put=PUT):
    size = columns * 32 if expect is None else expect
    body = START + "@%p1 bra L2;" + (EXPECT + GET).format(bytes=size, column=column, row=row) + "L2: " + wait
    return kernel(body + f"{between} @%p1 bra L3;" + put.format() + done + "L3:", params=(128, 128), shared=8448)


def maps(device: Device, columns: int, swizzle: int):
    numbers = np.arange(60 * 72, dtype=np.uint16).reshape(60, 72)
    source, out = device.put(numbers), device.empty((40, 80), np.uint16)
    sizes = ((source, (70, 60), 144), (out, (80, 40), 160))
    return numbers, out, [TensorMap(at, 2, size, (stride,), (columns, 16), swizzle) for at, size, stride in sizes]


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("column", "row"), [(0, 0), (-5, -2), (40, 50)])
def test_a_box_in_and_out(swizzle, column, row):
    columns = {0: 64, 128: 64, 64: 32, 32: 16}[swizzle]
    made = copy_kernel(columns, column, row)
    for seed in range(3):
        device = Device(1 << 17)
        numbers, out, both = maps(device, columns, swizzle)
        device.launch(made, 1, 32, both, schedule=seed)
        wanted = np.full((40, 80), 0xFFFF, np.uint16)
        for i in range(16):
            for j in range(columns):
                inside = 0 <= row + i < 60 and 0 <= column + j < 70
                wanted[3 + i, 8 + j] = numbers[row + i, column + j] if inside else 0
        assert np.array_equal(device.get(out), wanted)


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_where_a_box_lies_in_shared_memory(swizzle):
    """A row's 16-byte chunks are exchanged by the number of its 128 bytes (ISA, "Swizzling Modes")."""
    columns, chunks = swizzle // 2, swizzle // 16
    body = START.replace("mov.u64 %rd2, p1;", "ld.param.u64 %rd2, [p1];").replace("cvta.param.u64 %rd2, %rd2;", "")
    body += "@%p1 bra L2;" + (EXPECT + GET).format(bytes=columns * 32, column=0, row=0) + "L2: " + WAIT
    body += "mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd2, %rd5; shl.b32 %r4, %r1, 2; add.u32 %r4, %r4, %r2;"
    words = columns * 16 // 2
    body += "".join(
        f"ld.shared.u32 %r5, [%r4+{i * 128}]; st.global.u32 [%rd6+{i * 128}], %r5;" for i in range(words // 32)
    )
    device = Device(1 << 17)
    numbers, _, (source, _) = maps(device, columns, swizzle)
    out = device.empty(words * 2, np.uint16)
    device.launch(kernel(body, params=(128, "u64"), shared=8448), 1, 32, [source, out], schedule=2)
    found = device.get(out)
    for row in range(16):
        for column in range(columns):
            chunk = column // 8 ^ (row * swizzle // 128 % chunks)
            assert found[row * columns + chunk * 8 + column % 8] == numbers[row, column]


TOUCH = "setp.eq.u32 %p3, %r1, 3; @%p3 st.shared.u32 [%r2+16], 7;"
ORDERS = {
    "not waited for": (dict(wait=""), {"race", "exit", "exited", "barrier"}),
    "too few bytes expected": (dict(expect=1024), {"race", "exit", "deadlock", "barrier", "exited"}),
    "too many bytes expected": (dict(expect=4096), {"deadlock"}),
    "overwritten without a fence": (
        dict(between=TOUCH + "bar.sync 0;"),
        {"proxy"},
    ),
    "overwritten with a fence": (
        dict(between=TOUCH + "fence.proxy.async.shared::cta; bar.sync 0;"),
        {""},
    ),
    "overwritten while the bulk-group reads": (dict(done="st.shared.u32 [%r2], 7;" + DONE), {"race"}),
    "overwritten after the bulk-group": (dict(done=DONE + "st.shared.u32 [%r2], 7;"), {""}),
    "overwritten after the bulk-group has read": (
        dict(done="cp.async.bulk.wait_group.read 0; st.shared.u32 [%r2], 7;"),
        {""},
    ),
    "no wait for the bulk-group": (dict(done=""), {"exit"}),
    "no commit": (dict(put=PUT[: PUT.index(";") + 1], done=DONE), {"exit"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders(name):
    changes, kinds = ORDERS[name]
    made = copy_kernel(64, 0, 0, **changes)
    for seed in range(6):
        device = Device(1 << 17)
        _, _, both = maps(device, 64, 128)
        try:
            device.launch(made, 1, 64, both, schedule=seed)
            assert kinds == {""}
        except Fault as fault:
            assert fault.kind in kinds, fault


def test_a_store_through_a_map_of_what_is_read_only():
    device = Device(1 << 17)
    _, _, (source, _) = maps(device, 64, 128)
    with pytest.raises(Fault, match="a store through a tensor map"):
        device.launch(copy_kernel(64, 0, 0), 1, 32, [source, source])


def test_two_clusters_that_store_one_box():
    device = Device(1 << 17)
    _, _, both = maps(device, 64, 128)
    with pytest.raises(Fault) as caught:
        device.launch(copy_kernel(64, 0, 0), 2, 32, both, schedule=1)
    assert caught.value.kind == "global race"


@pytest.mark.parametrize(("mask", "expects", "wanted"), [(3, 1, ""), (3, 0, "fault"), (1, 1, "deadlock")])
def test_multicast(mask, expects, wanted):
    """The first CTA loads for both; each CTA's own mbarrier counts the bytes."""
    body = START + "mov.u32 %r9, %cluster_ctarank; setp.ne.u32 %p4, %r9, 0; mov.b16 %h1, MASK;".replace(
        "MASK", str(mask)
    )
    body += "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; @%p1 bra L2;"
    body += ("" if expects else "@%p4 bra L4;") + EXPECT.format(bytes=2048) + "L4: @%p4 bra L2;"
    body += GET.replace("bytes [", "bytes.multicast::cluster [").format(column=8, row=5)[:-1] + ", %h1; L2: " + WAIT
    body += "@%p1 bra L3; shl.b32 %r10, %r9, 4; add.u32 %r10, %r10, 3; "
    body += PUT.format().replace("{8, 3}", "{8, %r10}") + DONE
    body += "L3: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    made, faults = kernel(body, params=(128, 128), shared=8448), set()
    for seed in range(6):
        device = Device(1 << 17)
        numbers, out, both = maps(device, 64, 128)
        try:
            device.launch(made, 2, 32, both, cluster=2, schedule=seed)
            for rank in range(2):
                found = device.get(out)[3 + 16 * rank : 19 + 16 * rank, 8:72]
                assert np.array_equal(found[:, :62], numbers[5:21, 8:70]) and not found[:, 62:].any()
            faults.add("")
        except Fault as fault:
            faults.add(fault.kind if wanted != "fault" else "fault")
    assert faults == {wanted}


@pytest.mark.parametrize("lands", [True, False])
def test_a_tensor_copy_that_nobody_waits_for(lands):
    """A fault where it has not landed when the CTA ends."""
    body = START + "@%p1 ret;" + (EXPECT + GET).format(bytes=2048, column=0, row=0)
    made, device = kernel(body, params=(128, 128), shared=8448), Device(1 << 17)
    schedule = replace(Schedule.of(0), eager=float(lands), rate=0.0, lazy="" if lands else "copies")
    params = maps(device, 64, 128)[2]
    if lands:
        device.launch(made, 1, 32, params, schedule=schedule)
        return
    with pytest.raises(Fault, match="a copy into shared memory under way"):
        device.launch(made, 1, 32, params, schedule=schedule)


ASYNC = (
    LOAD.format(step=16, out=16)
    + """shl.b32 %r2, %r1, 4; mov.u32 %r3, s; add.u32 %r3, %r3, %r2;
cp.async.cg.shared.global [%r3], [%rd4], 16{given}; {wait} ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3];
st.global.v4.u32 [%rd6], {{%r4, %r5, %r6, %r7}}; {after}"""
)
GROUP = "cp.async.commit_group; cp.async.wait_group {};"


@pytest.mark.parametrize(
    ("given", "wait", "kind"),
    [("", GROUP.format(0), ""), ("", "cp.async.wait_all;", ""), (", 0", GROUP.format(0), ""), ("", "", "race"),
     ("", GROUP.format(1), "race"), ("", "cp.async.commit_group;", "race"), ("", "cp.async.wait_group 0;", "race")],
)  # fmt: skip
def test_async_groups(given, wait, kind):
    made = kernel(ASYNC.format(given=given, wait=wait, after="cp.async.wait_all;"), shared=1024)
    numbers = np.arange(128, dtype=np.uint32).reshape(32, 4)
    for seed in range(6):
        device = Device(1 << 16)
        source, out = device.put(numbers), device.empty((32, 4), np.uint32)
        try:
            device.launch(made, 1, 32, [source, out], schedule=seed)
            assert not kind and np.array_equal(device.get(out), numbers * (0 if given else 1))
        except Fault as fault:
            assert fault.kind == kind, fault


@pytest.mark.parametrize(("wait", "kind"), [(GROUP.format(0), ""), ("cp.async.commit_group;", "exit"), ("", "exit")])
def test_async_groups_at_the_end(wait, kind):
    body = LOAD.format(step=16, out=16) + "shl.b32 %r2, %r1, 4; mov.u32 %r3, s; add.u32 %r3, %r3, %r2;"
    made = kernel(body + f"cp.async.cg.shared.global [%r3], [%rd4], 16; {wait}", shared=1024)
    for seed in range(6):
        device = Device(1 << 16)
        try:
            device.launch(made, 1, 32, [device.put(np.zeros((32, 4), np.uint32)), 0], schedule=seed)
            assert not kind
        except Fault as fault:
            assert fault.kind == kind, fault
