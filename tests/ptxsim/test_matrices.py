"""wgmma, mma, ldmatrix and stmatrix against layouts written from the tables of the PTX ISA."""

import numpy as np
import pytest
import torch

from ptxsim import Device, Fault

from .small_kernels import kernel

# Each thread copies 16-byte parts of an image into shared memory; then the async proxy may read it.
FILL = """
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; shl.b32 %r3, %r1, 4;
F: cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3; ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd4];
add.u32 %r8, %r2, %r3; st.shared.v4.u32 [%r8], {{%r4, %r5, %r6, %r7}}; add.u32 %r3, %r3, {step};
setp.lt.u32 %p1, %r3, {size}; @%p1 bra F; {fence} bar.sync 0;
"""
FENCE = "fence.proxy.async.shared::cta;"
MODES = {0: 0, 128: 1, 64: 2, 32: 3}
PRODUCT = "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {a}, {b}, {adds}, 1, 1{mn_major};"


def chunk_at(row: int, chunk: int, span: int) -> int:
    """Where a row's 16-byte chunk lies among the chunks of the row: exclusive or with the row, every 128 bytes."""
    chunks = span // 16
    return chunk ^ (row * span // 128 % chunks) if span > 16 else chunk


def image_k_major(x: np.ndarray, span: int) -> tuple[np.ndarray, int, int]:
    """(rows, 16) of 16-bit words: the bytes, and the leading and stride offsets of its descriptor."""
    rows = len(x)
    if not span:  # 8 × 16-byte core matrices, the two of a row beside each other
        out = np.zeros(rows * 32, np.uint8)
        for row in range(rows):
            for k in range(16):
                at = (row // 8) * 256 + (k // 8) * 128 + (row % 8) * 16 + k % 8 * 2
                out[at : at + 2] = x[row, k : k + 1].view(np.uint8)
        return out, 128, 256
    out = np.zeros(rows * span, np.uint8)
    for row in range(rows):
        for k in range(16):
            at = row * span + chunk_at(row, k // 8, span) * 16 + k % 8 * 2
            out[at : at + 2] = x[row, k : k + 1].view(np.uint8)
    return out, 16, 8 * span


def image_mn_major(x: np.ndarray, span: int) -> tuple[np.ndarray, int, int]:
    """(rows, 16) whose rows lie beside each other: blocks of span bytes of rows, 16 steps of each."""
    rows, each = len(x), span // 2
    out = np.zeros(max(rows // each, 1) * 16 * span, np.uint8)
    for row in range(rows):
        for k in range(16):
            line = row // each * 16 + k
            at = line * span + chunk_at(k, row % each // 8, span) * 16 + row % 8 * 2
            out[at : at + 2] = x[row, k : k + 1].view(np.uint8)
    return out, 16 * span, 8 * span


def descriptor(register: str, at: int, leading: int, stride: int, span: int) -> str:
    bits = leading >> 4 << 16 | stride >> 4 << 32 | MODES[span] << 62
    number = register.removeprefix("%rd")
    return f"""add.u32 %r9, %r2, {at}; shr.u32 %r9, %r9, 4; cvt.u64.u32 %rd{number}, %r9;
    or.b64 %rd{number}, %rd{number}, {bits:#x};"""


def words(shape, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers as 16-bit words and as doubles."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.view(torch.int16).numpy().view(np.uint16), x.double().numpy()


def accumulators(found: np.ndarray, n: int) -> np.ndarray:
    """(threads, registers) to a matrix (ISA, "Register Fragments", matrix D)."""
    out = np.zeros((len(found) // 2, n))
    for thread in range(len(found)):
        for i in range(n // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            out[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = found[thread, i]
    return out


def wgmma_kernel(image_size: int, n: int, body: str, fence: str = FENCE):
    stores = f"mul.wide.u32 %rd5, %r1, {n * 2}; add.s64 %rd6, %rd2, %rd5;"
    stores += "".join(f"st.global.f32 [%rd6+{4 * i}], %f{i};" for i in range(n // 2))
    fill = FILL.format(step=2048, size=image_size, fence=fence)
    return kernel(fill + body + stores, shared=image_size)


def multiply(n: int, kind: str, adds: str, a="%rd8", b="%rd9", mn_major="") -> str:
    return PRODUCT.format(
        n=n, kind=kind, d=", ".join(f"%f{i}" for i in range(n // 2)), a=a, b=b, adds=adds, mn_major=mn_major
    )


BEGIN, END = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def images(n: int, span: int, a_mn_major: int, b_mn_major: int, kind: str):
    """A (64 × 16) and B (n × 16), their image, and the descriptors in %rd8 and %rd9."""
    (a_words, a), (b_words, b) = words((64, 16), kind, 1), words((n, 16), kind, 2)
    one, two = (
        (image_mn_major if by else image_k_major)(x, span) for x, by in ((a_words, a_mn_major), (b_words, b_mn_major))
    )
    first = -(-len(one[0]) // 1024) * 1024
    image = np.zeros(-(-(first + len(two[0])) // 2048) * 2048, np.uint8)
    image[: len(one[0])], image[first : first + len(two[0])] = one[0], two[0]
    return a, b, image, descriptor("%rd8", 0, *one[1:], span) + descriptor("%rd9", first, *two[1:], span)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(
    ("n", "span", "a_mn_major", "b_mn_major"),
    [(8, 0, 0, 0), (16, 32, 0, 0), (64, 64, 0, 0), (64, 128, 0, 0), (128, 128, 0, 1), (64, 128, 1, 1), (64, 64, 1, 0),
     (32, 64, 0, 1), (16, 32, 0, 1), (64, 32, 1, 0)],
)  # fmt: skip
def test_wgmma(n, span, a_mn_major, b_mn_major, kind):
    a, b, image, descriptors = images(n, span, a_mn_major, b_mn_major, kind)
    two = multiply(n, kind, "0", mn_major=f", {a_mn_major}, {b_mn_major}") + multiply(
        n, kind, "1", mn_major=f", {a_mn_major}, {b_mn_major}"
    )
    made = wgmma_kernel(len(image), n, descriptors + BEGIN + two + END)
    for seed in range(2):
        device = Device(1 << 17)
        out = device.empty((128, n // 2), np.float32)
        device.launch(made, 1, 128, [device.put(image), out], schedule=seed)
        np.testing.assert_allclose(accumulators(device.get(out), n), 2 * a @ b.T, rtol=1e-5, atol=1e-5)


def test_wgmma_with_a_in_registers():
    a, b, image, descriptors = images(64, 128, 0, 0, "bf16")
    whole, _ = words((64, 16), "bf16", 1)
    fragment = np.zeros((128, 8), np.uint16)  # four registers of two (ISA, matrix A)
    for thread in range(128):
        for i in range(8):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            fragment[thread, i] = whole[row, thread % 4 * 2 + i % 2 + 8 * (i // 4)]
    load = """mul.wide.u32 %rd10, %r1, 16; add.s64 %rd11, %rd1, %rd10;
    ld.global.v4.u32 {%r40, %r41, %r42, %r43}, [%rd11+SIZE];""".replace("SIZE", str(len(image)))
    product = multiply(64, "bf16", "0", a="{%r40, %r41, %r42, %r43}", mn_major=", 0")
    made = wgmma_kernel(len(image), 64, descriptors + load + BEGIN + product + END)
    device = Device(1 << 17)
    out = device.empty((128, 32), np.float32)
    device.launch(made, 1, 128, [device.put(np.concatenate([image, fragment.view(np.uint8).ravel()])), out])
    np.testing.assert_allclose(accumulators(device.get(out), 64), a @ b.T, rtol=1e-5, atol=1e-5)


PRODUCTS = {
    "no fence of the proxy": ("", lambda p: BEGIN + p("0") + END, "proxy"),
    "no wgmma.fence": (FENCE, lambda p: p("0") + END, "wgmma"),
    "written after the fence": (FENCE, lambda p: BEGIN + "mov.f32 %f3, 0f00000000;" + p("1") + END, "wgmma"),
    "read in flight": (FENCE, lambda p: BEGIN + p("0") + "add.f32 %f90, %f3, %f3;" + END, "wgmma"),
    "written in flight": (FENCE, lambda p: BEGIN + p("0") + "mov.f32 %f3, 0f00000000;" + END, "wgmma"),
    "never waited for": (FENCE, lambda p: BEGIN + p("0") + END[: END.index(";") + 1] + "ret;", "wgmma"),
    "overwritten while read": (FENCE, lambda p: BEGIN + p("0") + "st.shared.u32 [%r8], 0;" + END, "race"),
    "right": (FENCE, lambda p: BEGIN + p("0") + END + "add.f32 %f3, %f3, %f3;" + BEGIN + p("1") + END, ""),
    "some lanes have ended": (
        FENCE,
        lambda p: "setp.eq.u32 %p2, %r1, 5; @%p2 ret;" + BEGIN + p("0") + END,
        "divergence",
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_order_of_wgmma(name):
    fence, body, kind = PRODUCTS[name]
    _, _, image, descriptors = images(8, 32, 0, 0, "bf16")
    text = descriptors + body(lambda adds: multiply(8, "bf16", adds, mn_major=", 0, 0"))
    made = wgmma_kernel(len(image), 8, text, fence)
    for seed in range(4):
        device = Device(1 << 17)
        params = [device.put(image), device.empty((128, 4), np.float32)]
        try:
            device.launch(made, 1, 128, params, schedule=seed)
            assert not kind
        except Fault as fault:
            assert fault.kind == kind or (name == "never waited for" and fault.kind == "exited"), fault


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind):
    rng = np.random.default_rng(4)
    depth = 8 if kind == "tf32" else 16
    if kind == "tf32":
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
        a_words, b_words = a.view(np.uint32), b.view(np.uint32)
        a, b = ((x & np.uint32(0xFFFFE000)).view(np.float32) for x in (a_words, b_words))
    else:
        (a_words, a), (b_words, b) = words((16, 16), kind, 1), words((16, 8), kind, 2)
    each = 1 if kind == "tf32" else 2
    data = np.zeros((32, 8 * each), a_words.dtype)
    for lane in range(32):
        for i in range(4 * each):  # A: rows of eight lanes' groups, then of the lower half, then the later columns
            column = lane % 4 * each + i % each + depth // 2 * (i // (2 * each))
            data[lane, i] = a_words[lane // 4 + 8 * (i // each % 2), column]
        for i in range(2 * each):
            data[lane, 4 * each + i] = b_words[lane % 4 * each + i % each + depth // 2 * (i // each), lane // 4]
    shape = f"m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    body = f"""ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 32;
    add.s64 %rd4, %rd1, %rd3; ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd4];
    ld.global.v2.u32 {{%r14, %r15}}, [%rd4+16];
    mov.f32 %f5, 0f3F800000; mma.sync.aligned.{shape} {{%f1, %f2, %f3, %f4}},
    {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}},
    {{%f5, %f5, %f5, %f5}}; mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd2, %rd5;
    st.global.v4.f32 [%rd6], {{%f1, %f2, %f3, %f4}};"""
    device = Device(1 << 16)
    out = device.empty((32, 4), np.float32)
    device.launch(kernel(body), 1, 32, [device.put(data), out])
    np.testing.assert_allclose(accumulators(device.get(out), 8), a.astype(float) @ b + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix_and_stmatrix(number, trans):
    """A lane's register has row lane / 4, columns 2 (lane % 4) and the next of 8 × 8; its address is that of a row."""
    x = np.arange(number * 64, dtype=np.uint16).reshape(number, 8, 8)
    registers = ", ".join(f"%r{40 + i}" for i in range(number))
    body = (
        FILL.format(step=512, size=512, fence="")
        + f"""shl.b32 %r9, %r1, 4; and.b32 %r9, %r9, {number * 128 - 1};
    add.u32 %r9, %r9, %r2; ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{registers}}}, [%r9];
    bar.sync 0; add.u32 %r10, %r9, 512; stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%r10], {{{registers}}};
    bar.sync 0; mul.wide.u32 %rd5, %r1, 32; add.s64 %rd6, %rd2, %rd5;"""
    )
    body += "".join(f"st.global.u32 [%rd6+{4 * i}], %r{40 + i};" for i in range(number))
    body += "shl.b32 %r9, %r1, 4; add.u32 %r9, %r9, %r2; ld.shared.v4.u32 {%r50, %r51, %r52, %r53}, [%r9+512];"
    body += "st.global.v4.u32 [%rd6+16], {%r50, %r51, %r52, %r53};"
    device = Device(1 << 16)
    image = np.zeros(512, np.uint8)
    image[: x.nbytes] = x.view(np.uint8).ravel()
    out = device.empty((32, 8), np.uint32)
    device.launch(kernel(body, shared=1024), 1, 32, [device.put(image), out])
    found = device.get(out)
    for lane in range(32):
        for i in range(number):
            one, two = ((lane // 4, lane % 4 * 2 + j) for j in range(2))
            at = (lambda m, p: m[p[1], p[0]]) if trans else (lambda m, p: m[p])
            assert found[lane, i] == int(at(x[i], one)) | int(at(x[i], two)) << 16
    assert (found[: number * 8, 4:].copy().view(np.uint16).reshape(number, 8, 8) == x).all()  # and stored as it was
