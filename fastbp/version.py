"""The version, and the fingerprint by which a compiled library is known to belong to the sources beside it."""

import hashlib
from pathlib import Path

__version__ = "0.1.0"


def fingerprint(sources: Path, suffixes: tuple[str, ...] = (".h", ".cpp", ".cu", ".cuh")) -> str:
    """A digest of every source in a folder; of C++, unless told otherwise."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in suffixes):
        digest.update(path.relative_to(sources).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
