"""Which tile a product takes: the tables, the rules, what was measured and remembered, and the measuring itself."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from support import each

from fastbp import backends, cache
from fastbp.backends import triton
from fastbp.backends.triton import configs
from fastbp.backends.triton.configs import FAMILIES, KINDS, Tile
from fastbp.problem import configure
from fastbp.tuning import products
from fastbp.tuning.drawn import draw
from fastbp.tuning.jobs import parse
from fastbp.tuning.products import products_of

if triton.unavailable is None:
    from fastbp.backends.triton import autotune, choice, launch, layers, tuning

pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
CPU = torch.device("cpu")  # which choice takes for a small Hopper: four multiprocessors
SIZES = (1024, 2048, 512)
CONFIG = configure("mlp", "gelu", (), "preact", "triton")
TABLES = list(product(FAMILIES, KINDS))
each_kind = each("kind", KINDS)


def file_of():
    return cache.folder() / tuning.file_name(tuning.environment(CPU))


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """A cache of its own, nothing recalled, nothing proven."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(choice, "PROVEN", frozenset())
    tuning.forget()
    yield
    tuning.forget()


@each_kind
def test_names_are_unique(kind):
    """The cache knows a tile by its name, whatever the family."""
    tiles = configs.every_tile(kind)
    assert len({tile.name for tile in tiles}) == len(tiles) > 3


def test_the_table_lists_every_tile():
    every = [f"{family} {kind} {tile.name}" for family, kind in TABLES for tile in configs.tiles(kind, family)]
    assert [" ".join(line.split()) for line in configs.table().splitlines()] == every
    assert len(set(every)) == len(every) and any("pingpong" in line for line in every)


@each(("family", "kind"), TABLES)
def test_the_rule_takes_the_largest_that_fills_the_gpu(family, kind):
    shipped = FAMILIES[family][kind]
    assert list(shipped) == sorted(shipped, key=lambda tile: -tile.block_m * tile.block_n)
    for m, n, processors in product((1, 100, 1000, 8192), (8, 768, 4096), (1, 4, 132)):
        tile = configs.rule(kind, family, m, n, processors)
        enough = [t for t in shipped if -(-m // t.block_m) * -(-n // t.block_n) >= processors]
        assert tile == (enough[0] if enough else shipped[-1])


@each(("family", "kind"), TABLES)
def test_worthwhile_at_its_boundaries(family, kind):
    smallest = FAMILIES[family][kind][-1]
    m, n = 4 * smallest.block_m, 8 * smallest.block_n

    def worthwhile(m, n, k, processors=32):
        return configs.worthwhile(kind, m, n, k, family, processors)

    assert [worthwhile(m, n, k) for k in (63, 64, 2048, 2049)] == [False, True, True, False]
    assert worthwhile(m - 1, n - 1, 512) and not worthwhile(m, n, 512, 33)
    assert not worthwhile(m - smallest.block_m, n, 512)


@each("itemsize", [2, 4, 8])
@each("processors", [1, 4, 132])
def test_strips_cover_every_row_and_column_once(itemsize, processors):
    for m, n in product((1, 7, 16, 17, 127, 128, 129, 1000, 8192, 100_003), repeat=2):
        strip = configs.strip(m, n, itemsize, processors)
        columns, strips = strip.grid(m, n)
        assert strips == strip.strips(m) and strip.rows % strip.block_m == 0
        assert (strips - 1) * strip.rows < m <= strips * strip.rows
        assert (columns - 1) * strip.block_n < n <= columns * strip.block_n
        # Not more programs than are wanted, four a processor, unless the columns alone are more.
        assert strips * columns <= max(4 * processors, columns)


@each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each("size", [1, 511, 512, 513, 1024, 1025, 5000])
def test_the_flat_grid_covers_every_number_once(size, dtype):
    z = torch.empty(size, dtype=dtype)
    found = launch.activation(launch.arithmetic(CONFIG, dtype), z, None, z)
    block = found.arguments["BLOCK"]
    assert found.arguments["size"] == size and (found.grid[0] - 1) * block < size <= found.grid[0] * block
    assert block == configs.flat_block(dtype.itemsize)


def operands(kind="forward", dtype=torch.bfloat16, sizes=SIZES):
    """The matrices that a product reads."""
    m, n, k = sizes
    width = 2 if "gated" in kind else 1
    shapes = [(m, k), (k, n), *[(m, n)] * width] if "dgrad" in kind else [(m, k), *[(n, k)] * width]
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def tile_for(kind="forward", sizes=SIZES, given=None, dtype=torch.bfloat16):
    return choice.tile_for(kind, CONFIG, sizes, *(given or operands(kind, dtype, sizes)))


def prove(monkeypatch):
    monkeypatch.setattr(choice, "PROVEN", frozenset(("sm_90", kind) for kind in KINDS))


def put(times, kind="forward", dtype=torch.bfloat16):
    tuning.remember(CPU, tuning.key(kind, "gelu", dtype, SIZES), times)


@each_kind
def test_unmeasured_tiles_are_taken_where_they_are_proven_and_worthwhile(kind, monkeypatch):
    assert tile_for(kind) is None
    prove(monkeypatch)
    assert tile_for(kind) == configs.rule(kind, "sm_90", *SIZES[:2], 4) and tile_for(kind, (1024, 2056, 512)).tma
    for sizes in ((1024, 2048, 4096), (16, 64, 512), (1024, 2052, 512)):  # the last has no rows of 16 bytes
        assert tile_for(kind, sizes) is None
    monkeypatch.setattr(choice, "PROVEN", frozenset({("sm_80", kind), ("sm_90", "none")}))
    assert tile_for(kind) is None


@each("dtype", [torch.float32, torch.float64])
def test_no_tile_for_wide_dtypes(dtype, monkeypatch):
    prove(monkeypatch)
    put({FAMILIES["sm_90"]["forward"][0].name: 1.0}, dtype=dtype)
    assert tile_for(dtype=dtype) is None
    with choice.forced("fused", FAMILIES["sm_90"]["forward"][0]):
        assert tile_for(dtype=dtype) is None


SPOILT = {
    "odd row stride": lambda t: torch.empty(t.shape[0], t.shape[1] + 1, dtype=t.dtype)[:, : t.shape[1]],
    "not at 16 bytes": lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape),
    "every other column": lambda t: torch.empty(t.shape[0], 2 * t.shape[1], dtype=t.dtype)[:, ::2],
    "one row for all": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: torch.empty(t.shape[::-1], dtype=t.dtype).mT,
}


@each("spoilt", SPOILT)
@each_kind
def test_what_tma_cannot_describe(kind, spoilt, monkeypatch):
    """Whichever operand it is, no tile with TMA; one with pointers where it was measured."""
    prove(monkeypatch)
    with_tma, by_pointers = FAMILIES["sm_90"][kind][0], FAMILIES["sm_80"][kind][1]
    for index in range(len(operands(kind))):
        given = operands(kind)
        given[index] = SPOILT[spoilt](given[index])
        assert tile_for(kind, given=given) is None
        put({with_tma.name: 1.0, by_pointers.name: 2.0}, kind)
        assert tile_for(kind) == with_tma and tile_for(kind, given=given) is None
        put({with_tma.name: 2.0, by_pointers.name: 1.0}, kind)
        assert tile_for(kind, given=given) == by_pointers
        with choice.forced("fused", with_tma):
            assert not tile_for(kind, given=given).tma and tile_for(kind).tma
        with choice.forced("fused"):
            assert tile_for(kind, given=given) == configs.ODD
        cache.write(file_of().name, {})
        tuning.forget()


@each_kind
def test_forced_routes(kind, monkeypatch):
    prove(monkeypatch)
    mine = Tile(16, 32, 16, 4, 2)
    for route in ("eager", "library"):
        with choice.forced(route, mine):
            assert tile_for(kind) is None
            assert choice.stays_eager(CONFIG, 1 << 30) is (route == "eager")
            with choice.forced("fused", mine):
                assert tile_for(kind) == mine and not choice.stays_eager(CONFIG, 1)
            assert tile_for(kind) is None
    assert choice.stays_eager(CONFIG, choice.SMALL - 1) and not choice.stays_eager(CONFIG, choice.SMALL)


@each_kind
def test_a_call_may_ask_for_the_products_of_the_library(kind, monkeypatch):
    asking = replace(CONFIG, route="library")
    put({FAMILIES["sm_90"][kind][0].name: 1.0}, kind)
    prove(monkeypatch)
    for config, taken in ((CONFIG, FAMILIES["sm_90"][kind][0]), (asking, None)):
        assert choice.tile_for(kind, config, SIZES, *operands(kind)) == taken
    assert choice.stays_eager(CONFIG, 1) and not choice.stays_eager(asking, 1)
    with choice.forced("fused"):
        assert tile_for(kind) == configs.rule(kind, "sm_90", *SIZES[:2], 4)
    with pytest.raises(KeyError), choice.forced("eager"):
        raise KeyError
    assert choice._forced is None


def test_an_unknown_route():
    words = "unknown route 'nope'; there are eager, library, fused"
    with pytest.raises(ValueError, match=f"forced: {words}"), choice.forced("nope"):
        pass
    command = [sys.executable, "-c", "import fastbp.backends.triton.choice"]
    done = subprocess.run(command, env=os.environ | {"FASTBP_TRITON_ROUTE": "nope"}, capture_output=True, text=True)
    assert done.returncode != 0 and f"ValueError: FASTBP_TRITON_ROUTE: {words}" in done.stderr


@each_kind
def test_a_measurement_beats_the_rule(kind, monkeypatch):
    prove(monkeypatch)
    by_rule, other = tile_for(kind), FAMILIES["sm_80"][kind][-1]
    put({by_rule.name: 3.0, other.name: 2.0, tuning.LIBRARY: 2.5}, kind)
    assert tile_for(kind) == other and tile_for(kind, (1024, 2048, 520)) == by_rule
    put({by_rule.name: 3.0, other.name: 2.0, tuning.LIBRARY: 1.0}, kind)
    assert tile_for(kind) is None
    put({"1x1x1 1w 1s 1p": 0.5, other.name: 2.0}, kind)  # as if unmeasured: a tile that is no longer shipped
    assert tile_for(kind) == by_rule


@each("name", ["device", "torch", "triton", "kernels"])
def test_what_was_measured_elsewhere_is_not_found(name, monkeypatch):
    put({FAMILIES["sm_80"]["forward"][-1].name: 1.0})
    assert tile_for() == FAMILIES["sm_80"]["forward"][-1]
    found = tuning.environment(CPU)
    monkeypatch.setattr(tuning, "environment", lambda device: {**found, name: found[name] + "x"})
    tuning.forget()
    assert tile_for() is None


def test_the_file_is_read_once(monkeypatch):
    put({FAMILIES["sm_80"]["forward"][-1].name: 1.0})
    first = tile_for(), tile_for("dgrad")
    monkeypatch.setattr(cache, "read", lambda name: pytest.fail("the file is read again"))
    assert (tile_for(), tile_for("dgrad"), tile_for("gated_dgrad")) == (*first, None)


AT = "forward gelu bfloat16 1024x2048x512"


@each("content", [{}, {"fastest": 5}, {"fastest": []}, {"fastest": {AT: 5}}, {"fastest": {AT: {"fastest": []}}}])
def test_a_file_of_another_form_is_as_none(content):
    cache.write(file_of().name, content)
    assert tile_for() is None
    put({FAMILIES["sm_80"]["forward"][-1].name: 1.0})
    assert tile_for() == FAMILIES["sm_80"]["forward"][-1]


SMALL, RESULT = (40, 48, 64), {"forward": 3, "gated_forward": 3, "dgrad": 3, "gated_dgrad": 4}


def tuned(kind, fastest, sizes=SMALL, **options):
    """What a clock finds for which these candidates are the fastest, the first most of all; and who was timed."""
    if not triton.interpreting():
        pytest.skip("on a GPU test_gpu.py measures")
    timed = {}

    def clock(steps):
        timed.update({name: 1.0 + fastest.index(name) if name in fastest else 100.0 for name in steps})
        return timed

    return autotune.tune(kind, "gelu", torch.bfloat16, sizes, CPU, clock, **options), timed


@each_kind
def test_the_fastest_wins(kind):
    every = autotune.candidates(kind, CPU)
    tuned(kind, [], remember=False)
    assert not file_of().exists()
    assert list(every) == [tuning.LIBRARY, *(t.name for t in configs.tiles(kind, "sm_90") if not t.pingpong)]
    for name in (list(every)[-1], tuning.LIBRARY):
        found, timed = tuned(kind, [name])
        assert set(timed) == set(every) == set(found.errors) and not found.refused and found.fastest == name
        assert tile_for(kind, SMALL) == every[name]
        assert tuning.recall(CPU, kind, "gelu", torch.bfloat16, SMALL) == tuning.Choice(every[name])


@each_kind
def test_what_is_wrong_or_does_not_run_is_refused(kind, monkeypatch):
    real = getattr(launch, kind)
    wrong, of_nan, raising, right = (tile.name for tile in configs.tiles(kind, "sm_90")[:4])

    def spoilt(how, tile, programs, *tensors):
        def run():
            if tile.name == raising:
                raise RuntimeError("out of resources\nand more")
            real(how, tile, programs, *tensors)()
            if tile.name == wrong:
                tensors[RESULT[kind]].mul_(1.05)
            elif tile.name == of_nan:  # not all: in the second result alone
                tensors[RESULT[kind] + 1][-1, -1] = float("nan")

        return run

    monkeypatch.setattr(launch, kind, spoilt)
    found, timed = tuned(kind, [raising, of_nan, wrong, right])
    assert set(found.refused) == {raising, of_nan, wrong} == set(autotune.candidates(kind, CPU)) - set(timed)
    assert found.refused[raising] == "RuntimeError: out of resources"
    assert "against float64" in found.refused[wrong] and "has nan at row 39" in found.refused[of_nan]
    assert found.fastest == right and tile_for(kind, SMALL).name == right


def test_no_tile_is_measured_as_what_it_will_not_be():
    """Where TMA cannot describe the matrices no tile with TMA runs, and the fastest without is what calls take."""
    first, second = FAMILIES["sm_90"]["forward"][0].name, FAMILIES["sm_80"]["forward"][0].name
    _, timed = tuned("forward", [first, second], sizes=(40, 50, 64))
    assert first not in timed and tile_for("forward", (40, 50, 64)).name == second


CALLS = ("linear_act 6x8x16", "gated_linear_act 6x8x16", "mlp 6x8x16x32x4", "gated_mlp 6x8x16x4")
CALLS += ("act_linear 6x8x16", "gated_act_linear 6x8x16")


@each("call", CALLS)
def test_tuning_measures_the_products_that_a_call_asks_for(call, monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "tile_for", lambda kind, config, sizes, *rest, **code: asked.append((kind, sizes)))
    job = parse("x", f"{call} silu bfloat16 preact", CPU)
    with choice.forced("library"):
        draw(job).results(backends.with_backend(job.config, "triton"))
    assert sorted(asked) == sorted(products_of(job.config.form, job.sizes))


@each("call", CALLS)
def test_products_are_measured_once_each_on_a_gpu_alone(call, monkeypatch):
    """With a device that says it is one, and its products not run. What was measured is remembered here."""
    job = parse("x", f"{call} silu bfloat16 preact", CPU)
    measured = []

    class Measuring:
        def product(self, job, product, seconds):
            measured.append(product)
            return {"library": 1.0}

    products.tune(job, 0.1, Measuring())
    assert measured == []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(tuning, "environment", lambda device: {"device": device.type})
    monkeypatch.setattr(backends, "refusal", lambda entry, problem: None)
    for _ in range(2):
        products.tune(job._replace(device=gpu), 0.1, Measuring())
    assert sorted(measured) == sorted(products_of(job.config.form, job.sizes))
    for kind, sizes in measured:
        assert tuning.recall(gpu, kind, "silu", torch.bfloat16, sizes) == tuning.Choice(None)
    measured.clear()
    products.tune(job._replace(device=gpu, dtype=torch.float32), 0.1, Measuring())
    assert measured == []
