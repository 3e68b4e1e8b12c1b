"""The command line as a user types it, and what its `--json` tells."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import yaml
from builders import id_of


def typed(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error; whatever goes wrong, no traceback."""
    command = [sys.executable, "-m", "lodeset", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done.returncode, done.stdout, done.stderr


def asked(*arguments: str | Path) -> tuple[int, str, str]:
    """As `typed`, in this process, several seconds sooner; a run's stages still have processes of their own."""
    from lodeset.infra.cli.command import perform
    from lodeset.infra.cli.main import app

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["lodeset", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = perform(app)
    finally:
        sys.argv = before
    assert "Traceback" not in err.getvalue() + out.getvalue(), err.getvalue()
    return code, out.getvalue(), err.getvalue()


def lodeset(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command that ends with `code`."""
    got, out, err = asked(*arguments)
    assert got == code, err
    return out, err


def entries(config: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    tree = json.loads(lodeset("status", config, "--json", *arguments)[0])
    return {f"{e['stage']}/{e['set']}": e for e in tree["artifacts"]}


def actions(config: Path, *arguments: str) -> dict[str, str]:
    tree = json.loads(lodeset("plan", config, "--json", *arguments)[0])
    return {f"{e['stage']}/{e['set']}": e["action"] for e in tree["stages"]}


def rows(entry: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return ds.dataset(entry["tables"][table]).to_table().to_pylist()


def by_image(entry: dict[str, Any], table: str) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in rows(entry, table)}


def indexed(entry: dict[str, Any]) -> dict[str, bytes]:
    """What lies where the index says that images lie."""
    folder, found = Path(entry["tables"]["index"][0]).parent, {}
    for row in rows(entry, "index"):
        with (folder / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            found[row["image_id"]] = file.read(row["size_bytes"])
    assert all(id_of(data) == image_id for image_id, data in found.items())
    return found


def copied(config: Path, name: str) -> Path:
    """A configuration beside `config` whose store, in the folder `name`, starts as a copy of that of `config`."""
    tree = yaml.safe_load(config.read_text())
    shutil.copytree(config.parent / tree["store"], config.parent / name, copy_function=shutil.copy2)
    path = config.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**tree, "store": f"./{name}"}))
    return path


def assert_digests_hold(told: dict[str, dict[str, Any]], store: Path) -> None:
    """Every file of every artifact has the digest that its manifest tells."""
    for entry in told.values():
        tree = json.loads(Path(entry["manifest"]).read_text())
        for files in tree["tables"].values():
            for file in files:
                assert hashlib.sha256((store / file["path"]).read_bytes()).hexdigest() == file["sha256"]
