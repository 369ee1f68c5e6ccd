"""Small result files with known figures, for the tests of the report."""

from pathlib import Path

from benchmarks import records

ENVIRONMENT = {
    "date": "2026-01-02", "commit": "c0ffee1", "command": "python -m benchmarks.run --suite layers", "device": "cpu",
    "cpu": "Wonder CPU", "threads": 3, "torch": "9.9.9", "native": "avx9", "python": "3.11", "fastbp": "0.1.0",
}  # fmt: skip
PEAKS = {"float32": 400.0, "copy": 20.0}


def rival(ms: float, eager: float = 10.0, **more: object) -> dict[str, object]:
    """A rival's figures; its spread is five percent to either side."""
    ratio = eager / ms
    spread = {"over_eager_p20": 0.95 * ratio, "over_eager_p80": 1.05 * ratio}
    return {"ms": ms, "over_eager": ratio, **spread, "error": 2e-7, "accurate": True, **more}


def row(case: str, mode: str = "fwd_bwd", rivals: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    """A case of which eager takes 10 ms, its products alone 8, and ``rivals`` what is given in ms."""
    found = {"eager": rival(10.0), "eager again": rival(10.2), "linears alone": rival(8.0)}
    found |= {name: rival(r) if isinstance(r, float) else r for name, r in (rivals or {}).items()}  # type: ignore[arg-type]
    return {"case": case, "mode": mode, "rivals": found, **more}


# fastbp is 2, 2.5 and 0.8 times as fast as eager in float32, and 1.25 times in bfloat16.
LAYERS = [
    row("layer 64×8→8 gelu float32", rivals={"fastbp": 5.0, "torch.compile": 9.0}, flops=4e9, bytes=1e8),
    row("layer 64×8→8 relu float32", rivals={"fastbp": 4.0, "torch.compile": rival(20.0, accurate=False, error=8e-7)}),
    row(
        "layer 512×8→8 gelu float32",
        rivals={"fastbp": 12.5, "torch.compile": 8.0},
        flops=4e9,
        bytes=1e7,
        left_out={"quack": "no such kernel"},
    ),
    row("layer 64×8→8 gelu bfloat16", rivals={"fastbp": 8.0}, broken={"torch.compile": "AssertionError: wrong"}),
    row("layer 64×8→8 gelu float32", mode="train", rivals={"fastbp": 10.0}),
]


def write(root: Path, **suites: list[dict[str, object]]) -> Path:
    """A folder of results with one machine."""
    for name, rows in suites.items():
        records.write(root / "wonder" / f"{name}.jsonl", ENVIRONMENT, rows)
    return root
