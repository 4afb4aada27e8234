"""From text to token ids: bytes, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[SEP]")  # noqa: RUF001
"""Names under which tokenizers carry their end-of-document token, looked up in this order."""

PIECE_NUM_BYTES = 1 << 20
LONGEST_PIECE_NUM_BYTES = 1 << 24


class NotTextError(Exception):
    """A file of the corpus is not UTF-8 text; it is skipped and listed, not fatal."""


class Encoder(Protocol):
    """Text to ids. `separator` is written after every file, so a model can see where one ends."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def separator(self) -> int: ...
    def encode(self, text: str) -> npt.NDArray[np.integer]: ...


@dataclass(frozen=True)
class ByteEncoder:
    """UTF-8 bytes are the tokens. The separator is byte 0, which text never contains (see `text_pieces`)."""

    name: str = "bytes"
    vocab_size: int = 256
    separator: int = 0

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


class TokenizerEncoder:
    """A tokenizer.json of the `tokenizers` library.

    Args:
        path: the tokenizer.json.
        separator: the token written after every file, by name; by default the tokenizer's own end of text.

    Raises ValueError when the file is no tokenizer or has no such token.
    """

    def __init__(self, path: Path, separator: str | None = None) -> None:
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist. Give the path of a tokenizer.json.")
        from tokenizers import Tokenizer

        content = path.read_bytes()
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} has an empty vocabulary: 0 tokens. Train the tokenizer first.")
        # Ids may have holes: the embedding needs a row for the largest id, not one per name.
        self.vocab_size = max(vocabulary.values()) + 1
        self.name = f"{path.name} {hashlib.blake2b(content, digest_size=8).hexdigest()}"
        names = END_OF_TEXT_NAMES if separator is None else (separator,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found:
            raise ValueError(
                f"{path} ({len(vocabulary)} tokens) has none of {', '.join(names)} to mark the end of a file."
                " Name one of its tokens with --separator."
            )
        self.separator = found[0]
        # Truncation and padding settings are for single prompts; a corpus must come through whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned integer that holds every id."""
    if vocab_size <= 1 << 8:
        return np.dtype(np.uint8)
    if vocab_size <= 1 << 16:
        return np.dtype(np.uint16)
    return np.dtype(np.uint32)


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about 1 MiB that end at line ends, so memory stays bounded.

    Line ends are kept as they are. A line above 16 MiB is cut. Raises NotTextError at the first byte that
    is not UTF-8, or at a NUL byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending = ""
    with path.open("rb") as file:
        while True:
            block = file.read(PIECE_NUM_BYTES)
            if b"\0" in block:
                raise NotTextError("binary (NUL byte)")
            try:
                pending += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise NotTextError("not UTF-8") from error
            if not block:
                break
            cut = pending.rfind("\n") + 1
            if cut == 0 and len(pending) >= LONGEST_PIECE_NUM_BYTES:
                cut = len(pending)
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending


def looks_like_text(path: Path) -> bool:
    """Whether the first 64 KiB are UTF-8 without NUL bytes."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
