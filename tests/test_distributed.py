"""fastbp on PyTorch's distributed engines: two processes on gloo."""

import mesh_cases
import pytest
import torch.distributed as dist
from support import compressed_cases, each
from two_ranks import TwoRanks

from fastbp.activations import bind
from fastbp.forms import FORMS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo in this torch")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    two = TwoRanks(lambda: tmp_path_factory.mktemp("ranks"))
    yield two
    two.stop()


@each("form", FORMS)
def test_every_layout(ranks, form):
    ranks.run(mesh_cases.every_layout, form)


@each("layout", mesh_cases.UNMOVED)
def test_nothing_moves(ranks, layout):
    ranks.run(mesh_cases.nothing_moves, layout)


@each("form", FORMS)
@each("shape", [(1, 2), (2, 1)])
def test_a_mesh_of_two_dimensions(ranks, form, shape):
    ranks.run(mesh_cases.a_mesh_of_two_dimensions, shape, form)


@each("form", FORMS)
@each(("rows", "hidden"), [(3, 5), (1, 1)])
def test_parts_of_other_sizes(ranks, form, rows, hidden):
    ranks.run(mesh_cases.parts_of_other_sizes, form, rows, hidden)


@each(("form", "save"), [(f.name, save) for f, _, save in compressed_cases([bind("gelu")])] + [("mlp", "recompute")])
def test_what_is_kept_is_of_the_part(ranks, form, save):
    ranks.run(mesh_cases.compressed, form, save)


@each("form", FORMS)
def test_second_derivatives(ranks, form):
    ranks.run(mesh_cases.second_derivatives, form)


@each("form", ["linear_act", "gated_mlp"])
def test_compiled(ranks, form):
    ranks.run(mesh_cases.compiled, form)


CASES = (
    mesh_cases.under_autocast,
    mesh_cases.refusals,
    mesh_cases.a_mesh_without_this_rank,
    mesh_cases.row_parallel_needs_no_activation,
)


@each("case", CASES)
def test_case(ranks, case):
    ranks.run(case)
