"""Exchanges between lanes, and what the lanes of a warp must come to together."""

import numpy as np
import pytest

from ptxsim import Device, Fault

from .small_kernels import kernel, random_words, run

WORDS = np.arange(96).reshape(32, 3)


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "where"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i),
        ("up", 2, 0, lambda i: i - 2 if i >= 2 else i),
        ("idx", 7, 31, lambda i: 7),
        ("idx", 3, 0x181F, lambda i: i & 24 | 3),
        ("bfly", 8, 0x1807, lambda i: i ^ 8 if i & 8 else i),
    ],
)
def test_shuffles(mode, by, clamp, where):
    found = run(f"shfl.sync.{mode}.b32 %r20|%p1, %r10, {by}, {clamp}, -1;", WORDS)
    assert [int(x) for x in found] == [3 * where(i) for i in range(32)]


REDUCED = {
    "redux.sync.add.s32 %r20, %r10, -1;": lambda x: sum(x),
    "redux.sync.max.u32 %r20, %r10, -1;": lambda x: max(x),
    "redux.sync.xor.b32 %r20, %r10, -1;": lambda x: np.bitwise_xor.reduce(x),
    "setp.gt.s32 %p1, %r10, 0; vote.sync.ballot.b32 %r20, %p1, -1;": lambda x: sum(
        int(0 < n < 1 << 31) << i for i, n in enumerate(x)
    ),
    "setp.ne.u32 %p1, %r10, 0; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r20, 1, 0, %p2;": lambda x: int(all(x)),
    "setp.eq.u32 %p1, %r10, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r20, 1, 0, %p2;": lambda x: int(0 in x),
    "activemask.b32 %r20;": lambda x: 0xFFFFFFFF,
}


@pytest.mark.parametrize("operations", REDUCED)
@pytest.mark.parametrize("seed", [0, 1])
def test_reductions(operations, seed):
    words = random_words(seed)
    assert (run(operations, words) == (int(REDUCED[operations](words[:, 0].tolist())) & 0xFFFFFFFF)).all()


def test_one_lane_is_elected():
    body = "elect.sync %r13|%p1, -1; mov.u32 %r20, 0; @%p1 mov.u32 %r20, 1;"
    chosen = [run(body, WORDS, seed=seed) for seed in range(6)]
    assert all(x.sum() == 1 for x in chosen) and len({int(x.argmax()) for x in chosen}) > 1


def faults(body: str, threads: int = 32, kind: str = "", seeds=range(4), **options):
    """Every seed finds this kind."""
    made = kernel(body, params=(), **options)
    for seed in seeds:
        with pytest.raises(Fault) as caught:
            Device(1 << 14).launch(made, 1, threads, [], schedule=seed)
        assert caught.value.kind == kind, caught.value
    return caught.value


LOW = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; setp.ge.u32 %p2, %r1, 16;"


def test_a_value_of_a_lane_that_takes_no_part():
    fault = faults(LOW + "@%p1 shfl.sync.bfly.b32 %r2|%p3, %r1, 16, 31, 65535;", kind="shuffle")
    assert "line" in str(fault)


@pytest.mark.parametrize(
    "body",
    [
        "@%p1 bar.sync 0;",
        "@%p1 bra L; bar.sync 0; bra M; L: bar.sync 1; M:",
        "@%p1 bra L; mov.u32 %r2, s; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2]; bra M; L: bar.sync 1; M:",
        "@%p1 ret; mov.u32 %r2, s; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
    ],
    ids=["predicate", "branch", "matrix", "ended"],
)
def test_divergence(body):
    faults(LOW + body, kind="divergence", shared=256)


def test_lanes_that_meet_again_are_no_divergence():
    body = LOW + "@%p1 bra L; mov.u32 %r2, 5; L: bar.sync 0; @%p2 bra M; mov.u32 %r2, 6; M: bar.sync 0;"
    for seed in range(6):
        Device(1 << 14).launch(kernel(body, params=()), 1, 64, [], schedule=seed)
