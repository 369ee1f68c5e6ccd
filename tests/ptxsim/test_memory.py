"""Loads, stores and atomics: where they may go, and what is there before."""

import numpy as np
import pytest

from ptxsim import Device, Fault, load_module

from .small_kernels import HEAD, LOAD, kernel

STORE = "st.global.u32 [%rd6], %r20;"


def launch(body: str, kind: str, inputs=None, out=None, **options):
    device = Device(1 << 16)
    source = device.put(np.arange(32, dtype=np.uint32) if inputs is None else inputs)
    with pytest.raises(Fault) as caught:
        device.launch(kernel(body, **options), 1, 32, [source, device.empty(32, np.uint32) if out is None else out])
    assert caught.value.kind == kind, caught.value


@pytest.mark.parametrize(("offset", "kind"), [(128, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")])
def test_loads(offset, kind):
    launch(LOAD.format(step=0, out=4) + f"ld.global.u32 %r20, [%rd4{offset:+}]; {STORE}", kind)


def test_a_store_to_what_is_read_only():
    launch(LOAD.format(step=4, out=4) + "st.global.u32 [%rd4], %r1;", "out of bounds")


def test_one_lane_out_of_bounds():
    launch(
        LOAD.format(step=4, out=4) + f"setp.eq.u32 %p1, %r1, 9; @%p1 add.s64 %rd6, %rd6, 128; {STORE}", "out of bounds"
    )


@pytest.mark.parametrize(("offset", "kind"), [(256, "out of bounds"), (-1024, "out of bounds"), (1, "misaligned")])
def test_shared_memory(offset, kind):
    body = LOAD.format(step=4, out=4) + f"mov.u32 %r2, s; st.shared.u32 [%r2{offset:+}], %r1;"
    launch(body, kind, shared=256)


def test_a_misaligned_vector():
    launch(LOAD.format(step=4, out=4) + "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd1+4];", "misaligned")


def test_a_red_zone():
    device = Device(1 << 14)
    device.put(np.zeros(4, np.uint32))
    assert device.red_zones_whole()
    device.memory.bytes[3] = 0
    assert not device.red_zones_whole()


def test_what_nobody_wrote_is_nan():
    device = Device(1 << 16)
    out = device.empty((3, 32), np.float32)
    body = """ld.param.u64 %rd2, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd2, %rd5;
    mov.u32 %r2, s; ld.shared.f32 %f1, [%r2]; add.f32 %f1, %f1, 0f3F800000; st.global.f32 [%rd6], %f1;
    add.f32 %f2, %f9, 0f3F800000; st.global.f32 [%rd6+128], %f2;"""
    device.launch(kernel(body, params=("u64",), shared=64), 1, 32, [out])
    assert np.isnan(device.get(out)).all()


def test_lanes_that_write_different_numbers_to_one_address():
    body = LOAD.format(step=4, out=0) + "st.global.u32 [%rd6], {};"
    launch(body.format("%r1"), "race")
    device = Device(1 << 14)
    device.launch(kernel(body.format(7)), 1, 32, [0, device.empty(1, np.uint32)])


@pytest.mark.parametrize(("operation", "wanted"), [("add", 96 * 97 // 2), ("max", 96), ("or", 127), ("exch", None)])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(operation, wanted, space):
    kind = "b32" if operation in ("or", "exch") else "u32"
    body = """ld.param.u64 %rd2, [p0]; ld.param.u64 %rd3, [p1]; mov.u32 %r1, %tid.x; add.u32 %r2, %r1, 1;
    mov.u32 %r3, s;
    setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r3], 0; bar.sync 0;"""
    at = "%rd2" if space == "global" else "%r3"
    body += f"atom.{space}.{operation}.{kind} %r4, [{at}], %r2;"
    if space == "shared":
        body += "bar.sync 0; ld.shared.u32 %r5, [%r3]; @%p1 st.global.u32 [%rd3], %r5;"
    device = Device(1 << 14)
    word, out = device.put(np.zeros(1, np.uint32), writable=True), device.empty(1, np.uint32)
    device.launch(kernel(body, shared=16), 1, 96, [word, out], schedule=5)
    found = int(device.get(word if space == "global" else out)[0])
    assert found == wanted if wanted else 0 < found <= 96


def test_variables_of_a_module():
    before = ".const .align 4 .b32 table[4] = {5, 6, 0x7, 8};\n.global .align 4 .u32 count;\n"
    body = """ld.param.u64 %rd2, [p0]; mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mul.wide.u32 %rd3, %r2, 4;
    mov.u64 %rd4, table; add.s64 %rd4, %rd4, %rd3; ld.const.u32 %r3, [%rd4]; mul.wide.u32 %rd5, %r1, 4;
    mov.u64 %rd7, count; ld.global.u32 %r4, [%rd7]; add.u32 %r3, %r3, %r4; add.s64 %rd6, %rd2, %rd5;
    st.global.u32 [%rd6], %r3;"""
    made = kernel(body, params=("u64",), before=before)
    for size in (1 << 14, 1 << 15):  # two devices, one kernel
        device = Device(size)
        device.put(np.zeros(size // 64, np.uint8))
        out = device.empty(32, np.uint32)
        device.launch(made, 1, 32, [out])
        assert (device.get(out) == np.arange(32) % 4 + 5).all()


def test_local_memory_and_generic_addresses():
    body = (
        LOAD.format(step=4, out=4)
        + """.local .align 8 .b8 stack[64]; mov.u64 %rd10, stack; cvta.local.u64 %rd11, %rd10;
    st.u32 [%rd11+8], %r1; ld.local.u32 %r2, [%rd10+8]; ld.u32 %r3, [%rd4]; add.u32 %r20, %r2, %r3;"""
        + STORE
    )
    device = Device(1 << 14)
    source, out = device.put(np.arange(32, dtype=np.uint32)), device.empty(32, np.uint32)
    device.launch(kernel(body), 1, 32, [source, out])
    assert (device.get(out) == 2 * np.arange(32)).all()


def test_a_variable_of_a_module_is_at_one_address_in_every_device():
    """So what was translated for one serves the others."""
    text = (
        HEAD + ".global .align 4 .u32 v[4] = {7, 8, 9, 10};\n"
        ".visible .entry k(.param .u64 p0)\n{\n.reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n"
        "ld.param.u64 %rd1, [p0]; mov.u64 %rd2, v; ld.global.u32 %r1, [%rd2+8]; st.global.u32 [%rd1], %r1; ret;\n}\n"
    )
    found = load_module(text).find("k")
    for before in (0, 3):
        device = Device(1 << 16)
        for _ in range(before):
            device.empty(5, np.uint32)
        out = device.empty(1, np.uint32)
        device.launch(found, 1, 1, [out])
        assert device.get(out)[0] == 9 and len(found.programs) == 1
