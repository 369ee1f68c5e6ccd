"""Fixtures of more than one file."""

import pytest
import torch

# Their assertions are to say what they compared, as those of the tests do.
pytest.register_assert_rewrite("autograd_cases", "fusible", "graphs", "module_pairs", "refusals", "routes", "support")


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
