"""A user's mistake or a bad file gives one clear error or one counted reject; never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from builders import picture, write_folder, write_tar
from commands import asked, typed
from inline import in_one_process


def config(folder: Path, text: str) -> Path:
    path = folder / "lodeset.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "pool.tar", [(f"{i}.png", picture(i)) for i in range(6)])


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("pool: nowhere.tar", 1, "nothing is at"),
        ("pool: empty/", 1, "holds no files"),
        ("pool: pool.tar\nshard: {}", 2, "did you mean `shards`"),
        ("pool: pool.tar\ncluster: {k: many}", 2, "cluster.k = 'many'"),
        ("pool: pool.tar\nembed: {semantic: {kind: onnx, path: none.onnx}}", 1, "no embedder"),
        ("pool: pool.tar\npruning: [{method: entropic}]", 2, "needs a trained model"),
        ("pool: pool.tar\nembed: {semantic: {kind: precomputed, path: pool.tar}}", 2, "dedup.threshold"),
        ("pool: nosuch://x", 1, "cannot be opened"),
        ("pool: pool.tar\nstore: pool.tar", 2, "a folder of its own"),
        ("pool: pool.tar\nstore: other.tar", 1, "not a folder"),
    ],
)
def test_mistakes(tmp_path: Path, pool: Path, text: str, code: int, told: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tar").write_bytes(b"")
    path = config(tmp_path, text)
    got, out, err = asked("run", path, "--json")
    assert (got, told in err) == (code, True), err
    assert json.loads(out)["exit_code"] == code


def test_usage(tmp_path: Path, pool: Path) -> None:
    path = config(tmp_path, "pool: pool.tar")
    assert typed("run")[0] == 2
    assert asked("fly")[0] == 2
    assert asked("run", path, "--limit", "0")[0] == 2
    code, _, err = asked("plan", path, "--until", "dinner")
    assert (code, "there are: calibrate" in err) == (2, True)
    code, _, err = asked("init", path)
    assert (code, "exists" in err) == (2, True)
    assert asked("init", tmp_path / "new.yaml")[0] == 0
    assert asked("plan", tmp_path / "new.yaml")[0] == 1


def test_bad_files_are_counted(tmp_path: Path, one_process: None) -> None:
    broken = picture(1)
    members = [
        ("a.png", picture(0)),
        ("t.jpg", b"\xff\xd8\xff" + broken),
        ("b.png", b""),
        ("c.png", broken[:-150]),
        ("d.txt", b"caption"),
    ]
    write_tar(tmp_path / "pool/good.tar", members)
    (tmp_path / "pool/bad.tar").write_bytes(os.urandom(4096))
    write_folder(tmp_path / "pool/loose", [("readme.md", b"text"), ("x.png", picture(2))])
    path = config(tmp_path, "pool: pool/")
    code, out, err = asked("run", path, "--until", "ingest", "--json")
    assert code == 0, err
    (entry,) = [e for e in json.loads(out)["artifacts"] if e["stage"] == "ingest"]
    assert entry["rows"] == {
        "in": 8,
        "kept": 2,
        "dropped": {"corrupt": 2, "empty": 1, "metadata_without_image": 1, "not_an_image": 1, "unreadable_archive": 1},
    }


def test_too_few_images_are_told(tmp_path: Path, pool: Path, one_process: None) -> None:
    code, _, err = asked("run", config(tmp_path, "pool: pool.tar"))
    assert code == 1
    assert "too few for a dictionary" in err


def test_a_tiny_network_too_many_clusters_and_an_empty_curated_set(
    tmp_path: Path, pool: Path, one_process: None
) -> None:
    import torch

    class Mean(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(image, 8).flatten(1)

    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(Mean(), torch.zeros(1, 3, 32, 32)), tmp_path / "mean.pt")
    write_tar(tmp_path / "none.tar", [("x.png", b"broken")])
    base = "pool: pool.tar\nembed: {semantic: {kind: torchscript, path: mean.pt, size: 32}}\ndedup: {threshold: 0.999, reference_threshold: 0.999}\n"
    code, _, err = asked("run", config(tmp_path, base + "cluster: {k: 50}"))
    assert (code, "more than the 6 images" in err) == (1, True), err
    code, _, err = asked(
        "run", config(tmp_path, base + "curated: [{name: none, uri: none.tar, retrieve: {mode: sample}}]")
    )
    assert (code, "`none` has no readable image" in err) == (1, True), err
    # A reference set equal to the pool leaves nothing, and says so.
    code, _, err = asked("run", config(tmp_path, base + "reference: [{name: same, uri: pool.tar}]"))
    assert (code, "reference" in err) == (1, True), err
    looking = base + "curated: [{name: some, uri: pool.tar, retrieve: {mode: sample, k: 50}}]\n"
    code, _, err = asked("run", config(tmp_path, looking + "reference: [{name: same, uri: pool.tar}]"))
    assert (code, "{'reference': 6}): `some` has nothing" in err) == (1, True), err
    # More than there is: all of it, and a warning with the numbers.
    code, out, err = asked("run", config(tmp_path, looking))
    assert (code, "k = 50 is more than the 6 pool images" in err) == (0, True), err
    assert "some 300 6 30 264 0 0" in " ".join(out.split()), out
    code, _, err = asked("run", config(tmp_path, base), "--json")
    assert code == 0, err


@pytest.mark.skipif(os.name != "posix", reason="needs a small file system of its own")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A store on a file system of 256 KiB: one clear error, no half-written artifact; with room the run goes on.

    The log of the stage's process cannot be written there either.
    """
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        write_tar(tmp_path / "pool.tar", [(f"{i}.png", picture(i, width=120, height=90)) for i in range(300)])
        path = config(tmp_path, "pool: pool.tar\nstore: small/runs\ningest: {slice_mb: 0.2}")
        code, _, err = asked("run", path, "--until", "ingest")
        assert (code, "is full" in err) == (1, True), err
        assert not list(small.glob("runs/artifacts/**/manifest.json"))
        for manifest in small.glob("runs/parts/**/manifest.json"):
            json.loads(manifest.read_text())
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        with in_one_process():
            code, _, err = asked("run", path, "--until", "ingest")
        assert code == 0, err
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_read_only_store(tmp_path: Path, pool: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(store)], capture_output=True).returncode == 0
    )
    if not mounted:
        store.chmod(0o500)
        if os.access(store, os.W_OK):
            pytest.skip("this user can write everywhere and may not mount")
    try:
        code, _, err = asked("run", config(tmp_path, "pool: pool.tar\nstore: store"))
        assert (code, "cannot be read or written" in err) == (1, True), err
    finally:
        if mounted:
            subprocess.run(["umount", str(store)], check=True)
