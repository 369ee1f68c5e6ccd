"""Whether Triton can build its launchers on this machine: a small C extension for each signature of a kernel.

Without a compiler the first launch fails, in the middle of a step. So before a call takes these kernels, one extension
is built as Triton builds them, with its own compiler, headers and cache.
"""

from __future__ import annotations

import os
import shutil

MEND = "`apt-get install gcc python3-dev` brings one and Python's headers, or CC names one that is there"
SOURCE = """
#include "cuda.h"
#define PY_SSIZE_T_CLEAN
#include <Python.h>
static struct PyModuleDef fastbp_probe = {PyModuleDef_HEAD_INIT, "fastbp_probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_fastbp_probe(void) {
  int version = 0;
  cuDriverGetVersion(&version);
  return PyModule_Create(&fastbp_probe);
}
"""


def compiler() -> str | None:
    """What Triton compiles with: ``CC``, gcc, clang; None where none of them is there."""
    named = os.environ.get("CC")
    return shutil.which(named) if named is not None else shutil.which("gcc") or shutil.which("clang")


def unable() -> str | None:
    """Why Triton cannot build a launcher, and what to do about it; None if it can. The first time takes half a second.

    Triton keeps what it built, so a later process loads it. But the next kernel needs the compiler all the same.
    """
    try:
        from triton import knobs
        from triton.backends.nvidia import driver
        from triton.runtime.build import compile_module_from_src
    except ImportError:  # another Triton than those known here, which may need none of it
        return None
    if knobs.build.impl is None and compiler() is None:
        named = os.environ.get("CC")
        found = "there is neither gcc nor clang" if named is None else f"CC names {named!r}, which is not there"
        return f"Triton builds its launchers with a C compiler, and {found}; {MEND}"
    try:
        compile_module_from_src(
            src=SOURCE, name="fastbp_probe", library_dirs=driver.library_dirs(), include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )  # fmt: skip
    except Exception as error:  # of the compiler, of its headers, of the driver's library, of the cache's folder
        return f"Triton cannot build a launcher with {compiler()}: {type(error).__name__}: {error}; {MEND}"
    return None
