"""fastbp's build. FASTBP_BUILD=auto|none|cpu|cuda says which native kernels to build.

``auto`` (the default) builds what this machine can and never fails: what it leaves out it says in a line, and
``python -m fastbp doctor`` says it again. ``none`` builds nothing. ``cpu`` builds the CPU kernels or fails with the
reason. ``cuda`` builds CUDA kernels too, for which nvcc must be there and a GPU or a CUDA build of torch need not;
``auto`` does so where torch is a CUDA build.

The kernels are one shared library on LibTorch's stable ABI: built once, it loads into every Python from 3.10 and every
torch from 2.11 on. MAX_JOBS bounds the compilers that run at a time, CXX and NVCC name the compilers, FASTBP_CXXFLAGS
adds flags (``make sanitize`` uses it), FASTBP_CUDA_ARCHITECTURES says for which GPUs (``80 90a 100``).
"""

import os
import platform
import re
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
    SOURCES / "cpu" / "compressed.cpp": ["-fschedule-insns", "-fsched-pressure"],
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
# CUDA: the oldest nvcc that has what the sources call (cudaGetDriverEntryPointByVersion); the architectures, and the
# version of nvcc that knows them; sources for one of them alone.
OLDEST_NVCC = (12, 5)
ARCHITECTURES = {"80": OLDEST_NVCC, "90a": OLDEST_NVCC, "100": (12, 8)}
HOPPER = "90a"
NVCC_FLAGS = ["-c", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
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


def nvcc() -> tuple[list[str], list[str]]:
    """The compiler of CUDA, and the architectures it compiles for."""
    oldest = ".".join(map(str, OLDEST_NVCC))
    named = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if shutil.which(named) is None:
        raise Unable(
            f"no CUDA compiler was found; the CUDA toolkit ({oldest} or newer) brings nvcc, NVCC=/path names it"
        )
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([named, "--version"], capture_output=True, text=True).stdout
    )
    if found is None:
        raise Unable(f"{named} --version does not say which release it is")
    release = (int(found[1]), int(found[2]))
    if release < OLDEST_NVCC:
        raise Unable(
            f"{named} is of CUDA {found[1]}.{found[2]}, and {oldest} or newer is needed; NVCC=/path names another"
        )
    known = [name for name, since in ARCHITECTURES.items() if release >= since]
    wanted = re.split(r"[\s;,]+", os.environ.get("FASTBP_CUDA_ARCHITECTURES", " ".join(known)).strip())
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise Unable(
            f"FASTBP_CUDA_ARCHITECTURES names {', '.join(unknown)}; nvcc {found[1]}.{found[2]} and fastbp know "
            f"{', '.join(known)}"
        )
    if HOPPER not in wanted:
        raise Unable(f"FASTBP_CUDA_ARCHITECTURES must have {HOPPER}: the fused products are compiled for nothing else")
    return [named], wanted


def toolkit_folders(command: list[str]) -> tuple[str, str]:
    """Where CUDA's headers and libraries lie, as nvcc says itself: what is on the path may be a script."""
    said = subprocess.run([*command, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    include, libraries = re.search(r'INCLUDES="-I([^"]+)"', said), re.findall(r'"-L([^"]+)"', said)
    library = next((folder for folder in libraries if Path(folder, "libcudart_static.a").is_file()), None)
    if include is None or library is None:
        raise Unable(f"{command[0]} does not say where CUDA's headers and libcudart_static.a lie")
    return include[1], library


def torch_is_cuda_build() -> bool:
    import torch

    return torch.version.cuda is not None


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

        compilers = cuda_compiler()
        cuda_flags: list[str] = []
        link = ["-shared", "-Wl,--no-as-needed", f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if not extra:  # what is missing fails here and not when it is loaded; sanitizers come with the process
            link.append("-Wl,-z,defs")
        jobs: list[list[str]] = []
        made: list[str] = []

        def add(compiler: list[str], source: Path, flags: list[str], suffix: str = "") -> None:
            made.append(str(objects / f"{'_'.join(source.relative_to(SOURCES).parts)}{suffix}.o"))
            jobs.append([*compiler, *flags, str(source), "-o", made[-1]])

        if compilers:
            command, architectures = compilers
            include, library = toolkit_folders(command)
            names = " ".join(f"sm_{name}" for name in architectures)
            cuda_flags = [f'-DFASTBP_CUDA_ARCHITECTURES="{names}"', "-isystem", include]
            link += [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
            for source in sorted(SOURCES.rglob("*.cu")):  # the longest jobs, so they come first
                only = [HOPPER] if source.stem.startswith("hopper") else architectures
                code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in only]
                add(command, source, [*NVCC_FLAGS, "-ccbin", cxx[0], *code])
        for source in sorted(SOURCES.rglob("*.cpp")):
            common = [*FLAGS, *QUIET, *extra]
            if source in KERNELS:
                for name, flags in CAPABILITIES.items():
                    own = ["-O3", *KERNELS[source], *flags.split(), f"-DFASTBP_CAPABILITY={name}"]
                    add(cxx, source, [*common, *own], f"_{name}")
            elif compilers or source.parent.name != "cuda":
                add(cxx, source, [*common, "-O2", *torch_flags, *cuda_flags, f'-DFASTBP_IDENTITY="{identity}"'])
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(run, jobs))

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*cxx, *extra, *made, *link, "-o", str(target)])


MODE = os.environ.get("FASTBP_BUILD", "auto").lower()


def cuda_compiler() -> tuple[list[str], list[str]] | None:
    """nvcc and the architectures if CUDA kernels are to be built, else None; with ``auto`` it says why not."""
    if MODE == "cuda":
        return nvcc()
    if MODE == "auto" and torch_is_cuda_build():
        try:
            return nvcc()
        except Unable as reason:
            print(f"fastbp: no CUDA kernels, Triton serves the GPU instead: {reason}", file=sys.stderr)
    return None


def main() -> None:
    if MODE not in MODES:
        sys.exit(f"fastbp: FASTBP_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
    library = [Extension("fastbp._native", [], py_limited_api=True)] if MODE != "none" else []
    setup(
        ext_modules=library,
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if library else {},
    )


if __name__ == "__main__":  # as every installer runs it; the tests read the tables above
    main()
