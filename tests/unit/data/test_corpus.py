"""What counts as a corpus file, in which order, and on which side of the split."""

from pathlib import Path

import pytest

from mhc_dist.data.corpus import TextFile, python_stdlib, text_folder
from mhc_dist.data.split import position, split_files


def make_files(names: list[str]) -> list[TextFile]:
    return [TextFile(name, Path(name), 1, 0) for name in names]


def test_stdlib_holds_sources_and_no_tests() -> None:
    """Oracle: modules every Python has are listed, in sorted order, and nothing from a skipped folder."""
    corpus = python_stdlib()
    paths = [file.relative_path for file in corpus.files]
    assert paths == sorted(paths)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(paths)
    assert not [path for path in paths if {"test", "tests", "site-packages"} & set(path.split("/"))]
    assert all(path.endswith(".py") for path in paths)
    assert 4e6 < sum(file.num_bytes for file in corpus.files) < 4e7


def test_folder_lists_visible_files_in_order(tmp_path: Path) -> None:
    """Oracle: a folder written by hand, whose usable files are known."""
    for name in ["b.txt", "a/z.md", "a/b.txt", ".hidden", ".git/config", "__pycache__/x.pyc", "cache/t.bin"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    corpus = text_folder(tmp_path, excluded=tmp_path / "cache")
    assert [file.relative_path for file in corpus.files] == ["a/b.txt", "a/z.md", "b.txt"]
    assert [(file.relative_path, file.reason) for file in corpus.skipped] == [
        ("dangling", "not a regular file"),
        ("empty.txt", "empty"),
    ]


def test_missing_empty_and_single_file_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """Oracle: the message names the path, the count and what to do."""
    with pytest.raises(ValueError, match=r"does not exist.*Give a folder"):
        text_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds 0 usable files.*Put text files"):
        text_folder(tmp_path)
    path = tmp_path / "input.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"is a file, not a folder.*split -n l/20 input.txt"):
        text_folder(path)


def test_split_depends_on_the_path_alone() -> None:
    """Oracle: no file that is in both of two overlapping corpora changes sides."""
    names = [f"folder/{number}.txt" for number in range(1000)]
    whole = split_files(make_files(names), 0.1)
    half = split_files(make_files(names[::-2]), 0.1)
    validation = {file.relative_path for file in whole.validation}
    for file in half.validation:
        assert file.relative_path in validation
    for file in half.train:
        assert file.relative_path not in validation
    assert 60 <= len(validation) <= 140
    assert len(whole.train) + len(whole.validation) == 1000


def test_split_position_is_frozen() -> None:
    """Oracle: a value written down once; if it moves, every published validation loss means another set."""
    assert position("json/decoder.py") == pytest.approx(0.11393991729957655, abs=1e-12)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(fraction: float) -> None:
    """Oracle: with few files both sides still get one, the same whatever order the files come in."""
    files = make_files(["a", "b", "c"])
    split = split_files(files, fraction)
    assert min(len(split.train), len(split.validation)) == 1
    assert set(split_files(files[::-1], fraction).validation) == set(split.validation)


def test_one_file_cannot_be_split() -> None:
    """Oracle: the message has the number found and the number needed."""
    with pytest.raises(ValueError, match=r"has 1 text file.*at least 2"):
        split_files(make_files(["a"]), 0.5)
