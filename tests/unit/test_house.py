"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "mhc_dist": ROOT / "mhc_dist",
    "mhc_kernels": ROOT / "kernels" / "mhc_kernels",
    "mhc_launcher": ROOT / "launcher" / "mhc_launcher",
}
OURS = frozenset(PACKAGES)


@cache
def sources(package: str) -> tuple[Path, ...]:
    folder = PACKAGES[package]
    found = tuple(sorted(folder.rglob("*.py")))
    assert found, folder
    return found


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, wherever in the file; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def tracked_files() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return (ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def test_model_knows_no_other_process() -> None:
    """Oracle: the syntax trees of mhc_dist/model: no torch.distributed, imported or reached for."""
    for path in (PACKAGES["mhc_dist"] / "model").rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith("torch.distributed")], path
        for node in ast.walk(ast.parse(path.read_text())):
            reached = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
            assert not reached, f"{path}:{getattr(node, 'lineno', 0)}"


def test_files_that_promise_the_standard_library_keep_to_it() -> None:
    """Oracle: Python's own list of its modules. Plans are made and checked where nothing is installed."""
    promised = [
        path
        for path in sources("mhc_dist")
        if "standard library only" in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
    ]
    names = {path.stem for path in promised}
    assert {"topology", "action", "lower", "validate", "simulate", "place", "dualpipev"} <= names | {
        path.stem for path in (PACKAGES["mhc_dist"] / "pipeline" / "schedules").glob("*.py")
    }
    promised += (PACKAGES["mhc_dist"] / "pipeline" / "schedules").glob("*.py")
    for path in promised:
        roots = {name.partition(".")[0] for name in imported(path)}
        assert roots <= sys.stdlib_module_names | OURS, path


def test_only_the_start_of_a_rank_reaches_into_the_launcher() -> None:
    """Oracle: the syntax trees of mhc_dist: a rank of a run, and of a survey, read who they are."""
    users = {
        path.name if path.parent.name == "mhc_dist" else path.parent.name
        for path in sources("mhc_dist")
        if any(name.partition(".")[0] == "mhc_launcher" for name in imported(path))
    }
    assert users <= {"train.py", "preflight"}


def test_package_starts_import_nothing() -> None:
    """Oracle: the syntax trees of every __init__.py: importing one module must not pull in the others."""
    for package in PACKAGES:
        for path in sources(package):
            if path.name == "__init__.py":
                assert not imported(path), path


def test_folders_beside_packages_are_no_packages() -> None:
    """Oracle: the file system. A package named kernels or tests would shadow somebody else's."""
    for folder in ("kernels", "launcher", "configs", "tests", "docker"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_every_python_file_is_checked_for_types() -> None:
    """Oracle: the packages that exist, against the folders in mypy's settings, and their py.typed marks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {str(folder.relative_to(ROOT)) for folder in PACKAGES.values()}
    assert set(settings["tool"]["mypy"]["files"]) == folders
    assert set(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == folders
    assert all((folder / "py.typed").exists() for folder in PACKAGES.values())


def test_lock_names_exact_versions_of_all_dependencies() -> None:
    """Oracle: pyproject.toml's dependencies, each pinned by name and version and nothing else."""
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!]*)", line)
        assert match, f"{line}: only name==version works everywhere"
        pins[match[1].lower().replace("_", "-")] = match[2]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for wanted in settings["project"]["dependencies"]:
        name, _, version = re.sub(">=.*", "", wanted).lower().partition("==")
        assert name in pins, name
        assert version in ("", pins[name]), wanted


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w./])/(?:root|work|home)/[\w.]",  # a folder of the machine it was written on
        r"(?:index|extra-index|find-links)[-_ ]?url",  # where one machine finds its packages
        r"\b(?:TODO|FIXME|XXX)\b",
    ],
)
def test_nothing_of_the_writers_machine_or_intentions_is_committed(pattern: str) -> None:
    """Oracle: every tracked text file, searched for what only its author could use."""
    this_file = Path(__file__).resolve()
    for path in tracked_files():
        if path == this_file or path.suffix in (".png", ".bin"):
            continue
        found = re.search(pattern, path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"
