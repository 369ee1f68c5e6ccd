"""What tools/render.py writes is fresh, and it says what is stale and what it cannot write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastbp.activations import ROWS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # no package: a tool is run by its path
import render  # noqa: E402


@pytest.mark.parametrize("target", render.TARGETS, ids=lambda target: target.path)
def test_fresh(target):
    expected = target.expected(ROOT)
    assert (ROOT / target.path).read_text(encoding="utf-8") == expected, "run `python tools/render.py`"


def test_check_names_what_is_stale(tmp_path, capsys):
    for target in render.TARGETS:
        (tmp_path / target.path).parent.mkdir(parents=True, exist_ok=True)
    assert render.main([], tmp_path) == 1
    assert "README.md must exist and hold the markers <!-- activations:begin -->" in capsys.readouterr().err
    readme = tmp_path / "README.md"
    for path in {target.path for target in render.TARGETS if target.region}:
        regions = [target.region for target in render.TARGETS if target.path == path]
        markers = "".join(f"<!-- {region}:begin -->\n<!-- {region}:end -->\n" for region in regions)
        (tmp_path / path).write_text(f"head\n{markers}tail\n", encoding="utf-8")
    assert render.main(["--check"], tmp_path) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert render.main([], tmp_path) == 0
    assert render.main(["--check"], tmp_path) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("head\n") and text.endswith("tail\n") and all(f"| `{name}` |" in text for name in ROWS)


def loop(z):
    while z > 1.0:
        z = z / 2.0
    return z


def power(z):
    return z**2.0


def elsewhere(z):
    return torch.exp(z)


@pytest.mark.parametrize(
    ("function", "construct"), [(loop, "While `while z > 1.0:`"), (power, "Pow"), (elsewhere, "Call `torch.exp")]
)
def test_refuses_what_it_cannot_render(function, construct):
    with pytest.raises(render.RenderError, match=f"{function.__name__}: cannot render {construct}"):
        render.Formula(function)
