"""What a failure says, what is refused, and which instructions were met."""

from dataclasses import replace

import numpy as np
import pytest

from ptxsim import Device, Fault, Schedule, load_module
from ptxsim.ir import ParseError

from .small_kernels import HEAD, LOAD, kernel, random_words, run

NAME = "_ZN3foo10bad_kernelIfEEvPT_"
LOCATED = f"""{HEAD}.visible .entry {NAME}(.param .u64 p0)
{{
.reg .b64 %rd<9>;
.reg .b32 %r<9>;
.loc 1 10 3
ld.param.u64 %rd1, [p0];
.loc 1 12 3
.loc 2 7 5, function_name $L__info_string0, inlined_at 1 12 3
.loc 3 44 9, function_name $L__info_string1, inlined_at 2 7 5
st.global.u32 [%rd1+64], 3;
.loc 1 13 1
ret;
}}
.file 1 "/src/kernel.cu"
.file 2 "/src/middle.cuh"
.file 3 "/src/inner.cuh"
"""


def test_a_failure_says_where_and_how_to_see_it_again():
    made = load_module(LOCATED).find("bad_kernel")
    device = Device(1 << 14)
    schedule = replace(Schedule.of(17), slice=3, strict=True)
    with pytest.raises(Fault) as caught:
        device.launch(made, 1, 32, [device.empty(16, np.float32, "y")], schedule=schedule, label="a store too far")
    fault, text = caught.value, str(caught.value)
    assert fault.kind == "out of bounds"
    line = LOCATED.splitlines().index("st.global.u32 [%rd1+64], 3;") + 1
    assert f"line {line}: st.global.u32 [%rd1+64], 3 [/src/inner.cuh:44, inlined at /src/kernel.cu:12]" in text
    assert "CTA 0 warp 0" in text and "of y (64 bytes)" in text
    assert NAME in text or "foo::bad_kernel<float>" in text
    assert "launch: a store too far" in text
    wanted = "replace(Schedule.of(17), " + ("slice=3, " if Schedule.of(17).slice != 3 else "") + "strict=True)"
    assert f"schedule={wanted}" in text
    again = eval(wanted, {"replace": replace, "Schedule": Schedule})
    assert again == schedule


def test_a_seed_alone_is_enough():
    with pytest.raises(Fault, match=r"again by: schedule=5\b"):
        Device(1 << 14).launch(kernel("trap;", params=()), 1, 32, [], schedule=5)


def test_all_reports_are_shown():
    body = "mov.u32 %r1, %tid.x; mov.u32 %r2, s; st.shared.u32 [%r2], %r1; st.shared.u32 [%r2+4], %r1;"
    with pytest.raises(Fault) as caught:
        Device(1 << 14).launch(kernel(body, params=(), shared=64), 1, 64, [], schedule=1)
    assert len(caught.value.reports) >= 2 and all(report in str(caught.value) for report in caught.value.reports)


def test_the_same_seed_gives_the_same_run():
    def race(seed):
        body = "mov.u32 %r1, %tid.x; mov.u32 %r2, s; st.shared.u32 [%r2], %r1; ld.shared.u32 %r3, [%r2+4];"
        with pytest.raises(Fault) as caught:
            Device(1 << 14).launch(kernel(body, params=(), shared=64), 1, 128, [], schedule=seed)
        return str(caught.value)

    assert [race(seed) for seed in range(5)] == [race(seed) for seed in range(5)]
    assert len({str(Schedule.of(seed)) for seed in range(20)}) == 20


UNSUPPORTED = [
    "add.sat.s32 %r20, %r10, %r11;", "add.cc.u32 %r20, %r10, %r11;", "addc.u32 %r20, %r10, %r11;",
    "fma.rn.relu.bf16x2 %r20, %r10, %r11, %r12;", "div.rz.f32 %f1, %f2, %f3;", "cvt.rz.bf16.f32 %h1, %f1;",
    "cvt.rn.satfinite.e5m2x2.f32 %h1, %f1, %f2;", "prmt.b32.f4e %r20, %r10, %r11, %r12;",
    "mul24.lo.u32 %r20, %r10, %r11;",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r10], 32;", "st.async.weak.u32 [%r10], %r11, [%r12];",
    "bar.red.popc.u32 %r20, 0, %p1;", "mov.u32 %r20, %envreg3;", "ld.global.b128.foo %r20, [%rd4];",
    "vote.all.pred %p1, %p2;",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd4], 16, [%r11];",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};", "shfl.bfly.b32 %r20, %r10, 1, 31;",
    "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1, %f2, %f3, %f4}, %rd1, %rd2, 1, 1, 1;",
    "add.s32 %r20, %r10;", "fence.proxy.tensormap::generic.acquire.gpu [%rd4], 128;",
    "multimem.red.add.f32 [%rd4], %f1;",
]  # fmt: skip


@pytest.mark.parametrize("statement", UNSUPPORTED)
def test_what_is_not_emulated_is_a_fault_that_names_it(statement):
    with pytest.raises(Fault) as caught:
        run(statement, random_words(0))
    assert caught.value.kind == "unsupported"
    assert statement.split()[0].split(".")[0] in str(caught.value) and "kernel: k" in str(caught.value)
    assert "line " in str(caught.value)


def test_what_is_never_met_may_be_unsupported():
    words = random_words(0)
    assert (run("mov.u32 %r20, %r10; bra E; mul24.lo.u32 %r20, %r10, %r11; E:", words) == words[:, 0]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".func (.param .b32 r) helper(.param .b32 a)\n{ ret; }", r"line 4: \.func is not emulated: .*helper"),
        (".extern .func (.param .b32 r) vprintf(.param .b64 a);", "vprintf"),
        (".alias a, b;", r"\.alias"),
    ],
)
def test_what_a_module_may_not_have(text, message):
    with pytest.raises(ParseError, match=message):
        load_module(f"{HEAD}{text}\n.visible .entry k() {{ ret; }}\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".callprototype _ (.param .b32 a);", "kernel k, line .*directive"),
        ("@%q1 ret;", "kernel k, line .*no register %q1"),
        ("bra nowhere;", "kernel k.*nowhere"),
        ("mov.u32 %r1, (1;", "kernel k, line .*operand"),
    ],
)
def test_what_a_kernel_may_not_have(body, message):
    with pytest.raises(ParseError, match=message):
        kernel(body, params=())


@pytest.mark.parametrize(
    ("params", "grid", "cluster", "message"),
    [([1], 1, 1, "has 2 parameters"), ([1, b"123"], 1, 1, "has 8 bytes, not 3"), ([0, 0], 3, 2, "no whole clusters")],
)
def test_launches_that_cannot_be(params, grid, cluster, message):
    with pytest.raises(ValueError, match=message):
        Device(1 << 14).launch(kernel("ret;"), grid, 32, params, cluster=cluster)


def test_coverage():
    text = f"""{HEAD}.file 1 "/src/a.cu"
.visible .entry covered(.param .u32 p0)
{{
.reg .b32 %r<9>;
.reg .pred %p<9>;
.loc 1 3 1
ld.param.u32 %r1, [p0]; setp.eq.u32 %p1, %r1, 0;
@%p1 bra L;
.loc 1 4 1
mov.u32 %r2, 1;
bar.sync 0;
bra M;
L:
.loc 1 6 1
mov.u32 %r2, 2;
bar.sync 1;
M:
.loc 1 7 1
ret;
}}
"""
    lines = text.splitlines()
    first, second = ((lines.index(a) + 1, lines.index(b) + 1) for a, b in (
        ("mov.u32 %r2, 1;", "bra M;"), ("mov.u32 %r2, 2;", "bar.sync 1;")))  # fmt: skip
    one, two = load_module(text + "// one\n").find("covered"), load_module(text + "// two\n").find("covered")
    assert one.coverage().share == 0
    Device(1 << 14).launch(one, 1, 32, [0])
    assert one.coverage().missed_lines() == [first] and one.coverage().missed_sources() == ["/src/a.cu:4"]
    assert [instr.op for instr in one.coverage().missed()] == ["mov", "bar", "bra"]
    assert one.coverage().share == pytest.approx(6 / 9)
    Device(1 << 14).launch(two, 1, 32, [1], shared=16)
    assert two.coverage().missed_lines() == [second]
    assert (one.coverage() | two.coverage()).share == 1
    Device(1 << 15).launch(one, 1, 32, [1], shared=32)  # another program of the same kernel
    assert one.coverage().share == 1
    with pytest.raises(ValueError, match="not of one kernel"):
        one.coverage() | kernel(LOAD.format(step=4, out=4)).coverage()
