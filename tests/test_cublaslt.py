"""What csrc/cuda/cublaslt.cpp asks of cuBLASLt, beside one of the host that computes it (cublaslt_fake.cpp)."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cxx import ROOT, SETUP
from support import each

M, N, K = 5, 24, 40


@pytest.fixture(scope="session")
def cublaslt(tmp_path_factory):
    """(product, handles_created) of the two libraries, the fake one under the name that PyTorch loads."""
    try:
        cxx, (nvcc, _) = SETUP["compiler"](), SETUP["nvcc"]()
        include, _ = SETUP["toolkit_folders"](nvcc)
    except SETUP["Unable"] as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("cublaslt")
    flags = ["-shared", "-std=c++20", "-O1", "-fPIC", f"-I{ROOT / 'csrc'}", "-isystem", include, *SETUP["QUIET"]]
    fake, host = folder / "libcublasLt.so.13", folder / "host.so"
    for target, sources, more in (
        (fake, ["tests/cublaslt_fake.cpp"], [f"-Wl,-soname,{fake.name}"]),
        (host, ["tests/cublaslt_host.cpp", "csrc/cuda/cublaslt.cpp", "csrc/cuda/capture.cpp"], []),
    ):
        command = [*cxx, *flags, *(str(ROOT / source) for source in sources), *more, "-o", str(target)]
        subprocess.run(command, check=True)
    if any(f"libcublasLt.so.{version}" in Path("/proc/self/maps").read_text() for version in (14, 13, 12)):
        pytest.skip("PyTorch has loaded a cuBLASLt of its own, which would be found first")
    library = ctypes.CDLL(str(fake), mode=ctypes.RTLD_GLOBAL)
    product = ctypes.CDLL(str(host)).product
    product.restype = ctypes.c_char_p
    product.argtypes = [
        ctypes.c_bool, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
        *[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_bool,
    ]  # fmt: skip
    return product, library.handles_created


def placed(rows, columns, at, scale=1.0):
    """Random numbers at an address that is a multiple of ``at`` bytes and of no more; rows are eight numbers longer."""
    size, stride = rows * (columns + 8), columns + 8
    whole = torch.full((size + 512,), float("nan"), dtype=torch.bfloat16)
    skip = next(i for i in range(512) if (whole.data_ptr() + 2 * i) % (2 * at) == at)
    found = whole[skip : skip + size].view(rows, stride)[:, :columns]
    return found.copy_(torch.randn(rows, columns) * scale)


def address(t):
    return t.data_ptr()


@each("backward", [False, True])
@each("bias", [True, False])
@each("alignments", [(16, 16, 16), (256, 32, 16), (16, 256, 64), (256, 256, 256)])
def test_products(cublaslt, seeded, backward, bias, alignments):
    """Every operand at an alignment of its own: cuBLASLt must not be told of more than there is."""
    product, _ = cublaslt
    of_a, of_b, of_out = alignments
    a, b = placed(M, K, of_a), placed(K, N, of_b, K**-0.5) if backward else placed(N, K, of_b, K**-0.5)
    z, beside = torch.randn(M, N).bfloat16(), torch.randn(N).bfloat16()
    out = placed(1, M * N, of_out)[0].view(M, N).fill_(float("nan"))
    said = product(backward, M, N, K, address(a), a.stride(0), address(b), b.stride(0),
                   address(beside) if bias else None, address(z), address(out), 0, False)  # fmt: skip
    assert said == b""
    if backward:
        wide = z.double().requires_grad_()
        F.gelu(wide, approximate="tanh").backward(a.double() @ b.double())
        torch.testing.assert_close(out.double(), wide.grad, rtol=2**-7, atol=2**-8)
        if bias:
            torch.testing.assert_close(beside.double(), wide.grad.sum(0), rtol=2**-7, atol=2**-6)
        return
    wanted = a.double() @ b.double().mT + (beside.double() if bias else 0)
    torch.testing.assert_close(z.double(), wanted, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(out.double(), F.gelu(wanted, approximate="tanh"), rtol=2**-7, atol=2**-8)


def test_a_first_call_inside_a_graph_capture_says_what_to_do(cublaslt, seeded):
    """The handle is made by a device's first call, outside a capture; from then on a capture is served."""
    product, created = cublaslt
    a, b, z, out = placed(M, K, 16), placed(N, K, 16), *(torch.empty(M, N, dtype=torch.bfloat16) for _ in range(2))

    def call(in_capture):
        return product(False, M, N, K, address(a), a.stride(0), address(b), b.stride(0), None, address(z),
                       address(out), 1, in_capture).decode()  # fmt: skip

    before = created()
    said = call(True)
    assert "inside a CUDA graph capture" in said and "once before the capture" in said and created() == before
    assert [call(False), call(True), created()] == ["", "", before + 1]
