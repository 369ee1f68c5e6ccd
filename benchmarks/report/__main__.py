"""All results as a page to sort and filter, or as the Markdown of docs/benchmarks.md: ``python -m benchmarks.report``.

It reads result files (benchmarks/results/<machine>/*.jsonl) and measures nothing. What README.md and docs/ show of
them is put there by ``python tools/render.py``; ``make report`` does both.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from benchmarks.records import RESULTS
from benchmarks.report import pictures
from benchmarks.report.document import document, picture_file, shown
from benchmarks.report.load import ReportError, load
from benchmarks.report.page import page

KINDS = {".html": page, ".md": document}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder with one for each machine in it")
    parser.add_argument("--machine", action="append", default=[], help="may be given more than once; all if not")
    parser.add_argument("--output", type=Path, default=Path("build/report.html"), help="what to write: .html or .md")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if output.suffix not in KINDS:
        parser.error(f"--output {output}: its end says what it becomes; there are {', '.join(KINDS)}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            machines = load(arguments.results, arguments.machine)
        for warning in caught:
            print(f"report: {warning.message}", file=sys.stderr)
        files = {output: KINDS[output.suffix](machines)}
        if output.suffix == ".md":  # a page has its pictures in it
            files |= {
                output.with_name(picture_file(machine, name)): pictures.of(machine)[name]()
                for machine in machines
                for name in shown(machine)
            }
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    rows = sum(len(suite.rows) for machine in machines for suite in machine.suites.values())
    print(
        f"{output}: {rows} rows of {', '.join(machine.name for machine in machines)}, {len(files[output]) // 1000} kB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
