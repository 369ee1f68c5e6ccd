"""Fixtures of more than one file."""

import pytest
import torch

# Their assertions are to say what they compared, as those of the tests do.
pytest.register_assert_rewrite("autograd_cases", "fusible", "graphs", "module_pairs", "refusals", "support")


@pytest.fixture
def fresh_dynamo():
    """No compiled code, and no count of recompilations, from another test."""
    torch._dynamo.reset()


@pytest.fixture
def seeded():
    torch.manual_seed(0)
