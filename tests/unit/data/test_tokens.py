"""Encoding, the files on disk, and many processes opening them at once."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mhc_dist.config_sections import DataConfig
from mhc_dist.data import token_files, tokens
from mhc_dist.data.corpus import Corpus
from mhc_dist.data.encode import Encoder, NotTextError, TokenizerEncoder, text_pieces, token_dtype
from mhc_dist.data.prepare import prepare_corpus
from mhc_dist.data.token_files import check_vocabulary, read_token_files
from mhc_dist.data.tokens import open_tokens


def write_corpus(folder: Path, num_files: int = 20) -> dict[str, bytes]:
    contents = {f"{number:02}.txt": f"file {number} äöü\n".encode() * 30 for number in range(num_files)}
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def data_config(corpus: Path | str, sequence_length: int = 16, fraction: float = 0.3) -> DataConfig:
    return DataConfig(corpus=str(corpus), sequence_length=sequence_length, validation_fraction=fraction)


def write_tokenizer(path: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path))


def test_bytes_are_the_files_each_followed_by_zero(tmp_path: Path) -> None:
    """Oracle: the files themselves, put together by hand in order of their names."""
    contents = write_corpus(tmp_path / "corpus")
    data = open_tokens(data_config(tmp_path / "corpus"), tmp_path / "cache")
    assert data.vocab_size == 256
    assert data.train.dtype == np.uint8
    train_files = data.train.tobytes().split(b"\0")[:-1]
    validation_files = data.validation.tobytes().split(b"\0")[:-1]
    assert sorted(train_files + validation_files) == sorted(contents.values())
    in_order = list(contents.values())
    assert [in_order.index(file) for file in train_files] == sorted(map(in_order.index, train_files))
    assert 2 <= len(validation_files) <= 11


def test_stdlib_opens_and_is_text(tmp_path: Path) -> None:
    """Oracle: the source of a module in memory is found verbatim in one of the two splits."""
    data = open_tokens(data_config("python-stdlib", 256, 0.05), tmp_path)
    source = Path(json.__file__).read_bytes()
    assert (source + b"\0" in data.train.tobytes()) != (source + b"\0" in data.validation.tobytes())
    assert data.num_skipped == 0


def test_binary_files_are_skipped_and_named(tmp_path: Path) -> None:
    """Oracle: tokens equal those of the same folder without the two files that are not text."""
    write_corpus(tmp_path / "plain")
    write_corpus(tmp_path / "mixed")
    (tmp_path / "mixed" / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (tmp_path / "mixed" / "late.txt").write_bytes(b"a" * 100_000 + b"\xff" + b"a" * 100)
    plain = open_tokens(data_config(tmp_path / "plain"), tmp_path / "cache")
    mixed = open_tokens(data_config(tmp_path / "mixed"), tmp_path / "cache")
    assert mixed.fingerprint == plain.fingerprint
    assert {(file.relative_path, file.reason) for file in mixed.skipped} == {
        ("picture.png", "not UTF-8 text"),
        ("late.txt", "not UTF-8"),
    }
    assert mixed.num_skipped == 2


def test_an_edited_file_changes_the_tokens(tmp_path: Path) -> None:
    """Oracle: the new text is found in the tokens, so no stale cache was used."""
    write_corpus(tmp_path / "corpus")
    first = open_tokens(data_config(tmp_path / "corpus"), tmp_path / "cache")
    for path in (tmp_path / "corpus").iterdir():
        path.write_text("changed " * 40)
    second = open_tokens(data_config(tmp_path / "corpus"), tmp_path / "cache")
    assert b"changed" in second.train.tobytes()
    assert second.fingerprint != first.fingerprint


def _open_and_count(corpus: str, cache: str, results: "multiprocessing.Queue[str]") -> None:
    real = token_files.write_token_files
    builds: list[Path] = []

    def counted(corpus: Corpus, encoder: Encoder, fraction: float, folder: Path) -> None:
        builds.append(folder)
        real(corpus, encoder, fraction, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "write_token_files", counted)
        data = open_tokens(data_config(corpus), Path(cache))
    results.put(f"{data.fingerprint} {len(builds)} {len(data.train)} {int(data.train.sum())}")


def test_four_processes_at_once_encode_once(tmp_path: Path) -> None:
    """Oracle: exactly one of four simultaneous processes encodes; all map the same complete tokens."""
    write_corpus(tmp_path / "corpus", num_files=300)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [
        context.Process(
            target=_open_and_count, args=(str(tmp_path / "corpus"), str(tmp_path / "cache"), results)
        )
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    lines = [results.get(timeout=30).split() for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert sorted(line[1] for line in lines) == ["0", "0", "0", "1"]
    assert len({(line[0], line[2], line[3]) for line in lines}) == 1


def _die_while_building(corpus: str, cache: str) -> None:
    def die(corpus: Corpus, encoder: Encoder, fraction: float, folder: Path) -> None:
        assert list(folder.parent.glob("*.lock"))
        token_files.building_name(folder).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "write_token_files", die)
        open_tokens(data_config(corpus), Path(cache))


def test_a_killed_builder_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """Oracle: after kill -9 of the process that holds the lock, the next one builds without waiting."""
    write_corpus(tmp_path / "corpus")
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_building, args=(str(tmp_path / "corpus"), str(tmp_path / "cache"))
    )
    process.start()
    process.join(timeout=30)
    assert process.exitcode == -9
    data = open_tokens(data_config(tmp_path / "corpus"), tmp_path / "cache")
    assert len(data.train) > 0
    assert not list((tmp_path / "cache").glob("*.building*"))


def test_a_corpus_too_small_for_one_window_is_refused(tmp_path: Path) -> None:
    """Oracle: the message has both numbers and the keys to change."""
    write_corpus(tmp_path / "corpus", num_files=2)
    with pytest.raises(ValueError, match=r"has \d+ tokens, data.sequence_length=4096 needs.* 8192"):
        open_tokens(data_config(tmp_path / "corpus", 4096), tmp_path / "cache")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    """Oracle: binary files only is the same as too few text files, and said so."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"has 0 text file"):
        open_tokens(data_config(folder), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.building*"))


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Oracle: the message names the folder and how to choose another."""
    write_corpus(tmp_path / "corpus")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"cannot write the token cache in .*blocked.*XDG_CACHE_HOME"):
        open_tokens(data_config(tmp_path / "corpus"), blocked)


def test_prepared_bytes_equal_the_cache(tmp_path: Path) -> None:
    """Oracle: preparing a folder and opening it directly give the same fingerprint."""
    write_corpus(tmp_path / "corpus")
    prepared = prepare_corpus(str(tmp_path / "corpus"), tmp_path / "out", validation_fraction=0.3)
    direct = open_tokens(data_config(tmp_path / "corpus"), tmp_path / "cache")
    opened = open_tokens(data_config(tmp_path / "out", fraction=0.9), tmp_path / "cache")
    assert prepared.fingerprint == direct.fingerprint == opened.fingerprint


def test_tokenizer_ids_decode_to_the_text(tmp_path: Path) -> None:
    """Oracle: decoding the stored ids word by word gives the files, separators between them."""
    words = ["<unk>", "<|endoftext|>", "file", "äöü", *map(str, range(20))]
    write_tokenizer(tmp_path / "tokenizer.json", words)
    write_corpus(tmp_path / "corpus")
    prepared = prepare_corpus(
        str(tmp_path / "corpus"), tmp_path / "out", tmp_path / "tokenizer.json", validation_fraction=0.3
    )
    data = read_token_files(tmp_path / "out")
    assert prepared.vocab_size == data.vocab_size == len(words)
    text = " ".join(words[token] for token in data.train)
    numbers = [number for number in range(20) if f"file {number} äöü" in text]
    assert text == "".join(f"file {number} äöü " * 30 + "<|endoftext|> " for number in numbers).strip()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    check_vocabulary(data, len(words))
    with pytest.raises(ValueError, match=r"model.vocab_size=23 is less than the 24"):
        check_vocabulary(data, len(words) - 1)


def test_tokenizer_without_end_of_text_asks_for_one(tmp_path: Path) -> None:
    """Oracle: refused with the remedy; accepted with --separator; unknown names refused."""
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, ["<unk>", "stop"])
    with pytest.raises(ValueError, match=r"has none of .* --separator"):
        TokenizerEncoder(path)
    assert TokenizerEncoder(path, "stop").separator == 1
    with pytest.raises(ValueError, match="has none of halt"):
        TokenizerEncoder(path, "halt")


def test_a_bad_tokenizer_or_output_is_refused(tmp_path: Path) -> None:
    """Oracle: one clear message each, and the existing folder is left alone."""
    write_corpus(tmp_path / "corpus")
    (tmp_path / "bad.json").write_text("{}")
    source = str(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        prepare_corpus(source, tmp_path / "out", tmp_path / "bad.json")
    with pytest.raises(ValueError, match="does not exist"):
        prepare_corpus(source, tmp_path / "out", tmp_path / "none.json")
    with pytest.raises(ValueError, match="already exists"):
        prepare_corpus(source, tmp_path / "corpus")
    with pytest.raises(ValueError, match="--separator needs --tokenizer"):
        prepare_corpus(source, tmp_path / "out", separator="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.bin").write_bytes(b"abc"), "has 3 bytes"),
        (lambda folder: (folder / "validation.bin").unlink(), "has 0 bytes"),
        (lambda folder: (folder / "tokens.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "tokens.json").write_text('{"format": 99}'), "token format 99"),
        (lambda folder: (folder / "tokens.json").write_text('{"format": 1}'), "lacks or garbles 'dtype'"),
    ],
)
def test_damaged_token_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    """Oracle: each kind of damage is refused with what is wrong and the remedy."""
    write_corpus(tmp_path / "corpus")
    prepare_corpus(str(tmp_path / "corpus"), tmp_path / "out")
    assert callable(damage)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{message}.*prepare it again"):
        open_tokens(data_config(tmp_path / "out"), tmp_path / "cache")


def test_pieces_of_a_long_file_lose_nothing(tmp_path: Path) -> None:
    """Oracle: joined pieces equal the file, across block borders inside multi-byte characters."""
    text = "".join(f"line {number} äöü€😀\r\n" for number in range(150_000))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    pieces = list(text_pieces(path))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    path.write_bytes(text.encode() + "€".encode()[:2])
    with pytest.raises(NotTextError):
        list(text_pieces(path))


def test_token_width_follows_the_vocabulary() -> None:
    """Oracle: the largest id of each width, by hand."""
    assert [token_dtype(size).itemsize for size in (256, 257, 65536, 65537, 129280)] == [1, 2, 2, 4, 4]
