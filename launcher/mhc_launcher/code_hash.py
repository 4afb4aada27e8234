"""A fingerprint of the code that runs: equal on all nodes, or the run is refused. Standard library only."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("mhc_dist", "mhc_kernels", "mhc_launcher")


def code_hash() -> str:
    """Over names and contents of all Python files of the installed packages, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(folder)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
