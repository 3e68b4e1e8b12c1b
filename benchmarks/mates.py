"""Copies found and template-mates left alone by dedup, with and without details, over closed groups: whole runs on a pool of several
domains.

    python benchmarks/mates.py [--images N] FOLDER...

Each FOLDER holds the images of one domain, which are known to be no copies of each other unless their pixels are the same (of those,
one is taken). Each is copied three times, as by `fit_details.py`. Give it images that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import tempfile
from pathlib import Path

import fit_details
import numpy as np
import pyarrow.parquet as pq
import yaml
from fit_copies import PROCESSES
from fit_details import Picture, copies, images_of
from world import lodeset

from lodeset.pipeline.algorithms.images.decoding import image_id


def judged(groups: dict[str, str], kept: dict[str, Picture]) -> dict[str, tuple[int, int, int]]:
    """By domain: pairs found, pairs of copies found, pairs of copies that there are."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    members: dict[str, list[str]] = collections.defaultdict(list)
    originals: dict[int, list[str]] = collections.defaultdict(list)
    for image, picture in kept.items():
        members[groups[image]].append(image)
        originals[picture.original].append(image)
    for some in members.values():
        for a, b in itertools.combinations(some, 2):
            counts = found[kept[a].domain]
            counts[0] += 1
            counts[1] += kept[a].original == kept[b].original
    for some in originals.values():
        found[kept[some[0]].domain][2] += len(some) * (len(some) - 1) // 2
    return {domain: (counts[0], counts[1], counts[2]) for domain, counts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=100)
    asked = parser.parse_args()
    rng, pictures = np.random.default_rng(1), fit_details.pictures
    for folder in asked.folders:
        for data in images_of(folder, asked.images, rng):
            pictures.append(Picture(folder.name, data, len(pictures)))
    count = len(pictures)
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for number, made in enumerate(pool.map(copies, range(count), chunksize=8)):
            pictures.extend(Picture(pictures[number].domain, data, number) for data in made)
    by_id = {image_id(picture.data): picture for picture in pictures}
    print("| details | domain | copies found | of | recall | precision | dedup s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="lodeset-mates-") as name:
        folder = Path(name)
        (folder / "pool").mkdir()
        for number, data in enumerate(picture.data for picture in pictures):
            (folder / "pool" / f"{number:06d}.png").write_bytes(data)
        config = folder / "lodeset.yaml"
        config.write_text(yaml.safe_dump({"store": "./runs", "pool": ["pool/"]}))
        for line in ("null", "0", "0.5", "1"):
            run = ("run", str(config), "--until", "dedup", "--set", f"dedup.min_detail_score={line}")
            (dedup,) = (one for one in lodeset(*run)["artifacts"] if one["stage"] == "dedup")
            rows = pq.read_table(dedup["tables"]["duplicates"][0]).to_pylist()
            groups = {row["image_id"]: row["group_id"] for row in rows}
            found = judged(groups, {image: picture for image, picture in by_id.items() if image in groups})
            whole = tuple(sum(column) for column in zip(*found.values(), strict=True))
            for domain, (pairs, true, there) in [*found.items(), ("all", whole)]:
                told = f"{true / max(1, there):.3f} | {true / max(1, pairs):.3f} | {dedup['seconds']:.1f}"
                print(f"| {line} | {domain} | {true} | {there} | {told} |", flush=True)


if __name__ == "__main__":
    main()
