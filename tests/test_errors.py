"""Every refusal: the right exception, in words that name the function, the rule, what came and what to try.

A call that has to be refused may not compute anything on the way, so each is made with every kernel forbidden.
"""

import contextlib
import functools

import pytest
import support
import torch
import torch.nn.functional as F
from support import each
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbp
from fastbp.activations import ROWS
from fastbp.forms import FORMS
from fastbp.saving import POLICIES

K, N, INNER, OUT = SIZES = (6, 8, 7, 5)
MODULES = {
    "LinearAct": lambda **settings: fastbp.LinearAct(K, N, **settings),
    "GatedLinear": lambda **settings: fastbp.GatedLinear(K, N, **settings),
    "MLP": lambda **settings: fastbp.MLP(K, N, OUT, **settings),
    "GatedMLP": lambda **settings: fastbp.GatedMLP(K, N, OUT, **settings),
}
MODULE_OF = dict(zip(FORMS, MODULES, strict=True))


def good(form):
    """The tensors of a call that is served, by the caller's names."""
    x, weights, biases = support.tensors(form, torch.float32, seed=0, rows=3, features=SIZES, requires_grad=False)
    named = {"x": x} | {form.argument("weight", i): weight for i, weight in enumerate(weights)}
    return named | {form.argument("bias", i): bias for i, bias in enumerate(biases)}


def call(form, named, **settings):
    x, *tensors = named.values()
    half = len(tensors) // 2
    return support.call(form, x, tensors[:half], tensors[half:], **{"activation": "gelu"} | settings)


METADATA = {torch.ops.aten.dim.default, torch.ops.aten.sym_size.default, torch.ops.aten.sym_size.int}


class Forbidden(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in METADATA:  # what jagged tensors answer in Python
            return func(*args, **kwargs or {})
        raise AssertionError(f"{func} ran in a call that has to be refused")


@contextlib.contextmanager
def refused(error, where, *words, computing=False):
    """The block raises ``error``, its message begins with ``fastbp.where:`` and has the words, and no kernel runs."""
    with pytest.raises(error) as caught, contextlib.nullcontext() if computing else Forbidden():
        yield
    message = str(caught.value)
    assert message.startswith(f"fastbp.{where}: "), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


ARGUMENTS = [(form, name) for form in FORMS.values() for name in good(form)]
each_form = each("form", FORMS.values())
each_argument = each(("form", "name"), ARGUMENTS)
each_weight = each(("form", "name"), [pair for pair in ARGUMENTS if "weight" in pair[1]])
each_bias = each(("form", "name"), [pair for pair in ARGUMENTS if "bias" in pair[1]])


@each_form
def test_the_good_call_is_served(form):
    """Else the tests below could pass for a reason of their own."""
    assert call(form, good(form)).isfinite().all()


# Shapes


@each_weight
def test_weight_with_other_in_features(form, name):
    named = good(form)
    rows, columns = named[name].shape
    named[name] = torch.randn(rows, columns + 1)
    words = f"{name} must be (out_features, {columns}) to match ", f"got ({rows}, {columns + 1})"
    with refused(ValueError, form.name, *words):
        call(form, named)


@each_weight
def test_transposed_weight_is_recognised(form, name):
    named = good(form)
    named[name] = named[name].t()
    with refused(ValueError, form.name, f"got {tuple(named[name].shape)}", f"; did you mean {name}.T?"):
        call(form, named)


@each_form
def test_transposing_is_not_proposed_where_it_does_not_help(form):
    named = good(form)
    name = form.argument("weight", 0)
    named[name] = torch.randn(N + 1, N)
    with pytest.raises(ValueError, match="out_features") as caught:
        call(form, named)
    assert "did you mean" not in str(caught.value)


@each_weight
@each("shape", [(), (K,), (1, N, K)])
def test_weight_that_is_no_matrix(form, name, shape):
    named = good(form) | {name: torch.randn(shape)}
    with refused(ValueError, form.name, f"{name} must be (out_features, ", f"got {shape}"):
        call(form, named)


@each_bias
@each("shape", [(), (0,), (1,), ("n - 1",), ("n", 1), (1, "n")])
def test_bias_of_another_shape_does_not_broadcast(form, name, shape):
    named = good(form)
    n = named[name].shape[0]
    shape = tuple({"n": n, "n - 1": n - 1}.get(size, size) for size in shape)
    named[name] = torch.randn(shape)
    weight = name.replace("biases", "weights").replace("bias", "weight")
    with refused(ValueError, form.name, f"{name} must be ({n},) to match {weight} ({n}, ", f"got {shape}"):
        call(form, named)


@each_form
def test_x_with_other_features(form):
    named = good(form) | {"x": torch.randn(2, 3, K + 1)}
    first = form.argument("weight", 0)
    words = f"{first} must be (out_features, {K + 1}) to match x (2, 3, {K + 1})", f"got ({N}, {K})"
    with refused(ValueError, form.name, *words):
        call(form, named)


@each_form
def test_x_without_dimensions(form):
    named = good(form) | {"x": torch.tensor(1.0)}
    with refused(ValueError, form.name, "x must have at least one dimension, (..., in_features)", "0-d"):
        call(form, named)


@each("form", [form for form in FORMS.values() if form.gated])
def test_gate_and_up_of_different_sizes(form):
    named = good(form) | {"up_weight": torch.randn(N + 1, K), "up_bias": torch.randn(N + 1)}
    words = "gate_weight and up_weight must have the same shape", f"({N}, {K}) and ({N + 1}, {K})"
    with refused(ValueError, form.name, *words):
        call(form, named)


def test_a_chain_names_the_link_that_breaks():
    x, weights = torch.randn(3, K), [torch.randn(N, K), torch.randn(INNER, N + 1), torch.randn(OUT, INNER)]
    words = f"weights[1] must be (out_features, {N}) to match weights[0] ({N}, {K})", f"got ({INNER}, {N + 1})"
    with refused(ValueError, "mlp", *words):
        fastbp.mlp(x, weights)


def test_lists_of_weights_and_biases():
    x, weight, bias = torch.randn(3, K), torch.randn(N, K), torch.randn(N)
    with refused(ValueError, "mlp", "weights must hold at least one weight, got none"):
        fastbp.mlp(x, [])
    for biases in ([], [bias, None]):
        with refused(ValueError, "mlp", "one bias or None for each of the 1 weights", f"got {len(biases)}"):
            fastbp.mlp(x, [weight], biases)
    for single in (weight, None, 3):
        with refused(TypeError, "mlp", "weights must be a list or tuple of tensors", f"got {type(single).__name__}"):
            fastbp.mlp(x, single)
    with refused(TypeError, "mlp", "biases must be a list or tuple of tensors", "got Tensor"):
        fastbp.mlp(x, [weight], bias)


# Kinds of tensors


@each_argument
@each("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtype_that_no_layer_has(form, name, dtype):
    named = good(form)
    named[name] = named[name].to(dtype)
    words = f"{name} must be one of float64, float32, bfloat16, float16, got {dtype}"
    with refused(TypeError, form.name, words):
        call(form, named)


@each_form
@each("dtype", [torch.int32, torch.complex128, torch.float8_e4m3fn])
def test_dtype_that_no_layer_has_throughout(form, dtype):
    named = {name: tensor.to(dtype) for name, tensor in good(form).items()}
    hint = "complex layers are not supported" if dtype.is_complex else "try x.float()"
    with refused(TypeError, form.name, f"x must be one of float64, float32, bfloat16, float16, got {dtype}; {hint}"):
        call(form, named)


@each_argument
@each("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mixed_dtypes(form, name, dtype):
    named = good(form)
    named[name] = named[name].to(dtype)
    blamed = form.argument("weight", 0) if name == "x" else name
    words = f"{blamed} must have the dtype of x", str(dtype), "torch.float32", "torch.autocast('cpu')"
    with refused(TypeError, form.name, *words):
        call(form, named)


@each_form
def test_autocast_does_not_mend_float64(form):
    """It leaves float64 alone, so x stays at odds with the weights, and F.linear refuses too."""
    named = good(form)
    named["x"] = named["x"].double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(named["x"], named[form.argument("weight", 0)])
        with refused(TypeError, form.name, "must have the dtype of x, torch.float64", "bfloat16", computing=True):
            call(form, named)


@each_argument
@each("moved", ["it", "the others"])
def test_cpu_and_meta(form, name, moved):
    named = {n: t.to("meta") if (n == name) == (moved == "it") else t for n, t in good(form).items()}
    with refused(ValueError, form.name, "must be on the device of x", "meta", "cpu", ".to()"):
        call(form, named)


LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.expand(2, -1).to_sparse_csr() if t.dim() == 1 else t.to_sparse_csr(),
    "sparse_csc": lambda t: t.expand(2, -1).to_sparse_csc() if t.dim() == 1 else t.to_sparse_csc(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "nested, ragged": lambda t: torch.nested.nested_tensor([t, t[1:]]),
    "nested, jagged": lambda t: torch.nested.nested_tensor([t, t[1:]], layout=torch.jagged),
}


@each_argument
@each("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta", "ignore:The PyTorch API of nested tensors")
def test_layouts(form, name, layout):
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    named = good(form)
    named[name] = LAYOUTS[layout](named[name])
    with refused(TypeError, form.name, f"{name} must be a dense tensor"):
        call(form, named)


@each_argument
@each("kind", ["NoneType", "ndarray", "list", "float"])
def test_not_a_tensor(form, name, kind):
    if kind == "NoneType" and "bias" in name:
        pytest.skip("None is a bias")
    named = good(form)
    named[name] = {"NoneType": None, "ndarray": named[name].numpy(), "list": named[name].tolist(), "float": 1.0}[kind]
    with refused(TypeError, form.name, f"{name} must be a torch.Tensor", f"got {kind}"):
        call(form, named)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_changes_no_refusal(mode):
    x, weight = torch.randn(3, K, requires_grad=True), torch.randn(K, N)
    with mode(), refused(ValueError, "linear_act", "did you mean weight.T?"):
        fastbp.linear_act(x, weight)


def test_refused_under_vmap():
    words = f"weight must be (out_features, {K}) to match x (3, {K})", "did you mean weight.T?"
    with refused(ValueError, "linear_act", *words, computing=True):
        torch.vmap(fastbp.linear_act, in_dims=(0, None))(torch.randn(4, 3, K), torch.randn(K, N))


# Settings


class Unhashable:
    """A callable that is no activation and cannot be a key."""

    __hash__ = None

    def __call__(self, z):
        return z * z


def hooked():
    module = nn.GELU()
    module.register_forward_hook(lambda *_: None)
    return module


def crossed():
    module = nn.Hardtanh()
    module.min_val = 3.0
    return module


NONE_OF = "computes none of the known activations; use one of identity"
STEEP = functools.partial(F.leaky_relu, negative_slope="steep")
ACTIVATION_CASES = {
    "unknown": ("gelo", ValueError, "unknown activation 'gelo'; did you mean 'gelu'? known: ", ", ".join(ROWS)),
    "nothing near": ("#", ValueError, "unknown activation '#'; known: identity"),
    "a class's name": ("ReLU", ValueError, "unknown activation 'ReLU'; did you mean 'relu'?"),
    "in another case": ("Gelu", ValueError, "unknown activation 'Gelu'; did you mean 'gelu'?"),
    "None": (None, TypeError, "activation must be a name, an nn.Module or a function, got NoneType None", "'identity'"),
    "a number": (3, TypeError, "got int 3"),
    "a list": (["gelu"], TypeError, "got list ['gelu']"),
    "a function": (torch.sin, ValueError, f"activation sin {NONE_OF}"),
    "unhashable": (Unhashable(), ValueError, NONE_OF),
    "a module": (nn.Softmax(-1), ValueError, f"activation Softmax {NONE_OF}"),
    "another GELU": (nn.GELU(approximate="erf"), ValueError, f"activation GELU {NONE_OF}"),
    "random": (nn.RReLU(), ValueError, f"activation RReLU {NONE_OF}"),
    "with parameters": (nn.PReLU(), ValueError, "activation PReLU has parameters or buffers of its own (weight)"),
    "a linear": (nn.Linear(2, 2), ValueError, "activation Linear has parameters or buffers of its own (weight, bias)"),
    "hooked": (hooked(), ValueError, "activation GELU has hooks"),
    "alpha 0": (nn.CELU(0.0), ValueError, "celu: alpha must not be 0"),
    "beta 0": (nn.Softplus(0.0), ValueError, "softplus: beta must not be 0"),
    "crossed limits": (crossed(), ValueError, "hardtanh: min_val must be below max_val, got 3.0 and 1.0"),
    "slope nan": (nn.LeakyReLU(float("nan")), ValueError, "leaky_relu", "finite", "nan"),
    "alpha inf": (nn.ELU(float("inf")), ValueError, "elu", "finite", "inf"),
    "slope a word": (nn.LeakyReLU("steep"), TypeError, "the parameters of leaky_relu must be numbers, got ('steep',)"),
    "keyword a word": (STEEP, TypeError, "the parameters of leaky_relu must be numbers, got ('steep',)"),
}
OTHER_CASES = {
    "save unknown": (dict(save="preactt"), ValueError, "'preactt'; did you mean 'preact'? there are auto, preact,"),
    "save a number": (dict(save=3), TypeError, "save must be the name of a policy, got int 3"),
    "save a list": (dict(save=["auto"]), TypeError, "save must be the name of a policy, got list ['auto']"),
    "backend unknown": (dict(backend="refrence"), ValueError, "'refrence'; did you mean 'reference'? there are auto,"),
    "backend a number": (dict(backend=3), TypeError, "backend must be a name or None, got int 3"),
    "backend a list": (dict(backend=["auto"]), TypeError, "backend must be a name or None, got list ['auto']"),
} | {
    save: (dict(save=save), ValueError, f"{save!r} is not in this version; there are auto, {', '.join(POLICIES)}")
    for save in ("output_bits", "output_lsb", "fp8")
} | {
    name: (dict(backend=name), ValueError, f"backend {name!r} is not available: {reason}", "available: reference")
    for name, reason in fastbp.available_backends().items()
    if reason != "available"
}  # fmt: skip
CASES = {f"activation {key}": (dict(activation=a), *rest) for key, (a, *rest) in ACTIVATION_CASES.items()} | OTHER_CASES


@each_form
@each("case", CASES)
def test_settings_of_functions(form, case):
    settings, error, *words = CASES[case]
    named = good(form)
    # What is not in the table of modules and functions is recognised by its values, which takes kernels.
    with refused(error, form.name, *words, computing="activation" in settings):
        call(form, named, **settings)


@each("module", MODULES)
@each("case", CASES)
def test_settings_of_modules(module, case):
    """Refused in the constructor, in the module's name."""
    settings, error, *words = CASES[case]
    with refused(error, module, *words, computing=True):
        MODULES[module](**settings)


@each("case", OTHER_CASES)
def test_settings_of_use_and_fuse(case):
    settings, error, *words = OTHER_CASES[case]
    with refused(error, "use", *words):
        fastbp.use(**settings)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    with refused(error, "fuse", *words):
        fastbp.fuse(model, **settings)
    assert type(model) is nn.Sequential


def test_save_none_is_no_policy():
    form = FORMS["linear_act"]
    named = good(form)
    with refused(TypeError, "linear_act", "save must be the name of a policy, got NoneType None"):
        call(form, named, save=None)
    with refused(TypeError, "LinearAct", "save must be the name of a policy, got NoneType None"):
        fastbp.LinearAct(K, N, save=None)


@each_form
@each("activation", ROWS)
@each("save", POLICIES)
def test_a_policy_is_served_or_refused(form, activation, save):
    """As ``available_activations`` says, and ``output`` never where a gate is."""
    named, settings = good(form), dict(activation=activation, save=save)
    if save in fastbp.available_activations()[activation] and not (form.gated and save == "output"):
        call(form, named, **settings)
        MODULES[MODULE_OF[form.name]](**settings)
        return
    words = f"save={save!r} cannot serve {activation}: ", "; use 'preact' or 'recompute' or 'auto'"
    with refused(ValueError, form.name, *words):
        call(form, named, **settings)
    with refused(ValueError, MODULE_OF[form.name], *words):
        MODULES[MODULE_OF[form.name]](**settings)


LOSING = [nn.LeakyReLU(-0.1), nn.ELU(-1.0), nn.CELU(-1.0), nn.Softplus(threshold=5)]


@pytest.mark.parametrize("activation", LOSING, ids=lambda a: type(a).__name__)
def test_output_is_refused_where_parameters_lose_the_slope(activation):
    form = FORMS["linear_act"]
    named = good(form)
    call(form, named, activation=type(activation)(), save="output")
    call(form, named, activation=activation)
    with refused(ValueError, "linear_act", "save='output' cannot serve", "; use 'preact' or 'recompute' or 'auto'"):
        call(form, named, activation=activation, save="output")


def test_use_without_arguments():
    with refused(ValueError, "use", "neither backend nor save was given"):
        fastbp.use()


def test_use_is_refused_by_the_call_it_does_not_suit_and_ends_all_the_same():
    form = FORMS["linear_act"]
    named = good(form)
    with refused(ValueError, "linear_act", "save='output' cannot serve gelu"), fastbp.use(save="output"):
        call(form, named, activation="gelu")
    call(form, named, activation="gelu")


# Modules, surgery, memory


@each("module", [*MODULES, "Linear"])
def test_input_of_modules(module):
    """Refused in the name of the function that the module calls."""
    make = MODULES.get(module, lambda: fastbp.Linear(K, N))
    where = next((form for form, name in MODULE_OF.items() if name == module), "linear_act")
    layer, x = make(), torch.randn(3, K)
    on_meta = make().to("meta")
    refusals = [
        (torch.randn(3, K + 1), ValueError, f"to match x (3, {K + 1})"),
        (torch.tensor(1.0), ValueError, "x must have at least one dimension"),
        (x.double(), TypeError, "must have the dtype of x, torch.float64"),
        (x.int(), TypeError, "x must be one of float64, float32, bfloat16, float16, got torch.int32"),
        (x.to("meta"), ValueError, "must be on the device of x, meta, got cpu"),
        (x.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    ]
    for bad, error, word in refusals:
        with refused(error, where, word):
            layer(bad)
    with refused(ValueError, where, "must be on the device of x, cpu, got meta"):
        on_meta(x)


@pytest.mark.parametrize("hidden", [4.5, "8", None, [8, 4.5]], ids=str)
def test_hidden_features_that_are_no_sizes(hidden):
    with pytest.raises(TypeError, match=r"fastbp\.MLP: hidden_features must be an int or a sequence of ints"):
        fastbp.MLP(K, hidden)


def test_fuse_takes_modules():
    with refused(TypeError, "fuse", "model must be an nn.Module, got int"):
        fastbp.fuse(3)
    with refused(TypeError, "unfuse", "model must be an nn.Module, got int"):
        fastbp.unfuse(3)


@pytest.mark.parametrize("exclude", [[3], "ab", 3, nn.Linear(2, 2)], ids=lambda e: type(e).__name__)
def test_saved_bytes_takes_tensors_and_modules(exclude):
    with refused(TypeError, "SavedBytes", "exclude must"):
        fastbp.SavedBytes(exclude=exclude)


def test_a_function_wants_a_named_backend():
    config = fastbp.problem.configure("linear_act", "gelu", (), "preact", "auto")
    with pytest.raises(ValueError, match=r"must name a backend, got 'auto'"):
        fastbp.autograd.LinearActFunction.apply(config, torch.randn(2, 3), torch.randn(4, 3), None)
