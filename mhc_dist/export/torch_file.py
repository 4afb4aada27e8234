"""A model as one file of plain tensors: `model.pt`, beside the configuration it was trained with."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.export.folder import new_folder
from mhc_dist.export.weights import Weights, whole_state

STATE_FILE = "model.pt"
CONFIG_FILE = "config.yaml"


def write_torch(
    weights: Weights, config: RunConfig, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write `LanguageModel.state_dict()` into the new folder `folder`.

    Raises ValueError when the folder exists or cannot be written.
    """
    state = {name: tensor.to(dtype) for name, tensor in whole_state(weights, config).items()}
    with new_folder(folder) as building:
        try:
            torch.save(state, building / STATE_FILE)
        except RuntimeError as error:  # torch's own kind for a full disk
            raise ValueError(f"{folder.parent} cannot take the weights: {error}") from error
        (building / CONFIG_FILE).write_text(dump_config(config))


def is_torch(folder: Path) -> bool:
    """Whether `folder` was written by `write_torch`."""
    return (folder / STATE_FILE).is_file()


def read_torch(folder: Path) -> tuple[RunConfig, dict[str, Tensor]]:
    """Configuration and state dict (fp32). Runs no code from the file. Raises ValueError when damaged."""
    config = load_config(folder / CONFIG_FILE)
    path = folder / STATE_FILE
    try:
        state: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return config, {name: tensor.float() for name, tensor in state.items()}
