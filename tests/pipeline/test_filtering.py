"""Filters end to end, through the command line: a tar with metadata and a known classifier, and what a new threshold costs."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import encoded, id_of, pixels, write_tar
from commands import entries, lodeset, rows
from onnx_files import write_means
from PIL import Image, ImageFilter

from lodeset.infra import api
from lodeset.pipeline.errors import LodesetError

DETAIL = np.random.default_rng(0).integers(-40, 40, (64, 64, 1))


def picture(seed: int, red: int) -> Image.Image:
    """Blobs under fine grain: sharp, and with a red channel of one value."""
    image = (pixels(seed, 64, 64) + DETAIL).clip(0, 255).astype(np.uint8)
    image[..., 0] = red
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images: 0 to 7 as red as 20, 40, ... 160; 8 to 11 blurred; 12 to 15 flat; 16 to 19 long; 20 to 23 from bad hosts."""
    folder = tmp_path_factory.mktemp("filtering")
    members: list[tuple[str, bytes]] = []
    for n in range(24):
        image = picture(n, 20 * (n + 1) if n < 8 else 0)
        url = f"https://good{n}.org/{n}.png"
        if 8 <= n < 12:
            image = image.filter(ImageFilter.GaussianBlur(3))
        elif 12 <= n < 16:
            image = Image.new("RGB", (48, 48), (0, n, n))
        elif 16 <= n < 20:
            image = image.resize((200, 20 + n))
        elif n >= 20:
            url = f"HTTPS://me@img.Bad.org.:443/{n}.png"
        members += [(f"{n:02}.png", encoded(image)), (f"{n:02}.json", json.dumps({"url": url}).encode())]
    write_tar(folder / "pool.tar", members)
    write_means(folder / "red.onnx", 32)
    (folder / "hosts.txt").write_text("# not ours\nbad.org\n")
    classifier = {"name": "reddish", "path": "red.onnx", "size": 32, "mean": [0, 0, 0], "std": [1, 1, 1], "index": 0}
    config = {
        "store": "./runs",
        "pool": ["pool.tar"],
        "ingest": {"slice_mb": 0.05},
        "filter": {
            "max_aspect": 3, "blank": True, "min_sharpness": 0.2, "blocked_domains": "hosts.txt",
            "classifiers": [{**classifier, "keep": "below", "threshold": 0.5}],
        },
    }  # fmt: skip
    (folder / "lodeset.yaml").write_text(yaml.safe_dump(config))
    return folder


def numbers(folder: Path) -> dict[str, int]:
    """The images of the tar by image_id."""
    found = {}
    with tarfile.open(folder / "pool.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".png"):
                found[id_of(file.read())] = int(member.name[:2])
    return found


def test_from_the_first_run_to_another_threshold(folder: Path, tmp_path: Path, one_process: None) -> None:
    config = folder / "lodeset.yaml"
    planned = json.loads(lodeset("plan", config, "--json")[0])["stages"]
    pass_over_bytes = next(stage for stage in planned if stage["stage"] == "score")
    assert pass_over_bytes["seconds"] > 5 and pass_over_bytes["size_bytes"] == pass_over_bytes["images"] * 2 * 25

    lodeset("run", config, "--until", "filter")
    first, number = entries(config), numbers(folder)
    expected = {
        **dict.fromkeys((6, 7), "reddish"),
        **dict.fromkeys(range(8, 12), "blur"),
        **dict.fromkeys(range(12, 16), "blank"),
        **dict.fromkeys(range(16, 20), "max_aspect"),
        **dict.fromkeys(range(20, 24), "blocked_domain"),
    }
    assert {number[row["image_id"]]: row["reason"] for row in rows(first["filter/pool"], "filtered")} == expected
    assert first["filter/pool"]["rows"] == {
        "in": 24, "kept": 6, "dropped": {"max_aspect": 4, "blank": 4, "blur": 4, "reddish": 2, "blocked_domain": 4}
    }  # fmt: skip
    scored = first["score/pool"]
    assert scored["rows"] == {"in": 24, "kept": 24, "dropped": {}}
    assert scored["details"]["images_read"] == 24 and scored["details"]["parts"] > 2
    red = {row["image_id"]: row["score"] for row in rows(scored, "scores") if row["filter"] == "reddish"}
    assert sorted(red.values())[-8:] == pytest.approx([20 * n / 255 for n in range(1, 9)], abs=1e-5)

    dropped = next(image_id for image_id in red if number[image_id] == 7)
    told = json.loads(lodeset("trace", config, dropped, "--json")[0])["steps"]
    assert {
        "stage": "score/pool",
        "table": "scores",
        "image_id": dropped,
        "filter": "reddish",
        "score": red[dropped],
    } in told
    verdict = {"reason": "reddish", "score": red[dropped], "threshold": 0.5}
    assert {"stage": "filter/pool", "table": "filtered", "image_id": dropped, **verdict} in told

    page = tmp_path / "report.html"
    lodeset("report", config, "--out", page)
    assert "Scores of reddish" in page.read_text() and "Scores of blur" in page.read_text()

    change = ("--set", "filter.classifiers.0.threshold=0.3", "--set", "filter.min_sharpness=0.05")
    planned = {one["stage"]: one for one in json.loads(lodeset("plan", config, "--json", *change)[0])["stages"]}
    assert planned["score"]["action"] == "finished"
    assert "classifiers.reddish.threshold 0.5 -> 0.3; min_sharpness 0.2 -> 0.05" in planned["filter"]["reason"]
    lodeset("run", config, "--until", "filter", *change)
    after = entries(config, *change)
    assert after["score/pool"] == scored and after["ingest/pool"] == first["ingest/pool"]
    assert after["filter/pool"]["rows"]["dropped"]["reddish"] == 5  # of 20 n / 255 those from .3 on: n >= 4


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ("filter.classifiers.0.path=none.onnx", 1, "filter.classifiers (reddish): path:"),
        ("filter.classifiers.0.name=blur", 2, "name blur is the reason of another filter"),
        ("filter.classifiers.0.keep=over", 2, "'below' or 'above'"),
        ("filter.classifiers.0.std=[1, 0, 1]", 2, "filter.classifiers.0.std.1 = 0"),
        ("filter.blocked_domains=none.txt", 1, "filter.blocked_domains: no file"),
        ("filter.blocked_domains=[a.org/x]", 2, "filter.blocked_domains.0: 'a.org/x' is not a host"),
        ("filter.min_sharpnes=0.2", 2, "did you mean `min_sharpness`?"),
        ("filter.max_aspect=0.5", 2, "filter.max_aspect = 0.5"),
    ],
)
def test_mistakes_are_told_before_anything_runs(folder: Path, change: str, code: int, told: str) -> None:
    with pytest.raises(LodesetError) as caught:
        api.open_config(folder / "lodeset.yaml", (change,))
    assert told in str(caught.value) and caught.value.exit_code == code


def test_classifiers_of_one_name_are_refused(folder: Path) -> None:
    tree = yaml.safe_load((folder / "lodeset.yaml").read_text())
    tree["filter"]["classifiers"] *= 2
    (folder / "twice.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(LodesetError, match="told apart by name; used twice: reddish"):
        api.open_config(folder / "twice.yaml")
