"""The calls that a model makes, and those that somebody types: what there is to measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastbp import backends
from fastbp.activations import ROWS, bind
from fastbp.backends.measured import Sizes, key_of, parse_key, sizes_of, subject_of
from fastbp.forms import FORMS, Form
from fastbp.fusion.sample import as_call, undisturbed
from fastbp.problem import DTYPES, Config, configure
from fastbp.saving import check_dtype, resolve


class Job(NamedTuple):
    """A call of no particular tensors: which biases there are, and which of its tensors take gradients."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    biases: tuple[bool, ...]
    needs: tuple[bool, ...]  # the inputs, the weights, the biases

    @property
    def key(self) -> str:
        return key_of(subject_of(self.config, self.dtype), self.sizes)


def to_plain(job: Job) -> list[Any]:
    """A job in plain values, for another process."""
    dtype = str(job.dtype).removeprefix("torch.")
    return [job.config.names, str(job.device), dtype, job.sizes, job.biases, job.needs]


def from_plain(values: Sequence[Any]) -> Job:
    """The other way round; of JSON, too, which has lists alone."""
    (form, activation, params, save, backend), device, dtype, (rows, features), biases, needs = values
    config = configure(form, activation, tuple(params), save, backend)
    sizes = Sizes(rows, tuple(features))
    return Job(config, torch.device(device), getattr(torch, dtype), sizes, tuple(biases), tuple(needs))


class Seen(NamedTuple):
    """What a run of a model showed: its calls with how often each came, and how many named their backend."""

    jobs: dict[Job, int]
    named: int


def watch(where: str, model: nn.Module, sample_inputs: Any) -> Seen:
    """Run the model once, as it is, and see its calls.

    Calls that differ in nothing but who takes gradients are one, measured with all the gradients that any of them
    takes; with every gradient where none does, as under torch.no_grad, for training is what is measured.
    """
    found: dict[str, Job] = {}
    counts: dict[str, int] = {}
    named = 0

    def see(config: Config, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
        nonlocal named
        if config.backend != backends.AUTO:
            named += 1
            return
        _, weights, given_biases = config.form.split((x, *tensors))
        needs = tuple(t is not None and t.requires_grad for t in (x, *tensors))
        biases = tuple(t is not None for t in given_biases)
        job = Job(config, x.device, x.dtype, sizes_of(config.form, x, weights), biases, needs)  # type: ignore[arg-type]
        known = found.get(job.key, job)
        both = tuple(a or b for a, b in zip(known.needs, needs, strict=True))
        found[job.key] = job._replace(needs=both, biases=tuple(map(max, known.biases, biases)))
        counts[job.key] = counts.get(job.key, 0) + 1

    args, kwargs = as_call(sample_inputs)
    with undisturbed(model), backends.watching(see):
        try:
            tree_leaves(model(*args, **kwargs))
        except Exception as error:
            raise ValueError(
                f"{where}: the model does not run with sample_inputs ({type(error).__name__}: {error}); they are a "
                "tensor, a tuple of arguments or a dict of keyword arguments for it"
            ) from error
    return Seen({_trained(job): counts[key] for key, job in found.items() if job.sizes.rows}, named)


def _trained(job: Job) -> Job:
    return job if any(job.needs) else job._replace(needs=_all_needs(job.config.form, job.biases))


def _all_needs(form: Form, biases: tuple[bool, ...]) -> tuple[bool, ...]:
    return (*[True] * (form.inputs + len(biases)), *biases)


def parse(where: str, text: str, device: torch.device) -> Job:
    """The job of ``mlp 2048x768x3072x768 gelu float32 preact``, with all biases and gradients; ``auto`` may be the
    policy. ValueError where it is none.
    """
    subject, sizes = parse_key(text)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    form = FORMS[subject.form]
    if subject.activation not in ROWS or subject.dtype not in dtypes:
        raise ValueError(
            f"{where}: {text!r} must have an activation of {', '.join(ROWS)} and a dtype of {', '.join(dtypes)}"
        )
    layers = len(sizes.features) - 1
    expected = len(form.parts) - (form.gated and not form.given)  # gate and up are one layer
    if form.parts and layers != expected:
        count = expected + 1
        raise ValueError(f"{where}: {text!r} must have {count} features after the rows, got {len(sizes.features)}")
    activation, dtype = bind(subject.activation), dtypes[subject.dtype]
    save = resolve(subject.save, activation, form, where)
    check_dtype(save, dtype, form)
    biases = (True,) * (len(form.parts) or layers)
    config = configure(form.name, activation.name, activation.params, save, backends.AUTO)
    return Job(config, device, dtype, sizes, biases, _all_needs(form, biases))
