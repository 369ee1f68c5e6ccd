"""Barriers of CTAs, clusters and mbarriers: what waits for ever, comes too often, or too early."""

import pytest

from ptxsim import Device, Fault, Schedule

from .small_kernels import kernel

START = "mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r1, 0; mov.u32 %r3, s;"
MADE = START + """@%p2 mbarrier.init.shared::cta.b64 [%r3], {count}; fence.mbarrier_init.release.cluster; bar.sync 0;"""
WAIT = "{label}: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r3], {parity}; @!%p5 bra {label};"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r3];"


def wait(label: str, parity: int) -> str:
    return WAIT.format(label=label, parity=parity)


def launch(body: str, threads: int = 64, seeds=range(6), cluster: int = 1, **changes) -> set:
    """The kinds of faults that seeds find, "" for none."""
    made, kinds = kernel(body, params=(), shared=1024), set()
    for seed in seeds:
        schedule = Schedule.of(seed)
        for name, value in changes.items():
            setattr(schedule, name, value)
        try:
            Device(1 << 14).launch(made, cluster, threads, [], schedule=schedule, cluster=cluster)
            kinds.add("")
        except Fault as fault:
            kinds.add(fault.kind)
            text = str(fault)
    if kinds != {""}:
        assert "line" in text
    return kinds


def test_deadlock_says_where_everybody_is():
    made = kernel(START + "@%p1 bra L;\nbar.sync 1, 64;\nL: bar.sync 2, 64;", params=(), shared=1024)
    with pytest.raises(Fault) as caught:
        Device(1 << 14).launch(made, 1, 64, [], schedule=1)
    text = str(caught.value)
    lines = made.module.source.splitlines()
    places = [lines.index("bar.sync 1, 64;") + 1, lines.index("L: bar.sync 2, 64;") + 1]
    assert caught.value.kind == "deadlock"
    assert f"line {places[0]}: bar.sync 1, 64 <- 0.1" in text and f"line {places[1]}: bar.sync 2, 64 <- 0.0" in text


def test_livelock():
    assert launch(START + "L: add.u32 %r4, %r4, 1; bra L;", limit=10_000) == {"livelock"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("@%p1 bra L; bar.sync 1, 64; bra M; L: bar.arrive 1, 64; M:", ""),
        ("@%p1 bra L; bar.sync 1, 64; bra M; L: bar.sync 1, 96; M:", "barrier"),  # counts that disagree
        ("bar.sync 1, 48;", "barrier"),
        ("@%p1 bar.arrive 3, 96;", "exit"),  # nobody waited
        ("@%p1 ret; bar.sync 0;", ""),  # for all that have not ended
        ("@%p1 bra L; bar.sync 0; L:", ""),
    ],
)
def test_named_barriers(body, kind):
    assert launch(START + body) == {kind}


def test_a_warp_ends_while_others_wait():
    late = "mov.u32 %r5, 300; L: sub.u32 %r5, %r5, 1; setp.ne.u32 %p3, %r5, 0; bar.warp.sync -1; @%p3 bra L; ret;"
    assert launch(START + "@!%p1 bra M; " + late + " M: bar.sync 0;", seeds=range(12)) == {""}


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", {""}),
        ("barrier.cluster.arrive.release; barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", {"barrier"}),
        ("mov.u32 %r9, %cluster_ctarank; setp.eq.u32 %p3, %r9, 0; @%p3 barrier.cluster.arrive.release;"
         "@%p3 bra L; M: add.u32 %r8, %r8, 1; bar.warp.sync -1; setp.lt.u32 %p4, %r8, 9; @%p4 bra M; bar.sync 1, 96;"
         "L: barrier.cluster.wait.acquire;", {"deadlock"}),
    ],
    ids=["right", "twice", "one CTA never comes"],
)  # fmt: skip
def test_clusters(body, kinds):
    assert launch(START + body, cluster=2) == kinds


def test_registers_that_nobody_gives():
    take, give = ("setmaxnreg.{}.sync.aligned.u32 {};".format(*x) for x in (("inc", 240), ("dec", 24)))
    threads = 384
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 128; "
    assert launch(body + f"@%p1 bra L; {take} bra M; L: {give} M:", threads) == {""}
    assert launch(body + f"@%p1 bra L; {take} bra M; L: M:", threads) == {"deadlock"}
    assert launch(body + f"{take} bar.sync 0;", threads) == {"deadlock"}
    assert launch(body + "setmaxnreg.inc.sync.aligned.u32 236;", threads) == {"registers"}


def test_mbarriers_in_turns():
    both = "".join(f"{ARRIVE} {wait(f'W{i}', i & 1)}" for i in range(5))
    assert launch(MADE.format(count=64) + both, seeds=range(12)) == {""}


MBARRIERS = {
    "none made": (START + ARRIVE, {"barrier"}),
    "too few": (MADE.format(count=65) + ARRIVE + wait("W", 0), {"deadlock"}),
    "wrong parity": (
        MADE.format(count=64) + ARRIVE + wait("W", 0) + wait("V", 0) + ARRIVE + wait("U", 0),
        {"deadlock"},
    ),
    "bytes that never come": (
        MADE.format(count=1) + "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;",
        {"exit"},
    ),
    "a tx-count out of range": (
        MADE.format(count=2) + "@%p2 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], 1048576;",
        {"barrier"},
    ),
    "an ordinary store over it": (MADE.format(count=2) + "@%p2 st.shared.u32 [%r3+4], 0;", {"barrier"}),
    "inval, then arrive": (
        MADE.format(count=2) + f"@%p2 mbarrier.inval.shared::cta.b64 [%r3]; @%p2 {ARRIVE}",
        {"barrier"},
    ),
}


@pytest.mark.parametrize("name", MBARRIERS)
def test_mbarriers(name):
    body, kinds = MBARRIERS[name]
    assert launch(body) == kinds


def test_more_arrivals_than_are_counted():
    body = (
        MADE.format(count=3)
        + "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r3], 2; @%p2 mbarrier.arrive.shared::cta.b64 _, [%r3], 2;"
    )
    assert launch(body) == {"barrier"}


# The first warp makes phases, and the second waits for one of them.
PHASES = "@%p1 bra P; {second} bra E; P: {first} E:"
ARRIVALS = "@%p2 " + ARRIVE


@pytest.mark.parametrize("parity", [0, 1])
def test_a_phase_that_went_by(parity):
    """Two phases complete without the waiter: its wait is for a phase that nobody holds open."""
    first = ARRIVALS + wait("A", 0) + ARRIVALS + wait("B", 1) + ARRIVALS
    body = MADE.format(count=1) + PHASES.format(first=first, second=wait("W", parity))
    kinds = launch(body, seeds=range(24))
    assert kinds & {"overrun", "phase"}


def test_a_wait_that_passes_two_phases_early():
    """It means phase 1, and knows of no phase: while phase 0 is in flight it passes at once."""
    first = ARRIVALS + wait("A", 0) + ARRIVALS + wait("B", 1)
    body = MADE.format(count=1) + PHASES.format(first=first, second=wait("W", 1))
    kinds = launch(body, seeds=range(24))
    assert "phase" in kinds
    body = MADE.format(count=1) + PHASES.format(first=first, second=wait("V", 0) + wait("W", 1))
    assert launch(body, seeds=range(24)) <= {"overrun", "phase", "deadlock", ""}
    # told by a barrier that phase 0 is over, it knows which phase it waits for
    told = ARRIVALS + wait("A", 0) + "bar.sync 1, 64;" + ARRIVALS + wait("B", 1)
    body = MADE.format(count=1) + PHASES.format(first=told, second="bar.sync 1, 64;" + wait("W", 1))
    assert launch(body, seeds=range(24)) == {""}


def test_an_arrival_at_a_cta_that_has_ended():
    body = (
        MADE.format(count=9)
        + """mov.u32 %r9, %cluster_ctarank; setp.eq.u32 %p3, %r9, 0;
    barrier.cluster.arrive.release; barrier.cluster.wait.acquire; @%p3 ret;
    mov.u32 %r5, 300; L: sub.u32 %r5, %r5, 1; setp.ne.u32 %p4, %r5, 0; bar.warp.sync -1; @%p4 bra L;
    mapa.shared::cluster.u32 %r6, %r3, 0; @%p2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];"""
    )
    assert "exited" in launch(body, cluster=2, seeds=range(12))
