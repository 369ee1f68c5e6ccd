"""The versions that the regression guard compares: which commit is the base, and how it is unpacked and built."""

import subprocess

import pytest
from support import each

from benchmarks import check, records, versions
from benchmarks.environment import CPU
from benchmarks.versions import Unusable


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, and what they are called."""
    root = tmp_path / "repository"
    (root / "csrc").mkdir(parents=True)
    (root / "fastbp").mkdir()
    monkeypatch.setattr(versions, "ROOT", root)
    monkeypatch.setattr(versions, "results_of", lambda device: root)
    for key in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(key, "nobody")
    versions.git("init", "--quiet", "--initial-branch", "trunk")
    commits = []
    for day in (1, 2):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2020-01-0{day}T00:00:00Z")
        (root / "csrc" / "ops.cpp").write_text(f"{day}")
        versions.git("add", "csrc")
        versions.git("commit", "--quiet", "--message", f"day {day}")
        commits.append(versions.git("rev-parse", "--short", "HEAD"))
    return root, commits


def test_which_version_is_the_base(repository):
    root, (first, second) = repository
    assert versions.default_base(["layers"], CPU) == (second, "HEAD, for there are no results in .")
    records.write(root / "layers.jsonl", {"commit": "dead10cc"}, [])
    missing = "HEAD, for layers.jsonl is of dead10cc, which git does not have here"
    assert versions.default_base(["small", "layers"], CPU) == (second, missing)
    records.write(root / "small.jsonl", {"commit": first}, [])
    assert versions.default_base(["small", "layers"], CPU) == (first, "that of small.jsonl")
    records.write(root / "layers.jsonl", {"commit": second}, [])
    assert versions.default_base(["small", "layers"], CPU) == (second, "that of layers.jsonl"), "the newest"


def test_changes_and_new_files_are_seen(repository):
    root, (first, second) = repository
    assert versions.same(second, "csrc") and not versions.same(first, "csrc")
    assert versions.same(first, "setup.py")
    (root / "csrc" / "new.cpp").write_text("")
    assert not versions.same(second, "csrc")


@each("error", [Unusable, KeyboardInterrupt])
def test_the_base_is_unpacked_whole_or_not_at_all(repository, tmp_path, monkeypatch, error):
    _, (first, _) = repository
    store = tmp_path / "store"

    def fail(commit, tree, kernels):
        assert (tree / "csrc" / "ops.cpp").read_text() == "1"
        raise error

    monkeypatch.setattr(versions, "give_library", fail)
    with pytest.raises(error):
        versions.unpacked(first, CPU, store)
    assert list(store.iterdir()) == []
    monkeypatch.setattr(versions, "give_library", lambda *_: None)
    found = versions.unpacked(first, CPU, store)
    assert list(store.iterdir()) == [found] and (found / "csrc" / "ops.cpp").read_text() == "1"
    monkeypatch.setattr(versions, "give_library", fail)
    assert versions.unpacked(first, CPU, store) == found, "made once"


@each(
    ("alike", "unavailable", "kernels", "taken"),
    [
        (True, None, "cpu", True),
        (True, "built from other sources", "cpu", False),
        (False, None, "cuda", False),
        (True, None, "none", False),
    ],
)
def test_a_library_of_the_same_sources_is_taken_over(tmp_path, monkeypatch, alike, unavailable, kernels, taken):
    built = []

    def run(command, cwd, env, **_):
        built.append((command[-1], cwd, env["FASTBP_BUILD"]))
        return subprocess.CompletedProcess(command, len(built) - 1, "", "no compiler")

    (tmp_path / "fastbp").mkdir()
    library = tmp_path / "_native.abi3.so"
    library.write_text("kernels")
    monkeypatch.setattr(versions.native, "LIBRARY", library)
    monkeypatch.setattr(versions.native, "unavailable", unavailable)
    monkeypatch.setattr(versions, "same", lambda commit, *places: alike)
    monkeypatch.setattr(versions.subprocess, "run", run)
    versions.give_library("c0ffee", tmp_path, kernels)
    assert (tmp_path / "fastbp" / library.name).is_file() is taken
    if taken or kernels == "none":
        assert not built
        return
    assert built == [("--inplace", tmp_path, kernels)]
    with pytest.raises(Unusable, match=r"library of c0ffee does not build:\nno compiler"):
        versions.give_library("c0ffee", tmp_path, kernels)


@each(
    ("words", "said"),
    [
        (["--base", "no-such"], "--base 'no-such' is no commit that git has here; there are trunk, and the last"),
        (["--suite", "nothing"], "layers"),
        (["--suite", "overhead", "--case", "nothing"], "of overhead:\n  layer 4×8→8 gelu float32\n"),
    ],
)
def test_bad_arguments_exit_with_2_and_what_there_is(repository, words, said, capsys):
    try:
        code = check.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err
