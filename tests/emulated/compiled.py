"""A process in which Triton compiles.

Whether Triton interprets or compiles is settled when it is imported, and in the process of the tests it interprets. So
what needs PTX is a function of a module, and runs in a child without TRITON_INTERPRET, which lives as long as the
tests.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[2] / "build" / "triton"  # what Triton compiled, for all processes and the next run
LIMIT = 240.0  # seconds for one function; the longest takes 10 on an idle machine


class Failed(AssertionError):
    """What went wrong in the child: the kind of it, and its traceback."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def compiling() -> None:
    """Let Triton compile in this process, which must not have imported it yet."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _serve(connection: Connection) -> None:
    compiling()
    while (asked := connection.recv()) is not None:
        function, arguments, options = asked
        try:
            answer = None, function(*arguments, **options)
        except Exception as error:
            kind = getattr(error, "kind", type(error).__name__)
            answer = kind, "".join(traceback.format_exception(error))
        connection.send(answer)


class Child:
    """The process, started when it is first asked. A function that hangs or crashes costs one test, not the others."""

    def __init__(self) -> None:
        self.process: Any = None

    def __call__(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT, **options: Any) -> Any:
        """What a function of a module gives; ``Failed`` if it raises, dies or takes longer than ``limit`` seconds."""
        if self.process is None:
            self._start()
        self.connection.send((function, arguments, options))
        try:
            if not self.connection.poll(limit):
                self.close()
                raise Failed("hang", f"{function.__name__}{arguments} took more than {limit:.0f} seconds")
            kind, found = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.close()
            raise Failed("crash", f"the process of {function.__name__}{arguments} ended with {code}") from None
        if kind is not None:
            raise Failed(kind, found)
        return found

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # The child imports modules before it serves, so Triton must not find the variable there.
        interpret = os.environ.pop("TRITON_INTERPRET", None)
        try:
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
        finally:
            if interpret is not None:
                os.environ["TRITON_INTERPRET"] = interpret
        theirs.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None
