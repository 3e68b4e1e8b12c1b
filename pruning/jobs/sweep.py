"""A sweep of the entropic method in three steps: moments, solutions, variants. Ray workers share the parts of each
step; no part reads another part of the same step.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence

from lodeset.pipeline.dag.fingerprint import digest
from lodeset.pipeline.dag.parts import made
from lodeset.pipeline.dag.store import File
from lodeset.pipeline.errors import LodesetError
from lodeset.pruning.choosing.criteria import METHODS
from lodeset.pruning.config import PruneJob
from lodeset.pruning.jobs.path_picture import path_picture
from lodeset.pruning.jobs.recover import recovered, run_to_recover_by
from lodeset.pruning.jobs.setting import VERSION, Done, Workplace, judging_inputs, kept_file
from lodeset.pruning.jobs.sweep_parts import (
    GRAMS,
    SOLVED,
    VARIANT,
    calibration,
    choices,
    measurer,
    paths_of,
    points,
    pruner,
    solver,
)
from lodeset.pruning.specs import images_per_part
from lodeset.pruning.units.groups import Group

PICTURED = "prune_paths"


def sweep(work: Workplace, job: PruneJob, number: int) -> Done:
    """Make all variants of a job.

    Raises:
        LodesetError: no image can be read, or the model or the moments cannot be used.
    """
    started = time.time()
    if job.recover is not None:
        run_to_recover_by(work.setting, job.recover)  # reports errors of the configuration now
    context, setting, share, basis = work.context, work.setting, work.share, work.basis
    store = context.store

    runs, compared = calibration(setting.index, job)
    sampled = (job.calibration_images, job.positions_per_image, job.seed, job.targets)
    blocks = [
        (key, (key, i * images_per_part(job.calibration_images), run), len(run))
        for i, run in enumerate(runs)
        if (key := digest(GRAMS, VERSION, *basis, setting.size, *sampled, i))
    ]
    model = setting.model()
    groups, skipped = setting.groups(model, job)
    measure = functools.partial(measurer, setting, groups, job)
    moments, new_moments = made(context, GRAMS, blocks, functools.partial(share, measure))
    images = sum(p.counts["images"] for p in moments)
    if images == 0:
        raise LodesetError(f"none of the {sum(map(len, runs))} calibration images could be read: check the shards")
    files = tuple(p.files["moments"] for p in moments)

    solving_job = job.model_copy(update={"recover": None, "remove": (), **({"mode": "one_pass"} if job.remove else {})})
    solve = digest(SOLVED, VERSION, [p.key for p in moments], solving_job, bool(job.remove))
    rows = [row for run in runs for row in run]
    # Either one group by itself over the whole sweep, or all groups one after the other at one strength.
    pieces: list[tuple[tuple[Group, ...], float | None]] = [((group,), None) for group in groups]
    if job.solved_in_turn:
        pieces = [(groups, eps) for eps in sorted(job.sweep)]
    layers = [
        (key, (key, *piece), 1) for piece in pieces if (key := digest(solve, [g.name for g in piece[0]], piece[1]))
    ]
    make_solutions = functools.partial(solver, setting, files, rows, job)
    solved, new_solved = made(context, SOLVED, layers, functools.partial(share, make_solutions), unit="groups")

    solved_in = tuple(p.files["solution"] for p in solved)
    choices_by_group, refused = choices(store, solved_in)
    if len(refused) == len(groups):
        raise LodesetError(f"nothing can be pruned: {'; '.join(refused.values())}")
    variants = [
        (key, (key, point, method), 1)
        for point in points(job, model, groups, choices_by_group)
        for method in METHODS
        if (key := digest(VARIANT, VERSION, solve, job.mode, job.swept, point.at, method, judging_inputs(setting)))
    ]
    make = functools.partial(pruner, setting, groups, files, solved_in, rows, compared, job, number)
    done, new_done = made(context, VARIANT, variants, functools.partial(share, make), unit="variants")
    told_of = [json.loads(store.bytes_of(p.files["row"])) for p in done]
    again, trained, new_trained = recovered(work, job, zip(done, told_of, strict=True), compared, number)
    report = {
        "job": job.model_dump(mode="json"),
        "calibration_images": images,
        "skipped_modules": skipped | refused,
        "knn_dense": work.knn_dense(),
        "variants": sorted([*told_of, *again], key=lambda row: float(row[job.swept])),
        "seconds": round(time.time() - started, 2),
    }
    models = [
        file for p in (*done, *trained) for name, file in sorted(p.files.items()) if name not in ("row", "summary")
    ]
    drawn = paths_drawn(work, solve, solved_in)
    report["paths"] = {name: file.path for name, file in drawn.items()}
    models += drawn.values()
    parts = len(moments) + len(solved) + len(done) + len(trained)
    return Done(report, models, parts, len(new_moments) + len(new_solved) + len(new_done) + new_trained)


def paths_drawn(work: Workplace, solve: str, solved: Sequence[File]) -> dict[str, File]:
    """The path of w of every group as a PNG, drawn once."""
    store, key = work.context.store, digest(solve, "paths")
    part = store.part(PICTURED, key)
    if part is None:
        files = {
            name: kept_file(store, PICTURED, key, "path.png", path_picture(followed))
            for name, followed in paths_of(store, solved).items()
        }
        part = store.commit_part(PICTURED, key, {}, {"images": 0}, files=files)
    return dict(part.files)
