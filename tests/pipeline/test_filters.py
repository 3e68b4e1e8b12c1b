"""`score` and `filter` on a pool made by hand: what is dropped and why, and what a change costs."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import encoded, pixels
from hypothesis import given
from hypothesis import strategies as st
from inline import ran, without_engine
from onnx_files import write_means
from PIL import Image
from pools import Pool, pictures

from lodeset.pipeline import graph
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.stages import filter, score
from lodeset.pipeline.stages.filter import first_reasons
from lodeset.pipeline.tables import records


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


@pytest.mark.parametrize("said", [{}, {"Href": "https://bad.com/1"}, {"page": "//bad.com/1", "n": 3}])
def test_a_blocklist_without_an_address_to_compare_with_is_told(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    monkeypatch.setattr("pools.URLS", {})
    ingested = pool.ingested(folder="bare")
    if said:
        rows = [{"image_id": image_id, "source": "s", "extra": json.dumps(said)} for image_id in pool.names]
        table = pa.Table.from_pylist(rows, schema=records.METADATA)
        file = pool.store.commit_part("ingest", "said", {"metadata": table}).files["metadata"]
        ingested = replace(ingested, tables={**ingested.tables, "metadata": (file,)})
    made = pool.filtered(pool.config(blocked_domains=["bad.com"]), ingested)
    (told,) = made.details["warnings"]
    assert told.startswith("nothing could be blocked") and "none of the 6 images has one" in told
    assert [name for name in said if f"lie in {name}:" in told] == [name for name in said if name != "n"]
    assert "warnings" not in pool.filtered(pool.config(), ingested).details


def test_a_blocklist_that_had_addresses_is_not_told(pool: Pool) -> None:
    made = pool.filtered(pool.config(blocked_domains=["nowhere.org"]), pool.ingested())
    assert made.details["with_url"] == 7 and "warnings" not in made.details


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
