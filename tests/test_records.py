"""Result files: what is written is read again, and what cannot be read is named by file and line."""

import re
import warnings

import pytest

from benchmarks import environment, records

ENVIRONMENT = {"commit": "c0ffee", "date": "today", "command": "python -m benchmarks.run"}
ROWS = [{"case": "layer 4×8→8", "rivals": {"eager": {"ms": 0.5}}}, {"case": "mlp", "rivals": {}}]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "layers.jsonl"
    records.write(path, ENVIRONMENT, ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records.read(path, needed=("case", "rivals")) == (ENVIRONMENT, ROWS)
    assert "×" in path.read_text(encoding="utf-8"), "names are to be found by a search"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"case": "cut of', "not JSON"),
        (b'["a", "list"]', "not a JSON object"),
        (b'{"case": "nobody"}', "it has no rivals"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"null", "not a JSON object"),
    ],
)
@pytest.mark.parametrize("number", [2, 3])
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line, words, number):
    path = tmp_path / "layers.jsonl"
    records.write(path, ENVIRONMENT, ROWS)
    lines = path.read_bytes().splitlines()
    lines.insert(number - 1, line)
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(RuntimeWarning) as caught:
        assert records.read(path, needed=("case", "rivals")) == (ENVIRONMENT, ROWS)
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith(f"{path}, line {number}, is skipped: ") and words in text


def test_a_row_with_a_fault_is_named(tmp_path):
    path = tmp_path / "layers.jsonl"
    records.write(path, ENVIRONMENT, ROWS)
    with pytest.warns(RuntimeWarning, match=r"layers\.jsonl, line 3, is skipped: nobody ran") as caught:
        found = records.read(path, needed=("case",), fault=lambda row: "" if row["rivals"] else "nobody ran")
    assert found.rows == ROWS[:1] and len(caught) == 1


def test_rows_of_an_unknown_environment_are_not_read(tmp_path):
    path = tmp_path / "layers.jsonl"
    records.write(path, ENVIRONMENT, ROWS)
    path.write_bytes(path.read_bytes().partition(b"\n")[2])
    with pytest.warns(RuntimeWarning) as caught:
        assert records.read(path) == ({}, [])
    assert [str(warning.message).partition(", is")[0] for warning in caught] == [f"{path}, line {n}" for n in (1, 2)]


@pytest.mark.parametrize(
    ("facts", "folder"),
    [
        ({"vendor_id": "GenuineIntel", "flags": "avx2 amx_bf16 amx_tile"}, "cpu-intel-amx"),
        ({"vendor_id": "AuthenticAMD", "flags": "avx2 avx512f"}, "cpu-amd-avx512-bf16"),
    ],
)
def test_every_kind_of_cpu_has_a_folder(monkeypatch, facts, folder):
    monkeypatch.setattr(environment, "cpu_facts", lambda: facts)
    monkeypatch.setattr(environment, "native_capability", lambda: "avx512_bf16")
    assert environment.folder_of(environment.CPU) == folder
    assert (records.RESULTS / folder).is_dir()


def test_a_results_file_says_why_there_is_no_library_and_not_where(monkeypatch):
    reason = "the C++ kernels were not built; `pip install -e /tmp/somewhere` builds them"
    monkeypatch.setattr(environment.native, "unavailable", reason)
    assert environment.environment("make bench")["native"] == "the C++ kernels were not built"
    for path in records.RESULTS.rglob("*.jsonl"):
        assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), path
