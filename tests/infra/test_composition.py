"""What a composition says before there is any data, and what earlier runs teach it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import picture, write_folder
from rich.console import Console
from typer.testing import CliRunner

from lodeset.infra import api
from lodeset.infra.cli import main as cli
from lodeset.infra.composition import Composition, Row, compose
from lodeset.pipeline.dag.fingerprint import canonical
from lodeset.pipeline.dag.store import Artifact, Rows
from lodeset.pipeline.errors import LodesetError

RECIPE = Path(__file__).parents[2] / "recipes/lvd142m.yaml"
MILLION = 1_000_000
# DINOv2 (arXiv:2304.07193v2), appendix A: images of the set, mode, images in LVD-142M.
PUBLISHED = [
    (14_197_086, "as_is", 14_197_086), (14_197_086, "sample", 56_788_344), (1_281_167, "sample", 40_997_344),
    (1_434_262, "as_is", 1_434_262), (1_580_470, "as_is", 1_580_470), (1_580_470, "sample", 6_321_880),
    (1_231, "cluster", 960_000), (1_231, "cluster", 830_000),
    *((n, "cluster", MILLION) for n in (
        3_030, 5_994, 1_880, 3_334, 1_020, 75_750, 3_680, 8_144, 19_850, 2_501, 20_210, 2_975, 1_464, 23_158, 24_231,
        4_829, 397_121, 4_993, 6_322)),
]  # fmt: skip


def planned(config: Path, *overrides: str) -> dict[str, Any]:
    arguments = ["plan", str(config), "--json", *(word for one in overrides for word in ("--set", one))]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# -- the published data set


def test_the_recipe_is_the_published_table_without_any_data() -> None:
    told = planned(RECIPE)
    composed = told["composition"]
    assert [(r["images"], r["mode"], r["final"]) for r in composed["rows"]] == PUBLISHED
    assert [r["expected"] for r in composed["rows"]] == [final for *_, final in PUBLISHED]
    assert {r["difference"] for r in composed["rows"]} == {0}
    assert (composed["final"], composed["expected"], composed["difference"]) == (142_109_386, 142_109_386, 0)
    # Nothing was made up where the data is not: no stage, and what is missing.
    assert told["stages"] == [] and composed["unknown"] == []
    assert any(line.startswith("pool: nothing is at") for line in told["missing"])
    assert len(told["missing"]) == len(api.open_config(RECIPE, without_sources=True).config.named_sets) + 1


def test_another_k_or_limit_is_another_composition() -> None:
    rows = planned(RECIPE, "curated.1.retrieve.k=8")["composition"]
    assert rows["rows"][2]["final"] == rows["rows"][2]["retrieved"] == 8 * 1_281_167
    assert rows["rows"][2]["difference"] == rows["difference"] == -24 * 1_281_167
    assert rows["final"] == 142_109_386 - 24 * 1_281_167 and rows["expected"] == 142_109_386
    food = planned(RECIPE, "curated.11.retrieve.limit=2500000")["composition"]["rows"][13]
    assert (food["set"], food["retrieved"], food["final"]) == ("food101", 21_670_000, 2_500_000)
    caltech = planned(RECIPE, "curated.6.retrieve.limit=9000000")["composition"]["rows"][8]
    assert (caltech["set"], caltech["final"], caltech["difference"]) == ("caltech101", 2_630_000, 1_630_000)


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_whole_on_any_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(cli, "out", Console(width=width))
    monkeypatch.setattr(cli, "err", Console(width=width, stderr=True))
    done = CliRunner().invoke(cli.app, ["plan", str(RECIPE)], catch_exceptions=False)
    total = next(line for line in done.stdout.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "142,109,386", "142,109,386", "0"]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["google-landmarks-v2-train-clean", "sample", "1,580,470", "6,321,880", "6,321,880", "6,321,880", "0"] in [
        row[:7] for row in rows
    ]
    assert "nothing to do" not in done.stdout
    assert (
        done.exit_code == 0 and "not ready to run: 47 missing" in done.stderr and "pool: nothing is at" in done.stderr
    )


def test_run_on_the_recipe_says_what_is_missing() -> None:
    with pytest.raises(LodesetError, match="nothing is at"):
        CliRunner().invoke(cli.app, ["run", str(RECIPE)], catch_exceptions=False)


# -- any configuration


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, count in (("pool", 9), ("birds", 3), ("cats", 2)):
        write_folder(tmp_path / name, [(f"{n}.png", picture(n)) for n in range(count)])
    path = tmp_path / "lodeset.yaml"
    path.write_text(
        "pool: pool/\ncurated:\n"
        "  - {name: birds, uri: birds/, include: true, retrieve: {mode: sample, k: 2}}\n"
        "  - {name: cats, uri: cats/, retrieve: {mode: cluster, per_cluster: 5, min_matches: 1, limit: 4}}\n"
    )
    return path


def remember(config: Path, id_: str, kept: int, overrides: tuple[str, ...] = (), **details: Any) -> None:
    """An earlier run of a stage, from other inputs."""
    opened = api.open_config(config, overrides)
    stage = opened.stages[id_]
    fingerprint = f"{len(opened.store.history(stage.name, stage.set)):064}"
    made = Artifact(
        stage.name, stage.set, stage.version, fingerprint, canonical(stage.config), {}, {}, Rows(kept, kept), {},
        details, 1.0, 1.0 + int(fingerprint),
    )  # fmt: skip
    opened.store.commit_artifact(made)


def composed(config: Path, *overrides: str) -> Composition:
    return api.composition(api.open_config(config, overrides))


def test_nothing_is_known_of_sets_that_nobody_read(config: Path) -> None:
    found = composed(config)
    assert not found.known and found.unknown == ("birds", "cats") and found.expected is None
    done = CliRunner().invoke(cli.app, ["plan", str(config)], catch_exceptions=False)
    assert done.exit_code == 0 and "curated set" not in done.stdout and "would run" in done.stdout


def test_what_was_ingested_before_is_reckoned_with(config: Path) -> None:
    remember(config, "ingest/birds", 300)
    remember(config, "ingest/cats", 20)
    remember(config, "ingest/pool", 7, ("ingest.limit=7",))  # a trial says nothing of the whole pool
    found = composed(config)
    assert found.rows[:2] == (
        Row("birds", "as_is", 300, None, 300, "ingested", None),
        Row("birds", "sample", 300, 600, 600, "2 x N, N ingested", None),
    )
    assert found.final == 900 and found.unknown == ("cats",) and found.rows[2].images == 20
    assert composed(config, "curated.0.retrieve.k=5").rows[1].final == 1500
    remember(config, "ingest/pool", 450)
    assert composed(config).rows[1] == Row("birds", "sample", 300, 600, 450, "2 x N, no more than the pool's 450", None)
    assert composed(config, "ingest.limit=50").rows[1].final == 50
    told = planned(config)
    assert told["composition"]["final"] == 750 and told["missing"] == [] and told["stages"]
    done = CliRunner().invoke(cli.app, ["plan", str(config)], catch_exceptions=False)
    assert "without cats" in done.stdout and "expected" not in done.stdout and "would run" in done.stdout


def test_clusters_of_an_earlier_run_meet_another_limit(config: Path) -> None:
    remember(config, "retrieve/cats", 4, asked=50, retrieved=31, distinct=4)
    assert composed(config).rows[2] == Row("cats", "cluster", None, 31, 4, "clusters of an earlier run", None)
    assert composed(config, "curated.1.retrieve.limit=100").rows[2].final == 31
    assert composed(config, "curated.1.retrieve.min_matches=2").rows[2].final is None


def test_a_finished_set_tells_what_it_got(config: Path) -> None:
    opened = api.open_config(config)
    done = Artifact(
        "retrieve", "birds", 2, "f", {}, {}, {}, Rows(6, 5), {}, {"asked": 6, "retrieved": 6, "distinct": 5}, 1.0, 1.0
    )
    together = replace(done, set="all", details={"as_is_by_set": {"birds": 2, "cats": 0}})
    rows = compose(opened.config, opened.store, {"retrieve/birds": done, "retrieve/all": together}).rows
    assert [(row.retrieved, row.final, row.basis) for row in rows[:2]] == [(None, 2, "measured"), (6, 5, "measured")]


def test_expected_figures_change_no_result(config: Path) -> None:
    plain = api.open_config(config)
    told = ("curated.0.expected={images: 300, final: 7}",)
    found = composed(config, *told)
    assert [(r.final, r.expected, r.difference) for r in found.rows[:2]] == [(300, 300, 0), (600, 7, 593)]
    assert found.expected is None, "cats says nothing"
    with_it = api.open_config(config, told)
    assert {id_: stage.config for id_, stage in with_it.stages.items()} == {
        id_: stage.config for id_, stage in plain.stages.items()
    }
    remember(config, "ingest/birds", 10)
    assert composed(config, *told).rows[0].images == 10, "what was counted is worth more than what is expected"
