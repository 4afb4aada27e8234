"""What the page says that no measurement says: `page.yaml`, typed. Its prose holds names of figures only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

SOURCE = Path(__file__).with_name("page.yaml")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Known(_Part):
    """A result file that there can be. file: under results/. label: for files that carry none. takes: on two
    quiet cores. printed: the command prints the file's content instead of writing it.
    """

    file: str
    command: str
    takes: str
    label: str | None = None
    printed: bool = False

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return f"{self.command} > results/{self.file}" if self.printed else self.command


class Claim(_Part):
    """One figure beside what was asked of it. at_most_figure: the limit is a figure of the same file, too.
    `reason` is printed where it falls short.
    """

    what: str
    result: str
    value: str
    shown: str
    interval: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    at_most_figure: str | None = None
    aim: str | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Claim:
        given = (self.at_most, self.at_least, self.at_most_figure)
        if sum(limit is not None for limit in given) != 1:
            raise ValueError(f"{self.what}: one of at_most, at_least and at_most_figure")
        return self


class Section(_Part):
    """A heading with prose, claims, tables (functions of `tables`) and pictures (of `pictures`, or files)."""

    title: str
    text: str = ""
    claims: list[Claim] = []
    tables: list[str] = []
    pictures: list[str] = []
    after: str = ""


class Picture(_Part):
    """file: under results/. draw: a function of `drawings` that makes it; absent for what a study has drawn.
    results: what it is drawn from.
    """

    file: str
    alt: str
    results: list[str] = []
    draw: str | None = None


class Source(_Part):
    """The whole of `page.yaml`."""

    results: dict[str, Known]
    pictures: dict[str, Picture]
    intro: str
    sections: list[Section]


def load_source(path: Path = SOURCE) -> Source:
    """ValueError names what is wrong with the file."""
    content: Any = yaml.safe_load(path.read_text())
    try:
        return Source.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: {problems}") from None
