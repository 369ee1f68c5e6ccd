"""What is measured once and remembered: JSON files in ``$XDG_CACHE_HOME/fastbp`` (or ``~/.cache/fastbp``).

The folder is made with mode 0700. One that belongs to somebody else, or that others may write to, is not read: what is
in it would decide which kernels run. A file is written whole, by rename. A cache that cannot be used costs a warning,
once, and never a call.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any


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
