"""fastbp.Linear by the fp8 policy, and by the others."""

import pytest
import torch
import torch.nn.functional as F
from linear_twins import assert_as_stock, assert_close, assert_equal, outcome, run, twice
from torch import nn

import fastbp

ROWS, WIDTH = 64, 32  # so that codes and scales are whole blocks
SIZES = {"rows": ROWS, "width": WIDTH}
PROGRAMS = {
    "mlp": lambda fc, x: fc[2](F.gelu(fc[0](x))),
    "gated": lambda fc, x: fc[2](F.silu(fc[0](x)) * fc[1](x)),
}


@pytest.mark.parametrize("name", ["mlp", "gated"])
@pytest.mark.parametrize("by", ["fuse", "use"])
def test_fp8(name, by):
    """One byte a hidden element and linear, and scales; errors of backward of a few percent, forward exact."""
    program, bytes_kept = PROGRAMS[name], {"mlp": 1, "gated": 2}[name]

    def under(fc, x, seen):
        for linear in fc:
            if isinstance(linear, fastbp.Linear) and by == "fuse":
                fastbp.fuse(linear, save="fp8")
        with fastbp.SavedBytes(exclude=[x, *fc]) as saved:
            if by == "use":
                with fastbp.use(save="fp8"):
                    y = program(fc, x)
            else:
                y = program(fc, x)
        fc[0].kept = saved.total / (ROWS * WIDTH)
        return y

    stock, ours = (run(kind, under, **SIZES, dtype=torch.float32) for kind in (nn.Linear, fastbp.Linear))
    assert_equal([ours.y], [stock.y])
    assert ours.linears[0].kept == pytest.approx(bytes_kept, rel=0.05)
    assert outcome(ours.linears[2])[0] == "fused"
    for a, b in zip(ours.grads, stock.grads, strict=True):
        if b is not None:
            error = float((a - b).norm() / b.norm())
            assert error < 0.05, error
    assert any(float((a - b).abs().max()) > 0 for a, b in zip(ours.grads, stock.grads, strict=True) if b is not None)


@pytest.mark.parametrize("name", ["mlp", "gated"])
def test_fp8_is_not_differentiated_twice(name):
    def under(fc, x, seen):
        with fastbp.use(save="fp8"):
            return PROGRAMS[name](fc, x)

    with pytest.raises(RuntimeError, match=r"create_graph=True.*save='fp8'.*use save='auto'"):
        run(fastbp.Linear, under, after=twice, **SIZES, dtype=torch.float32)


@pytest.mark.parametrize("name", ["mlp", "gated"])
def test_hooks_see_gradients_under_fp8(name):
    def under(fc, x, seen):
        with fastbp.use(save="fp8"):
            g, u = fc[0](x), fc[1](x)
            h = F.silu(g) * u if name == "gated" else F.silu(g)
            y = fc[2](h)
            h.register_hook(lambda grad: seen.append(grad))
            return y

    stock, ours = (run(kind, under, **SIZES, dtype=torch.float32) for kind in (nn.Linear, fastbp.Linear))
    assert_close(ours.seen, stock.seen, 1e-6)  # dh = dy W has no z in it
    assert len(ours.seen) == 1


@pytest.mark.parametrize("name", ["mlp", "gated"])
def test_two_readers_under_fp8(name):
    """The second reads the codes of the first, and no z or g and u."""

    def under(fc, x, seen):
        with fastbp.use(save="fp8"):
            h = F.silu(fc[0](x)) * fc[1](x) if name == "gated" else F.silu(fc[0](x))
            return fc[2](h) + fc[3](h)

    stock, ours = (run(kind, under, **SIZES, dtype=torch.float32) for kind in (nn.Linear, fastbp.Linear))
    assert_equal([ours.y], [stock.y])
    assert_close(ours.grads, stock.grads, 0.1)


@pytest.mark.parametrize("policy", ["preact", "output", "recompute", "output_bits", "output_lsb"])
def test_other_policies_keep_z(policy):
    """Which is exact, and no more than they keep."""

    def under(fc, x, seen):
        with fastbp.use(save=policy):
            return PROGRAMS["mlp"](fc, x)

    assert_as_stock(under, fused="act_linear, gelu", **SIZES)
