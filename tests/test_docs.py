"""The pages that back each line by a test name tests that are there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = {path.name: path.read_text() for path in TESTS.glob("*.py")}
PAGES = {"graphs": 25, "integrations": 10, "precision": 20, "distributed": 10}  # and at least how many they name


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_are_there(page):
    named = set(re.findall(r"\btest_\w+(?:\.py)?", (TESTS.parent / "docs" / f"{page}.md").read_text()))
    everything = "".join(SOURCES.values())
    missing = [n for n in named if (n not in SOURCES if n.endswith(".py") else f"def {n}(" not in everything)]
    assert len(named) >= PAGES[page] and not missing


def test_cases_of_engines_are_there():
    """docs/distributed.md names cases of test_distributed.py by their functions."""
    text = (TESTS.parent / "docs" / "distributed.md").read_text()
    rows = [line.split("|")[-2] for line in text.splitlines() if line.startswith("|")]
    cases = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row) if not name.startswith("test_")}
    engines = SOURCES["engine_cases.py"] + SOURCES["mesh_cases.py"]
    assert len(cases & set(re.findall(r"def (\w+)\(", engines))) >= 8
    functions = {"linear_act", "gated_linear_act", "mlp", "gated_mlp", "identity"}
    assert not [name for name in cases - functions if f"def {name}(" not in engines]
