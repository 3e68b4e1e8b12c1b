"""The page of a pruning job by itself: what it says of sweeps, of tickets and of masks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lodeset.infra.report.pruned import report_of
from lodeset.infra.report.render import write_pruned
from lodeset.pruning.jobs.path_picture import in_order, path_picture

LATENCY = {f"batch_{b}": {"median": 1.5, "spread": 0.5} for b in (1, 32)}
COST = {"parameters": 800, "nonzero": 400, "macs": 4_000_000, "channels": 32, "latency_ms": LATENCY, "threads": 1}
SHARES = COST | {"parameters_removed": 0.2, "macs_removed": 0.2, "channels_removed": 0.5, "density": 0.5, "dense": COST}


def page(job: dict[str, Any], tmp_path: Path, files: dict[str, bytes] | None = None) -> str:
    path = write_pruned(job, (files or {}).get, tmp_path / "report.html", "lenet <pruned>")
    text = path.read_text()
    assert "<h1>lenet &lt;pruned&gt;</h1>" in text and "http-equiv" in text
    return text


def test_tickets_and_the_overlap_of_their_masks(tmp_path: Path) -> None:
    methods = ("dino", "rotation", "dino, at random", "dino, then labels")
    rows = [
        SHARES | {"method": m, "round": r, "kept": 0.8**r, "knn": {"birds": {"10": 0.4, "100": 0.5}}, "linear": {"birds": 0.45}, "loss": 1.25}
        for m in methods for r in (2, 1)
    ]  # fmt: skip
    job = {"method": "lottery", "structured": False, "rate": 0.2, "scope": "global", "rewind": 0.1, "steps": 1000}
    overlaps = [{"round": 1, "one": "dino", "other": "rotation", "jaccard": 0.731, "by_chance": 0.667}]
    tree = {"job": job, "images": 9, "knn_dense": {}, "skipped_modules": {}, "variants": rows, "overlaps": overlaps}
    text = page(tree, tmp_path)
    assert "reset to step 100 of 1,000" in text and "73.1 %" in text and "66.7 %" in text
    # kNN and linear, as they were trained and on labels.
    assert text.count('<svg class="chart"') == 4 and "birds, %, then trained on labels" in text
    assert [one.at for one in report_of(tree).variants] == [1] * 4 + [2] * 4  # type: ignore[union-attr]
    dashed = [part for part in text.split("<polyline")[1:] if 'class="line dashed"' in part[:40]]
    assert len(dashed) == 3  # what was drawn at random: in the key, and in two charts


def test_masks_without_labelled_images(tmp_path: Path) -> None:
    rows = [
        SHARES
        | {
            "method": m,
            "lr": 0.15,
            "kept": 0.9,
            "knn": {},
            "linear": {},
            "loss": loss,
            "masks_bytes": 2160,
            "weights_bytes": 65_432,
        }
        for m, loss in (("masks, swav", 2.0), ("masks, at random", None))
    ]
    tree = {
        "job": {"method": "self_masking", "task": "swav", "steps": 40},
        "knn_dense": {},
        "linear_dense": {},
        "skipped_modules": {},
        "variants": rows,
    }
    text = page(tree, tmp_path)
    assert (
        "masks, swav" in text
        and "2,160" in text
        and "65,432" in text
        and "learning rate" in text
        and "learned from images alone (SwAV)" in text
        and '<svg class="chart"' not in text
    )


def test_a_sweep_shows_agreement_and_paths_where_there_is_nothing_else(tmp_path: Path) -> None:
    followed = {10.0**-n: np.array([0.7, 0.0, 0.3]) if n < 3 else np.full(3, 1 / 3) for n in range(1, 6)}
    rows = [
        SHARES | {"method": m, "eps_w": 0.1, "units": {}, "unexplained": {"fc": 0.125}, "converged": True, "knn": {},
            "removal_difference": 0.0, "agreement": 0.98765}
        for m in ("entropic", "random+refit")
    ]  # fmt: skip
    tree = {
        "job": {"method": "entropic"}, "calibration_images": 8, "skipped_modules": {"a": "why"}, "knn_dense": {}, "variants": rows,
        "paths": {"fc": "path.png", "gone": "gone.png"},
    }  # fmt: skip
    text = page(tree, tmp_path, {"path.png": path_picture(followed)})
    assert "0.9877" in text and "agreement with the dense model" in text and text.count("data:image/png") == 1


def test_shares_to_remove_and_what_each_group_keeps(tmp_path: Path) -> None:
    rows = [
        SHARES | {"method": m, "remove": at, "strengths": {"<fc>": eps}, "units": {"<fc>": units}, "unexplained": {}, "converged": True,
            "knn": {}, "removal_difference": 0.0, "agreement": 0.9}
        for at, eps, units in ((0.25, 0.005, 2_345), (0.5, 0.01, 1_234)) for m in ("entropic", "random+refit")
    ]  # fmt: skip
    tree = {
        "job": {"method": "entropic"}, "calibration_images": 8, "skipped_modules": {}, "knn_dense": {}, "variants": rows,
    }  # fmt: skip
    text = page(tree, tmp_path)
    told = re.sub(r"<[^>]*>", " ", text[text.index("What each group keeps") :])
    assert "&lt;fc&gt;" in told and text.count("2,345") == text.count("1,234") == 1 and "0.005" in told
    assert "eps_w" in told and "to remove" in text and "25.0 %" in told and "50.0 %" in told


def test_a_path_shows_when_units_go() -> None:
    w = np.array([[0.2, 0.3, 0.5], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    assert list(in_order(w)) == [1, 2, 0]
    picture = cv2.imdecode(np.frombuffer(path_picture(dict(enumerate(w, 1))), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    tall, wide = picture.shape[0] // 3, picture.shape[1] // 3
    gone = (picture[tall // 2 :: tall, wide // 2 :: wide] == picture[-1, -1]).all(axis=2)
    assert gone.tolist() == [[False] * 3, [False, False, True], [False, True, True]]
    many = np.linspace(1, 2, 1000)[None].repeat(3, axis=0)
    tall_one = cv2.imdecode(np.frombuffer(path_picture(dict(enumerate(many))), np.uint8), cv2.IMREAD_COLOR)
    assert tall_one is not None and tall_one.shape[0] <= 320
