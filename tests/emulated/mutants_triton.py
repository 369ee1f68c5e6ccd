"""Faults put into the PTX of the Triton kernels on purpose: a synchronisation less, a count off by one, a mask dropped.

A mutant is a text's change, and a case that meets it. ``first_fault`` says which schedule sees it, and as what.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from emulated import pingpong, triton_elementwise, triton_products
from emulated.jobs import Verdict

Change = Callable[[str], str]
SEEDS = range(6)


def nth(pattern: str, put: str, which: int | None = None) -> Change:
    """A text with the pattern replaced, everywhere or at its n-th place; the pattern must be there."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"the PTX has no {pattern}"
        for match in reversed(found if which is None else [found[which]]):
            text = text[: match.start()] + match.expand(put) + text[match.end() :]
        return text

    return change


class Mutant(NamedTuple):
    """``run(case, seed, change)`` of the modules of kernels."""

    name: str
    change: Change
    case: triton_products.Case | triton_elementwise.Case

    def __str__(self) -> str:
        return self.name


TMA = triton_products.Case("forward", "sm_90", 1, 130, 136, 264, programs=1)
POINTERS = triton_products.Case("forward", "sm_80", 2, 70, 80, 240, programs=1)
EDGES = triton_products.Case("forward", "sm_80", 2, 70, 77, 41, programs=1)
PING_PONG = pingpong.case_of(300, 136, 456)
CHAIN_RULE = triton_elementwise.Case("chain_rule", "sm_90", 33, 272)
ODD = triton_elementwise.Case("chain_rule", "sm_80", 9, 77)
FLAT = triton_elementwise.Case("activation", "sm_90", 9, 513, overwrite=True)
COLUMNS = triton_elementwise.Case("column_sum", "sm_90", 70, 77)

WAIT = r"waitLoop:\s*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"
FENCE = r"fence\.proxy\.async\.shared::cta;"
WGMMA_WAIT = r"(wgmma\.wait_group\.sync\.aligned\s+)"
PARITY = r"(mbarrier\.try_wait\.parity\.shared\.b64 complete, \[%r\d+\], )(%r\d+);"
EXPECT = r"(mbarrier\.arrive\.expect_tx[^;]*,\s*)(\d+);"
COPIED = r"(cp\.async\.wait_group\s+)4;"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+[^,]+, %r\d+, )\d+,"
READ = r"cp\.async\.bulk\.wait_group\.read\s+"

MUTANTS = [
    Mutant("TMA: no fence.proxy.async before the store", nth(FENCE, "", 0), TMA),
    Mutant("TMA: no wait for a store to have read", nth(READ + "0;", "", 1), TMA),
    Mutant("TMA: no bar.sync before the store", nth(rf"({FENCE}[^;]*?)bar\.sync\s+0;", r"\1", 0), TMA),
    Mutant("TMA: always parity 1", nth(PARITY, r"\g<1>1;", 0), TMA),
    Mutant("TMA: always parity 0", nth(PARITY, r"\g<1>0;", 0), TMA),
    Mutant("TMA: wgmma.wait_group 2 for 1", nth(WGMMA_WAIT + "1;", r"\g<1>2;"), TMA),
    Mutant("TMA: no wgmma.wait_group 0", nth(WGMMA_WAIT + "0;", ""), TMA),
    Mutant("TMA: expect_tx of half the bytes", nth(EXPECT, r"\g<1>8192;", 0), TMA),
    Mutant("TMA: expect_tx of twice the bytes", nth(EXPECT, r"\g<1>65536;", 0), TMA),
    Mutant("pointers: cp.async.wait_group 5 for 4", nth(COPIED, r"\g<1>5;"), POINTERS),
    Mutant("pointers: cp.async.wait_group 6 for 4", nth(COPIED, r"\g<1>6;"), POINTERS),
    Mutant("pointers: no bar.sync after the wait", nth(COPIED + r"([^;]*?)bar\.sync\s+0;", r"\g<1>4;\2"), POINTERS),
    Mutant("pointers: a result stored without its mask", nth(r"@%p\d+ (st\.global)", r"\1", -1), EDGES),
    Mutant("ping-pong: no wait for a turn", nth(WAIT, "", 0), PING_PONG),
    Mutant("ping-pong: no wait for a full stage", nth(WAIT, "", 1), PING_PONG),
    Mutant("ping-pong: no wait for a free stage", nth(WAIT, "", 2), PING_PONG),
    Mutant("ping-pong: result of try_wait not looked at", nth(r"@!complete bra\.uni waitLoop;", "", 1), PING_PONG),
    Mutant("ping-pong: a stage freed too early", nth(WGMMA_WAIT + "1;", r"\g<1>3;"), PING_PONG),
    Mutant("ping-pong: no fence before a store", nth(FENCE, "", 1), PING_PONG),
    Mutant("ping-pong: wait_group.read 2 for 1", nth(r"(" + READ + r")1;", r"\g<1>2;"), PING_PONG),
    Mutant("ping-pong: no wait_group.read 1", nth(READ + "1;", ""), PING_PONG),
    Mutant("ping-pong: wgmma.wait_group 2 for 1", nth(WGMMA_WAIT + "1;", r"\g<1>2;"), PING_PONG),
    Mutant("ping-pong: expect_tx of half the bytes", nth(EXPECT, r"\g<1>16384;", 0), PING_PONG),
    Mutant("chain rule: the first bar.sync of the sums is missing", nth(r"bar\.sync\s+0;", "", 0), CHAIN_RULE),
    Mutant("chain rule: the last bar.sync of the sums is missing", nth(r"bar\.sync\s+0;", "", -1), CHAIN_RULE),
    Mutant("chain rule: a load without its mask", nth(r"@%p\d+ (ld\.global)", r"\1", 0), ODD),
    Mutant("chain rule: a store without its mask", nth(r"@%p\d+ (st\.global)", r"\1", 0), ODD),
    Mutant("chain rule: a shuffle by the wrong distance", nth(SHUFFLE, r"\g<1>1,", 0), CHAIN_RULE),
    Mutant("activation: a load without its mask", nth(r"@%p\d+ (ld\.global)", r"\1"), FLAT),
    Mutant("activation: a store without its mask", nth(r"@%p\d+ (st\.global)", r"\1"), FLAT),
    Mutant("column sum: a bar.sync is missing", nth(r"bar\.sync\s+0;", "", -1), COLUMNS),
    Mutant("column sum: a load without its mask", nth(r"@%p\d+ (ld\.global)", r"\1", -1), COLUMNS),
]  # fmt: skip


def first_fault(number: int) -> Verdict:
    """Of the first of a few schedules that sees the mutant; no fault if none does."""
    mutant = MUTANTS[number]
    run = triton_products.run if isinstance(mutant.case, triton_products.Case) else triton_elementwise.run
    for seed in SEEDS:
        verdict = run(mutant.case, seed, mutant.change)
        if verdict.fault:
            return verdict
    return Verdict(text=f"{mutant.case}: nothing is seen under any of {len(SEEDS)} schedules")
