"""`score` and `filter` on a pool made by hand: what is dropped and why, and what a change costs."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import encoded, id_of, pixels, write_folder
from hypothesis import given
from hypothesis import strategies as st
from inline import artifact, ran, without_engine
from onnx_files import write_means
from PIL import Image, ImageFilter

from pipeline import graph, records
from pipeline.algorithms.images import examine
from pipeline.config import CurationConfig
from pipeline.dag.stage import Context, Outcome
from pipeline.dag.store import Artifact, Rows, Store
from pipeline.errors import ConfigError, LodesetError
from pipeline.stages import filter, score
from pipeline.stages.filter import first_reasons

DETAIL, BLOCKS = (np.random.default_rng(0).integers(0, 128, (side, side, 3), dtype=np.uint8) for side in (64, 4))
NOISE = DETAIL + np.kron(BLOCKS, np.ones((16, 16, 1), np.uint8))  # fine detail that blur takes, blocks that it leaves


def noisy(red: int = 128, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Sharp, not blank, and as red as asked."""
    image = np.asarray(Image.fromarray(NOISE).resize(size, Image.Resampling.NEAREST)).copy()
    image[..., 0] = red
    return Image.fromarray(image)


def pictures() -> dict[str, bytes]:
    made = {
        "sharp": noisy(100),
        "red": noisy(250),
        "small": noisy(101, (40, 10)),
        "long": noisy(102, (20, 100)),
        "blank": Image.new("RGB", (50, 50), (90, 100, 110)),
        "blurred": noisy(103).filter(ImageFilter.GaussianBlur(4)),
    }
    return {name: encoded(image) for name, image in made.items()}


URLS = {
    "sharp": ["https://good.org/a.jpg", None, "data:,x"],
    "red": ["https://img.bad.com/x", "https://good.org/x"],
    "small": ["https://bad.com/private/x"],
    "long": [],
    "blank": ["not a url at all"],
    "blurred": ["https://good.org/private/x"],
}


@dataclass
class Pool:
    """A folder of images, and what ingest would say about it."""

    folder: Path
    store: Store
    names: dict[str, str]  # image_id -> name

    def config(self, **filter: Any) -> CurationConfig:
        return CurationConfig.model_validate(
            {"store": self.store.url, "pool": [str(self.folder / "pool")], "filter": filter}
        )

    def ingested(self, parts: int = 2, more: dict[str, bytes] | None = None) -> Artifact:
        """`ingest` of the pool in so many parts; `more` images are added to the first."""
        files = pictures() | (more or {})
        write_folder(self.folder / "pool", [(f"{name}.png", data) for name, data in files.items()])
        self.names.update({id_of(data): name for name, data in files.items()})
        tables: dict[str, list[Any]] = {"images": [], "locations": [], "metadata": []}
        names = list(files)
        for part in range(parts):
            rows: dict[str, list[Any]] = {"images": [], "locations": [], "metadata": []}
            for name in names[part::parts]:
                data = files[name]
                found = examine(data, 10**8)
                shown = {"set": "pool", "size_bytes": len(data), "derived_from": None}
                rows["images"].append({**vars(found), **shown})
                place = {"uri": str(self.folder / f"pool/{name}.png"), "member": "", "offset": 0}
                rows["locations"].append({**place, "set": "pool", "image_id": found.image_id, "size_bytes": len(data)})
                for n, url in enumerate(URLS.get(name, [])):
                    rows["metadata"].append({"image_id": found.image_id, "source": str(n), "url": url})
            schemas = {"images": records.IMAGES, "locations": records.LOCATIONS, "metadata": records.METADATA}
            made = {t: pa.Table.from_pylist(rows[t], schema=schema) for t, schema in schemas.items()}
            key = f"{part}-of-{parts}-{len(files)}"
            for table, file in self.store.commit_part("ingest", key, made).files.items():
                tables[table].append(file)
        outcome = Outcome({t: tuple(found) for t, found in tables.items()}, Rows(len(files), len(files)))
        return artifact("ingest", "pool", outcome)

    def scored(self, config: CurationConfig, ingested: Artifact, previous: Artifact | None = None) -> Artifact:
        stage = graph.build(config)["score/pool"]
        outcome = stage.function(Context(self.store, stage, "f", {"images": ingested}, 1, lambda _: None, previous))
        made = artifact("score", "pool", outcome)
        return Artifact(**{**vars(made), "config": dict(stage.config)})

    def filtered(self, config: CurationConfig, ingested: Artifact | None = None) -> Artifact:
        ingested = ingested or self.ingested()
        stages = graph.build(config)
        known = {"ingest/pool": ingested}
        if "score/pool" in stages:
            known["score/pool"] = self.scored(config, ingested)
        return ran(self.store, stages["filter/pool"], known)

    def reasons(self, made: Artifact) -> dict[str, str]:
        table = self.store.table(made.tables["filtered"], ["image_id", "reason"], records.FILTERED)
        ids = table["image_id"].to_pylist()
        assert ids == sorted(set(ids)), "image_id is the primary key"
        found = {self.names[i]: reason for i, reason in zip(ids, table["reason"].to_pylist(), strict=True)}
        assert sum(made.rows.dropped.values()) == len(found)
        return found

    def scores(self, made: Artifact) -> dict[tuple[str, str], float]:
        rows = self.store.table(made.tables["scores"]).to_pylist()
        found = {(self.names[row["image_id"]], row["filter"]): row["score"] for row in rows}
        assert len(found) == len(rows), "image_id, filter is the primary key"
        return found


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    without_engine(score, monkeypatch)
    monkeypatch.setattr(filter, "map_items", lambda function, items, **_: map(function, items))
    made = Pool(tmp_path, Store(str(tmp_path / "runs")), {})
    made.ingested()
    yield made


def red(pool: Pool, **knobs: Any) -> dict[str, Any]:
    """A classifier whose score is the mean of the red channel, 0..1."""
    path = write_means(pool.folder / "means.onnx", 16)
    plain = {"size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    return {"name": "red", "path": str(path), "index": 0, "keep": "below", "threshold": 0.9, **plain, **knobs}


# -- what is dropped


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, {"small": "min_side"}),
        ({"min_side": 1}, {}),
        ({"max_aspect": 4.5}, {"small": "min_side", "long": "max_aspect"}),
        ({"max_aspect": 5}, {"small": "min_side"}),
        ({"min_side": 1, "max_aspect": 3}, {"small": "max_aspect", "long": "max_aspect"}),
        ({"blank": True}, {"small": "min_side", "blank": "blank"}),
        ({"blank": 0.0001}, {"small": "min_side", "blank": "blank"}),
        ({"min_side": 1, "min_sharpness": 0.2}, {"blank": "blur", "blurred": "blur"}),
        ({"min_side": 1, "min_sharpness": 0.2, "blank": True}, {"blank": "blank", "blurred": "blur"}),
        ({"min_side": 1, "blocked_domains": ["bad.com"]}, {"red": "blocked_domain", "small": "blocked_domain"}),
        ({"blocked_domains": ["bad.com"]}, {"red": "blocked_domain", "small": "min_side"}),
        (
            {"min_side": 1, "blocked_domains": ["bad.com"], "blocked_urls": ["bad.com/private", "http://good.org/private"]},
            {"red": "blocked_domain", "small": "blocked_domain", "blurred": "blocked_url"},
        ),
    ],
)  # fmt: skip
def test_the_first_filter_that_fails_is_the_reason(pool: Pool, knobs: dict[str, Any], expected: dict[str, str]) -> None:
    assert pool.reasons(pool.filtered(pool.config(**knobs))) == expected


def test_classifiers_keep_one_side_of_their_threshold(pool: Pool) -> None:
    below = pool.config(min_side=1, classifiers=[red(pool)])
    assert pool.reasons(pool.filtered(below)) == {"red": "red"}
    above = pool.config(min_side=1, classifiers=[red(pool, keep="above")])
    assert set(pool.reasons(pool.filtered(above))) == set(pictures()) - {"red"}
    both = [red(pool, name="first"), red(pool, name="second", threshold=0.395, activation="none")]
    found = pool.reasons(pool.filtered(pool.config(min_side=1, classifiers=both)))
    # 100/255 = .392 stays; the next ones are of the second classifier, and the reddest fails both.
    assert found == {"red": "first", "small": "second", "long": "second", "blurred": "second"}


def test_rows_tell_the_score_and_its_threshold(pool: Pool) -> None:
    made = pool.filtered(
        pool.config(min_side=16, max_aspect=4, blank=5, classifiers=[red(pool)], blocked_urls=["good.org/p"])
    )
    rows = {pool.names[row["image_id"]]: row for row in pool.store.table(made.tables["filtered"]).to_pylist()}
    told = {name: (row["score"], row["threshold"]) for name, row in rows.items()}
    assert told == {
        "small": (10, 16), "long": (5, 4), "blank": (0, 5), "red": (pytest.approx(250 / 255), 0.9), "blurred": (None, None)
    }  # fmt: skip
    assert dict(made.rows.dropped) == {"min_side": 1, "max_aspect": 1, "blank": 1, "red": 1, "blocked_url": 1}


def test_parts_and_their_order_do_not_count(pool: Pool) -> None:
    config = pool.config(max_aspect=4, min_sharpness=0.2, classifiers=[red(pool)], blocked_domains=["bad.com"])
    found = [pool.filtered(config, pool.ingested(parts)) for parts in (1, 2, 4)]
    tables = [pool.store.table(one.tables["filtered"]) for one in found]
    assert tables[0].num_rows == 5 and tables[0].equals(tables[1]) and tables[0].equals(tables[2])


REASONS = ["a", "b", "c"]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(REASONS)), max_size=12), st.permutations(REASONS))
def test_first_reasons_are_those_of_a_plain_loop(rows: list[tuple[str, str]], order: list[str]) -> None:
    table = pa.Table.from_pylist([{"image_id": i, "reason": r} for i, r in rows], schema=records.FILTERED)
    expected: dict[str, str] = {}
    for reason in order:
        for image_id, other in rows:
            if other == reason:
                expected.setdefault(image_id, reason)
    found = first_reasons(table, order)
    assert list(zip(found["image_id"].to_pylist(), found["reason"].to_pylist(), strict=True)) == sorted(
        expected.items()
    )


# -- what it costs


def test_without_pixel_filters_no_image_is_read(pool: Pool) -> None:
    config = pool.config(max_aspect=2, blank=True, blocked_domains=["bad.com"])
    stages = graph.build(config)
    assert "score/pool" not in stages
    ingested = pool.ingested()
    for name in pictures():
        (pool.folder / f"pool/{name}.png").unlink()
    made = ran(pool.store, stages["filter/pool"], {"ingest/pool": ingested})
    assert pool.reasons(made) == {"small": "min_side", "long": "max_aspect", "blank": "blank", "red": "blocked_domain"}


def test_defaults_are_min_side_alone(pool: Pool) -> None:
    stage = graph.build(pool.config())["filter/pool"]
    assert dict(stage.config) == {"min_side": 16}
    assert set(stage.inputs) == {"images"}


def test_another_threshold_reads_no_image(pool: Pool) -> None:
    ingested = pool.ingested()
    one = pool.config(min_sharpness=0.2, classifiers=[red(pool)])
    first = pool.scored(one, ingested)
    assert (first.details["parts_made"], first.details["images_read"]) == (4, 6)
    other = pool.config(min_sharpness=0.9, max_aspect=2, classifiers=[red(pool, threshold=0.1, keep="above", batch=1)])
    stages = [graph.build(config)["score/pool"] for config in (one, other)]
    identity = {"ingest/pool": ingested}
    assert stages[0].fingerprint(identity) == stages[1].fingerprint(identity), "not even a stage to run"
    again = pool.scored(other, ingested)
    assert (again.details["parts_made"], again.details["images_read"]) == (0, 0)
    before, after = (
        ran(pool.store, graph.build(c)["filter/pool"], identity | {"score/pool": first}) for c in (one, other)
    )
    assert pool.reasons(before) != pool.reasons(after)
    # Thresholds of scores alone: what was judged by the images table stays.
    third = pool.config(min_sharpness=0.3, max_aspect=2, classifiers=[red(pool, threshold=0.1, keep="above")])
    made = ran(pool.store, graph.build(third)["filter/pool"], identity | {"score/pool": first})
    assert (made.details["parts"], made.details["parts_made"]) == (6, 4)


def test_another_classifier_costs_its_own_scores_in_one_pass(pool: Pool) -> None:
    ingested = pool.ingested()
    first = pool.scored(pool.config(min_sharpness=0.2), ingested)
    two = [red(pool), red(pool, name="green", index=1)]
    second = pool.scored(pool.config(min_sharpness=0.2, classifiers=two), ingested)
    assert (second.details["parts"], second.details["parts_made"], second.details["images_read"]) == (6, 4, 6)
    found = pool.scores(second)
    assert {key: value for key, value in found.items() if key[1] == "blur"} == pool.scores(first)
    for name, data in pictures().items():
        image = np.asarray(Image.open(io.BytesIO(data)).resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=2.0))
        assert found[name, "red"] == pytest.approx(image[..., 0].mean() / 255, abs=1e-5)
        assert found[name, "green"] == pytest.approx(image[..., 1].mean() / 255, abs=1e-5)


def test_one_more_image_costs_only_itself(pool: Pool) -> None:
    config = pool.config(min_sharpness=0.2, classifiers=[red(pool)])
    first = pool.scored(config, pool.ingested())
    grown = pool.ingested(more={"new": encoded(pixels(9))})
    second = pool.scored(config, grown, previous=first)
    assert second.details["images_read"] == 1
    fresh = Pool(pool.folder, Store(str(pool.folder / "elsewhere")), pool.names)
    alone = fresh.scored(config, fresh.ingested(more={"new": encoded(pixels(9))}))
    assert alone.details["images_read"] == 7
    assert pool.scores(second) == fresh.scores(alone)
    # A model of other bytes takes nothing over.
    other = write_means(pool.folder / "other.onnx", 16, then=["Neg"])
    changed = pool.config(classifiers=[red(pool) | {"path": str(other)}])
    assert pool.scored(changed, grown, previous=second).details["images_read"] == 7


# -- what cannot work


def test_scores_that_are_no_numbers_stop_the_stage(pool: Pool) -> None:
    path = write_means(pool.folder / "nan.onnx", 16, then=["Neg", "Sqrt"])
    with pytest.raises(LodesetError, match=r"classifier red \(.*nan\.onnx\) gives the score nan"):
        pool.scored(pool.config(classifiers=[red(pool) | {"path": str(path)}]), pool.ingested())


def test_a_missing_model_is_told_by_the_plan(pool: Pool) -> None:
    with pytest.raises(LodesetError, match=r"no model: .*check `filter\.classifiers \(red\): path:`"):
        graph.build(pool.config(classifiers=[red(pool) | {"path": str(pool.folder / "none.onnx")}]))
    with pytest.raises(ConfigError, match=r"filter\.blocked_domains\.0"):
        graph.build(pool.config(blocked_domains=["https://bad.com/x"]))
