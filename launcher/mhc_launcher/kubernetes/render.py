"""Manifests as YAML text, several documents in one file."""

from __future__ import annotations

from typing import Any

import yaml

from mhc_launcher.kubernetes.flavors import manifests
from mhc_launcher.kubernetes.request import Request


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; equal objects are written out, not referred to."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def render(request: Request, command: str) -> str:
    """All manifests of a run; the first line says how the file was made."""
    documents = [
        yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110)
        for manifest in manifests(request)
    ]
    return f"# {command}\n---\n" + "---\n".join(documents)
