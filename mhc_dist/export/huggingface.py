"""Export folders in Hugging Face's DeepSeek layout: written shard by shard, read tensor by tensor."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.export.folder import new_folder
from mhc_dist.export.layout import absent_tensors, entries, latent_scale
from mhc_dist.export.settings import MODELING_FILE, check_expressible, config_of, settings_of
from mhc_dist.export.vocabulary import Vocabulary
from mhc_dist.export.weights import Weights, stack_experts

SETTINGS_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Tensors of a shard are in memory together while it is written."""


def write_huggingface(
    weights: Weights,
    config: RunConfig,
    vocabulary: Vocabulary,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model into the new folder `folder`.

    Raises ValueError when the layout cannot express the model, or the folder exists or cannot be written.
    """
    check_expressible(config)
    scale = latent_scale(config.model.norm_eps)
    with new_folder(folder) as building:
        _Shards(building, shard_bytes).write(weights, config, scale, dtype)
        name = str(dtype).removeprefix("torch.")
        _write_json(building / SETTINGS_FILE, settings_of(config, vocabulary.separator, name, scale))
        generation = {
            "bos_token_id": vocabulary.separator,
            "eos_token_id": vocabulary.separator,
            "do_sample": True,
        }
        _write_json(building / "generation_config.json", generation)
        if config.residual.kind is ResidualKind.MHC:
            shutil.copyfile(Path(__file__).with_name(MODELING_FILE), building / MODELING_FILE)
        vocabulary.write(building)


class _Shards:
    """Collects tensors until they fill a file."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._open: dict[str, Tensor] = {}
        self._open_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self._num_bytes = 0

    def write(self, weights: Weights, config: RunConfig, scale: float, dtype: torch.dtype) -> None:
        for entry in entries(config, scale):
            ours = weights.load_tensor(entry.ours).float()
            for name, tensor in zip(entry.theirs, entry.to_theirs(ours), strict=True):
                self._add(name, tensor.to(torch.float32 if entry.keep_fp32 else dtype).contiguous())
        for name, shape in absent_tensors(config):
            self._add(name, torch.empty(shape, dtype=dtype))
        self._close_shard()
        self._name_shards()

    def _add(self, name: str, tensor: Tensor) -> None:
        if self._open and self._open_bytes + tensor.nbytes > self._shard_bytes:
            self._close_shard()
        # Two entries may be views of one tensor, which the format refuses: each owns its bytes.
        self._open[name] = tensor.clone()
        self._open_bytes += tensor.nbytes
        self._shard_of[name] = self._num_shards

    def _close_shard(self) -> None:
        try:
            save_file(self._open, self._folder / f"shard-{self._num_shards}", metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind for a full disk too
            raise ValueError(f"{self._folder.parent} cannot take the weights: {error}") from error
        self._num_shards += 1
        self._num_bytes += self._open_bytes
        self._open, self._open_bytes = {}, 0

    def _name_shards(self) -> None:
        """As transformers expects: one `model.safetensors`, or numbered files and an index."""
        if self._num_shards == 1:
            (self._folder / "shard-0").rename(self._folder / "model.safetensors")
            return
        names = [
            f"model-{shard + 1:05d}-of-{self._num_shards:05d}.safetensors"
            for shard in range(self._num_shards)
        ]
        for shard, name in enumerate(names):
            (self._folder / f"shard-{shard}").rename(self._folder / name)
        index = {
            "metadata": {"total_size": self._num_bytes},
            "weight_map": {name: names[shard] for name, shard in self._shard_of.items()},
        }
        _write_json(self._folder / INDEX_FILE, index)


def is_huggingface(folder: Path) -> bool:
    """Whether `folder` looks like a model in Hugging Face's layout."""
    return (folder / SETTINGS_FILE).is_file()


def read_huggingface(folder: Path) -> tuple[RunConfig, dict[str, Tensor]]:
    """Configuration and `LanguageModel` state dict (fp32) of an export folder.

    Raises ValueError that names what is missing, damaged, or of another kind of model.
    """
    path = folder / SETTINGS_FILE
    settings = read_settings(path)
    config = config_of(settings, path)
    scale = float(settings.get("latent_scale", 1.0))
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        file_of = _files(folder)

        def load(name: str) -> Tensor:
            file = file_of.get(name) if file_of is not None else "model.safetensors"
            if file is None:
                raise ValueError(f"{folder / INDEX_FILE} has no tensor {name}")
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                tensor: Tensor = opened[file].get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / file}: {name} cannot be read: {error}") from error
            return tensor.float()

        for entry in entries(config, scale):
            tensors[entry.ours] = entry.to_ours([load(name) for name in entry.theirs])
    return config, stack_experts(tensors)


def _files(folder: Path) -> dict[str, str] | None:
    """Which file has which tensor; None when there is one file."""
    if not (folder / INDEX_FILE).is_file():
        return None
    weight_map: dict[str, str] = read_settings(folder / INDEX_FILE).get("weight_map", {})
    return weight_map


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError when it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
