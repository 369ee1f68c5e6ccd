"""The settings of a call, checked; and ``use``, which sets the defaults of some for a while."""

from __future__ import annotations

import threading
from typing import Any

from fastbp import backends, recognition, saving
from fastbp.forms import Form
from fastbp.problem import Config, Names, configure


class _Defaults(threading.local):
    def __init__(self) -> None:  # of instances, not of the class: Dynamo guards only these
        self.both: tuple[str | None, str | None] = (None, None)  # save and backend: looking one thing up is cheaper


defaults = _Defaults()


class use:
    """Set the backend or the save policy for the calls of this thread that do not name their own.

    ``with fastbp.use(backend="reference", save="recompute"): ...``. A call or module that names a backend or a policy
    keeps it; a compiled call is compiled anew for another setting. Raises as the functions do for an unknown name; a
    policy that is illegal for an activation is refused by the call it reaches.
    """

    def __init__(self, backend: str | None = None, save: str | None = None) -> None:
        if backend is None and save is None:
            raise ValueError("fastbp.use: neither backend nor save was given, so it would change nothing")
        self.backend = None if backend is None else backends.check_name(backend, "fastbp.use")
        self.save = None if save is None else saving.check_name(save, "fastbp.use")
        self._before: list[tuple[str | None, str | None]] = []

    def __enter__(self) -> None:
        save, backend = defaults.both
        self._before.append((save, backend))
        defaults.both = (save if self.save is None else self.save, backend if self.backend is None else self.backend)

    def __exit__(self, *exception: object) -> None:
        defaults.both = self._before.pop()


def settle(
    form: Form,
    activation: Any,
    save: str,
    backend: str | None,
    defaults: tuple[str | None, str | None],
) -> Names:
    """The settings of a call, checked, as ``Config.names``. ``defaults`` are the policy and the backend of ``use``."""
    default_save, default_backend = defaults
    where = f"fastbp.{form.name}"
    bound = recognition.resolve(activation, where)
    if save == "auto" and default_save is not None:
        save = default_save
    policy = saving.resolve(save, bound, form, where)
    backend = backends.check_name(default_backend if backend is None else backend, where)
    return form.name, bound.name, bound.params, policy, backend


def configure_settled(settings: tuple[Any, ...]) -> Config:
    """The config of the arguments of ``settle``."""
    return configure(*settle(*settings))
