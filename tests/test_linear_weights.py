"""fastbp.Linear under autocast and inference, of patched functions and of weights that are not plain."""

import pytest
import torch
import torch.nn.functional as F
from linear_twins import MAKERS, ROWS, WIDTH, assert_as_stock, assert_close, assert_equal, outcome, run
from torch import nn

import fastbp
from fastbp import backends
from fastbp.backends.measured import EAGER
from fastbp.linear import of_any_size


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


@pytest.mark.parametrize(
    "where", ["forward", "backward too", "around h alone", "around the linear alone", "off inside"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(maker, where, dtype):
    """Outputs to the bit, with PyTorch's casts; gradients within rounding of the 16 bits."""
    make, what = maker

    def program(fc, x, seen):
        def region(enabled=True):
            return torch.autocast("cpu", dtype=dtype, enabled=enabled)

        if where == "around h alone":
            with region():
                h = make(fc[0](x), fc[1](x))
            return fc[2](h.float())
        if where == "around the linear alone":
            h = make(fc[0](x), fc[1](x))
            with region():
                return fc[2](h)
        with region():
            h = make(fc[0](x), fc[1](x))
            if where == "off inside":
                with region(False):
                    return fc[2](h.float())
            return fc[2](h)

    def backward(y, x, parameters, result):
        with torch.autocast("cpu", dtype=dtype, enabled=where == "backward too"):
            return torch.autograd.grad(y.float().square().sum(), [x, *parameters], allow_unused=True)

    fused = "linear of to_copy" if where in ("around h alone", "around the linear alone", "off inside") else what
    options = {"dtype": torch.float32, "rows": 64, "width": 32, "tolerance": 5e-2}
    assert_as_stock(program, fused=fused, after=backward, **options)


def test_backward_in_a_region_is_that_of_outside(maker):
    """Whoever calls it there wants the gradients that forward had in mind."""
    make, _ = maker

    def program(fc, x, seen):
        return fc[2](make(fc[0](x), fc[1](x)))

    def backward(y, x, parameters, result):
        dy, wanted = torch.ones_like(y), [result.linears[2].weight, result.linears[2].bias]
        outside = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.autograd.grad(y, wanted, dy)
        assert_close(inside, outside, 1e-6)
        return outside

    run(fastbp.Linear, program, after=backward, dtype=torch.float32, rows=64, width=32)


def test_autocast_is_on_again_after_an_error():
    layer, h = fastbp.Linear(WIDTH, WIDTH), F.silu(torch.randn(ROWS, WIDTH + 1, requires_grad=True))
    with torch.autocast("cpu", dtype=torch.bfloat16), of_any_size():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(h)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_bytes():
    """z, in 16 bits, and the cast of the weight; not h."""
    kept = []
    for kind in (nn.Linear, fastbp.Linear):
        net = nn.Sequential(kind(WIDTH, WIDTH), nn.SiLU(), kind(WIDTH, WIDTH))
        x = torch.randn(4096, WIDTH)
        with of_any_size(), torch.autocast("cpu", dtype=torch.bfloat16), fastbp.SavedBytes(exclude=[x, net]) as saved:
            y = net(x)
        kept.append(saved.total)
        del y
    assert kept[0] - kept[1] == 2 * 4096 * WIDTH


def test_inference(maker):
    make, _ = maker
    layers = [fastbp.Linear(WIDTH, WIDTH) for _ in range(3)]
    stock = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    for a, b in zip(stock, layers, strict=True):
        a.load_state_dict(b.state_dict())
    x = torch.randn(ROWS, WIDTH)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), of_any_size():
            results = []
            for fc in (stock, layers):
                torch.manual_seed(0)
                results.append(fc[2](make(fc[0](x), fc[1](x))))
                with torch.enable_grad():
                    results.append(fc[2](make(fc[0](x), fc[1](x)).detach()))
        assert_equal(results[2:3], results[0:1])
        assert outcome(layers[2])[0] != "fused"


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


@pytest.mark.parametrize("where", ["F.linear", "nn.Linear.forward", "of the object"])
def test_patches_are_called(maker, where, monkeypatch):
    make, _ = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        with monkeypatch.context() as patch:
            if where == "F.linear":
                patch.setattr(F, "linear", doubled(F.linear))
            elif where == "nn.Linear.forward":
                patch.setattr(nn.Linear, "forward", doubled(nn.Linear.forward))
            else:
                fc[2].forward = doubled(fc[2].forward)
            return fc[2](h)

    stock, ours = run(nn.Linear, program), run(fastbp.Linear, program)
    assert_equal([ours.y], [stock.y])
    assert_close(ours.grads, stock.grads, 1e-10)
    plain = run(nn.Linear, lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))))
    assert_equal([ours.y], [2 * plain.y])


def test_complex_numbers_are_pytorchs_affair():
    """Whose gradient of a weight is of the conjugate of h."""

    def program(fc, x, seen):
        return fc[2](fc[0](x) ** 2)

    def backward(y, x, parameters, result):
        return torch.autograd.grad(y.abs().square().sum(), [x, *parameters], allow_unused=True)

    assert_as_stock(program, left="its input is torch.complex128", dtype=torch.complex128, after=backward)


def test_subclasses_of_tensor_are_pytorchs_affair():
    class Own(torch.Tensor):
        pass

    def program(fc, x, seen):
        return fc[2](F.silu(fc[0](x).as_subclass(Own))).as_subclass(torch.Tensor)

    assert_as_stock(program)


class Tagged(torch.Tensor):
    """A subclass of Tensor as weight, whose products are its own affair."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2.0 if function is F.linear else result


def test_weights_of_other_classes(maker):
    make, _ = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        weight = fc[2].weight.detach().as_subclass(Tagged)
        del fc[2].weight
        fc[2].weight = weight
        return fc[2](h).as_subclass(torch.Tensor)

    def backward(y, x, parameters, result):
        return torch.autograd.grad(y.square().sum(), x)

    assert_as_stock(program, left="its weight is a Tagged", after=backward)


@pytest.mark.parametrize("how", ["weight_norm", "parametrize", "plain attribute", "no bias registered"])
def test_weights_that_are_computed(maker, how):
    make, _what = maker

    def prepare(linears):
        if how == "weight_norm":
            torch.nn.utils.parametrizations.weight_norm(linears[2])
        elif how == "parametrize":
            torch.nn.utils.parametrize.register_parametrization(linears[2], "weight", nn.Tanh())
        else:
            name = "weight" if how == "plain attribute" else "bias"
            value = getattr(linears[2], name).detach().clone()
            delattr(linears[2], name)
            setattr(linears[2], name, value)

    def program(fc, x, seen):
        return fc[2](make(fc[0](x), fc[1](x)))

    def backward(y, x, parameters, result):
        return torch.autograd.grad(y.square().sum(), [x, *result.linears[2].parameters()])

    stock, ours = (run(kind, program, after=backward, prepare=prepare) for kind in (nn.Linear, fastbp.Linear))
    assert_equal([ours.y], [stock.y])
    assert_close(ours.grads, stock.grads, 1e-10)


def test_mixed_devices_and_dtypes_are_pytorchs_affair():
    for change in (lambda m: m.to("meta"), lambda m: m.to(torch.float32)):

        def outcome_of(kind, change=change):
            layer = change(kind(WIDTH, WIDTH, dtype=torch.float64))
            try:
                return layer(F.silu(torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)))
            except RuntimeError as error:
                return str(error)

        with of_any_size():
            a, b = outcome_of(nn.Linear), outcome_of(fastbp.Linear)
        assert type(a) is type(b) and (a == b if isinstance(a, str) else a.device == b.device)


@pytest.mark.parametrize("maker", ["activation", "gate"])
def test_a_measured_choice_of_pytorch(maker, monkeypatch):
    """Where tuning found PyTorch's own operations the fastest: the linear is made of them, and keeps as little."""
    make, fused = MAKERS[maker]

    def choose(*arguments):
        return backends.with_backend(backends.choose_settled(*arguments), EAGER)

    monkeypatch.setattr("fastbp.linear.choose_settled", choose)
    assert_as_stock(lambda linears, x, also: linears[2](make(linears[0](x), linears[1](x))), fused=fused)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nested_inputs(dropout):
    """Tensors of the strided nested layout are plain Tensors by their class."""
    torch.manual_seed(0)

    def step(kind, fused):
        torch.manual_seed(0)
        one, drop, two = kind(6, 8), nn.Dropout(dropout), kind(8, 6)
        model = nn.Sequential(one, nn.GELU(), drop, two)
        if fused:
            fastbp.fuse(model)
        x = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)], requires_grad=True)
        with of_any_size():
            y = two(drop(F.gelu(one(x))))
        torch.nested.to_padded_tensor(y, 0.0).square().sum().backward()
        return y.unbind(), [p.grad for p in model.parameters()]

    for got, expected in zip(step(nn.Linear, True), step(nn.Linear, False), strict=True):
        assert_equal(got, expected)


def test_no_features_out():
    """Where nothing tells how many rows a gradient without columns has."""
    for kind in (nn.Linear, fastbp.Linear):
        torch.manual_seed(0)
        z = torch.randn(4, 6, requires_grad=True)
        linear = kind(6, 0)
        with of_any_size():
            linear(F.silu(z)).sum().backward()
        assert z.grad.abs().sum() == 0 and linear.weight.grad.shape == (0, 6)
