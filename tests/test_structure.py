"""The house rules: who may import whom, one table of activations, public names, docstrings, sizes, a light import."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbp
from fastbp.activations import ROWS

ROOT = Path(fastbp.__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fastbp").rglob("*.py"))
}
GENERATED = ("_activations.py", "_activations_16.py", "activations.h")

# From the ground up: a room imports rooms of the floors beneath it, and itself. Rooms of one floor are strangers.
FLOORS = (
    (
        "formulas",
        "version",
        "cache",
        "acceptance",
        "casts",
        "accumulation",
        "memory",
        "copies",
        "source",
        "imports",
        "stock",
    ),
    ("side_formulas", "compression", "flops"),
    ("activations",),
    ("recognition", "forms", "foreign", "kinks"),
    ("saving", "known_acts"),
    ("problem", "sharding", "shapes"),
    ("residuals", "producers"),
    ("reference", "unpacking"),
    ("tangents",),
    ("backends.*",),
    ("backends",),
    ("ops", "settings"),
    ("autograd", "capture"),
    ("main_grad",),
    ("functional", "rebuilt"),
    ("linear", "elementwise"),
    ("readers",),
    ("modules", "compiler"),
    ("known",),
    ("fusion",),
    ("doctor",),  # a leaf, as the planner: from here on up, nothing but the public face and the commands
    ("planner", "tuning"),
    ("fastbp",),
    ("demo",),  # the demo uses fastbp as anybody does
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """``fastbp.fusion.report`` is in ``fusion``; each backend is a room of its own."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "backends" else 1]) if parts else "fastbp"


def floor_of(room):
    return FLOOR_OF["backends.*" if room.startswith("backends.") else room]


def imports_of(source):
    """Every module of fastbp that a source imports, wherever in the file and in whatever way."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in SOURCES else node.module for name in inside]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from (name for name in found if str(name).split(".")[0] == "fastbp")


def breaches(module, source):
    room = room_of(module)
    others = {room_of(name) for name in imports_of(source)} - {room}
    return {other for other in others if floor_of(other) >= floor_of(room)}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert room_of(module).startswith("backends.") or room_of(module) in FLOOR_OF, "a room without a floor"
    assert not breaches(module, SOURCES[module].read_text())


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("fastbp.saving", "import fastbp.autograd", {"autograd"}),
        ("fastbp.saving", "from fastbp import functional", {"functional"}),
        ("fastbp.saving", "def lazily():\n    from fastbp.modules import MLP", {"modules"}),
        ("fastbp.saving", "importlib.import_module('fastbp.ops')", {"ops"}),
        ("fastbp.saving", "from fastbp import linear_act", {"fastbp"}),
        ("fastbp.modules", "from fastbp.doctor import diagnose", {"doctor"}),
        ("fastbp.forms", "from fastbp import recognition", {"recognition"}),
        ("fastbp.backends.native", "from fastbp.backends.triton import primitives", {"backends.triton"}),
        ("fastbp.backends.native", "from fastbp.backends import choose", {"backends"}),
        ("fastbp.backends.native", "from fastbp.reference import Saved", set()),
        ("fastbp.fusion.report", "from fastbp.fusion import verify", set()),
    ],
)
def test_the_rule_above_sees_a_breach(module, source, breach):
    assert breaches(module, source) == breach


def lists_of_names(source):
    """Collections written out in a source that hold three or more names of activations."""
    for node in ast.walk(ast.parse(source)):
        elements = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = {e.value for e in elements if isinstance(e, ast.Constant)} & set(ROWS)
        if len(names) >= 3:
            yield node.lineno, names


@pytest.mark.parametrize("module", SOURCES)
def test_no_second_list_of_activations(module):
    assert not list(lists_of_names(SOURCES[module].read_text()))
    assert list(lists_of_names('KNOWN = {"relu": 1, "gelu": 2, "silu": 3, "other": 4}'))


def test_every_cuda_kernel_is_launched_by_one_function():
    """There a first launch inside a graph capture is refused, and only there."""
    launches = [path.name for path in (ROOT / "csrc").rglob("*") if path.is_file() and "<<<" in path.read_text()]
    assert launches == ["launch.cuh"]


def test_public_names():
    """Those of the contract that this version has; a name more or less is a decision, not an accident."""
    contract = """
        linear_act gated_linear_act mlp gated_mlp act_linear gated_act_linear
        Linear LinearAct GatedLinear MLP GatedMLP
        fuse unfuse report FusionReport
        use available_backends available_activations SavedBytes plan_memory MemoryPlan autograd __version__
        tune TuningReport decompositions
    """
    assert sorted(fastbp.__all__) == sorted(contract.split())
    assert [name for name in fastbp.__all__ if not hasattr(fastbp, name)] == []
    functions = "LinearAct", "GatedLinearAct", "MLP", "GatedMLP", "ActLinear", "GatedActLinear"
    assert [name for name in functions if not hasattr(fastbp.autograd, f"{name}Function")] == []


def public_things():
    for name in fastbp.__all__:
        thing = getattr(fastbp, name)
        if inspect.isclass(thing):
            members = {f"{name}.{key}": value for key, value in vars(thing).items() if not key.startswith("_")}
            yield from (
                (key, value) for key, value in members.items() if callable(value) or isinstance(value, property)
            )
        if callable(thing) or inspect.ismodule(thing):
            yield name, thing


def test_public_things_have_docstrings():
    own = {"FusionReport.errors", "FusionReport.sites", "extra_repr"}  # data, and what nn.Module documents
    silent = [name for name, thing in public_things() if not vars_doc(thing) and not name.endswith(tuple(own))]
    assert silent == []


def vars_doc(thing):
    """A thing's own docstring, not one inherited."""
    return thing.__doc__ if not inspect.isclass(thing) else vars(thing).get("__doc__")


@pytest.mark.parametrize("module", SOURCES)
def test_modules_have_docstrings(module):
    assert ast.get_docstring(ast.parse(SOURCES[module].read_text()))


def test_files_stay_small():
    """A file that must grow is split by concern."""
    files = [
        path for folder in ("fastbp", "csrc", "tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*")
    ]
    sources = [f for f in files if f.suffix in (".py", ".h", ".cpp", ".cu") and f.name not in GENERATED]
    assert len(sources) >= len(SOURCES) - 1
    assert {str(f.relative_to(ROOT)): n for f in sources if (n := len(f.read_text().splitlines())) > _longest(f)} == {}


def _longest(file):
    return 370 if file.name == "activations.py" else 320  # a table has as many lines as rows need


def test_the_version_is_written_once():
    literal = re.compile(rf"""["']{re.escape(fastbp.__version__)}["']""")
    written = [name for name, path in SOURCES.items() if literal.search(path.read_text())]
    assert written == ["fastbp.version"]
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "fastbp.version.__version__" }' in project
    assert not literal.search((ROOT / "setup.py").read_text())
    try:
        installed = importlib.metadata.version("fastbp")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == fastbp.__version__


def test_import_is_light_and_silent():
    """Nothing optional and nothing slow comes in with fastbp that torch has not brought in itself."""
    program = """
import sys, warnings
import torch
before = set(sys.modules)
warnings.simplefilter("error")
import fastbp
heavy = ("triton", "sklearn", "matplotlib", "torch._inductor", "torch._dynamo", "torch.testing._internal", "sympy",
         "torch.distributed.tensor")
print(sorted(m for m in set(sys.modules) - before if any(m == h or m.startswith(h + ".") for h in heavy)))
"""
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (outcome.returncode, outcome.stdout.strip(), outcome.stderr) == (0, "[]", "")
