"""``python -m fastbp doctor | demo | tune``: what this machine can do, the main job, and what is fastest here."""

from __future__ import annotations

import argparse
import sys

from fastbp import doctor
from fastbp.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastbp", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, backends with reasons, GPUs, and what to run to get what is missing")
    commands.add_parser("demo", help="train on real data, stock and fused; demo --help has its options", add_help=False)
    commands.add_parser("tune", help="measure which backend is fastest, and remember it; tune --help", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from fastbp import demo  # its dependencies are optional

        return demo.main(rest)
    if arguments.command == "tune":
        from fastbp.tuning import command

        return command.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(doctor.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
