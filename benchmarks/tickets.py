"""Lottery tickets on CIFAR-10, found with labels and without: what their masks share, and what they are worth on labels.

    python benchmarks/tickets.py INDEX.parquet GALLERY.parquet TEST.parquet FOLDER [STEPS]

A residual network of seven convolutions (Frankle et al., arXiv:1912.05671, rewind such networks early in training) is trained on each task,
loses the smallest weights of all layers, is rewound to a tenth of the steps, and so on; every ticket, and as many weights at random in
every layer, is then trained on the labels of 10,000 images. INDEX is that of the shards that rotation and DINO learn from; labelled images as
in `prune_vit.py`. Goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from convnets import Block, convolution
from prune_vit import K, labelled
from torch import nn

from lodeset.infra.api import prune
from lodeset.pruning.formats.portable import save_portable

ROUNDS, RATE = 4, 0.5
WIDTHS = (32, 64, 128)


def network() -> nn.Sequential:
    """[B, 3, 32, 32] -> [B, 128]."""
    blocks = [Block(into, out, 2) for into, out in zip((32, *WIDTHS), WIDTHS, strict=False)]
    return nn.Sequential(convolution(3, 32, 3, 2), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def main() -> None:
    index, gallery, test, folder = sys.argv[1:5]
    steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    labelled(gallery, test, out / "labelled.parquet")
    torch.manual_seed(0)
    if not (out / "network").is_dir():
        save_portable(network().eval(), out / "network", torch.randn(2, 3, 32, 32))
    settings = (
        "method=lottery",
        "tasks=[labels, rotation, dino]",
        f"rounds={ROUNDS}",
        f"rate={RATE}",
        f"steps={steps}",
        "crops={global_scale: [0.3, 1.0], blur: [0.0, 0.0, 0.0], solarise: 0.0}",
    )
    told = prune(
        out / "network", out / "tickets", [index], None, settings, size=32, target=str(out / "labelled.parquet")
    )
    print(f"{told['seconds']:.0f} s\nround  weights  kNN, k = {K}  linear  loss   network")
    for one in told["variants"]:
        score = one["knn"]["target"][K], one["linear"]["target"]
        print(
            f"{one['round']:5}  {one['kept']:6.1%}  {score[0]:.3f}        {score[1]:.3f}   {one['loss']:.3f}  {one['method']}"
        )
    for one in told["overlaps"]:
        print(
            f"round {one['round']}: {one['one']} and {one['other']} share {one['jaccard']:.3f}, by chance {one['by_chance']:.3f}"
        )


if __name__ == "__main__":
    main()
