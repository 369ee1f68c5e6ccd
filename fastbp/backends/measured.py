"""What was measured on this machine: which backend, by which way of its, is the fastest for a call of these sizes.

``remember`` writes it into the cache and ``recall`` looks it up, by the form of the call, its activation, dtype, save
policy and sizes; nothing is ever measured in a call. A file belongs to one device, one version of torch, these very
kernels, on a GPU one driver and on a CPU so many threads: its name is the digest of them, and what was measured with
others is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbp import cache
from fastbp.forms import FORMS, Form
from fastbp.problem import Config, check

# PyTorch's operations under its own autograd, as people write them: no backend, for nothing of fastbp's is called.
EAGER = "eager"
Environment = tuple[tuple[str, str], ...]


class Choice(NamedTuple):
    """A backend, and the way in which it is to compute; "" for what its own rule says."""

    backend: str
    route: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.route}".rstrip()


class Sizes(NamedTuple):
    """Rows of x, and the features of x and of every layer: (K, N_1, ..., N_L); a gated layer counts once."""

    rows: int
    features: tuple[int, ...]


class Subject(NamedTuple):
    """What a call is apart from its sizes."""

    form: str
    activation: str
    dtype: str
    save: str


def subject_of(config: Config, dtype: torch.dtype) -> Subject:
    """Of an activation's parameters nothing depends in time."""
    return Subject(config.form.name, config.row.name, str(dtype).removeprefix("torch."), config.save)


def sizes_of(form: Form, data: Tensor, weights: Sequence[Tensor]) -> Sizes:
    """The sizes of a call; ``data`` is x or dy."""
    layers = weights[::2] if form.gated else weights  # gate and up have the same
    rows = data.numel() // max(data.shape[-1], 1)
    return Sizes(rows, (weights[0].shape[1], *(w.shape[0] for w in layers)))


def key_of(subject: Subject, sizes: Sizes) -> str:
    """A problem in the file, and as people read and type it: ``mlp 2048x768x3072x768 gelu float32 preact``."""
    return f"{subject.form} {'x'.join(map(str, (sizes.rows, *sizes.features)))} {' '.join(subject[1:])}"


def parse_key(text: str) -> tuple[Subject, Sizes]:
    """The other way round; ValueError for what is no problem."""
    try:
        form, numbers, activation, dtype, save = text.split()
        rows, *features = map(int, numbers.split("x"))
    except ValueError:
        raise ValueError(
            f"{text!r} is no problem: one is like 'mlp 2048x768x3072x768 gelu float32 preact', with rows and features"
        ) from None
    if form not in FORMS or len(features) < 2 or min(features) < 1 or rows < 1:
        raise ValueError(f"{text!r} is no problem: there are {', '.join(FORMS)}, each of at least 1 row and 2 features")
    return Subject(form, activation, dtype, save), Sizes(rows, tuple(features))


@lru_cache(maxsize=1)
def cpu_facts() -> dict[str, str]:
    """What Linux says of the first core."""
    info = Path("/proc/cpuinfo")
    core = info.read_text().partition("\n\n")[0] if info.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in core.splitlines())}


def file_name(environment: Environment) -> str:
    """The file of an environment."""
    return f"choices-{hashlib.sha256(repr(environment).encode()).hexdigest()[:16]}.json"


def by_sizes(unmeasured: Config, found: Mapping[Sizes, Config]) -> Callable[..., Config]:
    """What gives the choice for every call of one config, by its sizes: of x or dy, what else there is, the weights.

    It costs a look at the shapes, about 0.6 µs for a layer; as an object with ``__call__`` it would be 0.1 µs more.
    Where a forward call takes ``eager``, which computes what PyTorch computes, shapes that make no call are refused.
    """
    by_shapes: dict[Any, Config] = {}  # grows with the sizes a program uses, not with its calls

    def choice(data: Tensor, tensors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Config:
        shapes: Any = data.shape
        for tensor in tensors:
            shapes = (shapes, None if tensor is None else tensor.shape)
        try:
            return by_shapes[shapes]
        except KeyError:
            chosen = found.get(_sizes_if_any(unmeasured.form, data, weights), unmeasured)  # type: ignore[arg-type]
            if chosen.backend == EAGER:
                others = chosen.form.inputs - 1
                if tensors[others] is not weights[0]:  # a backward call, which has all inputs: no shapes are checked
                    return chosen
                check(chosen.form, data, weights, tensors[others + len(weights) :], tensors[:others])  # type: ignore[arg-type]
            by_shapes[shapes] = chosen
            return chosen

    return choice


def _sizes_if_any(form: Form, data: Tensor, weights: Sequence[Tensor]) -> Sizes | None:
    """None for shapes that make no call, which whoever computes will refuse."""
    try:
        return sizes_of(form, data, weights)
    except IndexError:
        return None


def recall(subject: Subject, environment: Environment) -> dict[Sizes, Choice]:
    """What was measured of calls that differ in their sizes alone. The file is read once."""
    return _read(environment).get(subject, {})


@lru_cache(maxsize=16)
def _read(environment: Environment) -> dict[Subject, dict[Sizes, Choice]]:
    found: dict[Subject, dict[Sizes, Choice]] = {}
    for text, entry in inventory(environment).items():
        try:
            subject, sizes = parse_key(text)
            backend, _, route = entry["fastest"].partition(" ")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of another form: as if it were not there
        found.setdefault(subject, {})[sizes] = Choice(backend, route)
    return found


_unwritten: dict[Environment, dict[str, Any]] = {}  # where the cache cannot be written, for this process


def inventory(environment: Environment) -> dict[str, Any]:
    """Every problem of an environment, with what was measured of it."""
    return _problems(cache.read(file_name(environment))) | _unwritten.get(environment, {})


def _problems(content: dict[str, Any]) -> dict[str, Any]:
    found = content.get("problems")
    return found if isinstance(found, dict) else {}


def remember(environment: Environment, problem: str, entry: dict[str, Any]) -> bool:
    """Write down what was measured of a problem: ``{"fastest": name, "milliseconds": {name: ...}, ...}``.

    False, with a warning, where the cache cannot be written: then this process knows it alone.
    """
    new = _unwritten.pop(environment, {}) | {problem: entry}

    def added(content: dict[str, Any]) -> dict[str, Any]:
        return {"environment": dict(environment), "problems": _problems(content) | new}

    written = cache.change(file_name(environment), added)
    if not written:
        _unwritten[environment] = new
    forget()
    return written


def forget() -> None:
    """Read the file again at the next look."""
    _read.cache_clear()
