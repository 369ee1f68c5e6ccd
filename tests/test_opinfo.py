"""PyTorch's own checks for operators, from its description of an operator, an OpInfo, for each function of fastbp.

What PyTorch's test_ops.py asks of its operators is asked here of ours, but for what they do not have: an in-place
variant, out=, TorchScript, and NumPy references.
"""

import functools
import itertools

import support
import torch
from support import on_flat
from torch._prims_common import compare_tensor_meta
from torch._subclasses import CrossRefFakeMode, FakeTensorMode
from torch.testing import make_tensor
from torch.testing._internal import composite_compliance
from torch.testing._internal.common_device_type import OpDTypes, instantiate_device_type_tests, ops
from torch.testing._internal.common_dtype import floating_types_and, get_all_dtypes
from torch.testing._internal.common_utils import TestCase, TestGradients
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

import fastbp
from fastbp.activations import bind
from fastbp.backends import native
from fastbp.forms import FORMS, LINEAR_ACT
from fastbp.saving import exact_policies

SIZES = (3, 4, 2, 3)  # in, hidden, hidden of mlp, out


def flat_call(form, activation, save):
    """A function of the inputs, weights and biases, all one tensor each."""
    if form.name == "linear_act":
        return functools.partial(fastbp.linear_act, activation=activation, save=save)
    return on_flat(support.call, form, activation=activation, save=save)


def sample_inputs(form, op_info, device, dtype, requires_grad, **_):
    draw = functools.partial(make_tensor, low=-2, high=2, device=device, dtype=dtype, requires_grad=requires_grad)
    for leading, bias in [((5,), True), ((5,), False), ((), True), ((2, 2), True), ((0,), True)]:
        like = support.flatten(*support.tensors(form, torch.float32, seed=0, rows=leading, features=SIZES, bias=bias))
        yield SampleInput(*[None if t is None else draw(*t.shape) for t in like])


def error_inputs(form, op_info, device, **_):
    def error(error_type, error_regex, *, at, change):
        x, weights, biases = support.tensors(form, torch.float32, seed=0, features=SIZES, device=device)
        arguments = [x, *weights, *biases]
        arguments[at] = change(arguments[at].detach())
        return ErrorInput(SampleInput(*arguments), error_type=error_type, error_regex=error_regex)

    first, weight, bias = form.names_of_inputs[0], form.inputs, 1 + len(support.tensors(form, seed=0)[1])
    if weight == 1:
        yield error(ValueError, rf"to match {first} \(37, 7\)", at=0, change=lambda x: x.new_zeros(37, 7))
    yield error(ValueError, f"{first} must have at least one dimension", at=0, change=lambda x: x.new_zeros(()))
    yield error(ValueError, r"did you mean \w+(\[0\])?\.T\?", at=weight, change=lambda w: w.t())
    yield error(ValueError, r"must be \(\d,\) to match", at=bias, change=lambda b: b[:1])
    yield error(TypeError, f"must have the dtype of {first}", at=1, change=torch.Tensor.double)
    yield error(TypeError, "complex layers are not supported", at=0, change=lambda x: x.to(torch.complex64))


def op_info(form, activation, save):
    return OpInfo(
        f"fastbp.{form.name}",
        variant_test_name=f"{activation.name}_{save}",
        op=flat_call(form, activation, save),
        dtypes=floating_types_and(torch.bfloat16, torch.float16),
        sample_inputs_func=functools.partial(sample_inputs, form),
        error_inputs_func=functools.partial(error_inputs, form),
        supports_out=False,
        supports_forward_ad=True,
        supports_fwgrad_bwgrad=True,
        check_batched_forward_grad=True,
    )


# Every form and policy with an activation that has a slope from z and one from y; and one that has the first only.
OPS = [
    op_info(form, bind(name), save)
    for form in FORMS.values()
    for name in ("gelu", "tanh", "relu2")
    for save in exact_policies(bind(name), form)
    if name == "tanh" or (save == "preact" if name == "gelu" else form is LINEAR_ACT)
]
ONE_OF_EACH_FORM = list({op.name: op for op in OPS}.values())
all_ops = ops(OPS, dtypes=OpDTypes.supported, allowed_dtypes=[torch.float64])
tanh_ops = ops([op for op in OPS if "tanh" in op.variant_test_name], allowed_dtypes=[torch.float64])


def inputs_of(sample):
    return [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]


def run(op, sample, dy=None):
    """Output and gradients."""
    y = op(sample.input, *sample.args, **sample.kwargs)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y) if dy is None else dy
    return [y, *torch.autograd.grad(y, inputs_of(sample), dy)]


def transformed(sample, change):
    """A new sample whose tensors are new leaves."""
    return sample.transform(lambda t: change(t.detach()).requires_grad_() if isinstance(t, torch.Tensor) else t)


class TestOperators(TestCase):
    @ops(ONE_OF_EACH_FORM, dtypes=OpDTypes.none)
    def test_dtypes(self, device, op):
        """Served, forward and backward, are the dtypes that are claimed, and the others are refused."""
        float8 = [torch.float8_e4m3fn, torch.float8_e5m2]
        for dtype in {*get_all_dtypes(), *float8}:
            samples = op.sample_inputs(device, torch.float32, requires_grad=True)
            sample = transformed(next(iter(samples)), torch.clone)
            if op.supports_dtype(dtype, torch.device(device).type):
                for result in run(op, transformed(sample, lambda t, dtype=dtype: t.to(dtype))):
                    self.assertEqual(result.dtype, dtype)
            else:
                sample = sample.transform(lambda t, dtype=dtype: t.to(dtype))
                with self.assertRaisesRegex(TypeError, f"fastbp.*must be one of .*{dtype}"):
                    op(sample.input, *sample.args)

    @ops(ONE_OF_EACH_FORM, dtypes=OpDTypes.none)
    def test_errors(self, device, op):
        for error in op.error_inputs(device):
            sample = error.sample_input
            with self.assertRaisesRegex(error.error_type, error.error_regex):
                op(sample.input, *sample.args, **sample.kwargs)

    @all_ops
    def test_out_is_not_supported(self, device, dtype, op):
        self.assertFalse(op.supports_out)
        sample = next(iter(op.sample_inputs(device, dtype)))
        with self.assertRaisesRegex(TypeError, "unexpected keyword argument 'out'"):
            op(sample.input, *sample.args, out=sample.input.new_empty(0))

    @all_ops
    def test_noncontiguous_samples(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            expected = run(op, sample)
            strided = sample.noncontiguous()
            leaves = transformed(strided, lambda t: t)
            self.assertFalse(all(t.is_contiguous() for t in inputs_of(leaves)))
            dy = torch.linspace(-1, 1, expected[0].numel(), device=device, dtype=dtype).view_as(expected[0])
            odd = torch.stack([dy, torch.full_like(dy, torch.nan)], -1)[..., 0]
            self.assertEqual(run(op, leaves, odd), expected)

    @all_ops
    def test_neg_view(self, device, dtype, op):
        """A tensor whose sign is a bit that nobody has written down yet."""
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            lazy = transformed(sample, lambda t: torch._neg_view(-t))
            self.assertTrue(all(t.is_neg() for t in inputs_of(lazy)))
            self.assertEqual(run(op, lazy), run(op, sample))

    @all_ops
    def test_cow_input(self, device, dtype, op):
        """A copy-on-write input is only read, forward and backward."""
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            lazy = transformed(sample, torch._lazy_clone)
            y = op(lazy.input, *lazy.args)
            dy = torch._lazy_clone(torch.ones_like(y))
            torch.autograd.grad(y, inputs_of(lazy), dy)
            self.assertTrue(all(torch._C._is_cow_tensor(t) for t in (*inputs_of(lazy), dy) if t.numel()))

    @all_ops
    def test_vmap(self, device, dtype, op):
        """With one tensor batched, with all but one, with all, at the front and at the back: the same as a loop."""
        for sample in itertools.islice(op.sample_inputs(device, dtype), 3):
            arguments = [sample.input, *sample.args]
            present = {i for i, t in enumerate(arguments) if t is not None}
            chosen = [present, *({i} for i in present), *(present - {i} for i in present)]
            for dim, which in itertools.product((0, -1), chosen):
                in_dims = tuple(dim if i in which else None for i in range(len(arguments)))
                batched = [
                    t if d is None else torch.stack([t, t.sin(), -t], d)
                    for t, d in zip(arguments, in_dims, strict=True)
                ]
                loop = [
                    op(*(t if d is None else t.select(d, k) for t, d in zip(batched, in_dims, strict=True)))
                    for k in range(3)
                ]
                self.assertEqual(torch.vmap(op.op, in_dims)(*batched), torch.stack(loop))

    @all_ops
    def test_vmap_of_grad(self, device, dtype, op):
        """Gradients for each sample of a batch: the same as a loop."""
        for sample in itertools.islice(op.sample_inputs(device, dtype), 2):
            rest = [t for t in sample.args if t is not None]

            def loss(x, *rest, sample=sample):
                tensors = iter(rest)
                return op(x, *(None if t is None else next(tensors) for t in sample.args)).square().sum()

            every = tuple(range(1 + len(rest)))
            per_sample = torch.func.grad(loss, argnums=every)
            others = getattr(op.op, "inputs", 1) - 1  # of the shape of x
            in_dims = (0, *(0 if i < others else None for i in range(len(rest))))
            batched = torch.vmap(per_sample, in_dims)(sample.input, *rest)
            loop = [per_sample(*inputs, *rest[others:]) for inputs in zip(sample.input, *rest[:others], strict=True)]
            self.assertEqual(batched, tuple(torch.stack(grads) for grads in zip(*loop, strict=True)))


class TestOperatorGradients(TestGradients):
    """Against finite differences, for a batch of gradients too, and where a gradient is undefined."""

    @all_ops
    def test_fn_grad(self, device, dtype, op):
        self._grad_test_helper(device, dtype, op, op.get_op())

    @all_ops
    def test_fn_gradgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "bwgrad_bwgrad")

    @all_ops
    def test_forward_mode_AD(self, device, dtype, op):
        batched = op.check_batched_forward_grad
        options = dict(check_forward_ad=True, check_backward_ad=False, check_batched_grad=False)
        self._grad_test_helper(device, dtype, op, op.get_op(), **options, check_batched_forward_grad=batched)

    @all_ops
    def test_fn_fwgrad_bwgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "fwgrad_bwgrad")


class TestCompositeCompliance(TestCase):
    """Any mix of plain tensors and subclasses, forward and backward: nobody reads memory behind a subclass's back."""

    def sample(self, op, device, dtype, requires_grad=False, bias=True):
        sample = next(itertools.islice(op.sample_inputs(device, dtype, requires_grad), 0 if bias else 1, None))
        return op.get_op(), (sample.input, *sample.args), sample.kwargs

    @tanh_ops
    def test_operator(self, device, dtype, op):
        sample = self.sample(op, device, dtype)
        composite_compliance.check_with_mode(*sample, self.assertEqual)
        composite_compliance.check_all_permutations(*sample, self.assertEqual)

    @tanh_ops
    def test_backward(self, device, dtype, op):
        sample = self.sample(op, device, dtype, requires_grad=True)
        composite_compliance.check_backward_formula(*sample, assert_equal_fn=self.assertEqual)

    @tanh_ops
    def test_forward_ad(self, device, dtype, op):
        # Four times as many mixes for each tensor more, so only linear_act brings its bias.
        sample = self.sample(op, device, dtype, requires_grad=True, bias=op.name == "fastbp.linear_act")
        composite_compliance.check_forward_ad_formula(*sample, assert_equal_fn=self.assertEqual)


class TestFakeTensor(TestCase):
    """Every operation that runs, forward and backward, against its fake; and calls of fake tensors."""

    def crossref(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            seen = []
            with CrossRefFakeMode(lambda func, seen=seen: bool(seen.append(func))):
                composite_compliance.compute_expected_grads(op.get_op(), [sample.input, *sample.args], sample.kwargs)
            self.assertTrue(any(func.namespace != "aten" for func in seen) or native.unavailable)

    @all_ops
    def test_fake_crossref_backward_no_amp(self, device, dtype, op):
        self.crossref(device, dtype, op)

    @ops(OPS, dtypes=OpDTypes.supported, allowed_dtypes=[torch.float32])
    def test_fake_crossref_backward_amp(self, device, dtype, op):
        for cast_to in (torch.bfloat16, torch.float16):
            with torch.autocast(device, cast_to):
                self.crossref(device, dtype, op)

    def of_fakes(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            mode = FakeTensorMode()
            fake = sample.transform(lambda t, mode=mode: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t)
            real = run(op, sample)
            with mode:
                for found, expected in zip(run(op, fake), real, strict=True):
                    compare_tensor_meta(found, expected, check_strides=True)

    @all_ops
    def test_fake(self, device, dtype, op):
        self.of_fakes(device, dtype, op)

    @ops(OPS, dtypes=OpDTypes.supported, allowed_dtypes=[torch.float32])
    def test_fake_autocast(self, device, dtype, op):
        with torch.autocast(device):
            self.of_fakes(device, dtype, op)


for test_class in (TestOperators, TestOperatorGradients, TestCompositeCompliance, TestFakeTensor):
    instantiate_device_type_tests(test_class, globals(), only_for="cpu")
