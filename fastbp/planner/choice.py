"""The choice itself: one option for each layer, so that the bytes stay within a budget at the least cost.

Layers are not independent, for a storage that two of them keep counts once: the output that one reads is the input that
the next keeps. So this is a knapsack with memory: layers are gone through in order, and a state is the set of storages
kept so far that a later layer may keep too. In a chain that is one storage at a time.

For each state there are the points that no other beats in both bytes and cost. Where there are at most ``LIMIT`` of
them, which is so unless many layers differ in size, the result is the best there is. Beyond that the range of bytes is
divided into ``LIMIT`` parts and the cheapest point of each is kept: the result is then within the budget as ever, the
one of fewest bytes is still found, and the cost may be above the least.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

LIMIT = 1000

Cost = tuple[int, ...]  # compared from the left; integers, so that sums in any order are equal
# Bytes, cost as one integer, a number that makes it unique, and the choice so far as a chain from the last layer back.
Point = tuple[int, int, int, Any]


@dataclass(frozen=True)
class Option:
    """What one layer keeps, and costs, under one policy."""

    policy: str
    own: int  # bytes that nothing else keeps
    shared: frozenset[Hashable]  # storages that others may keep too
    cost: Cost


def choose(
    layers: Sequence[Sequence[Option]], sizes: Mapping[Hashable, int], base: int, budget: int | None
) -> tuple[int, list[Option]] | None:
    """Bytes and options of the cheapest choice that keeps at most ``budget``; None where there is none.

    ``base`` is kept in any case and not part of any option; ``sizes`` has the bytes of the shared storages. Without a
    budget the choice of fewest bytes, and the cheapest of those.
    """
    last = {key: i for i, options in enumerate(layers) for option in options for key in option.shared}
    rest = [0] * (len(layers) + 1)  # what the layers from i on keep at least
    for i in range(len(layers) - 1, -1, -1):
        rest[i] = rest[i + 1] + min(option.own for option in layers[i])
    prices, serial = _prices(layers), count()
    states: dict[frozenset[Hashable], list[Point]] = {frozenset(): [(base, 0, next(serial), None)]}
    for i, options in enumerate(layers):
        found: dict[frozenset[Hashable], list[Point]] = defaultdict(list)
        for kept, points in states.items():
            for option in options:
                more = option.own + sum(sizes[key] for key in option.shared - kept)
                most = float("inf") if budget is None else budget - rest[i + 1] - more
                still = frozenset(key for key in kept | option.shared if last[key] > i)
                price = sum(map(int.__mul__, option.cost, prices))
                found[still] += [
                    (size + more, cost + price, next(serial), (option, chosen))
                    for size, cost, _, chosen in points
                    if size <= most
                ]
        states = {kept: _unbeaten(points, 1 if budget is None else LIMIT) for kept, points in found.items() if points}
    ends = [point for points in states.values() for point in points]
    if not ends:
        return None
    best = min(ends, key=lambda p: p[:2] if budget is None else (p[1], p[0]))
    taken: list[Option] = []
    chain = best[-1]
    while chain is not None:
        option, chain = chain
        taken.append(option)
    return best[0], taken[::-1]


def _prices(layers: Sequence[Sequence[Option]]) -> list[int]:
    """What one unit of each part of a cost is worth, so that sums of costs compare as single numbers."""
    dearest = [[max(parts) for parts in zip(*(option.cost for option in each), strict=True)] for each in layers]
    most = [sum(parts) for parts in zip(*dearest, strict=True)]
    prices = [1] * len(most)
    for i in range(len(most) - 1, 0, -1):
        prices[i - 1] = prices[i] * (most[i] + 1)
    return prices


def _unbeaten(points: list[Point], limit: int) -> list[Point]:
    """The points in order of bytes, each cheaper than all before it; about ``limit`` at most, and the first."""
    points.sort()
    kept = points[:1]
    for point in points:
        if point[1] < kept[-1][1]:
            kept.append(point)
    if limit == 1:
        return kept[:1]
    if len(kept) <= limit:
        return kept
    start = kept[0][0]
    span = (kept[-1][0] - start) / limit
    parts = {int((point[0] - start) / span): point for point in kept[1:]}  # the last of a part is cheapest
    return [kept[0], *parts.values()]
