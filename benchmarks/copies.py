"""Copies of photographs found by dedup, with and without close looks: kinds of copies that nothing was tuned on the labels of.

    python benchmarks/copies.py EMBEDDER.onnx IMAGES...        IMAGES: tars, and Parquet files with a column `image`

Of all images of 96 pixels and more, up to 1,000 are copied: every other one by one or two usual changes
(`algorithms.copies.variations`), the others as a crop to 10 to 40 % of the area, at any angle or inside another picture. Groups that
hold several of the given images are counted too: some of these are copies of each other, others photographs of one scene.
"""

from __future__ import annotations

import collections
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from fit_closeups import strong
from PIL import Image
from world import files, lodeset

from lodeset.pipeline.algorithms.copies.variations import varied
from lodeset.pipeline.algorithms.images.decoding import Unreadable, decode, image_id

LEAST_SIDE, COPIES = 96, 1_000


def images_of(path: Path) -> list[bytes]:
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            found = [tar.extractfile(m).read() for m in tar if m.isfile()]
    else:
        found = [cell["bytes"] if isinstance(cell, dict) else cell for cell in pq.read_table(path)["image"].to_pylist()]
    return [data for data in found if large(data)]


def large(data: bytes) -> bool:
    try:
        return min(decode(data).size) >= LEAST_SIDE
    except Unreadable:
        return False


def copied(image: Image.Image, other: Image.Image, far: bool, rng: np.random.Generator) -> bytes:
    made = strong(image, other, rng) if far else varied(image, rng)[0]
    buffer = io.BytesIO()
    made.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    embedder, *paths = (Path(word).resolve() for word in sys.argv[1:])
    originals = list({image_id(data): data for path in paths for data in images_of(path)}.values())
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(originals), min(COPIES, len(originals)), replace=False)
    copies = [
        copied(decode(originals[row]), decode(originals[int(rng.integers(len(originals)))]), at % 2 == 1, rng)
        for at, row in enumerate(chosen)
    ]
    with tempfile.TemporaryDirectory(prefix="lodeset-copies-") as folder:
        with tarfile.open(Path(folder) / "pool.tar", "w") as tar:
            for number, data in enumerate([*originals, *copies]):
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        config = Path(folder) / "lodeset.yaml"
        tree = {
            "store": "./runs",
            "pool": [{"uri": "pool.tar"}],
            "embed": {"semantic": {"kind": "onnx", "path": str(embedder)}},
        }
        config.write_text(yaml.safe_dump(tree))
        for closeups in ("false", "true"):
            run = ("run", str(config), "--until", "dedup", "--set", f"dedup.closeups={closeups}")
            artifacts = lodeset(*run)["artifacts"]
            table = pq.read_table(files(artifacts, "dedup", "duplicates"), columns=["image_id", "group_id"])
            group = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
            found = [
                group.get(image_id(copy)) == group.get(image_id(originals[row]))
                for row, copy in zip(chosen, copies, strict=True)
            ]
            held = collections.Counter(group[image_id(data)] for data in originals)
            (done,) = (a for a in artifacts if a["stage"] == "dedup")
            print(
                json.dumps(
                    {
                        "images": len(originals),
                        "closeups": closeups,
                        "usual_copies_found": round(float(np.mean(found[::2])), 3),
                        "strong_copies_found": round(float(np.mean(found[1::2])), 3),
                        "groups_of_several_originals": sum(count > 1 for count in held.values()),
                        "largest": max(held.values()),
                        "seconds": round(done["seconds"], 1),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
