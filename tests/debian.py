"""Commands that come from Debian packages: servers and browsers which some tests run for real."""

import shutil

import pytest


def require_command(name: str) -> str:
    """Path of a command of tests/debian-packages.txt, which `make tools` (part of `make test`) installs.

    Without apt there is nothing to install it with: the test is skipped, and says what is missing.
    """
    if path := shutil.which(name):
        return path
    assert shutil.which("apt-get") is None, f"{name} is missing: `make tools` installs it"
    pytest.skip(f"NOT TESTED: {name} is not installed and there is no apt-get to install it with")
