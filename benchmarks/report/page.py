"""All results as one page that needs nothing else: every case, mode and rival, to sort and to filter."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from benchmarks.report import drawing, pictures
from benchmarks.report.grid import Line, grid, shown
from benchmarks.report.load import Machine, Suite
from benchmarks.report.tables import stamp
from benchmarks.suites import SUITES

HERE = Path(__file__).parent
# Colours of a picture in the page's, which are others in the dark.
COLORS = {
    drawing.INK: "--ink",
    drawing.FAINT: "--faint",
    drawing.PALE: "--pale",
    drawing.PAPER: "--paper",
    **{color: f"--{name.replace('.', '-')}" for name, (color, _) in drawing.SERIES.items()},
}

KINDS = {"note": "note", "rival": "rival"}  # columns whose text may take several lines


def page(machines: Sequence[Machine]) -> str:
    """The page of these machines."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script runs, and nothing is fetched, whatever a result file holds.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        style=style,
        script=script,
        links="".join(f"<ul>{''.join(_links(machine))}</ul>" for machine in machines),
        body="".join(map(_machine, machines)),
    )


def _links(machine: Machine) -> Iterator[str]:
    yield f'<li><a href="#{_id(machine.name)}">{escape(machine.name)}</a></li>'
    for name in machine.suites:
        yield f'<li><a href="#{_id(machine.name, name, "suite")}">{escape(name)}</a></li>'


def _machine(machine: Machine) -> str:
    return (
        f'<article>\n<h2 id="{_id(machine.name)}">{escape(machine.title)} <small>{escape(machine.name)}</small></h2>\n'
        f"{''.join(_suite(machine, suite) for suite in machine.suites.values())}</article>\n"
    )


def _suite(machine: Machine, suite: Suite) -> str:
    """A file: what it was measured on, its picture, its table, and the commands."""
    place = _id(machine.name, suite.name)
    facts = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in suite.environment.items())
    return (
        f'<section id="{_id(machine.name, suite.name, "suite")}">\n'
        f"<h3>{escape(suite.name)} <small>{escape(machine.name)}, {len(suite.rows)} rows</small></h3>\n"
        f"<p>{escape(_about(suite.name))}</p>\n"
        f'<p class="facts">{escape(stamp(suite.environment))}</p>\n'
        f"<details><summary>Environment</summary><dl>{facts}</dl></details>\n"
        f"{''.join(_pictures(machine, suite, place))}{_table(suite, place)}{_commands(suite, place)}</section>\n"
    )


def _about(suite: str) -> str:
    """What a suite is; nothing of one that is not known."""
    about = SUITES[suite].about if suite in SUITES else ""
    return about[:1].upper() + about[1:]


def _pictures(machine: Machine, suite: Suite, place: str) -> Iterator[str]:
    """Those that a file allows, and in words why there is none of its speed."""
    alone = Machine(machine.name, {suite.name: suite})
    found = pictures.of(alone)
    for name, draw in found.items():
        words = pictures.CAPTIONS[name]
        yield f"<figure>{_inline(draw(), f'{place}/{name}', words)}<figcaption>{words}</figcaption></figure>\n"
    if suite.timed and not {"floor", "floor-edges"} & set(found):
        yield "<p>No picture of speed over the floor: no row has both <i>linears alone</i> and <i>fastbp</i>.</p>\n"
    if suite.timed and "roofline" not in found:
        yield "<p>No roofline: the file lacks flops and bytes of its rows, or the machine's peaks.</p>\n"


def _inline(svg: str, prefix: str, words: str) -> str:
    """A picture as a part of the page: in its colours, and with names that no other has."""
    body = svg[svg.index("<svg") :].partition("<metadata>")
    text = body[0] + body[2].partition("</metadata>")[2]
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}/", text)
    text = re.sub("#[0-9a-f]{6}", lambda m: f"var({COLORS[m[0]]})" if m[0] in COLORS else m[0], text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)


def _table(suite: Suite, place: str) -> str:
    table = grid(suite)
    kinds = {head: "n" if table.numeric(head) else KINDS.get(head, "") for head in table.heads}
    heads = "".join(
        f'<th scope="col"{_class(kind)}><button type="button">{escape(head)}</button></th>'
        for head, kind in kinds.items()
    )
    link = f"{place}/" if suite.timed else ""
    body = "".join(_row(line, kinds, link) for line in table.lines)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(suite.name)}" tabindex="0">'
        f'<table class="data" id="{place}"><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
    )


def _row(line: Line, kinds: dict[str, str], link: str) -> str:
    cells = []
    for head, kind in kinds.items():
        text = escape(shown(head, line.cells.get(head)))
        if link and head == "case":
            text = f'<a href="#{link}{line.of}">{text}</a>'
        cells.append(f"<td{_class(kind)}>{text}</td>")
    marks = " ".join(["ours"] * line.ours + ["wrong"] * line.wrong)
    return f"<tr{_class(marks)}>{''.join(cells)}</tr>\n"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _commands(suite: Suite, place: str) -> str:
    """What measures each row again."""
    if not suite.timed:
        return f"<p>Again: <code>{escape(str(suite.environment.get('command', '')))}</code></p>\n"
    items = "".join(
        f'<li id="{place}/{of}"><code>{escape(suite.command(row))}</code></li>\n' for of, row in enumerate(suite.rows)
    )
    return f"<details><summary>Commands that measure a row again</summary><ol>\n{items}</ol></details>\n"


def _id(*parts: str) -> str:
    """A name in the page, without blanks and quotes."""
    return "/".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
