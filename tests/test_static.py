"""benchmarks/static.py: it sees what is wrong with a kernel, and compiles what a launch would compile.

In processes of their own, for whether triton interprets or compiles is settled when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastbp
from fastbp.backends import triton

ROOT = Path(fastbp.__file__).parents[1]
pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")


def python(*arguments, interpret="0"):
    environment = dict(os.environ, TRITON_INTERPRET=interpret)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


FAULTS = """
import json
import torch
from benchmarks.static import Case, Tile, configs, examine

def faults(family, kernel, *tile, activation="gelu", **traits):
    return examine(Case(family, kernel, Tile(*tile, **traits), activation, torch.bfloat16)).faults

def odd(tile):
    return examine(Case("sm_80", "forward", tile, "gelu", torch.bfloat16, n=2730)).faults

print(json.dumps({
    "sound": faults("sm_90", "forward", 128, 128, 64, 4, 3, parts=2, tma=True),
    "spills": faults("sm_90", "gated_dgrad", 128, 128, 64, 8, 3, tma=True),
    "shared memory": faults("sm_90", "forward", 128, 256, 64, 8, 5, parts=4, tma=True),
    "slow products": faults("sm_90", "forward", 32, 64, 64, 4, 3, tma=True),
    "spills at 2730 columns": odd(Tile(128, 128, 32, 4, 4, parts=4, blocks_per_sm=2)),
    "sound at 2730 columns": odd(configs.ODD),
    "slow products of Blackwell": faults("sm_100", "forward", 32, 64, 64, 4, 3, tma=True),
}))
"""


def test_each_fault_is_seen():
    done = python("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sound"] == []
    assert "spills" in found["spills"][0] and "bytes of stack" in found["spills"][0]
    assert "KiB of shared memory, of 227" in found["shared memory"][0]
    assert "bytes of stack" in found["spills at 2730 columns"][0] and found["sound at 2730 columns"] == []
    assert found["slow products"][0] == "no HGMMA"
    assert found["slow products of Blackwell"][0] == "no UTCHMMA"


def test_a_fault_is_an_exit_code_and_a_line():
    program = (
        "import sys; from benchmarks import static; from fastbp.backends.triton import configs\n"
        "bad = configs.Tile(128, 128, 64, 8, 3, tma=True)\n"
        "configs.tiles = lambda kind, family: (bad,) if kind == 'gated_dgrad' else ()\n"
        "sys.exit(static.main(['--quick', '--only', 'triton', '--family', 'sm_90', '--activation', 'gelu']))"
    )
    done = python("-c", program)
    assert done.returncode == 1
    assert any("FAULT" in line and "128x128x64" in line for line in done.stdout.splitlines())
    assert "without a fault" in done.stdout.splitlines()[-1]


LAUNCHES = """
import math
import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks import static
from benchmarks.static import SIXTEEN, Case, GPUTarget, configs, make_launch, source_of
from fastbp.problem import DTYPES


def empty(*shape, dtype, skew=0):  # memory that is never touched
    return torch.empty(math.prod(shape) + skew, dtype=dtype)[skew:].view(shape)

static.empty = empty
backend = make_backend(GPUTarget("cuda", 90, 32))
elementwise = ("activation", "gated_activation", "chain_rule", "gated_chain_rule", "column_sum")
tiles = [(kind, tile) for kind in configs.KINDS for tile in configs.tiles(kind, "sm_90")]
cases = [
    *(Case("sm_90", kind, tile, "leaky_relu", SIXTEEN[0]) for kind, tile in tiles),
    *(Case("sm_90", kind, None, "softplus", dtype) for kind in elementwise for dtype in DTYPES),
    *static.compressed_cases(["sm_90"], ["gelu"], quick=True),
    *static.odd_cases(["sm_90"], ["gelu"], quick=False),
]
for case in cases:
    launch = make_launch(case)
    source = source_of(launch)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, specialized, options = binder(**launch.arguments, **launch.options)
    for i, (param, (type_name, aligned)) in enumerate(zip(launch.kernel.params, specialized, strict=True)):
        assert type_name.replace(" ", "") == source.signature[param.name].replace(" ", ""), (case, param.name)
        assert type_name == "constexpr" or (aligned == "D") == ((i,) in source.attrs), (case, param.name)
    assert options == launch.options, case
print(len(cases))
"""


def test_what_is_compiled_is_what_a_launch_compiles():
    """The types, constants and alignments that Triton finds in the arguments of a launch are those of the gate."""
    done = python("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 40


def test_under_the_interpreter_it_refuses():
    done = python("-m", "benchmarks.static", "--quick", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


RECORDED = """
import json, sys
from pathlib import Path
from benchmarks import compiled, records, static
compiled.FILE = Path(sys.argv[1])
codes = [static.main([*sys.argv[2:], "--record", "--only", "triton", "--kernel", kernel, "--family", "sm_80"])
         for kernel in ("column_sum", "gated_compress")]
codes.append(static.main(["--record", "--only", "triton", "--kernel", "gated_compress", "--family", "sm_80"]))
print(json.dumps([codes, records.read(compiled.FILE).rows]))
"""


def test_a_record_of_some_activations_is_one_of_a_part(tmp_path):
    ran = python("-c", RECORDED, str(tmp_path / "compiled.jsonl"), "--activation", "gelu")
    assert ran.returncode == 0, ran.stderr
    codes, rows = json.loads(ran.stdout.splitlines()[-1])
    found = {row["kernel"]: (row["family"], row["kernels"], row["faulty"], row["quick"]) for row in rows}
    assert codes == [0, 0, 0]
    assert found == {"triton column_sum": ("sm_80", 4, 0, True), "triton gated_compress": ("sm_80", 12, 0, False)}


def test_a_kernel_that_there_is_not_is_refused_by_name():
    ran = python("-m", "benchmarks.static", "--kernel", "forwards", "--family", "sm_80")
    assert ran.returncode == 2 and "no kernel forwards; of these there are ['activation'," in ran.stderr


FLOAT64 = """
import torch
from benchmarks import static
from benchmarks.static_cases import Case
for activation in ("sigmoid", "silu", "quick_gelu", "hardswish"):
    case = Case("sm_80", "gated_chain_rule", None, activation, torch.float64)
    print(activation, static.examine(case, False).faults)
"""


def test_strips_of_float64_do_not_spill():
    """ptxas, not told what a thread may have, spilled three registers of these four on sm_80."""
    ran = python("-c", FLOAT64)
    assert [line.split(" ", 1)[1] for line in ran.stdout.splitlines()] == ["()"] * 4, ran.stdout + ran.stderr
