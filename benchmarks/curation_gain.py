"""What curation is worth to the model that is trained on it: DINOv2's Table 2 in small.

    python benchmarks/curation_gain.py curate FOLDER WORK
    python benchmarks/curation_gain.py dictionary WORK [SEEDS]
    python benchmarks/curation_gain.py vit WORK [SEEDS [STEPS]]
    python benchmarks/curation_gain.py told WORK

FOLDER: world/pool.tar (an uncurated pool), world/targets.parquet (set, split, label, image) and weights/mobilenet_v2.onnx. WORK keeps
everything, so that every command goes on where it was stopped.

`curate` runs lodeset twice: with the `curate` images of three target sets as curated sets, and without any; their `test` images are
reference sets both times. Three arms are trained alike, by seed: (a) on what the pipeline selected, (b) on as many images drawn at
random from the pool that is left after deduplication, (c) on all of that pool. Each is judged by kNN (k = 10) from `gallery` to
`test` of each target set. The learner is a small DINOv2 (`vit`) or the patch dictionary. `told` prints means, and the interval of (a)
less (b) from 10,000 draws of seeds and, within each set, of test images.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from world import files, lodeset

SETS = ("flowers", "grocery", "signdigit")
ARMS = ("selected", "random", "pool")
PER_QUERY = 8  # pool images retrieved for each curated image
K, DRAWS, LIMIT = 10, 10_000, 10**8
STEPS = 2_000


def curate(folder: Path, work: Path) -> None:
    """Writes sets and configurations, runs lodeset for both, and notes where the indexes lie."""
    table = pq.read_table(folder / "world/targets.parquet")
    (work / "sets").mkdir(parents=True, exist_ok=True)
    named, splits = table["set"].to_numpy(), table["split"].to_numpy()
    for name in SETS:
        for split in ("curate", "gallery", "test"):
            rows = np.flatnonzero((named == name) & (splits == split))
            pq.write_table(table.take(rows), work / f"sets/{name}-{split}.parquet")
    tree: dict[str, Any] = {
        "store": "./store",
        "pool": [{"uri": str(folder / "world/pool.tar")}],
        "reference": [{"name": f"{name}-test", "uri": f"sets/{name}-test.parquet"} for name in SETS],
        "embed": {"semantic": {"kind": "onnx", "path": str(folder / "weights/mobilenet_v2.onnx")}},
        "ingest": {"slice_mb": 4},
        "shards": {"size_mb": 16},
    }
    curated = [
        {"name": n, "uri": f"sets/{n}-curate.parquet", "retrieve": {"mode": "sample", "k": PER_QUERY}} for n in SETS
    ]
    found = {}
    for arm, more in (("selected", {"curated": curated}), ("pool", {})):
        config = work / f"{arm}.yaml"
        config.write_text(yaml.safe_dump({**tree, **more, "name": arm}))
        artifacts = lodeset("run", str(config))["artifacts"]
        (found[arm],) = files(artifacts, "write_shards", "index")
        print(arm, json.dumps({a["stage"]: a["rows"] for a in artifacts if a["stage"] in ("dedup", "write_shards")}))
    (work / "indexes.json").write_text(json.dumps(found))


def index_of(work: Path, arm: str, seed: int) -> str:
    """The index of an arm; `random` gets one of its own beside the shards of the pool."""
    found: dict[str, str] = json.loads((work / "indexes.json").read_text())
    if arm != "random":
        return found[arm]
    pool = pq.read_table(found["pool"])
    wanted = pq.read_metadata(found["selected"]).num_rows
    rows = np.sort(np.random.default_rng(seed).permutation(len(pool))[:wanted])
    path = Path(found["pool"]).with_name(f"index-random-{seed}.parquet")
    pq.write_table(pool.take(rows), path)
    return str(path)


def images_of(work: Path, name: str, split: str) -> tuple[list[Any], list[str]]:
    from lodeset.pipeline.algorithms.images.decoding import decode

    table = pq.read_table(work / f"sets/{name}-{split}.parquet", columns=["image", "label"])
    encoded = table["image"].combine_chunks()
    if pa.types.is_struct(encoded.type):
        encoded = encoded.field("bytes")
    return [decode(one, LIMIT) for one in encoded.to_pylist()], [str(label) for label in table["label"].to_pylist()]


def judged(work: Path, embed: Any) -> dict[str, list[bool]]:
    """For each target set, which test images kNN labels rightly; `embed` takes images and gives vectors of length 1."""
    from lodeset.training.evaluate import knn

    right = {}
    for name in SETS:
        (gallery, labels), (test, truth) = images_of(work, name, "gallery"), images_of(work, name, "test")
        right[name] = (knn(embed(gallery), labels, embed(test), K) == np.asarray(truth)).tolist()
    return right


def dictionary(work: Path, arm: str, seed: int) -> None:
    from lodeset.pipeline.algorithms.images.decoding import decode
    from lodeset.pipeline.embedders import patches
    from lodeset.pipeline.embedders.config import PatchDictionary
    from lodeset.training.index import open_index

    index = open_index([index_of(work, arm, seed)])
    config = PatchDictionary(seed=seed)
    images = [decode(data, LIMIT) for data in index.read(range(len(index))) if data is not None]
    embed = patches.embedder(patches.fit(images, config), config)

    def unit(some: list[Any]) -> NDArray[np.float32]:
        vectors = np.concatenate([embed(some[i : i + 64]) for i in range(0, len(some), 64)])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    keep(work, "dictionary", arm, seed, judged(work, unit), len(index))


def vit(work: Path, arm: str, seed: int, steps: int) -> None:
    import torch

    from lodeset.training.config import TrainingConfig
    from lodeset.training.evaluate import features
    from lodeset.training.export import load_backbone
    from lodeset.training.index import Shards, open_index
    from lodeset.training.launch import train_inline

    torch.set_num_threads(1)
    config = TrainingConfig.model_validate(
        {
            "steps": steps,
            "batch": 64,
            "seed": seed,
            "precision": "bf16",
            "log_every": 50,
            "checkpoint_every": 250,
            "model": {"patch_size": 8, "dim": 128, "depth": 6, "heads": 2, "drop_path": 0.1},
            "heads": {"prototypes": 512},
            "teacher": {"temperature_end": 0.04},
            # What helped most on CIFAR-10, with no arm trained yet (docs/log.md).
            "crops": {"global_scale": (0.5, 1.0), "local_scale": (0.2, 0.6), "blur": (0.0, 0.0, 0.0), "solarise": 0.0},
            "optimiser": {"layer_decay": 1.0, "patch_embed_lr": 1.0},
        }
    )
    index, folder = index_of(work, arm, seed), work / f"runs/{arm}-{seed}-{steps}"
    train_inline(config, Shards(index=(index,)), folder)
    model = load_backbone(folder)

    def unit(some: list[Any]) -> NDArray[np.float32]:
        return features(model, (np.asarray(one) for one in some), config.crops.global_size, 64)

    keep(work, f"vit-{steps}", arm, seed, judged(work, unit), len(open_index([index])))


def keep(work: Path, learner: str, arm: str, seed: int, right: dict[str, list[bool]], images: int) -> None:
    path = work / f"results/{learner}/{arm}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "right": right}))
    print(learner, arm, seed, {name: round(float(np.mean(some)), 4) for name, some in right.items()}, flush=True)


def told(work: Path) -> None:
    for folder in sorted((work / "results").iterdir()):
        found = {tuple(path.stem.rsplit("-", 1)): json.loads(path.read_text()) for path in folder.glob("*.json")}
        seeds = sorted({int(seed) for _, seed in found if all((arm, seed) in found for arm in ARMS)})
        if not seeds:
            continue
        print(f"== {folder.name}, {len(seeds)} seeds, k = {K}")
        right = {
            arm: {name: np.array([found[arm, str(seed)]["right"][name] for seed in seeds]) for name in SETS}
            for arm in ARMS
        }  # [seeds, test images]
        for arm in ARMS:
            per_set = {name: round(float(right[arm][name].mean()), 4) for name in SETS}
            mean = np.array([[right[arm][name][s].mean() for name in SETS] for s in range(len(seeds))]).mean(axis=1)
            print(
                arm,
                found[arm, str(seeds[0])]["images"],
                "images",
                per_set,
                f"mean {mean.mean():.4f}, by seed {np.round(mean, 4)}",
            )
        for other in ("random", "pool"):
            low, high = interval({n: right["selected"][n].astype(float) - right[other][n] for n in SETS})
            difference = np.mean([right["selected"][n].mean() - right[other][n].mean() for n in SETS])
            print(f"selected - {other}: {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")


def interval(differences: dict[str, NDArray[np.float64]]) -> tuple[float, float]:
    """Of the mean over sets of differences [seeds, test images]: seeds and test images are drawn anew."""
    rng = np.random.default_rng(0)
    seeds = len(next(iter(differences.values())))
    drawn = np.empty(DRAWS)
    for i in range(DRAWS):
        some = rng.integers(seeds, size=seeds)
        drawn[i] = np.mean([x[some][:, rng.integers(x.shape[1], size=x.shape[1])].mean() for x in differences.values()])
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    command, *rest = sys.argv[1:]
    if command == "curate":
        curate(Path(rest[0]).resolve(), Path(rest[1]).resolve())
        return
    work = Path(rest[0]).resolve()
    if command == "told":
        told(work)
        return
    seeds, steps = int(rest[1]) if len(rest) > 1 else 3, int(rest[2]) if len(rest) > 2 else STEPS
    learner = f"vit-{steps}" if command == "vit" else command
    jobs = [
        (work, arm, seed, *([steps] if command == "vit" else []))
        for seed in range(seeds)
        for arm in ARMS
        if not (work / f"results/{learner}/{arm}-{seed}.json").exists()
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as two:
        two.starmap({"vit": vit, "dictionary": dictionary}[command], jobs, chunksize=1)
    told(work)


if __name__ == "__main__":
    main()
