"""Masks learned for a trained Vision Transformer that stays as it is: accuracy, density and bytes, with labels and without.

    python benchmarks/self_masking.py MODEL INDEX.parquet GALLERY.parquet TEST.parquet FOLDER [STEPS]

MODEL is what training exported, INDEX that of the shards that SwAV learns from; labelled images as in `prune_vit.py`. Beside every mask as
many weights at random in every layer. Goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prune_vit import K, labelled

from lodeset.infra.api import prune

RATES = "[0.5, 2.0, 8.0]"


def main() -> None:
    model, index, gallery, test, folder = sys.argv[1:6]
    steps = int(sys.argv[6]) if len(sys.argv) > 6 else 500
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    labelled(gallery, test, out / "labelled.parquet")
    for task in ("swav", "labels"):
        settings = ("method=self_masking", f"task={task}", f"lr={RATES}", f"steps={steps}")
        told = prune(Path(model), out / task, [index], None, settings, target=str(out / "labelled.parquet"))
        dense = told["knn_dense"]["target"][K], told["linear_dense"]["target"]
        print(
            f"{task}: {told['seconds']:.0f} s; as it is: kNN, k = {K}, {dense[0]:.3f}, linear {dense[1]:.3f}\nlr  kNN  linear  density  bytes"
        )
        for one in told["variants"]:
            score = one["knn"]["target"][K], one["linear"]["target"]
            sizes = f"{one['masks_bytes']:,} of {one['weights_bytes']:,}"
            print(f"{one['lr']:5g}  {score[0]:.3f}  {score[1]:.3f}  {one['kept']:8.3%}  {sizes}  {one['method']}")
        for rate, why in told["skipped_modules"].items():
            print(f"{rate}: {why}")


if __name__ == "__main__":
    main()
