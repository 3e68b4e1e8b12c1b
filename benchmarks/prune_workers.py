"""Does it matter how many workers prune? The same job on one and on two, compared weight by weight.

    python benchmarks/prune_workers.py MODEL INDEX.parquet FOLDER

MODEL is what training exported, INDEX that of shards to calibrate on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lodeset.infra.api import prune
from lodeset.pruning.formats.saving import load_model

SETTINGS = ("sweep=[1e-3,8e-3]", "targets=[units,heads]", "calibration_images=1024")


def main() -> None:
    model, index, folder = sys.argv[1:4]
    made = {}
    for cpus in (1, 2):
        out = Path(folder) / str(cpus)
        told = prune(model, out, [index], None, SETTINGS, cpus=cpus)
        made[cpus] = {f"{one['method']} {one['eps_w']:g}": load_model(out / one["model"]) for one in told["variants"]}
        print(f"{cpus} workers: {told['seconds']:.0f} s")
    for name, one in made[1].items():
        others = dict(made[2][name].named_parameters())
        apart = max(float((p - others[of]).detach().abs().max()) for of, p in one.named_parameters())
        print(f"{name}: weights at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
