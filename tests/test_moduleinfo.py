"""The modules under PyTorch's own checks for modules, from its description of a module's inputs."""

import copy

import torch
from module_pairs import OUT, PAIRS, H, K, through_file, through_pickle
from torch.testing import make_tensor
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_dtype import floating_types_and
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    FunctionInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    modules,
)
from torch.testing._internal.common_utils import (
    TestCase,
    freeze_rng_state,
    gradcheck,
    gradgradcheck,
    noncontiguous_like,
)

import fastbp


def reference_of(stock):
    """A reference_fn: the stock module with the parameters of the module under test."""

    def reference(module, parameters, *args, **kwargs):
        twin = stock(bias="bias" in str(list(module.state_dict())), dtype=parameters[0].dtype)
        twin.load_state_dict(module.state_dict())
        return twin.to(parameters[0].device)(*args, **kwargs)

    return reference


CONSTRUCTORS = {
    fastbp.Linear: (K, OUT),
    fastbp.LinearAct: (K, OUT),
    fastbp.GatedLinear: (K, OUT),
    fastbp.MLP: (K, H, OUT),
    fastbp.GatedMLP: (K, H, OUT),
}


def module_inputs(module_info, device, dtype, requires_grad, training, **_):
    cls = module_info.module_cls
    sizes, reference = CONSTRUCTORS[cls], reference_of(PAIRS[cls.__name__][1])

    def tensor(*shape):
        return make_tensor(shape, device=device, dtype=dtype, requires_grad=requires_grad)

    def sample(*forward_args, desc, bias=True, **forward_kwargs):
        constructor = FunctionInput(*sizes, bias=bias)
        forward = FunctionInput(*forward_args, **forward_kwargs)
        return ModuleInput(constructor, forward, desc=desc, reference_fn=reference)

    return [
        sample(input=tensor(4, K), desc="by_name"),
        sample(tensor(4, K), bias=False, desc="no_bias"),
        sample(tensor(K), desc="no_batch_dim"),
        sample(tensor(2, 2, K), desc="leading_sizes"),
        sample(tensor(0, K), desc="empty"),
    ]


def module_error_inputs(module_info, device, dtype, requires_grad, training, **_):
    sizes = CONSTRUCTORS[module_info.module_cls]

    def error(shape, error_type, error_regex):
        module_input = ModuleInput(FunctionInput(*sizes), FunctionInput(make_tensor(shape, device=device, dtype=dtype)))
        on = ModuleErrorEnum.FORWARD_ERROR
        return ErrorModuleInput(module_input, error_on=on, error_type=error_type, error_regex=error_regex)

    if module_info.module_cls is fastbp.Linear:  # it is F.linear that refuses
        return [
            error((4, K + 1), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
            error((), RuntimeError, "1D"),
        ]
    return [
        error((4, K + 1), ValueError, r"to match x \(4, 6\)"),
        error((), ValueError, "x must have at least one dimension"),
    ]


INFOS = [
    ModuleInfo(
        cls,
        module_inputs_func=module_inputs,
        module_error_inputs_func=module_error_inputs,
        dtypes=floating_types_and(torch.bfloat16, torch.float16),
    )
    for cls in CONSTRUCTORS
]


# Two ways to the same number agree in these; how exact the narrower dtypes are is the subject of test_accuracy.py.
WIDE = [torch.float32, torch.float64]


class TestModules(TestCase):
    """The checks of PyTorch's test_modules.py; its in-place ones have no object in modules like these."""

    def samples(self, module_info, device, dtype, training, requires_grad=False):
        """Each sample input with a module made and placed for it."""
        for sample in module_info.module_inputs_func(module_info, device, dtype, requires_grad, training):
            with freeze_rng_state():
                constructor = sample.constructor_input
                module = module_info.module_cls(*constructor.args, **constructor.kwargs)
                yield sample, module.to(device, dtype).train(training)

    def call(self, sample, module, transform=lambda t: t):
        args = [transform(t) for t in sample.forward_input.args]
        return module(*args, **{key: transform(t) for key, t in sample.forward_input.kwargs.items()})

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_forward(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
            self.assertEqual(self.call(sample, module), expected)

    @modules(INFOS)
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for sample, _ in self.samples(module_info, device, dtype, training):
            constructor = sample.constructor_input
            module = module_info.module_cls(*constructor.args, device=device, dtype=dtype, **constructor.kwargs)
            for parameter in module.parameters():
                self.assertEqual((str(parameter.device), parameter.dtype), (device, dtype))

    @modules(INFOS)
    def test_pickle_deepcopy_repr(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            expected = self.call(sample, module)
            for twin in (through_pickle(module), copy.deepcopy(module)):
                self.assertEqual(self.call(sample, twin), expected, atol=0, rtol=0)
                self.assertEqual(repr(twin), repr(module))

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training, requires_grad=True):
            found = []
            for transform in (torch.clone, noncontiguous_like):
                inputs = []

                def leaf(t, transform=transform, inputs=inputs):
                    inputs.append(transform(t.detach()).requires_grad_())
                    return inputs[-1]

                y = self.call(sample, module, leaf)
                dy = transform(torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view_as(y))
                found.append([y, *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)])
            self.assertEqual(*found)

    @modules(INFOS)
    def test_to_and_save_load(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            there_and_back = copy.deepcopy(module).to(torch.float64).to(dtype)
            self.assertEqual(self.call(sample, there_and_back), self.call(sample, module), atol=0, rtol=0)
            self.assertEqual(self.call(sample, through_file(module)), self.call(sample, module), atol=0, rtol=0)

    @modules(INFOS, allowed_dtypes=WIDE)
    def test_memory_format(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            if sample.desc == "leading_sizes":
                x = make_tensor((2, 3, 2, K), device=device, dtype=dtype)
                expected = module(x)
                module.to(memory_format=torch.channels_last)
                self.assertEqual(module(x.to(memory_format=torch.channels_last)), expected)

    @modules(INFOS)
    def test_if_train_and_eval_modes_differ(self, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training):
            differ = not torch.equal(self.call(sample, module.train()), self.call(sample, module.eval()))
            self.assertEqual(differ, module_info.train_and_eval_differ)

    @modules(INFOS)
    def test_errors(self, device, dtype, module_info, training):
        for error in module_info.module_error_inputs_func(module_info, device, dtype, False, training):
            sample = error.module_error_input
            constructor = sample.constructor_input
            module = module_info.module_cls(*constructor.args, **constructor.kwargs).to(device, dtype)
            with self.assertRaisesRegex(error.error_type, error.error_regex):
                self.call(sample, module)

    def check_gradients(self, check, device, dtype, module_info, training):
        for sample, module in self.samples(module_info, device, dtype, training, requires_grad=True):
            names = [name for name, _ in module.named_parameters()]
            inputs = [*sample.forward_input.args, *sample.forward_input.kwargs.values()]

            def function(x, *parameters, module=module, names=names):
                return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

            arguments = (*inputs, *(p.detach().requires_grad_() for p in module.parameters()))
            self.assertTrue(check(function, arguments))

    @modules(INFOS, allowed_dtypes=[torch.float64])
    def test_grad(self, device, dtype, module_info, training):
        def check(function, arguments):
            return gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)

        self.check_gradients(check, device, dtype, module_info, training)

    @modules(INFOS, allowed_dtypes=[torch.float64])
    def test_gradgrad(self, device, dtype, module_info, training):
        self.check_gradients(gradgradcheck, device, dtype, module_info, training)


instantiate_device_type_tests(TestModules, globals(), only_for="cpu")
