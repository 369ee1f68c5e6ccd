"""The ops under torch.library's checks."""

import pytest
import support
import torch
from graphs import CASES, GELU, IDENTITY, LEAKY, TANH, draw, each_form
from support import assert_close, compressed_cases, each, flatten, grads, like

from fastbp.activations import bind
from fastbp.forms import FORMS, MLP
from fastbp.saving import exact_policies, find_kept

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def op_case(form, activation, save, tensors, needs=None):
    """Arguments of a form's forward op, and those of its backward op as a graph would hold them."""
    x, weights, biases = tensors
    packed = [*weights, *biases] if form.parts else [weights, biases]
    settings = [activation.name, list(activation.params), save, "auto"]
    forward = [x, *packed, *settings]
    y, residuals = getattr(torch.ops.fastbp, form.name)(*forward)
    needs = [t is not None for t in flatten(*tensors)] if needs is None else needs
    kept = find_kept(form, save, activation.row.grad_reads_output, tuple(needs))
    residuals = [r if k else None for r, k in zip(residuals, kept[1 + len(needs) :], strict=True)]
    first, packed = form.inputs, [x, *packed]
    there = [t if k else None for t, k in zip([*packed[:first], y], kept, strict=False)]
    dy = like(y, seed=1)
    backward = [dy, *there, *packed[first:], residuals, *settings, needs]
    return forward, backward


def check_ops(form, forward, backward):
    torch.library.opcheck(getattr(torch.ops.fastbp, form.name).default, forward)
    torch.library.opcheck(getattr(torch.ops.fastbp, f"{form.name}_backward").default, backward)


OP_CASES = [(form, TANH, save) for form, activation, save in CASES if activation is TANH]
OP_CASES += [(form, activation, "preact") for form in FORMS.values() for activation in (IDENTITY, LEAKY)]
OP_CASES += [(FORMS["linear_act"], IDENTITY, "output"), (MLP, IDENTITY, "output")]


@each(("form", "activation", "save"), OP_CASES)
@each("bias", [True, False])
def test_opcheck(form, activation, save, bias):
    check_ops(form, *op_case(form, activation, save, draw(form, bias=bias, requires_grad=False)))


@each(("form", "activation", "save"), compressed_cases([GELU]))
def test_opcheck_of_compressed_policies(form, activation, save):
    check_ops(form, *op_case(form, activation, save, draw(form, dtype=torch.float16, requires_grad=False)))


@each_form
@each("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_16_bits(form, dtype):
    """One activation by PyTorch's kernels, one by the table's formula."""
    for activation in (TANH, bind("quick_gelu")):
        check_ops(form, *op_case(form, activation, "preact", draw(form, dtype=dtype, requires_grad=False)))


@each_form
def test_opcheck_of_the_derivative(form):
    """Of inputs that take gradients, all of them or x alone: the same in a graph as outside, and that of the call."""
    op = getattr(torch.ops.fastbp, form.name).default
    for save in exact_policies(TANH, form):
        for frozen in (False, True):
            x, weights, biases = draw(form)
            for t in (*weights, *biases):
                t.requires_grad_(not frozen)
            with torch.no_grad():
                forward, _ = op_case(form, TANH, save, (x, weights, biases))
            torch.library.opcheck(op, forward)
            y = support.call(form, x, weights, biases, activation=TANH, save=save)
            inputs, dy = [t for t in (x, *weights, *biases) if t.requires_grad], like(y, seed=1)
            for mine, expected in zip(grads(op(*forward)[0], inputs, dy), grads(y, inputs, dy), strict=True):
                assert_close(mine, expected)


@each_form
@each("rows", [(), (2, 3), (0,), (2, 0, 3), (1,)])
def test_opcheck_of_other_shapes(form, rows):
    for save in exact_policies(TANH, form):
        check_ops(form, *op_case(form, TANH, save, draw(form, rows, requires_grad=False)))


@each_form
def test_opcheck_of_other_strides(form):
    """A transposed x, weights that are slices, a dy of stride zero."""
    x, weights, biases = draw(form, (3, 4), requires_grad=False)
    weights = [torch.stack([w, w], -1)[..., 0] for w in weights]
    x = x.transpose(0, 1)
    weights[: form.inputs - 1] = [t.transpose(0, 1) for t in weights[: form.inputs - 1]]
    for activation in (TANH, GELU, IDENTITY):
        forward, backward = op_case(form, activation, "preact", (x, weights, biases))
        check_ops(form, forward, backward)
        check_ops(form, forward, [torch.ones((), dtype=x.dtype).expand_as(backward[0]), *backward[1:]])


@each_form
def test_opcheck_of_partial_needs(form):
    """Each input alone, and all but each, with what backward then reads and nothing else."""
    tensors = draw(form, requires_grad=False)
    count = len(flatten(*tensors))
    op = getattr(torch.ops.fastbp, f"{form.name}_backward").default
    for save in exact_policies(TANH, form):
        for wanted in range(count):
            for needs in ([i == wanted for i in range(count)], [i != wanted for i in range(count)]):
                _, backward = op_case(form, TANH, save, tensors, needs)
                torch.library.opcheck(op, backward, test_utils=("test_schema", "test_faketensor"))
