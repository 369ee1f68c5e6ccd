"""A kernel that is not compiled yet is not compiled while a CUDA graph is captured."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated import triton_capture


@each("kernel", triton_capture.KERNELS)
def test_a_first_call_inside_of_a_capture_asks_for_a_warm_up(child, kernel):
    said, launched = child(triton_capture.first_calls, kernel)
    name = "forward_kernel" if kernel == "pingpong" else f"{kernel}_kernel"
    assert f"the Triton kernel {name} is not compiled for these tensors yet; run the same step once before" in said
    assert launched == ["warm-up", name, name]
