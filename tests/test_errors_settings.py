"""Refused settings, and bad arguments of modules, surgery and the rest, in words that say what came and what to try."""

import functools

import pytest
import torch
import torch.nn.functional as F
from refusals import MODULE_OF, MODULES, K, N, call, each_form, good, refused
from support import each
from torch import nn

import fastbp
from fastbp.activations import ROWS
from fastbp.forms import FORMS
from fastbp.saving import POLICIES

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
AVAILABLE = ", ".join(name for name, state in fastbp.available_backends().items() if state == "available")
OTHER_CASES = {
    "save unknown": (dict(save="preactt"), ValueError, "'preactt'; did you mean 'preact'? there are auto, preact,"),
    "save a number": (dict(save=3), TypeError, "save must be the name of a policy, got int 3"),
    "save a list": (dict(save=["auto"]), TypeError, "save must be the name of a policy, got list ['auto']"),
    "backend unknown": (dict(backend="refrence"), ValueError, "'refrence'; did you mean 'reference'? there are auto,"),
    "backend a number": (dict(backend=3), TypeError, "backend must be a name or None, got int 3"),
    "backend a list": (dict(backend=["auto"]), TypeError, "backend must be a name or None, got list ['auto']"),
} | {
    name: (dict(backend=name), ValueError, f"backend {name!r} is not available: {reason}", f"available: {AVAILABLE}")
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
    """As ``available_activations`` says, and where a gate is, never by the output; then fp8 serves all.

    A form that is given z has nothing to make it again from.
    """
    named, settings = good(form), dict(activation=activation, save=save)
    by_output = save in ("output", "output_bits", "output_lsb")
    served = save in fastbp.available_activations()[activation]
    module = MODULE_OF.get(form.name)
    serves = (served and not by_output) or (form.gated and save == "fp8") or (served and not form.gated)
    if serves and not (save == "recompute" and form.given):
        call(form, named, **settings)
        if module:
            MODULES[module](**settings)
        return
    output = "'output' or " if "output" in fastbp.available_activations()[activation] and not form.gated else ""
    recompute = "" if form.given else "'recompute' or "
    words = f"save={save!r} cannot serve {activation}: ", f"; use 'preact' or {output}{recompute}'auto'"
    with refused(ValueError, form.name, *words):
        call(form, named, **settings)
    if module:
        with refused(ValueError, module, *words):
            MODULES[module](**settings)


@each_form
@each("save", [save for save, policy in POLICIES.items() if policy.compressed])
def test_compressed_policies_are_not_for_float64(form, save):
    named = {name: tensor.double() for name, tensor in good(form).items()}
    if form.gated and save != "fp8":
        return  # refused for the form, above
    words = f"save={save!r} is for float32, bfloat16, float16, got torch.float64; use 'preact'"
    with refused(ValueError, form.name, words, *([] if form.given else ["or 'recompute'"])):
        call(form, named, save=save)


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


@each("module", MODULES)
def test_input_of_modules(module):
    """Refused in the name of the function that the module calls. Of fastbp.Linear it is F.linear that refuses."""
    make = MODULES[module]
    where = next(form for form, name in MODULE_OF.items() if name == module)
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
