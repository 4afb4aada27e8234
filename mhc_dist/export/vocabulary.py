"""What a model's token ids stand for: bytes, or the entries of a tokenizer.json. Imports no torch.

A byte model's tokenizer is written as a byte-level BPE without merges: id b is byte b, and id 0, which no
text contains, is the token between files, named `<|endoftext|>`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mhc_dist.config import RunConfig
from mhc_dist.data.corpus import PYTHON_STDLIB
from mhc_dist.data.encode import ByteEncoder, TokenizerEncoder
from mhc_dist.data.token_files import DESCRIPTION_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


class TextStream(Protocol):
    """Ids to text, one at a time; a character of several tokens appears with its last one."""

    def feed(self, token: int) -> str: ...


class Vocabulary(Protocol):
    """Text to ids and back."""

    @property
    def separator(self) -> int:
        """The id that stood after every text of the corpus."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def stream(self) -> TextStream: ...
    def write(self, folder: Path) -> None:
        """Write what transformers' AutoTokenizer reads."""
        ...


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        # A model may have more rows than there are bytes; nothing trained the others.
        return self._decoder.decode(bytes([token])) if token < 256 else "\N{REPLACEMENT CHARACTER}"


class ByteVocabulary:
    """Ids 0 to 255 are bytes of UTF-8."""

    separator: int = ByteEncoder.separator

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def stream(self) -> TextStream:
        return _ByteStream()

    def write(self, folder: Path) -> None:
        byte_tokenizer(self.separator).save(str(folder / TOKENIZER_FILE))
        _write_tokenizer_config(folder, END_OF_TEXT)


class _TokenStream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=False)

    def feed(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


class TokenizerVocabulary:
    """The entries of a tokenizer.json.

    Raises ValueError when the file is no tokenizer, or has no token to mark the end of a text and none is
    given.
    """

    def __init__(self, path: Path, separator: int | None = None) -> None:
        from tokenizers import Tokenizer

        if separator is None:
            separator = TokenizerEncoder(path).separator
        self.separator = separator
        self._path = path
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def stream(self) -> TextStream:
        return _TokenStream(self._tokenizer)

    def write(self, folder: Path) -> None:
        (folder / TOKENIZER_FILE).write_bytes(self._path.read_bytes())
        _write_tokenizer_config(folder, self._tokenizer.id_to_token(self.separator))


def vocabulary_of(config: RunConfig, tokenizer: Path | None = None) -> Vocabulary:
    """The vocabulary a run was trained with.

    tokenizer: a tokenizer.json, for a prepared corpus that is not on this machine.

    Raises ValueError when it cannot be known.
    """
    if tokenizer is not None:
        return TokenizerVocabulary(tokenizer)
    corpus = Path(config.data.corpus).expanduser()
    description = corpus / DESCRIPTION_FILE
    if config.data.corpus == PYTHON_STDLIB or (corpus.is_dir() and not description.is_file()):
        return ByteVocabulary()  # text is encoded as bytes
    if description.is_file():
        facts: dict[str, Any] = json.loads(description.read_text())
        if (corpus / TOKENIZER_FILE).is_file():
            return TokenizerVocabulary(corpus / TOKENIZER_FILE, int(facts["separator"]))
        return ByteVocabulary()
    raise ValueError(
        f"data.corpus={config.data.corpus} is not on this machine, so what the {config.model.vocab_size}"
        " token ids stand for is unknown. Give the corpus's tokenizer.json with --tokenizer."
    )


def byte_tokenizer(separator: int) -> Tokenizer:
    """Id b is byte b; `separator` is the special token `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = byte_names()
    vocabulary = {END_OF_TEXT if byte == separator else name: byte for byte, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def byte_names() -> Sequence[str]:
    """How byte-level tokenizers write byte b as one visible character.

    Visible Latin-1 characters stand for themselves; the others, in order, for U+0100 onwards.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _write_tokenizer_config(folder: Path, end_of_text: str | None) -> None:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "bos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
