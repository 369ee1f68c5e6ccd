"""Refused tensors: the right exception, in words that name the function, the rule, what came and what to try."""

import pytest
import torch
import torch.nn.functional as F
from refusals import INNER, OUT, K, N, call, each_argument, each_bias, each_form, each_weight, good, refused
from support import each

import fastbp
from fastbp.forms import FORMS


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
    rows, columns = named[name].shape
    named[name] = torch.randn(rows + columns, columns + 1)
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
def test_inputs_with_other_features(form):
    named, name = good(form), form.argument("weight", 0)
    out, features = named[name].shape
    named |= {i: torch.randn(2, 3, features + 1) for i in form.names_of_inputs}
    shape = f"{form.names_of_inputs[0]} (2, 3, {features + 1})"
    words = f"{name} must be (out_features, {features + 1}) to match {shape}", f"got ({out}, {features})"
    with refused(ValueError, form.name, *words):
        call(form, named)


@each_form
def test_inputs_without_dimensions(form):
    named, first = good(form), form.names_of_inputs[0]
    named |= {name: torch.tensor(1.0) for name in form.names_of_inputs}
    with refused(ValueError, form.name, f"{first} must have at least one dimension, (..., in_features)", "0-d"):
        call(form, named)


@each("shape", [(3, N + 1), (1, N), (N,), (3, 1, N)])
def test_given_gate_and_up_of_different_shapes(shape):
    """They would broadcast, and the gradient of one would have another's shape."""
    named, other = good(FORMS["gated_act_linear"]), torch.randn(shape)
    for name, shapes in (("up", f"(3, {N}) and {shape}"), ("gate", f"{shape} and (3, {N})")):
        with refused(ValueError, "gated_act_linear", "gate and up must have the same shape", shapes):
            call(FORMS["gated_act_linear"], named | {name: other})


@each("form", [form for form in FORMS.values() if form.gated and not form.given])
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
    first = form.names_of_inputs[0]
    hint = "complex layers are not supported" if dtype.is_complex else f"try {first}.float()"
    known = "float64, float32, bfloat16, float16"
    with refused(TypeError, form.name, f"{first} must be one of {known}, got {dtype}; {hint}"):
        call(form, named)


@each_argument
@each("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mixed_dtypes(form, name, dtype):
    named = good(form)
    named[name] = named[name].to(dtype)
    first, second, *_ = named
    blamed = second if name == first else name
    words = f"{blamed} must have the dtype of {first}", str(dtype), "torch.float32", "torch.autocast('cpu')"
    with refused(TypeError, form.name, *words):
        call(form, named)


@each_form
def test_autocast_does_not_mend_float64(form):
    """It leaves float64 alone, so x stays at odds with the weights, and F.linear refuses too."""
    named, first = good(form), form.names_of_inputs[0]
    named[first] = named[first].double()
    words = f"must have the dtype of {first}, torch.float64", "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(named[first], named[form.argument("weight", 0)])
        with refused(TypeError, form.name, *words, computing=True):
            call(form, named)


@each_argument
@each("moved", ["it", "the others"])
def test_cpu_and_meta(form, name, moved):
    named = {n: t.to("meta") if (n == name) == (moved == "it") else t for n, t in good(form).items()}
    with refused(ValueError, form.name, f"must be on the device of {next(iter(named))}", "meta", "cpu", ".to()"):
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
        pytest.skip("no fault: None is what a call without this bias gives")
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
