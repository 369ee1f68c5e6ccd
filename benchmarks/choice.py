"""Which cases, modes and rivals the arguments of ``benchmarks.run`` ask for."""

from __future__ import annotations

import argparse
import difflib
from typing import NamedTuple

from benchmarks.cases import Case, flops, name_of
from benchmarks.suites import SUITES, Suite

SELECTIONS = ("case", "mode", "dtype", "rival")
CLOSEST = 12  # names of cases in a message


class Item(NamedTuple):
    """A row to measure, or a suite that another module measures as a whole."""

    suite: str
    case: Case | None
    mode: str


def chosen(arguments: argparse.Namespace) -> list[Item]:
    """What there is to measure. Modes one after another, what is asked for most first: a limit of time may cut it off.

    ValueError where that is nothing, with what there is.
    """
    asked = {key: getattr(arguments, key) for key in SELECTIONS if getattr(arguments, key)}
    names: list[str] = list(dict.fromkeys(arguments.suite or SUITES))
    items: list[Item] = []
    for name in names:
        suite = SUITES[name]
        if not suite.module:
            items += _timed(name, suite, arguments)
        elif unknown := [key for key in asked if key not in suite.takes]:
            if arguments.suite:
                raise ValueError(f"--{unknown[0]} is not for --suite {name}: `python -m {suite.module} --help`")
        elif not arguments.case or matching(suite.cases[arguments.device], arguments.case):
            items.append(Item(name, None, ""))
    if not items:
        raise ValueError(_nothing(names, arguments))
    return items


def _timed(name: str, suite: Suite, arguments: argparse.Namespace) -> list[Item]:
    cases = suite.cases[arguments.device]
    if arguments.case:
        cases = matching(cases, arguments.case)
    elif arguments.quick:
        cases = suite.quick or (min(cases, key=lambda case: flops(case, "fwd")),)
    cases = tuple(case for case in cases if not arguments.dtype or name_of(case.dtype) in arguments.dtype)
    modes = [mode for mode in suite.modes if not arguments.mode or mode in arguments.mode]
    return [Item(name, case, mode) for mode in modes for case in cases]


def matching(cases: tuple[Case, ...], text: str) -> tuple[Case, ...]:
    """The case of this name, or those that have it in theirs."""
    exact = tuple(case for case in cases if case.name == text)
    return exact or tuple(case for case in cases if text in case.name)


def _nothing(names: list[str], arguments: argparse.Namespace) -> str:
    """Why there is nothing to measure, and what there would be."""
    suites = [SUITES[name] for name in names]
    cases = [case.name for suite in suites for case in suite.cases[arguments.device]]
    if arguments.case and not any(arguments.case in case for case in cases):
        close = difflib.get_close_matches(arguments.case, cases, CLOSEST, 0.0)
        return f"--case {arguments.case}: no such case in {', '.join(names)}; the closest: {'; '.join(close)}"
    modes = dict.fromkeys(mode for suite in suites for mode in suite.modes)
    if arguments.mode and not any(mode in modes for mode in arguments.mode):
        return f"--mode {arguments.mode[0]}: {', '.join(names)} has {', '.join(modes)}"
    dtypes = dict.fromkeys(name_of(case.dtype) for suite in suites for case in suite.cases[arguments.device])
    there = f"dtypes: {', '.join(dtypes)}; modes: {', '.join(modes)}"
    return f"no case of {', '.join(names)} is all that was asked for; {there}"


def names_of(suite: str, case: Case, arguments: argparse.Namespace) -> list[str]:
    """Who is measured in a suite."""
    names = ["eager", *(arguments.rival or SUITES[suite].rivals_of(case, arguments.device))]
    return [name for name in dict.fromkeys(names) if name not in arguments.skip]


def passed_on(item: Item, arguments: argparse.Namespace, left: float) -> list[str]:
    """The arguments for the module that measures a suite, with so many seconds left."""
    suite = SUITES[item.suite]
    words = ["--device", arguments.device]
    words += ["--quick"] if arguments.quick else []
    words += ["--output", str(arguments.output)] if arguments.output else []
    if "case" in suite.takes:
        words += ["--case", arguments.case] if arguments.case else []
        words += ["--limit", str(left)]
    for name in arguments.rival or () if "rival" in suite.takes else ():
        words += ["--rival", name]
    return words
