"""The process in which Triton compiles: what goes wrong there is one test's failure, in words."""

import os
import signal
import time

import pytest

from emulated.compiled import Child, Failed


def interprets():
    from triton import knobs

    return os.getpid(), knobs.runtime.interpret


def raises():
    raise ValueError("seven")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def own():
    """A process that the test may end."""
    started = Child()
    yield started
    started.close()


def test_it_compiles_where_the_tests_interpret(own, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pid, interpreted = own(interprets)
    assert pid != os.getpid() and not interpreted
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_an_error_is_told_and_the_process_lives_on(own):
    pid, _ = own(interprets)
    with pytest.raises(Failed, match="seven") as failed:
        own(raises)
    assert failed.value.kind == "ValueError"
    assert own(interprets)[0] == pid


@pytest.mark.parametrize(("function", "arguments", "words"), [(dies, (), "ended with -9"), (time.sleep, (60,), "took")])
def test_a_crash_and_a_hang_are_told_and_the_next_finds_another_process(own, function, arguments, words):
    pid, _ = own(interprets)
    with pytest.raises(Failed, match=words):
        own(function, *arguments, limit=2.0)
    assert own(interprets)[0] != pid
