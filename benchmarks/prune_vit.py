"""What is left of a Vision Transformer that is pruned without labels and not trained again: kNN accuracy and speed against size.

    python benchmarks/prune_vit.py MODEL INDEX.parquet GALLERY.parquet TEST.parquet FOLDER [SETTING ...]

MODEL is what training exported, INDEX that of shards to calibrate on. Gallery: 10,000 images of GALLERY, drawn by seed; test: all of TEST
(both with `image` and `label`). SETTINGs are those of `lodeset prune --set`, such as `remove=[0.4,0.5,0.6]` and `mode=sequential`; without
any, four strengths. Beside every pruned model the gain over the same network untrained that it keeps:
(pruned - untrained) / (dense - untrained).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lodeset.infra.api import prune
from lodeset.infra.session import run_in
from lodeset.pipeline.config import Ingest, TargetSet
from lodeset.pipeline.dag.cluster import Cluster
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.graph import ingest_stage
from lodeset.pruning.formats.saving import load_model
from lodeset.pruning.jobs.judging import knn_of
from lodeset.pruning.learning.lottery import fresh
from lodeset.training.labelled import read_target
from lodeset.training.vit import DinoVisionTransformer

GALLERY, K = 10_000, "20"
SWEEP = "sweep=[0.0005, 0.001, 0.002, 0.008]"
ALWAYS = ("targets=[units, heads]", "calibration_images=1024")


def labelled(gallery: str, test: str, path: Path) -> None:
    tables = []
    for source, split, count in ((gallery, "gallery", GALLERY), (test, "test", None)):
        table = pq.read_table(source, columns=["image", "label"])
        if count is not None:
            table = table.take(np.sort(np.random.default_rng(0).permutation(len(table))[:count]))
        image = [one["bytes"] if isinstance(one, dict) else one for one in table["image"].to_pylist()]
        label = [str(one) for one in table["label"].to_pylist()]
        tables.append(pa.table({"image": image, "label": label, "split": [split] * len(image)}))
    pq.write_table(pa.concat_tables(tables), path)


def main() -> None:
    model, index, gallery, test, folder = sys.argv[1:6]
    target = Path(folder) / "labelled.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    labelled(gallery, test, target)
    dense = load_model(Path(model))
    assert isinstance(dense, DinoVisionTransformer)
    judged, store = TargetSet(name="target", uri=str(target)), Store(str(Path(folder) / "judged"))
    stage = ingest_stage(Ingest(), {}, judged.name, [judged])
    ingested = run_in(store, {stage.id: stage}, name="judged", cpus=2, ray=Cluster(), watch=lambda event: None)[
        stage.id
    ]
    where = read_target(store, ingested, judged.name, judged.label, judged.split)[0]
    scores = {
        name: knn_of(network, (where,), dense.image_size, 10**8)[where.name][K]
        for name, network in (("untrained", fresh(dense, 0)), ("dense", dense))
    }
    print(f"kNN, k = {K}: untrained {scores['untrained']:.3f}, dense {scores['dense']:.3f}", flush=True)
    gain = scores["dense"] - scores["untrained"]
    settings = (*ALWAYS, *(sys.argv[6:] or [SWEEP]))
    told = prune(model, Path(folder) / "pruned", [index], None, settings, target=str(target))
    print(f"{told['seconds']:.0f} s\nremoved   MACs  kNN   gain kept  speed at 1, 32  agreement  method")
    for one in told["variants"]:
        accuracy = one["knn"]["target"][K]
        speed = [
            one["dense"]["latency_ms"][batch]["median"] / one["latency_ms"][batch]["median"]
            for batch in ("batch_1", "batch_32")
        ]
        print(
            f"{one['parameters_removed']:6.1%} {one['macs_removed']:6.1%} {accuracy:.3f} {(accuracy - scores['untrained']) / gain:6.1%} "
            f"{speed[0]:.2f} {speed[1]:.2f} {one['agreement']:.4f} {one['method']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
