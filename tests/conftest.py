"""Fixtures of more than one file."""

import os
import tempfile

import pytest
import torch

# Where there is no GPU the Triton kernels are interpreted; Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What somebody measured on this machine would decide what the tests run.
_cache = tempfile.TemporaryDirectory(prefix="fastbp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

# Their assertions are to say what they compared, as those of the tests do.
pytest.register_assert_rewrite(
    "autograd_cases",
    "emulated.whole_calls",
    "fusible",
    "graphs",
    "known_cases",
    "linear_twins",
    "module_pairs",
    "refusals",
    "routes",
    "special_points",
    "standin",
    "support",
)


@pytest.fixture
def fresh_dynamo():
    """No compiled code, and no count of recompilations, from another test."""
    torch._dynamo.reset()


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def route(request):
    """This way of computing, wherever it serves, and NaN in all memory that nobody wrote."""
    torch.ops.fastbp_native.set_debug(True, request.param)
    yield request.param
    torch.ops.fastbp_native.set_debug(False, "")


@pytest.fixture
def triton_route(request, monkeypatch):
    """This way of the Triton kernels, and every allocation of theirs amid NaN, filled with NaN, and looked at after."""
    from routes import TRITON_ROUTES
    from support import RedZones

    from fastbp.backends.triton import choice, configs, layers

    route, tile = TRITON_ROUTES[request.param]
    zones = RedZones()
    monkeypatch.setattr(layers, "new", zones.new)
    with choice.forced(route, configs.Tile(**tile) if tile else None):
        yield request.param
    zones.check()


@pytest.fixture(scope="session")
def standin():
    """The ops of cuda_standin.cpp."""
    from standin import build, fall_through

    torch.ops.load_library(build())
    beneath = fall_through("fastbp_standin")
    yield torch.ops.fastbp_standin
    beneath._destroy()


@pytest.fixture
def on_gpu(standin, monkeypatch):
    """Calls of backend native go to the stand-in, by a route; fresh memory holds NaN."""
    from standin import take_calls

    take_calls(standin, monkeypatch)
    yield standin.set_cuda_route
    standin.set_cuda_route("")
    standin.set_debug(False)


@pytest.fixture
def own_choices(tmp_path, monkeypatch):
    """Where choices are remembered: a place of its own, and nothing known from another test."""
    from fastbp import backends, cache
    from fastbp.backends import measured

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(measured, "_unwritten", {})
    backends.forget()
    yield tmp_path / "fastbp"
    backends.forget()
