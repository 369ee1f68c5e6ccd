"""fastbp's build. FASTBP_BUILD=auto|none|cpu|cuda says which native kernels to build.

``auto`` (the default) builds what this machine can and never fails: what it leaves out it says in a line, and
``python -m fastbp doctor`` says it again. ``none`` builds nothing. ``cpu`` builds the CPU kernels or fails with the
reason. ``cuda`` promises CUDA kernels, which this version does not have.

The kernels are one shared library on LibTorch's stable ABI: built once, it loads into every Python from 3.10 and every
torch from 2.11 on. MAX_JOBS bounds the compilers that run at a time, CXX names the compiler, FASTBP_CXXFLAGS adds flags
(``make sanitize`` uses it).
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
MODES = ("auto", "none", "cpu", "cuda")
OLDEST_TORCH = (2, 11)
ABI = "0x020b000000000000"  # the same as a number: newer functions of the stable ABI then do not compile

# These are compiled once for each capability; the library takes the best one that the CPU has.
KERNELS = {
    SOURCES / "cpu" / "products.cpp": [],
    SOURCES / "cpu" / "elementwise.cpp": ["-fschedule-insns", "-fsched-pressure"],
}
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
X86 = {
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
    "generic": "",
}
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else {"generic": ""}
FLAGS = [
    "-c",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
# Registers in signatures are fine: they never leave a translation unit.
QUIET = ["-Wno-attributes", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
QUIET += ["-Wno-ignored-optimization-argument"]  # Clang schedules without being told


class Unable(Exception):
    """Why the kernels cannot be built here, and what to do about it."""


def compiler() -> list[str]:
    if sys.platform != "linux":
        raise Unable(f"the C++ kernels are built on Linux only, not on {sys.platform}")
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise Unable("no C++ compiler was found (g++ or clang++ with C++20); `apt-get install g++` brings one")


def torch_folders() -> tuple[list[Path], Path]:
    """Where torch's headers and libraries lie."""
    try:
        import torch
    except ImportError:
        raise Unable("torch is not importable here; install it first and pass --no-build-isolation") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise Unable(f"torch {torch.__version__} is older than 2.11; `pip install -U torch`")
    folder = Path(torch.__file__).parent
    return [folder / "include", folder / "include" / "torch" / "csrc" / "api" / "include"], folder / "lib"


def run(command: list[str]) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        first = next((line for line in outcome.stderr.splitlines() if "error" in line), outcome.stderr.strip())
        print(outcome.stderr, file=sys.stderr)
        raise Unable(f"{Path(command[0]).name} failed: {first}")


class Build(build_ext):
    """Compiles every source with its own flags, several at a time, and links them."""

    def run(self) -> None:
        try:
            super().run()
        except Unable as reason:
            if MODE != "auto":
                sys.exit(f"fastbp: FASTBP_BUILD={MODE}: {reason}")
            print(f"fastbp: no C++ kernels, plain PyTorch serves instead: {reason}", file=sys.stderr)
            self.extensions: list[Extension] = []

    def build_extension(self, extension: Extension) -> None:
        cxx, (includes, libraries) = compiler(), torch_folders()
        extra = shlex.split(os.environ.get("FASTBP_CXXFLAGS", ""))
        objects = Path(self.build_temp).resolve() / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        version = runpy.run_path(str(ROOT / "fastbp" / "version.py"))
        identity = f"{version['__version__']} {version['fingerprint'](SOURCES)}"
        torch_flags = [f"-DTORCH_TARGET_VERSION={ABI}", "-DTORCH_STABLE_ONLY"]
        torch_flags += [flag for folder in includes for flag in ("-isystem", str(folder))]

        jobs = []
        for source in sorted(SOURCES.rglob("*.cpp")):
            if source in KERNELS:
                for name, flags in CAPABILITIES.items():
                    own = ["-O3", *KERNELS[source], *flags.split(), f"-DFASTBP_CAPABILITY={name}"]
                    jobs.append((objects / f"{source.stem}_{name}.o", source, own))
            else:
                own = ["-O2", *torch_flags, f'-DFASTBP_IDENTITY="{identity}"']
                jobs.append((objects / f"{source.stem}.o", source, own))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            commands = ([*cxx, *FLAGS, *QUIET, *own, *extra, str(source), "-o", str(to)] for to, source, own in jobs)
            list(pool.map(run, commands))

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = ["-shared", "-Wl,--no-as-needed", f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        run([*cxx, *extra, *(str(to) for to, *_ in jobs), *link, "-o", str(target)])


MODE = os.environ.get("FASTBP_BUILD", "auto").lower()


def main() -> None:
    if MODE not in MODES:
        sys.exit(f"fastbp: FASTBP_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
    if MODE == "cuda":
        sys.exit("fastbp: FASTBP_BUILD=cuda, but this version has no CUDA kernels; use FASTBP_BUILD=auto, cpu or none")
    library = [Extension("fastbp._native", [], py_limited_api=True)] if MODE != "none" else []
    setup(
        ext_modules=library,
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if library else {},
    )


if __name__ == "__main__":  # as every installer runs it; the tests read the tables above
    main()
