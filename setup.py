"""fastbp's build. FASTBP_BUILD=auto|none|cpu|cuda says which native kernels to build.

This version has none, so ``auto`` and ``none`` install the Python package, and ``cpu`` and ``cuda``, which promise
kernels, fail with the reason.
"""

import os
import sys

from setuptools import setup

MODES = ("auto", "none", "cpu", "cuda")

mode = os.environ.get("FASTBP_BUILD", "auto").lower()
if mode not in MODES:
    sys.exit(f"fastbp: FASTBP_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
if mode in ("cpu", "cuda"):
    sys.exit(f"fastbp: FASTBP_BUILD={mode}, but this version has no native kernels; use FASTBP_BUILD=auto or none")

setup()
