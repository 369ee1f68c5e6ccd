"""``fastbp.tuning.worker`` with stand-ins for candidates that crash, hang, end the process, raise or are wrong.

They are backends, so that whatever starts them is the real thing. What they may take part in is named in
$FASTBP_TEST_CANDIDATES.
"""

import os
import signal
import sys
import time

from fastbp import backends
from fastbp.backends import reference
from fastbp.tuning import worker

calls = dict.fromkeys(("late",), 0)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def late():
    """Right whenever it is judged, and then it crashes while it is timed."""
    calls["late"] += 1
    if calls["late"] > 4:
        crash()


def poison():
    """An illegal access: it is told late, and from then on every call fails."""
    worker.usable = lambda device: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def raising():
    raise ValueError("out of resources\nand more")


BEFORE = {
    "crashes": crash,
    "hangs": lambda: time.sleep(3600),
    "exits": lambda: (print("something went wrong", file=sys.stderr, flush=True), os._exit(7)),
    "raises": raising,
    "late": late,
    "poisons": poison,
    "prints": lambda: (print("a compiler speaks"), os.write(1, b"a driver speaks\n"), time.sleep(0.02)),
    "nan": lambda: None,
    "good": lambda: None,
    "reference": lambda: time.sleep(0.02),
}


def stand_in(name):
    def forward(config, x, tensors):
        BEFORE[name]()
        y, *kept = reference.forward(config, x, tensors)
        return [y * float("nan") if name == "nan" else y, *kept]

    module = type(backends)(name)
    module.__dict__.update(vars(reference), forward=forward)
    return module


if __name__ == "__main__":
    backends.BACKENDS.clear()
    backends.BACKENDS.update({name: stand_in(name) for name in os.environ["FASTBP_TEST_CANDIDATES"].split()})
    if "dead" in sys.argv:
        sys.exit("no GPU for you")
    worker.main()
