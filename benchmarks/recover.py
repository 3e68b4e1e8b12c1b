"""What training again gives back to a Vision Transformer that was pruned hard: kNN accuracy before and after, for every way of choosing units.

    python benchmarks/recover.py RUN INDEX.parquet GALLERY.parquet TEST.parquet FOLDER EPS STEPS

RUN is the folder of a finished training run with its last checkpoint, INDEX that of the shards it trained on. At the strength EPS the three
refitted models are distilled from the dense one for STEPS steps. Labelled images as in `prune_vit.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prune_vit import TARGETS, K, labelled

from lodeset.infra.api import prune


def main() -> None:
    run, index, gallery, test, folder, eps, steps = sys.argv[1:8]
    target = Path(folder) / "labelled.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    labelled(gallery, test, target)
    recover = f"recover={{steps: {steps}, base_lr: 1.0e-3}}"
    settings = (f"sweep=[{eps}]", f"targets={TARGETS}", "calibration_images=1024", recover)
    told = prune(run, Path(folder) / "pruned", [index], None, settings, target=str(target))
    print(
        f"dense: kNN, k = {K}, {told['knn_dense']['target'][K]:.3f}; {told['seconds']:.0f} s\nremoved  kNN   agreement  seconds  method"
    )
    for one in told["variants"]:
        print(
            f"{one['parameters_removed']:6.1%}  {one['knn']['target'][K]:.3f}  {one['agreement']:.4f}  {one['seconds']:6.0f}  {one['method']}"
        )


if __name__ == "__main__":
    main()
