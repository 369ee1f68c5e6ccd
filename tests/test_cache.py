"""The cache of measurements: what it keeps, what it does not trust, and that it never costs a call."""

import json
import os
import pwd
import stat
import warnings

import pytest
from support import each

from fastbp import cache

NAME = "numbers.json"
CONTENT = {"b": {"ms": [1.5, 2.0]}, "a": "×"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own, without a folder yet, and nobody warned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "fastbp"


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def warned(function, *arguments):
    """What a function returns, and its one warning."""
    with pytest.warns(RuntimeWarning, match="fastbp's cache is not used") as caught:
        result = function(*arguments)
    assert len(caught) == 1
    return result, str(caught[0].message)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_read(place, silent):
    assert cache.write(NAME, CONTENT) is True
    assert cache.read(NAME) == CONTENT
    assert cache.write(NAME, {"other": 1}) is True
    assert cache.read(NAME) == {"other": 1}
    assert [path.name for path in place.iterdir()] == [NAME]


def test_nothing_there_is_no_fault(place, silent):
    assert cache.read(NAME) == {}
    place.mkdir(mode=0o777)
    assert cache.read(NAME) == {}


def test_the_folder_is_ones_own_whatever_the_umask(place, silent):
    before = os.umask(0)
    try:
        assert cache.write(NAME, CONTENT)
    finally:
        os.umask(before)
    assert mode(place) == 0o700
    assert mode(place / NAME) & 0o077 == 0


def test_without_the_variable_it_is_in_the_home(monkeypatch, tmp_path, silent):
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.folder() == tmp_path / "home" / ".cache" / "fastbp"
    assert cache.write(NAME, CONTENT) and cache.read(NAME) == CONTENT


def test_without_a_home(monkeypatch):
    """As in a container whose user has no entry in the table of users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    found, words = warned(cache.read, NAME)
    assert found == {} and "XDG_CACHE_HOME" in words
    cache._warned.clear()
    assert warned(cache.write, NAME, CONTENT)[0] is False


@each("bits", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to(place, bits):
    cache.write(NAME, CONTENT)
    place.chmod(bits)
    found, words = warned(cache.read, NAME)
    assert found == {} and f"others may write to {place}" in words and f"`chmod 700 {place}`" in words
    cache._warned.clear()
    done, words = warned(cache.write, NAME, {})
    assert done is False and f"`chmod 700 {place}`" in words
    place.chmod(0o755)
    assert cache.read(NAME) == CONTENT


def test_a_folder_of_another_user(place, monkeypatch):
    cache.write(NAME, CONTENT)
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    found, words = warned(cache.read, NAME)
    assert found == {} and f"{place} belongs to another user; set XDG_CACHE_HOME" in words
    cache._warned.clear()
    assert warned(cache.write, NAME, {})[0] is False
    assert json.loads((place / NAME).read_text(encoding="utf-8")) == CONTENT


def test_a_link_in_place_of_the_folder(place, tmp_path):
    cache.write(NAME, CONTENT)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    found, words = warned(cache.read, NAME)
    assert found == {} and f"{place} is not a folder" in words
    cache._warned.clear()
    assert warned(cache.write, NAME, {})[0] is False
    assert json.loads((tmp_path / "elsewhere" / NAME).read_text(encoding="utf-8")) == CONTENT


def test_a_file_in_place_of_the_folder(place, silent):
    place.write_text("mine")
    assert cache.read(NAME) == {}  # nothing was ever written, and reading has nothing to tell
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done, words = warned(cache.write, NAME, CONTENT)
    assert done is False and str(place) in words
    assert place.read_text() == "mine"


BROKEN = {
    "broken": (b'{"a": ', "is not JSON"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[1]", "does not hold a JSON object"),
    "a number": (b"1", "does not hold a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "nested too deep": (b"[" * 200_000, "is not JSON"),
}


@each("kind", BROKEN)
def test_a_file_that_holds_something_else(place, kind):
    text, words = BROKEN[kind]
    cache.write(NAME, CONTENT)
    (place / NAME).write_bytes(text)
    found, message = warned(cache.read, NAME)
    assert found == {} and f"{place / NAME} {words}" in message and "delete it" in message
    assert cache.write(NAME, CONTENT) and cache.read(NAME) == CONTENT


def test_a_place_below_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "deeper"))
    assert cache.read(NAME) == {}
    done, words = warned(cache.write, NAME, CONTENT)
    assert done is False and str(tmp_path / "file") in words


def test_each_warning_once(place):
    cache.write(NAME, CONTENT)
    (place / NAME).write_text("broken")
    warned(cache.read, NAME)
    (place / "other.json").write_text("broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(NAME) == {}
    assert "other.json" in warned(cache.read, "other.json")[1]


@each("error", [OSError("no space left"), KeyboardInterrupt(), ValueError("a bug of ours")])
def test_a_write_that_fails_leaves_what_was_there(place, monkeypatch, error):
    cache.write(NAME, CONTENT)

    def dump(content, file, **options):
        file.write('{"half')
        file.flush()
        raise error

    monkeypatch.setattr(json, "dump", dump)
    if isinstance(error, OSError):
        done, words = warned(cache.write, NAME, {"other": 1})
        assert done is False and "no space left" in words
    else:
        with pytest.raises(type(error)):
            cache.write(NAME, {"other": 1})
    assert [path.name for path in place.iterdir()] == [NAME]
    assert cache.read(NAME) == CONTENT


def test_what_is_no_json_is_not_half_written(place):
    cache.write(NAME, CONTENT)
    with pytest.raises(TypeError, match="not JSON serializable"):
        cache.write(NAME, {"a": object()})
    assert [path.name for path in place.iterdir()] == [NAME] and cache.read(NAME) == CONTENT
