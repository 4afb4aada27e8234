"""One YAML file describes one run. These models check it; nothing here imports torch.

    config = load_config("configs/tiny.yaml", ["train.steps=20"])     raises ConfigError
    text = dump_config(config)                                        loads back to an equal config

The keys are in `config_sections`, what holds between sections in `config_checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from mhc_dist.config_checks import disagreements
from mhc_dist.config_sections import RunSections
from mhc_dist.config_text import ConfigError, ReadableDumper, apply_override, describe, parse_yaml

__all__ = ["ConfigError", "RunConfig", "dump_config", "load_config"]


class RunConfig(RunSections):
    """A whole run whose sections agree with each other."""

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, document: Any) -> Any:
        """A section with nothing but comments below it is YAML's null: every key keeps its default."""
        if not isinstance(document, dict):
            return document
        return {name: {} if section is None else section for name, section in document.items()}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if problems := disagreements(self):
            raise ValueError("\n".join(problems))
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's YAML file; `overrides` are `section.key=value`, applied in order.

    Raises ConfigError with one message that names every problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Examples are in configs/.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: byte {error.start} is not UTF-8") from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise ConfigError(f"{path}: sections such as `model:` and `train:` are expected, found {found}")
    for override in overrides:
        apply_override(document, override)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = describe(error, RunConfig, document)
        source = f"{path} with --set {' --set '.join(overrides)}" if overrides else str(path)
        raise ConfigError("\n  ".join([f"{source}: cannot run this:", *problems])) from None


def dump_config(config: RunConfig) -> str:
    """The complete run as YAML, every key written out; `load_config` reads back an equal config."""
    text: str = yaml.dump(
        config.model_dump(mode="json"),
        Dumper=ReadableDumper,
        sort_keys=False,
        default_flow_style=False,
        width=110,
    )
    return text
