"""The environment that processes on other nodes get: what the user asks for, and what a run needs.

DeepSpeed's launcher forwards variables named in a file (`.deepspeed_env` in the home folder or here, or the
file that DS_ENV_FILE names). It stops at an empty line, and quotes values in a way that only a shell undoes.
So that file is read here, with empty lines and comments, and a clean one is written for the launcher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DEFAULT_NAME = ".deepspeed_env"
# What DeepSpeed passes on without quotes; a comma ends a variable in srun's --export.
PLAIN_VALUE = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
PLAIN_VALUE_WITHOUT_COMMA = re.compile(r"[\w@%+=:./-]*", re.ASCII)


def user_variables(environ: Mapping[str, str], home: Path, here: Path) -> dict[str, str]:
    """What the user's own files say: the one in the home folder first, the one here wins.

    Raises ValueError for a line that is not NAME=VALUE.
    """
    name = environ.get("DS_ENV_FILE", DEFAULT_NAME)
    found: dict[str, str] = {}
    for path in dict.fromkeys((home / name, here / name)):
        if path.is_file():
            found |= read_variables(path)
    return found


def read_variables(path: Path) -> dict[str, str]:
    """NAME=VALUE lines; empty lines and lines that begin with # say nothing, `export ` may come first."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)", text)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: {text!r} is not of the form NAME=VALUE. Correct or remove the line."
            )
        found[match[1]] = match[2].strip("\"'")
    return found


def write_variables(path: Path, variables: Mapping[str, str], *, commas: bool = True) -> None:
    """The file that DeepSpeed's launcher reads.

    Raises ValueError for values that would arrive changed; with `commas` False for those with a comma, too.
    """
    allowed = PLAIN_VALUE if commas else PLAIN_VALUE_WITHOUT_COMMA
    for name, value in variables.items():
        if not allowed.fullmatch(value):
            marks = "letters, digits and @%+=:./-" + (" and commas" if commas else "")
            raise ValueError(
                f"{name}={value!r} cannot be forwarded to other nodes: only {marks} arrive as they are. Set"
                f" {name} on the nodes themselves, or change its value."
            )
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
