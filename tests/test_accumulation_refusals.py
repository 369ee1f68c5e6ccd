"""What gradient_accumulation_fusion refuses, in words that say why and what to try."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from support import FEW, each, like, tensors
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastbp
from fastbp.backends import choose_accumulating, native
from fastbp.forms import FORMS, LINEAR_ACT
from fastbp.problem import configure
from fastbp.saving import exact_policies

BF16, F32 = torch.bfloat16, torch.float32
FLAG = dict(gradient_accumulation_fusion=True)


def drawn(dtype=F32, **attributes):
    """x and a weight with a main_grad that fits, or these attributes instead."""
    x, (weight,), _ = tensors(LINEAR_ACT, dtype, seed=95, rows=3)
    for name, value in ({"main_grad": torch.zeros(weight.shape)} | attributes).items():
        setattr(weight, name, value(weight) if callable(value) else value)
    return x, weight


def refuse(words, x, weight, error=ValueError, **settings):
    with pytest.raises(error, match=r"^fastbp\.linear_act: ") as caught:
        fastbp.linear_act(x, weight, **FLAG | settings)
    assert words in str(caught.value)


DESTINATIONS = {
    "none": (BF16, dict(main_grad=None), "weight must have a main_grad in float32"),
    "no grad_dtype": (BF16, dict(main_grad=None), "got none, and no .grad with grad_dtype torch.bfloat16; try"),
    "16 bits": (BF16, dict(main_grad=torch.zeros_like), "weight.main_grad must be float32 of (23, 19) on cpu"),
    "shape": (F32, dict(main_grad=torch.zeros(19, 23)), "got torch.float32 of (19, 23) on cpu"),
    "device": (F32, dict(main_grad=lambda w: torch.zeros(w.shape, device="meta")), "of (23, 19) on meta"),
    "sparse": (F32, dict(main_grad=lambda w: torch.zeros(w.shape).to_sparse()), "must be a plain dense tensor"),
    "subclass": (F32, dict(main_grad=lambda w: TwoTensor(*[torch.zeros(w.shape)] * 2)), "got a TwoTensor"),
    "trained": (F32, dict(main_grad=torch.ones(23, 19, requires_grad=True)), "got one that requires grad; try"),
    "grad that is trained": (
        F32,
        dict(main_grad=None, grad=lambda w: torch.ones(23, 19, requires_grad=True) * 2),
        "weight.grad must be a tensor that can be added to, got one that requires grad",
    ),
    "grad of 16 bits": (BF16, dict(main_grad=None, grad=torch.zeros_like), "and a .grad of torch.bfloat16"),
    "float64": (torch.float64, {}, "weight must be float32, bfloat16 or float16"),
}


@each("case", DESTINATIONS)
def test_what_cannot_be_added_to(case):
    dtype, attributes, words = DESTINATIONS[case]
    refuse(words, *drawn(dtype, **attributes))


def test_an_inference_tensor_cannot_be_added_to():
    with torch.inference_mode():
        main_grad = torch.zeros(23, 19)
    refuse("got an inference tensor", *drawn(main_grad=main_grad))


def test_a_main_grad_that_is_exchanged_is_looked_at_again():
    x, weight = drawn()
    y = fastbp.linear_act(x, weight, **FLAG)
    weight.main_grad = torch.zeros(weight.shape, dtype=BF16)
    with pytest.raises(ValueError, match=r"fastbp\.linear_act: weight\.main_grad must be float32"):
        y.sum().backward()


def test_arguments_are_named_as_the_caller_names_them():
    x, weights, _ = tensors(FORMS["gated_mlp"], F32, seed=96)
    weights[2].main_grad = torch.zeros(1)
    with pytest.raises(ValueError, match=r"fastbp\.gated_mlp: down_weight\.main_grad must be float32 of"):
        fastbp.gated_mlp(x, *weights, **FLAG)


def test_weights():
    x, weight = drawn()
    refuse("weight must be a leaf for gradient_accumulation_fusion, got the result of MulBackward0", x, weight * 1)
    x, weight = drawn()
    refuse("takes plain tensors only, got a TwoTensor", x, nn.Parameter(TwoTensor(weight.detach(), weight.detach())))
    refuse("takes plain tensors only, got a TwoTensor", TwoTensor(x.detach(), x.detach()), weight)
    refuse("must be True or False, got int 1", x, weight, TypeError, gradient_accumulation_fusion=1)
    refuse("weight must be (out_features, 19)", x, weight.mT)


@each("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_would_never_run(hook):
    x, weight = drawn()
    getattr(weight, hook)(lambda _: None)
    refuse("weight has hooks that gradient_accumulation_fusion would never run", x, weight)
    weight.grad_added_to_main_grad = False
    fastbp.linear_act(x, weight, **FLAG)
    weight.main_grad = None
    refuse("weight has hooks", x, weight)


def dual(x, weight):
    with forward_ad.dual_level():
        fastbp.linear_act(forward_ad.make_dual(x, x), weight, **FLAG)


SURROUNDINGS = {
    "grad": (lambda x, w: torch.func.grad(lambda x: fastbp.linear_act(x, w, **FLAG).sum())(x), "a transform of torch"),
    "vmap": (
        lambda x, w: torch.vmap(lambda x: fastbp.linear_act(x, w, **FLAG))(x),
        "a transform of torch.func or vmap",
    ),
    "jvp": (lambda x, w: torch.func.jvp(lambda x: fastbp.linear_act(x, w, **FLAG), (x,), (x,)), "a transform of torch"),
    "dual": (dual, "under forward-mode AD"),
    "make_fx": (
        lambda x, w: make_fx(lambda x: fastbp.linear_act(x, w, **FLAG))(x),
        "in a graph that is being captured",
    ),
    "jit": (
        lambda x, w: torch.jit.trace(lambda x: fastbp.linear_act(x, w, **FLAG), (x,)),
        "in a graph that is being captured",
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@each("case", SURROUNDINGS)
def test_where_backward_would_not_accumulate(case):
    run, words = SURROUNDINGS[case]
    with pytest.raises(
        ValueError, match=r"^fastbp\.linear_act: gradient_accumulation_fusion cannot serve a call "
    ) as e:
        run(*drawn())
    assert words in str(e.value)


@pytest.mark.usefixtures("fresh_dynamo")
@each("strict", [False, True])
def test_export(strict):
    module = fastbp.LinearAct(6, 8, **FLAG)
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="cannot serve a call in a graph that is"):
        torch.export.export(module, (torch.randn(3, 6),), strict=strict)


BACKWARDS = {
    "create_graph": lambda x, y: torch.autograd.grad(y.sum(), x, create_graph=True),
    "batched": lambda x, y: torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True),
    "vmap": lambda x, y: torch.vmap(lambda dy: torch.autograd.grad(y, x, dy))(torch.ones(2, *y.shape)),
}


@each("case", BACKWARDS)
@each(("form", "save"), [(form, save) for form in FORMS.values() for save in exact_policies(FEW[2], form)])
def test_backwards_that_would_have_to_return_the_gradient(form, save, case):
    x, weights, biases = tensors(form, F32, seed=97)
    arguments = (*weights, *biases) if form.parts else (weights, biases)
    y = getattr(fastbp, form.name)(x, *arguments, activation="tanh", save=save, **FLAG)
    with pytest.raises(RuntimeError, match=rf"^fastbp\.{form.name}: the backward of a call with gradient_acc.*neither"):
        BACKWARDS[case](x, y)
    assert all(weight.grad is None for weight in weights)


@pytest.mark.skipif(native.unavailable is not None or hasattr(native, "ACCUMULATES"), reason="native is not as it was")
def test_a_backend_that_does_not_add():
    refuse("backend 'native' cannot take this call: it does not add weight gradients", *drawn(), backend="native")
    config = configure("linear_act", "gelu", (), "preact", "auto")
    assert choose_accumulating(config, torch.device("cpu"), F32).backend == "reference"


@pytest.fixture
def one_process(tmp_path):
    if not dist.is_available():
        pytest.skip("no torch.distributed")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(one_process):
    module = fastbp.LinearAct(6, 8, **FLAG)
    module.weight.main_grad = torch.zeros(8, 6)
    ddp, x = nn.parallel.DistributedDataParallel(module), torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"inside a DistributedDataParallel that reduces gradients.*no_sync"):
        ddp(x)
    with torch.no_grad():
        ddp(x)
    with ddp.no_sync():
        ddp(x).sum().backward()
    assert module.weight.main_grad.any() and module.weight.grad is None and module.bias.grad.any()
    module(x)  # not DDP's call, and not DDP's business


def test_fully_shard(one_process):
    """The parameters inside forward are FSDP's own, without a main_grad; their .grad it reduces."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, grads = init_device_mesh("cpu", (1,)), []
    for flag in (False, True):
        torch.manual_seed(0)
        module = fastbp.MLP(6, 8, 5, gradient_accumulation_fusion=flag, backend="reference")
        fully_shard(module, mesh=mesh)
        for step in range(2):
            module(like(torch.empty(3, 6), step).requires_grad_()).sum().backward()
        grads.append([p.grad.full_tensor() for p in module.parameters()])
    torch.testing.assert_close(*grads)
    module = fastbp.MLP(6, 8, 5, dtype=BF16, **FLAG)
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    fully_shard(module, mesh=mesh)
    with pytest.raises(ValueError, match=r"weights\[0\] must have a main_grad in float32 .* got none.*fully_shard"):
        module(torch.randn(3, 6, dtype=BF16))
