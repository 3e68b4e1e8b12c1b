"""What the graph of a configuration depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import picture

from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.graph import build


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/a.png").write_bytes(picture(1))
    return {"pool": [{"uri": str(tmp_path / "pool")}], "embed": {"semantic": network(tmp_path / "a.pt")}}


def network(path: Path) -> dict[str, str]:
    path.write_bytes(path.name.encode())
    return {"kind": "torchscript", "path": str(path)}


def stages(tree: dict[str, Any]) -> dict[str, Stage]:
    return build(CurationConfig.model_validate(tree))


@pytest.mark.parametrize("fitted", ["calibrate/pool", "fit_clusters/pool"])
def test_what_is_fitted_on_vectors_is_of_their_embedder_alone(
    tree: dict[str, Any], tmp_path: Path, fitted: str
) -> None:
    """A fitted artifact is taken over by configuration, so the embedder and the size of a trial must be part of it."""
    before = stages(tree)[fitted]
    assert before.config == stages(tree)[fitted].config
    assert before.frozen or set(before.follows.keys if before.follows else ()) == {*before.config} - {"drift"}
    other = {**tree, "embed": {"semantic": network(tmp_path / "b.pt")}}
    assert stages(other)[fitted].config != before.config
    assert stages({**tree, "ingest": {"limit": 5}})[fitted].config != before.config


@pytest.mark.parametrize("fitted", ["fit_embedder/pool", "calibrate/pool", "fit_clusters/pool"])
def test_a_trial_on_a_sample_is_not_what_the_whole_pool_takes_over(tree: dict[str, Any], fitted: str) -> None:
    del tree["embed"]
    assert stages({**tree, "ingest": {"limit": 5}})[fitted].config != stages(tree)[fitted].config


def test_a_model_s_place_is_no_part_of_what_it_computes(tree: dict[str, Any], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.pt"
    moved.write_bytes(b"a.pt")
    other = {**tree, "embed": {"semantic": {"kind": "torchscript", "path": str(moved)}}}
    assert stages(other)["embed/pool"].config == stages(tree)["embed/pool"].config


def test_weights_beside_an_onnx_graph_are_part_of_the_embedder(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"...location weights/big.bin...")
    (folder / "weights/big.bin").write_bytes(b"one")
    (folder / "README.md").write_bytes(b"one")
    tree["embed"] = {"semantic": {"kind": "onnx", "path": str(folder / "model.onnx")}}
    before = stages(tree)["embed/pool"].config
    (folder / "README.md").write_bytes(b"two")
    assert stages(tree)["embed/pool"].config == before
    (folder / "weights/big.bin").write_bytes(b"two")
    assert stages(tree)["embed/pool"].config != before


def test_all_that_a_draw_goes_by_is_part_of_the_listing(tree: dict[str, Any], tmp_path: Path) -> None:
    """The same files by another root have other relative paths, and a limit draws by these."""
    above = {**tree, "pool": [{"uri": str(tmp_path / "po*")}]}
    assert stages(above)["ingest/pool"].config == stages(tree)["ingest/pool"].config
    (tmp_path / "pool/deep").mkdir()
    (tmp_path / "pool/a.png").rename(tmp_path / "pool/deep/a.png")
    below = {**tree, "pool": [{"uri": str(tmp_path / "pool/deep")}]}
    assert stages(below)["ingest/pool"].config != stages(tree)["ingest/pool"].config


def test_sscd_with_its_published_thresholds_is_not_calibrated(tree: dict[str, Any], tmp_path: Path) -> None:
    sscd = {**network(tmp_path / "sscd.pt"), "size": 288, "resize": "short_side", "interpolation": "bilinear"}
    tree["embed"]["dedup"] = sscd
    assert "calibrate/pool" in stages(tree)
    made = stages({**tree, "dedup": {"threshold": 0.6, "reference_threshold": 0.45}})
    assert "calibrate/pool" not in made
    assert made["embed_dedup/pool"].config["embedder"]["resize"] == "short_side"


def test_a_balanced_sample_takes_the_place_of_everything_and_stands_beside_curated_sets(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/b.png").write_bytes(picture(2))
    sampled = {"name": "s", "uri": str(tmp_path / "set"), "retrieve": {"mode": "sample"}}
    assert stages(tree)["retrieve/all"].config["everything"] and "balance/pool" not in stages(tree)
    assert "cluster/pool" not in stages({**tree, "curated": [sampled]})
    for curated in ([], [sampled]):
        made = stages({**tree, "balance": {"images": 5}, "curated": curated})
        assert not made["retrieve/all"].config["everything"]
        assert made["retrieve/all"].inputs["retrieve:pool"].stage is made["balance/pool"]
        assert made["balance/pool"].inputs["clusters"].stage is made["cluster/pool"]


def test_resampling_is_part_of_a_fit_only_where_there_are_levels(tree: dict[str, Any]) -> None:
    def fitted(**cluster: Any) -> Any:
        return stages({**tree, "cluster": cluster})["fit_clusters/pool"].config

    assert fitted(resampling=3) == fitted()
    assert fitted(k=[20, 4], resampling=3) != fitted(k=[20, 4])
    assert fitted(spherical=True) != fitted()
