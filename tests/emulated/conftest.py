"""The process in which Triton compiles, one for each worker of the tests."""

import pytest

from emulated.compiled import Child


@pytest.fixture(scope="session")
def child():
    started = Child()
    yield started
    started.close()
