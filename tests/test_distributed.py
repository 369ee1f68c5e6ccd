"""fastbp on PyTorch's distributed engines: two processes on gloo."""

import engine_cases
import mesh_cases
import pytest
import two_ranks
from support import compressed_cases, each
from two_ranks import TwoRanks

from fastbp.activations import bind
from fastbp.forms import FORMS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    two = TwoRanks(lambda: tmp_path_factory.mktemp("ranks"))
    yield two
    two.stop()


def test_a_failure_reaches_the_test(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(two_ranks, "GRACE", 1.0)
    two = TwoRanks(lambda: tmp_path_factory.mktemp("ranks"))
    with pytest.raises(pytest.fail.Exception) as failure:
        two.run(two_ranks.one_fails, "said so")
    told = str(failure.value)
    assert "two_ranks.one_fails(said so)" in told and "rank 1: Traceback" in told and "ValueError: said so" in told
    assert "rank 0: no answer" in told and "in barrier" in told
    with pytest.raises(pytest.fail.Exception, match="rank 0: died, exit code 3"):
        two.run(two_ranks.one_dies)


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
@each("order", [2, 3])
def test_higher_derivatives(ranks, form, order):
    ranks.run(mesh_cases.higher_derivatives, form, order)


@each("form", FORMS)
def test_transforms(ranks, form):
    ranks.run(mesh_cases.transforms, form)


@each("form", ["linear_act", "gated_mlp"])
def test_compiled(ranks, form):
    ranks.run(mesh_cases.compiled, form)


CASES = (
    mesh_cases.under_autocast,
    mesh_cases.refusals,
    mesh_cases.a_mesh_without_this_rank,
    mesh_cases.row_parallel_needs_no_activation,
    engine_cases.ddp_fused_before,
    engine_cases.ddp_fused_after,
    engine_cases.fsdp,
    engine_cases.fsdp_of_the_root_alone,
    engine_cases.fsdp_of_each_linear,
    engine_cases.fsdp_checkpointed,
    engine_cases.fsdp_fused_after,
    engine_cases.fsdp_unfused,
    engine_cases.fsdp_in_bfloat16,
    engine_cases.fsdp_compiled,
    engine_cases.sequence_parallel,
    engine_cases.linears_of_ours_in_styles,
    engine_cases.blocks_cut_whole,
)


@each("case", CASES)
def test_case(ranks, case):
    ranks.run(case)


@each("order", ["fuse first", "fuse last"])
def test_tensor_parallel(ranks, order):
    ranks.run(engine_cases.tensor_parallel, order)


@each("shape", [(1, 2), (2, 1)])
def test_fsdp_and_tensor_parallel(ranks, shape):
    ranks.run(engine_cases.two_dimensions, shape)


@each("name", engine_cases.CHECKPOINTS)
def test_checkpoints(ranks, name, tmp_path):
    ranks.run(engine_cases.checkpoints, name, str(tmp_path))


@each("schedule", ["GPipe", "1F1B"])
def test_pipeline(ranks, schedule):
    ranks.run(engine_cases.pipeline, schedule)


@each("engine", ["DDP", "FSDP", "FSDP of each linear"])
def test_linears_that_read(ranks, engine):
    ranks.run(engine_cases.linears_that_read, engine)
