"""The Gluon ping-pong kernel executed from its PTX: one tile, a tile for each consumer, more, edges, long K."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.pingpong import case_of, run

CASES = [
    case_of(1, 8, 8),
    case_of(200, 136, 72, "float16", "relu", keep=False),
    case_of(300, 200, 328, activation="silu"),  # six tiles for one program
    case_of(384, 264, 448, "float16", "gelu_tanh", programs=2, bias=False),  # K of more blocks than the ring has stages
]


@each("case", CASES)
@each("seed", [1, 2])
def test_pingpong(child, case, seed):
    verdict = child(run, case, seed)
    assert not verdict.fault, verdict.text
