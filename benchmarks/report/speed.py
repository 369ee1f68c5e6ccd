"""How fast: ratios of every timed suite, who is ahead of fastbp, and who was wrong or left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.records import Row
from benchmarks.report.load import REMARKS, YARDSTICKS, Machine, Suite, is_number, peaks_of
from benchmarks.report.tables import WORDS, folded, markdown, over_eager, over_floor, rivals_in, span


def groups(suites: Sequence[Suite], modes: Sequence[str] = ()) -> Iterator[tuple[Suite, str, str, list[Row]]]:
    """The rows of each suite, mode and dtype."""
    for suite in suites:
        for mode in suite.modes:
            for dtype in suite.dtypes:
                rows = suite.part(mode, dtype)
                if rows and (not modes or mode in modes):
                    yield suite, mode, dtype, rows


def summary(machine: Machine, beside: Sequence[str] = (), modes: Sequence[str] = ()) -> str:
    """fastbp over eager by suite, mode and dtype; the noise, the floor, and rivals ``beside``."""
    found = [group for group in groups(machine.compared, modes) if over_eager(group[-1], "fastbp")]
    beside = [name for name in beside if any(over_eager(rows, name) for *_, rows in found)]
    floor = any(over_floor(rows, "fastbp") for *_, rows in found)
    head = ["suite", "dtype", "mode", "cases", f"× eager: {WORDS}", "worst case", "eager again"]
    head += ["× floor"] * floor + beside
    table = []
    for suite, mode, dtype, rows in found:
        mine = over_eager(rows, "fastbp")
        cells = [suite.name, dtype, f"`{mode}`", str(len(rows)), span(mine, bold=True)]
        cells += [mine[0].case.removesuffix(f" {dtype}"), span(over_eager(rows, "eager again"))]
        cells += [span(over_floor(rows, "fastbp"))] * floor + [span(over_eager(rows, name)) for name in beside]
        table.append(cells)
    if len(modes) == 1:
        head, *table = [[*cells[:2], *cells[3:]] for cells in (head, *table)]
    return markdown(head, table)


def rivals(machine: Machine) -> str:
    """Every rival over eager, a table for the suites that have the same ones."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for suite, mode, dtype, rows in groups(machine.compared):
        names = tuple(name for name in rivals_in(suite.rows) if name != "eager")
        cells = [suite.name, dtype, f"`{mode}`", *(span(over_eager(rows, name)) for name in names)]
        tables.setdefault(names, []).append(cells)
    return "\n".join(markdown(["suite", "dtype", "mode", *names], rows) for names, rows in tables.items())


def ahead(machine: Machine) -> str:
    """Every row in which a rival is ahead of fastbp, the widest gap first."""
    found, total = [], 0
    for suite in machine.compared:
        for row in suite.rows:
            mine = row["rivals"].get("fastbp")
            if mine is None:
                continue
            total += 1
            faster = {
                name: rival
                for name, rival in row["rivals"].items()
                if name not in (*YARDSTICKS, "fastbp") and rival["over_eager"] > mine["over_eager"]
            }
            if faster:
                gap = max(rival["over_eager"] for rival in faster.values()) / mine["over_eager"]
                apart = any(rival["over_eager_p20"] > mine["over_eager_p80"] for rival in faster.values())
                names = ", ".join(_with_spread(name, rival) for name, rival in faster.items())
                cells = [suite.name, row["case"], f"`{row['mode']}`", _with_spread("", mine), names]
                found.append((gap, apart, [*cells, f"{100 * (gap - 1):.0f} %" + " (within the spread)" * (not apart)]))
    if not found:
        return f"No rival is ahead of fastbp in any of {total} rows.\n"
    found.sort(key=lambda row: -row[0])
    head = ["suite", "case", "mode", "fastbp × eager (p20 to p80)", "ahead of it (× eager)", "by"]
    beyond = sum(apart for _, apart, _ in found)
    line = f"{len(found)} of {total} rows in which a rival is ahead of fastbp, {beyond} of them by more than the spread"
    return folded(line, markdown(head, [cells for *_, cells in found]))


def _with_spread(name: str, rival: dict[str, float]) -> str:
    if name == "eager":
        return name
    text = f"{rival['over_eager']:.2f} ({rival['over_eager_p20']:.2f} to {rival['over_eager_p80']:.2f})"
    return f"{name} {text}".strip()


def failures(machine: Machine) -> str:
    """Who was less accurate than twice eager's error, and who is broken or was left out, with the reason."""
    wrong: dict[tuple[str, str], list[tuple[float, str]]] = {}
    remarks: dict[tuple[str, str, str], list[str]] = {}
    for suite in machine.compared:
        for row in suite.rows:
            eager = row["rivals"].get("eager", {}).get("error")
            for name, rival in row["rivals"].items():
                if rival.get("accurate") is False:
                    known = is_number(eager) and is_number(rival.get("error")) and eager > 0
                    times = rival["error"] / eager if known else 0.0
                    wrong.setdefault((suite.name, name), []).append((times, f"{row['case']} `{row['mode']}`"))
            for key, words in REMARKS.items():
                for name, reason in row.get(key, {}).items():
                    remarks.setdefault((suite.name, name, f"{words}: {reason}"), []).append(row["case"])
    table = [
        [suite, name, "less accurate", str(len(cases)), _worst_of(cases)] for (suite, name), cases in wrong.items()
    ]
    table += [
        [suite, name, reason, str(len(cases)), cases[0]] for (suite, name, reason), cases in sorted(remarks.items())
    ]
    if not table:
        return "Nobody was wrong or left out.\n"
    head = ["suite", "rival", "what", "rows", "for example"]
    return folded(f"{len(table)} entries of rivals that were wrong or left out", markdown(head, table))


def _worst_of(cases: list[tuple[float, str]]) -> str:
    times, case = max(cases)
    return f"{case}: {times:.1f} × eager's error" if times else case


def measured(machine: Machine) -> str:
    """Which files were measured on what and when, and the commands that did."""
    files: dict[tuple[str, ...], list[str]] = {}
    for suite in machine.suites.values():
        facts = suite.environment
        cells = (*map(str, (_hardware(facts), facts.get("threads", ""), _versions(facts), facts.get("date", ""))),)
        files.setdefault((*cells, str(facts.get("commit", ""))), []).append(suite.name)
    head = ["files", "CPU or GPU", "threads", "versions", "date", "commit"]
    commands = dict.fromkeys(str(suite.environment.get("command", "")) for suite in machine.suites.values())
    block = "".join(f"{command}\n" for command in commands if command)
    return markdown(head, [[", ".join(names), *cells] for cells, names in files.items()]) + f"\n```\n{block}```\n"


def _hardware(facts: dict[str, object]) -> str:
    return "; ".join(str(facts[key]) for key in ("gpu", "cpu") if facts.get(key))


def _versions(facts: dict[str, object]) -> str:
    names = {"fastbp": "fastbp", "torch": "torch", "cuda": "CUDA", "triton": "Triton", "native": "C++ kernels"}
    return ", ".join(f"{name} {facts[key]}" for key, name in (names | {"python": "Python"}).items() if facts.get(key))


def peaks(machine: Machine) -> str:
    """The most that a machine was seen to do, in words; nothing where that was not measured."""
    seen: dict[str, float] = {}
    for suite in machine.timed:
        for name, peak in peaks_of(suite).items():
            seen[name] = max(peak, seen.get(name, 0))
    units = {"copy": "GB/s copied"}
    return ", ".join(f"{peak:.4g} {units.get(name, f'GFLOP/s in {name}')}" for name, peak in seen.items())
