"""Between text and models: strict YAML, `a.b=value` overrides, and validation errors in plain words.

Nothing here knows what a run consists of; `config.py` does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """Something a user wrote cannot be used. The message is complete: print it and stop."""


class ReadableDumper(yaml.SafeDumper):
    """YAML for people: one key a line, lists of plain values on one line."""

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`)."""


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    loader.flatten_mapping(node)
    mapping: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """The document in `text`. Raises ConfigError naming `source`, line and column."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def apply_override(document: dict[str, Any], override: str) -> None:
    """Write one `a.b=value` into `document`; the value is read as YAML. Raises ConfigError.

    Whether the key exists is not decided here: validation refuses unknown keys wherever they come from.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write section.key=value, for example --set train.steps=200")
    value = parse_yaml(text, f"--set {override}")
    section: dict[str, Any] = document
    for depth, key in enumerate(keys[:-1]):
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            parent = ".".join(keys[: depth + 1])
            raise ConfigError(f"--set {override}: {parent} = {inner!r} is a value, it has no keys below it")
        section = inner
    section[keys[-1]] = value


def describe(error: ValidationError, model: type[BaseModel], document: Mapping[str, Any]) -> list[str]:
    """One line per problem: key path, value, what is accepted, what was probably meant."""
    accepted: dict[str, list[str]] = {}
    lines: list[str] = []
    for detail in error.errors():
        path = _known_path(detail["loc"], document)
        match detail["type"]:
            case "extra_forbidden":
                lines.append(_unknown_key(path, detail["input"], model))
            case "missing":
                lines.append(f"{path}: missing. Every run must say it.")
            case "value_error" if not path:
                lines.extend(str(detail["ctx"]["error"]).splitlines())
            case "literal_error" | "enum":
                accepted.setdefault(_shown(path, detail["input"]), []).append(detail["ctx"]["expected"])
            case _:
                text = re.sub("^(Input should be|Value error,) ?", "", detail["msg"])
                accepted.setdefault(_shown(path, detail["input"]), []).append(text)
    # A value that may be one of several kinds is reported once per kind: one line is enough.
    for shown, texts in accepted.items():
        only_choice = len(texts) == 1 and re.fullmatch("'[^']*'", texts[0])
        rest = ": nothing else is available in this version." if only_choice else "."
        lines.append(f"{shown}: must be {' or '.join(texts)}{rest}")
    return lines


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """`section.key` of everything `model` accepts, in order."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from key_paths(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _shown(path: str, value: Any) -> str:
    return f"{path} = {value!r}"


def _known_path(location: tuple[int | str, ...], document: Mapping[str, Any]) -> str:
    """Dotted path without the names pydantic adds for the members of a union."""
    words: list[str] = []
    here: Any = document
    for step in location:
        if isinstance(here, Mapping):
            words.append(str(step))
            here = here.get(step)
        elif isinstance(here, list | tuple) and isinstance(step, int) and step < len(here):
            words.append(str(step))
            here = here[step]
    return ".".join(words)


def _unknown_key(path: str, value: Any, model: type[BaseModel]) -> str:
    known = list(key_paths(model))
    parent, _, key = path.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    sections = sorted({name.partition(".")[0] for name in known})
    by_key = {name.rpartition(".")[2]: name for name in known}
    candidates = {name.rpartition(".")[2]: name for name in siblings} if siblings else {}
    if close := difflib.get_close_matches(key, candidates, n=1):
        hint = f"Did you mean {candidates[close[0]]}?"
    elif not parent and (close := difflib.get_close_matches(key, sections, n=1)):
        hint = f"Did you mean {close[0]}?"
    elif close := difflib.get_close_matches(key, by_key, n=1, cutoff=0.8):
        hint = f"Did you mean {by_key[close[0]]}?"
    elif siblings and parent:
        hint = f"{parent} has: {', '.join(candidates)}."
    elif parent:
        hint = f"{parent} takes no keys in this version."
    else:
        hint = f"Sections are: {', '.join(sections)}."
    shown = path if isinstance(value, dict) else _shown(path, value)
    return f"{shown}: unknown key. {hint}"
