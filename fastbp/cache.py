"""What is measured once and remembered: JSON files in ``$XDG_CACHE_HOME/fastbp`` (or ``~/.cache/fastbp``).

The folder is made with mode 0700. One that belongs to somebody else, or that others may write to, is not read: what is
in it would decide which kernels run. A file is written whole, by rename, and changed under a lock, so that processes
which remember at once lose nothing. A cache that cannot be used costs a warning, once, and never a call.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"  # a file beside the others: a folder cannot be locked on NFS, and a renamed file is another one
PATIENCE = 10.0  # seconds to wait for it; a change takes milliseconds
DRIVER = Path("/sys/module/nvidia/version")
Content = dict[str, Any]


def folder() -> Path:
    """Where the files are. OSError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "fastbp"
    try:
        return Path.home() / ".cache" / "fastbp"
    except RuntimeError:
        raise OSError("this user has no home; set XDG_CACHE_HOME to a folder of your own") from None


def refusal(path: Path) -> str | None:
    """Why this folder is not to be trusted, or None."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a folder; move it away"
    if found.st_uid != os.getuid():
        return f"{path} belongs to another user; set XDG_CACHE_HOME to a folder of your own"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path}; `chmod 700 {path}`"
    return None


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"fastbp's cache is not used: {text}", RuntimeWarning, stacklevel=3)


def read(name: str) -> dict[str, Any]:
    """What the file of this name holds; {} where there is none or, with a warning, where it cannot be used."""
    path = Path(name)
    try:
        path = folder() / name
        if not path.is_file():
            return {}
        reason = refusal(path.parent)
        if reason is None:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            reason = f"{path} does not hold a JSON object; delete it"
    except (ValueError, RecursionError):  # JSON, UTF-8, or lists in lists without end
        reason = f"{path} is not JSON; delete it"
    except OSError as error:
        reason = str(error)
    _warn_once(reason)
    return {}


def write(name: str, content: dict[str, Any]) -> bool:
    """Put a file of this name in place of what there was; False, with a warning, where that is not possible."""
    try:
        path = folder() / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = refusal(path.parent)
        if reason is None:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            return True
    except OSError as error:
        reason = str(error)
    _warn_once(reason)
    return False


def change(name: str, how: Callable[[Content], Content]) -> bool:
    """Put what ``how`` makes of a file's content in its place, while no other process changes it; as ``write``."""
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if refusal(place) is None:  # else ``write`` says what is wrong with it
            with _locked(place / LOCK):
                return write(name, how(read(name)))
    except OSError as error:
        _warn_once(str(error))
        return False
    return write(name, how({}))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that change the cache; OSError where another does not let go.

    Where there are no locks, on a file system without them for instance, a warning says so and the cache is changed
    without: a process alone, which is the usual case, loses nothing by that.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        reason = _lock(handle, path)
        if reason is not None:
            _warn_once(f"it is changed without a lock ({reason}), and processes that tune at once may lose entries")
        yield
    finally:
        os.close(handle)  # which gives the lock back


def _lock(handle: int, path: Path) -> str | None:
    """Take the lock; None, or why there is none."""
    if fcntl is None:
        return "this system has no fcntl"
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(
                    f"another process has held {path} for {PATIENCE:g} s; what was measured serves this process alone"
                ) from None
            time.sleep(0.01)
        except OSError as error:
            return str(error)


def driver_release() -> str:
    """The release of NVIDIA's kernel module, like ``580.65.06``, where Linux tells it."""
    try:
        return DRIVER.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "unknown"


def gpu_facts(device: torch.device) -> dict[str, str]:
    """What a measurement on a GPU belongs to: its name, its architecture, and the driver, which compiles PTX.

    PyTorch tells the newest CUDA version that the driver serves (cuDriverGetVersion); the release tells apart drivers
    that serve the same one.
    """
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)  # not there in a build for the CPU
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": f"{driver_release()}, CUDA {driver_version()}",
    }
