"""Where the Triton backend does not serve: which Triton, which GPU, which device, in words that say what to do."""

import importlib.metadata

import pytest
import torch
from graphs import call_of, compiled, draw, each_case, run
from refusals import call, good, refused
from routes import each_triton_route
from support import DTYPES, each

from fastbp import available_backends, backends
from fastbp.backends import triton
from fastbp.forms import FORMS, LINEAR_ACT
from fastbp.problem import Problem, configure

if triton.unavailable is None:
    import fastbp.backends.triton.calls  # noqa: F401 (whether kernels are interpreted is settled by the first import)

COMMAND = '`pip install "triton>=3.6"`'
only_interpreted = pytest.mark.skipif(
    triton.unavailable is not None or not triton.interpreting(), reason="the kernels are not interpreted here"
)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """No choice and no warning from another test."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    triton._loaded.cache_clear()
    yield
    triton._loaded.cache_clear()


@each("version", ["3.6.0", "3.6", "3.6.0rc1", "3.6.1.post1", "3.7.0+git1234", "3.7rc1", "3.10.1", "4.0.0", "10.0"])
def test_new_enough(version):
    assert triton.find_unavailable(version) is None


@each("version", ["3.5.1", "3.5.1+git1234", "3.5.0rc6", "2.10.0", "3", "0.0"])
def test_too_old(version):
    assert triton.find_unavailable(version) == f"Triton {version} is too old, 3.6 or newer is needed; {COMMAND}"


def test_not_installed():
    assert triton.find_unavailable(None) == f"Triton is not installed, and 3.6 or newer is needed; {COMMAND}"


@each(
    ("there", "found"),
    [
        ({}, None),
        ({"pytorch-triton": "3.7.0+git1"}, "3.7.0+git1"),
        ({"triton": "3.6.0", "pytorch-triton": "1"}, "3.6.0"),
    ],
)
def test_where_the_version_comes_from(there, found, monkeypatch):
    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert triton._installed() == found


@each("form", FORMS.values())
def test_a_call_that_names_it_hears_the_reason(form, monkeypatch):
    reason = triton.find_unavailable("3.5.1")
    monkeypatch.setitem(backends.BACKENDS, "triton", reason)
    assert available_backends()["triton"] == reason
    named = good(form)
    with refused(ValueError, form.name, "backend 'triton' is not available", reason, "reference"):
        call(form, named, backend="triton")
    assert call(form, named).isfinite().all()


@each("capability", [(7, 5), (7, 0), (6, 1)])
def test_an_old_gpu(capability):
    found = ".".join(map(str, capability))
    words = f"Old GPU has compute capability {found}, and the Triton kernels need 8.0 or newer"
    assert triton.refusal(capability, "Old GPU") == words


@each("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_that_serves(capability):
    assert triton.refusal(capability, "GPU") is None


def problem(backend="triton", device="cuda", dtype=torch.bfloat16):
    return Problem(configure("linear_act", "gelu", (), "preact", backend), torch.device(device), dtype)


@pytest.fixture
def gpu(monkeypatch):
    """As with a GPU of this capability; nothing is asked of a driver."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "builds", lambda: None)

    def present(capability, name="Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    present((9, 0), "H100")
    return present


def test_auto_on_an_old_gpu_ends_with_the_reference_and_one_warning(gpu, recwarn):
    gpu((7, 5))
    reason = "Tesla T4 has compute capability 7.5, and the Triton kernels need 8.0 or newer"
    assert triton.supports(problem()) == reason
    with pytest.raises(ValueError, match=f"backend 'triton' cannot take this call: {reason}"):
        backends._named(problem())
    assert [backends._first_that_supports(problem("auto")) for _ in range(2)] == ["reference"] * 2
    (warning,) = recwarn
    assert warning.category is RuntimeWarning and f"triton: {reason}" in str(warning.message)


@pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
@each("dtype", DTYPES)
def test_auto_on_a_new_gpu_takes_it(gpu, dtype, recwarn):
    assert triton.supports(problem(dtype=dtype)) is None
    assert backends._named(problem(dtype=dtype)) == "triton"
    assert backends._first_that_supports(problem("auto", dtype=dtype)) == "triton"
    assert not recwarn.list


def test_a_triton_that_does_not_load(gpu, monkeypatch):
    def calls():
        raise ImportError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(triton, "_calls", calls)
    words = f"Triton does not load: libtriton.so: cannot open shared object file; {COMMAND}"
    assert triton.supports(problem()) == words


NO_COMPILER = "Triton builds its launchers with a C compiler, and there is neither gcc nor clang"


@pytest.fixture
def toolchain(monkeypatch):
    """What builds launchers, as on a machine with a driver: against libraries that every machine has."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import driver

    from fastbp.backends.triton import toolchain

    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    monkeypatch.setattr(driver, "libraries", [])
    monkeypatch.setattr(toolchain, "SOURCE", toolchain.SOURCE.replace("  cuDriverGetVersion(&version);", ""))
    monkeypatch.delenv("CC", raising=False)
    return toolchain


def test_no_compiler_is_told_before_a_call_takes_the_kernels(gpu, toolchain, monkeypatch, tmp_path, recwarn):
    """As where somebody installed PyTorch alone: a call that names it hears it, auto falls back and says so once."""
    monkeypatch.setattr(triton, "builds", toolchain.unable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert triton.supports(problem()) == f"{NO_COMPILER}; {toolchain.MEND}"
    with pytest.raises(ValueError, match=f"backend 'triton' cannot take this call: {NO_COMPILER}"):
        backends._named(problem())
    assert [backends._first_that_supports(problem("auto")) for _ in range(2)] == ["reference"] * 2
    (warning,) = recwarn
    assert NO_COMPILER in str(warning.message) and "apt-get install gcc" in str(warning.message)


def test_a_compiler_that_works(toolchain, monkeypatch, tmp_path):
    if toolchain.compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert toolchain.unable() is None
    assert list(tmp_path.rglob("fastbp_probe*"))


@each(("cc", "words"), [("no-such-cc", "CC names 'no-such-cc', which is not there"), ("false", "CalledProcessError")])
def test_a_compiler_that_does_not_work(toolchain, monkeypatch, tmp_path, cc, words):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", cc)
    assert words in toolchain.unable() and toolchain.MEND in toolchain.unable()


def test_no_headers(toolchain, monkeypatch, tmp_path):
    if toolchain.compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(toolchain, "SOURCE", toolchain.SOURCE.replace("Python.h", "NoPython.h"))
    assert "CalledProcessError" in toolchain.unable()


@only_interpreted
def test_the_interpreter_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(triton, "builds", lambda: pytest.fail("asked for a compiler"))
    assert triton.supports(problem("triton", device="cpu")) is None


def test_an_amd_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked as if it were NVIDIA's"))
    assert triton.supports(problem()) == "the Triton kernels run on NVIDIA GPUs, and x is on an AMD GPU"
    assert "x is on the CPU" in triton.supports(problem(device="cpu"))


@each("device", ["xpu", "mps", "meta"])
def test_another_device(device, gpu):
    assert triton.supports(problem(device=device)) == f"the Triton kernels run on NVIDIA GPUs, and x is on {device}"


@each("value", ["1", "true", "True", "YES", "on", "y"])
def test_the_words_for_interpreting_are_those_of_triton(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton.interpreting() and "unset it" in triton.supports(problem())
    knobs = pytest.importorskip("triton").knobs
    assert knobs.runtime.interpret


@each("value", ["0", "false", "no", "", None])
def test_the_words_for_not_interpreting_are_those_of_triton(value, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET") if value is None else monkeypatch.setenv("TRITON_INTERPRET", value)
    assert not triton.interpreting()
    knobs = pytest.importorskip("triton").knobs
    assert not knobs.runtime.interpret


@pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
@each("form", FORMS.values())
def test_a_tensor_on_the_cpu(form, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    words = "backend 'triton' cannot take this call", "NVIDIA GPUs", "x is on the CPU", "'cuda'", "TRITON_INTERPRET=1"
    named = good(form)
    with refused(ValueError, form.name, *words):
        call(form, named, backend="triton")
    assert call(form, named).isfinite().all()


@only_interpreted
@each("native", [True, False])
@each("dtype", DTYPES)
def test_auto_never_has_kernels_interpreted(native, dtype, monkeypatch):
    if not native:
        monkeypatch.setitem(backends.BACKENDS, "native", "not built")
    elif isinstance(backends.BACKENDS["native"], str):
        pytest.skip(backends.BACKENDS["native"])
    x = torch.ones(3, 6, dtype=dtype)
    taken = backends.choose(problem("auto").config, x, ())
    assert taken.backend == ("native" if native else "reference")
    assert backends.choose(problem("triton").config, x, ()).backend == "triton"
    monkeypatch.setattr(triton, "forward", lambda *arguments: pytest.fail("a kernel is interpreted for auto"))
    named = {name: t.to(dtype) for name, t in good(LINEAR_ACT).items()}
    assert call(LINEAR_ACT, named).isfinite().all()


@only_interpreted
@each_triton_route("library", "fused", dtypes=[torch.bfloat16])
@each_case
def test_a_compiled_call_gives_the_same(form, activation, save, dtype, triton_route, fresh_dynamo, monkeypatch):
    tensors = draw(form, rows=19, dtype=dtype)
    function = call_of(form, activation=activation, save=save, backend="triton")
    expected = run(function, tensors)
    served = []
    monkeypatch.setattr(triton, "forward", lambda *arguments, real=triton.forward: served.append(1) or real(*arguments))
    for found, wanted in zip(run(compiled(function), tensors), expected, strict=True):
        assert torch.equal(found, wanted)
    assert served
