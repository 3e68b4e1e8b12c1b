"""A configuration that means the same on another machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import get_protocol

from lodeset.infra.config import Config, read
from lodeset.pipeline.config import merged
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shorthand import written_out
from lodeset.pipeline.shown import shown, without_secrets

# Keys whose text is a path or a URL.
_PLACES = ("uri", "path", "folder", "store", "model", "blocked_domains", "blocked_urls")
_SHOWN = 5


def portable(path: Path, overrides: tuple[str, ...], mounted: Sequence[str]) -> str:
    """A configuration as text, with all overrides applied and without the section `deploy`.

    Args:
        mounted: the paths that exist on the other machine, too.

    Raises:
        ConfigError: a path lies elsewhere, or the text holds a credential.
    """
    config = read(path, overrides)
    raw = written_out({"name": None, "store": None, **merged(Config, path, overrides)})
    tree = _said(raw, config.model_dump(mode="json", exclude={"deploy"}))
    lost = [
        f"{key}: {value}"
        for key, value in _places(tree, "")
        if not any(value == root or value.startswith(f"{root}/") for root in mounted)
    ]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        where = f"below {', '.join(mounted)}" if mounted else "on a volume (`deploy.kubernetes.volumes`)"
        raise ConfigError(
            f"{path}: pods cannot see {'; '.join(map(shown, lost[:_SHOWN]))}{more}: use URLs, or paths {where}"
        )
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    if without_secrets(text) != text:
        raise ConfigError(
            f"{path}: the configuration holds a credential, which everybody who may read it in the cluster would see: "
            "put it into a Secret, and name that in `deploy.kubernetes.env_secrets`"
        )
    return text


def _said(raw: Any, whole: Any) -> Any:
    """What `raw` says, in the words of the whole configuration: with absolute paths, and no abbreviation.

    What is not said stays away: a recipe or another section may give it.
    """
    if isinstance(raw, dict) and isinstance(whole, dict):
        return {key: _said(raw[key], value) for key, value in whole.items() if key in raw}
    if isinstance(raw, list) and isinstance(whole, list) and len(raw) == len(whole):
        return [_said(*pair) for pair in zip(raw, whole, strict=True)]
    return whole


def _places(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and value of every path on this machine."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _places(value, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _places(value, f"{key}.{number}")
    elif isinstance(node, str) and key.rpartition(".")[2] in _PLACES:
        protocol = get_protocol(node)
        if protocol == "memory":
            yield key, node
        elif protocol in ("file", "local") and (node.startswith("/") or "://" in node):
            yield key, os.path.normpath(node.removeprefix(f"{protocol}://"))
