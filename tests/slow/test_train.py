"""`lodeset train` as a user types it, on tars of another hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from builders import drawing
from commands import typed

pytestmark = pytest.mark.slow


def test_training_alone_goes_on_where_it_was(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number in range(24):
            buffer = io.BytesIO()
            drawing(number).save(buffer, "JPEG")
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (tmp_path / "training.yaml").write_text(
        "steps: 6\nbatch: 8\ncheckpoint_every: 3\nmodel: {dim: 32, depth: 2, heads: 2}\n"
        "crops: {global_size: 32, local_size: 16}\n"
    )
    told = (
        "train",
        str(tmp_path / "out"),
        str(tmp_path / "train-{0..0}.tar"),
        "--config",
        str(tmp_path / "training.yaml"),
    )
    code, out, err = typed(*told, "--json", "--cpus", "2")
    assert code == 0, err
    first = json.loads(out)["train"]
    assert (first["images"], first["images_seen"], first["resumed_step"]) == (24, 48, 0)
    exported = (tmp_path / "out/train/model.safetensors").read_bytes()
    for path in (tmp_path / "out/train/step-0000006").iterdir():
        path.unlink()
    code, out, err = typed(*told, "--json", "--cpus", "2")
    assert code == 0, err
    assert json.loads(out)["train"]["resumed_step"] == 3
    assert (tmp_path / "out/train/model.safetensors").read_bytes() == exported

    code, out, err = typed(*told, "--set", "stps=3")
    assert code == 2 and "did you mean `steps`?" in err
    code, out, err = typed(*told, "--set", "mix.flowers=2")
    assert code == 2 and "remove it" in err
    code, out, err = typed("train", str(tmp_path / "few"), str(tmp_path / "train-0.tar"), "--set", "batch=64")
    assert code == 1 and "24 images are fewer than one batch of 64" in err
