"""Tests in this folder need Triton's interpreter, which is chosen when Triton is imported.

tests/unit/kernels/test_interpreted.py runs each file in a process of its own with TRITON_INTERPRET=1; in any
other process this folder has nothing to collect.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
