"""What is sent to a cluster: lodeset as an unpacked wheel, the configuration with everything resolved, the lock file.

It becomes the working directory of the job, which Ray puts before `site-packages` on the import path of the driver and
of every worker. A `.whl` in `py_modules` would not do: Ray installs it by `pip` with all of its dependencies, on every
node (2.60).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import get_protocol

import lodeset
from lodeset.infra.config import Config, read, said
from lodeset.infra.versions import LOCK
from lodeset.pipeline.config import PATH_LISTS, PATHS
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.shown import shown, without_secrets

CONFIG = "lodeset.yaml"
MAX_BYTES = 2**20
NAME = "bundle.tar.xz"  # 660 kB; a zip archive is half as large again
LEFT_OUT = ("__pycache__", "vendor")  # no job serves the dashboard, whose scripts would be an eighth
_LOCAL = ("file", "local")


@dataclass(frozen=True)
class Resolved:
    """A configuration as a cluster gets it.

    Attributes:
        text: the YAML.
        local: keys and paths that are looked up on the cluster's own file systems.
    """

    config: Config
    text: str
    local: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def resolved(path: str | Path, overrides: tuple[str, ...] = ()) -> Resolved:
    """The configuration with overrides applied, paths absolute, and for the cluster that it runs on.

    Raises:
        ConfigError: the configuration is wrong, or holds a credential.
    """
    overrides = (*overrides, "resources.ray_address=auto")
    config = read(path, overrides)
    tree = said(config, path, overrides)
    for key, text in _texts(tree):
        section, dot, name = key.rpartition(".")
        if without_secrets(f"{name}={text}") != f"{name}={text}":
            raise ConfigError(
                f"{section}{dot}{shown(f'{name}={text}')}: it holds a credential, and everybody who can read the "
                "cluster's jobs would see it: let the nodes of the cluster have it (environment variables, roles, "
                "secrets), and remove it here"
            )
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return Resolved(config, text, tuple(_local(tree)))


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, entry in entries:
        yield from _texts(entry, f"{key}.{name}" if key else str(name))


def _local(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, text in _texts(tree):
        names = key.split(".")
        # A cache is each machine's own.
        named = any(name in PATHS and name != "cache_dir" for name in names[-2:]) or names[-1] == "model"
        named = named or (names[-1].isdigit() and names[-2:-1] in [[key] for key in PATH_LISTS])
        if named and (text.startswith("/") or ("://" in text and get_protocol(text) in _LOCAL)):
            yield key, text


def write(config: Resolved, to: Path) -> int:
    """Writes the bundle and returns its size.

    Raises:
        LodesetError: it is larger than a cluster should be sent.
    """
    files = {**_wheel(), CONFIG: config.text.encode(), LOCK: _lock().encode()}
    # The same content has the same bytes, so that a cluster that has it is not sent it again.
    with tarfile.open(to, "w:xz") as bundle:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            bundle.addfile(entry, io.BytesIO(files[name]))
    size = to.stat().st_size
    if size > MAX_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise LodesetError(
            f"what would be sent to the cluster has {size:,} bytes, and at most {MAX_BYTES:,} are: the largest file "
            f"is {largest} ({len(files[largest]):,} bytes); the cluster should find data by paths and URLs"
        )
    return size


def _wheel() -> dict[str, bytes]:
    """This lodeset as a wheel unpacks: the package, and the metadata that says its version."""
    root = Path(lodeset.__path__[0])
    found = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            file = Path(folder) / name
            found[f"lodeset/{file.relative_to(root).as_posix()}"] = file.read_bytes()
    about = importlib.metadata.distribution("lodeset")
    text = about.read_text("METADATA") or about.read_text("PKG-INFO") or ""
    return {**found, f"lodeset-{about.version}.dist-info/METADATA": text.encode()}


def _lock() -> str:
    """The lock file beside the package; of an installed lodeset, the versions that are installed with it."""
    beside = Path(lodeset.__path__[0]).parent / LOCK
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    pins = {f"{about.name}=={about.version}" for about in importlib.metadata.distributions() if about.name}
    return "".join(f"{pin}\n" for pin in sorted(pins, key=str.lower))
