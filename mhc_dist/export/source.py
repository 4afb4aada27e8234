"""What `export` and `generate` are given: a checkpoint, a run's folder, or an export folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mhc_dist.checkpoint.manifest import Section
from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.config import RunConfig
from mhc_dist.export.huggingface import SETTINGS_FILE, is_huggingface, read_huggingface, read_settings
from mhc_dist.export.torch_file import is_torch, read_torch
from mhc_dist.export.vocabulary import TOKENIZER_FILE, TokenizerVocabulary, Vocabulary, vocabulary_of
from mhc_dist.export.weights import StateDictWeights, Weights


class TrainedModel(NamedTuple):
    """`description` says in one line what was found, for the user."""

    config: RunConfig
    weights: Weights
    description: str


class CheckpointWeights:
    """The fp32 master weights of a checkpoint, and the router biases beside them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._sections = {
            name: section
            for section in (Section.BUFFER, Section.WEIGHT)
            for name in checkpoint.names(section)
        }

    def load_tensor(self, name: str) -> Tensor:
        if name not in self._sections:
            raise ValueError(f"{self._checkpoint.folder} has no tensor {name}")
        return self._checkpoint.load_tensor(name, self._sections[name])


def open_model(path: Path) -> TrainedModel:
    """Raises ValueError that says what is missing or damaged."""
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give a checkpoint, a run's folder, or an export folder.")
    if is_huggingface(path):
        config, state = read_huggingface(path)
        return TrainedModel(config, StateDictWeights(state), f"{path}, Hugging Face's layout")
    if is_torch(path):
        config, state = read_torch(path)
        return TrainedModel(config, StateDictWeights(state), f"{path}, torch state dict")
    checkpoint = Checkpoint.open(path)
    description = f"{checkpoint.folder}, after {checkpoint.manifest.progress.step} steps"
    return TrainedModel(checkpoint.config, CheckpointWeights(checkpoint), description)


def open_vocabulary(path: Path, config: RunConfig, tokenizer: Path | None) -> Vocabulary:
    """The vocabulary of the model at `path`; `tokenizer` names a tokenizer.json to use instead.

    Raises ValueError when it cannot be known.
    """
    if tokenizer is None and is_huggingface(path) and (path / TOKENIZER_FILE).is_file():
        separator = read_settings(path / SETTINGS_FILE).get("eos_token_id")
        return TokenizerVocabulary(path / TOKENIZER_FILE, separator if isinstance(separator, int) else None)
    return vocabulary_of(config, tokenizer)
