"""Lists of image_ids that somebody made: how they are read, what they drop and keep, and what they leave alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import id_of, picture, write_folder
from commands import by_image, entries, lodeset, rows
from inline import in_one_process
from PIL import Image
from pools import Pool

from lodeset.infra import api
from lodeset.infra.config import Config, read
from lodeset.infra.jobs.bundle import resolved
from lodeset.infra.looking.held import configuration
from lodeset.infra.observing.lineage import _dataset
from lodeset.pipeline.algorithms.copies.thresholds import Thresholds
from lodeset.pipeline.by_hand import ByHand, lists_of, read_list
from lodeset.pipeline.config import CurationConfig
from lodeset.pipeline.dag.decisions import differences
from lodeset.pipeline.dag.stage import read_as
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.graph import build
from lodeset.pipeline.specs import DedupSpec
from lodeset.pipeline.stages.dedup.what_if import counts, joined, limits, settings_of
from lodeset.pipeline.stages.inspect import compared

IDS = [f"{n:032x}" for n in (3, 1, 2)]


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


# -- files


def test_every_kind_of_file_gives_the_same_ids(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "# blurred", IDS[0], "", f"  {IDS[1]}   # the worst", IDS[2], IDS[0])
    table = write(tmp_path / "a.csv", "\ufeffwhy,image_id", *(f'"two\nlines",{i}' for i in IDS))
    pq.write_table(pa.table({"n": [1, 2, 3], "image_id": IDS}), tmp_path / "a.parquet")
    remote = "memory://lists/a.csv"
    with fsspec.open(remote, "wb") as file:
        file.write(Path(table).read_bytes())
    for place in (text, table, str(tmp_path / "a.parquet"), f"file://{text}", remote):
        assert read_list(place, "by_hand.drop").ids == tuple(sorted(IDS))
    assert read_list(write(tmp_path / "empty.txt", "# none yet"), "by_hand.drop").ids == ()


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        ("a.txt", (IDS[0], "# no", "cat.jpg"), r"by_hand\.drop: .*a\.txt:3: 'cat\.jpg' is not an image_id \(32 lower-case"),
        ("a.txt", (("AB" * 16),), r"a\.txt:1: .* write it in lower case"),
        ("a.csv", ("image_id", IDS[0], "x"), r"a\.csv:3: 'x' is not an image_id"),
        ("a.csv", ("id,url", f"{IDS[0]},"), r"a\.csv has no column image_id \(its columns: id, url\)"),
        ("a.parquet", ("no table",), r"a\.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_told_with_their_line(
    tmp_path: Path, name: str, lines: tuple[str, ...], told: str
) -> None:
    with pytest.raises(LodesetError, match=told):
        read_list(write(tmp_path / name, *lines), "by_hand.drop")


def test_a_file_that_is_not_there_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(LodesetError, match=r"by_hand\.keep: no file .*none\.txt: give a text file"):
        read_list(str(tmp_path / "none.txt"), "by_hand.keep")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LodesetError, match="is not a text file"):
        read_list(str(tmp_path / "a.txt"), "by_hand.keep")
    pq.write_table(pa.table({"image_id": [IDS[0], None]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet:row 1: '' is not an image_id"):
        read_list(str(tmp_path / "a.parquet"), "by_hand.keep")


def test_an_image_cannot_be_dropped_and_kept(tmp_path: Path) -> None:
    drop, keep = write(tmp_path / "a.txt", *IDS), write(tmp_path / "b.txt", IDS[0], IDS[2])
    with pytest.raises(ConfigError, match=rf"image {IDS[2]} is in .*a\.txt\) and in .*b\.txt\), and so are 1 more"):
        lists_of(ByHand(drop=(drop,), keep=(keep,)))


# -- what depends on them


def config(folder: Path, **sections: Any) -> CurationConfig:
    if not (folder / "pool").exists():
        write_folder(folder / "pool", [("a.png", picture(1))])
    tree = {"store": str(folder / "runs"), "pool": [str(folder / "pool")], "curated": [str(folder / "pool")]}
    return CurationConfig.model_validate({**tree, **sections})


def test_only_filter_and_dedup_go_by_lists_and_nothing_changes_without_them(tmp_path: Path) -> None:
    drop, keep = write(tmp_path / "a.txt", IDS[0]), write(tmp_path / "b.txt", *IDS[1:])

    def configs(by_hand: Any) -> dict[str, Any]:
        return {id_: stage.config for id_, stage in build(config(tmp_path, by_hand=by_hand)).items()}

    without = configs(None)
    assert without["filter/pool"] == {"min_side": 16}
    assert not any("by_hand" in key for of in without.values() for key in of)
    for section, changed in (
        ({}, set()),
        ({"drop": [drop]}, {"filter/pool"}),
        ({"keep": [keep]}, {"filter/pool", "dedup/pool"}),
    ):
        listed = configs(section)
        assert {id_ for id_ in listed if listed[id_] != without[id_]} == changed
    # What counts are the ids, not the files.
    one, two = write(tmp_path / "c.csv", "image_id", IDS[2]), write(tmp_path / "d.txt", IDS[1])
    assert configs({"keep": [one, two]}) == configs({"keep": [keep]})
    assert build(config(tmp_path, by_hand={"drop": [drop], "keep": [keep]}))["filter/pool"].reads == (drop, keep)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "give `uri`, where the set's images are, or `pool_ids`, a list of images of the pool"),
        ({"uri": "a/", "pool_ids": "a.txt"}, "nothing reads `uri`: remove either"),
        ({"pool_ids": "a.txt", "exclude": ["*.gif"], "image": "png"}, "nothing reads `image`, `exclude`"),
        ({"pool_ids": "a.txt", "retrieve": {"mode": "as_is"}}, "this set has no effect"),
    ],
)
def test_a_set_has_a_source_or_a_list(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    one = {"name": "birds", "retrieve": {"mode": "sample"}, **keys}
    with pytest.raises(ValueError, match=told):
        config(tmp_path, curated=[one])


def test_a_listed_set_has_no_stages_of_its_own_but_retrieve(tmp_path: Path) -> None:
    listed = {"name": "birds", "pool_ids": write(tmp_path / "a.txt", *IDS), "include": True}
    with_set = build(config(tmp_path, curated=[{**listed, "retrieve": {"mode": "sample"}}]))
    assert {id_ for id_ in with_set if id_.endswith("/birds")} == {"retrieve/birds"}
    asking = with_set["retrieve/birds"]
    assert (asking.config["pool_ids"]["ids"], asking.config["include"], set(asking.inputs)) == (
        3,
        True,
        {"vectors", "dedup"},
    )
    assert with_set["dedup/pool"].config["roles"] == {"pool": "pool"}
    plain = build(
        config(tmp_path, curated=[{"name": "same", "uri": str(tmp_path / "pool"), "retrieve": {"mode": "sample"}}])
    )
    assert plain["retrieve/same"].config == {"k": 4, "mode": "sample", "neighbors": "auto"}


def test_plan_says_how_a_list_has_changed() -> None:
    def listed(count: int, digest: str = "a") -> dict[str, Any]:
        return {"by_hand.drop": {"ids": count, "digest": digest * 64}}

    assert differences(listed(10), listed(22, "b")) == ["by_hand.drop has changed: 12 ids more"]
    assert differences(listed(10), listed(9, "b")) == ["by_hand.drop has changed: 1 ids fewer"]
    assert differences(listed(10), listed(10, "b")) == ["by_hand.drop has changed: 10 ids as before, but others"]
    assert differences({}, listed(3)) == ["by_hand.drop is new: 3 ids"]
    assert differences(listed(3), {}) == ["by_hand.drop is gone: 3 ids"]
    assert differences(listed(3), listed(3)) == []


def test_paths_are_relative_to_the_configuration_and_travel_with_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "pool", [("a.png", picture(1))])
    write(tmp_path / "a.txt", IDS[0])
    written = tmp_path / "c.yaml"
    written.write_text("pool: pool/\nby_hand: {drop: [a.txt], keep: ['s3://bucket/b.txt']}\n")
    by_hand = read(written).by_hand
    assert by_hand is not None
    assert (by_hand.drop, by_hand.keep) == ((str(tmp_path / "a.txt"),), ("s3://bucket/b.txt",))
    assert ("by_hand.drop.0", str(tmp_path / "a.txt")) in resolved(written).local


def test_the_record_of_a_run_has_no_new_keys_without_lists(tmp_path: Path) -> None:
    plain = configuration(Config.model_validate(config(tmp_path).model_dump(exclude_unset=True)))
    assert "by_hand" not in plain and "pool_ids" not in plain["curated"][0]
    listed = {"by_hand": {"drop": ["a.txt"]}, "curated": [{"name": "b", "pool_ids": "b.txt", "include": True}]}
    told = configuration(Config.model_validate(config(tmp_path, **listed).model_dump(exclude_unset=True)))
    assert told["by_hand"]["drop"] == ["a.txt"] and told["curated"][0]["pool_ids"] == "b.txt"


@pytest.mark.parametrize(
    ("place", "dataset"),
    [
        ("/data/a.txt", ("file", "/data/a.txt")),
        ("file:///data/a.txt", ("file", "/data/a.txt")),
        ("s3://user:hunter2@bucket/lists/a.txt", ("s3://user:***@bucket", "lists/a.txt")),
    ],
)
def test_lineage_names_a_list_without_its_secrets(place: str, dataset: tuple[str, str]) -> None:
    assert _dataset(place) == dataset


# -- filter


def test_lists_come_before_filters_and_blocked_urls_before_lists(tmp_path: Path, one_process: None) -> None:
    pool = Pool(tmp_path, Store(str(tmp_path / "store")), {})
    ingested = pool.ingested()
    of = {name: image_id for image_id, name in pool.names.items()}
    by_hand = {
        "drop": [write(tmp_path / "drop.txt", of["long"], of["sharp"], *IDS)],
        "keep": [write(tmp_path / "keep.txt", of["small"], of["blank"], of["red"]), write(tmp_path / "none.txt")],
    }
    knobs = {"min_side": 16, "max_aspect": 3, "blank": True, "blocked_domains": ["bad.com"]}
    wanted = pool.config(**knobs).model_copy(update={"by_hand": ByHand.model_validate(by_hand)})
    made = pool.filtered(wanted, ingested)
    assert pool.reasons(made) == {
        "long": "by_hand", "sharp": "by_hand", "red": "blocked_domain", "small": "blocked_domain"
    }  # fmt: skip
    assert made.rows.dropped == {"by_hand": 2, "blocked_domain": 2}
    named = {
        (pool.names[row["image_id"]], row["action"], row["list"])
        for row in pool.store.table(made.tables["by_hand"]).to_pylist()
    }
    assert named == {
        *((name, "drop", "drop.txt") for name in ("long", "sharp")),
        *((name, "keep", "keep.txt") for name in ("small", "blank", "red")),
    }
    assert made.details["warnings"] == [
        "by_hand.drop: 3 of the 5 image_ids of drop.txt are not in the pool",
        "by_hand.keep: the list none.txt holds no image_ids, so it changes nothing",
        "2 images of by_hand.keep come from blocked hosts or URLs, and were dropped all the same: take them out of "
        "filter.blocked_domains or filter.blocked_urls to keep them",
    ]
    assert "by_hand" not in pool.filtered(pool.config(**knobs), ingested).tables


# -- a run

CONFIG = """store: ./runs
pool: [pool/]
reference: [reference/]
filter: {min_side: 32}
dedup: {threshold: 0.99, reference_threshold: 0.99, verify: none}
embed: {semantic: {kind: patch_dictionary, words: 8}}
"""


def jpeg(seed: int, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed, width=64, height=64))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


FILES = {
    **{f"{n}.png": picture(n, width=64, height=64) for n in (*range(8), 20)},
    **{f"{n}.jpg": jpeg(n, 95) for n in (0, 1)},
    "0-worse.jpg": jpeg(0, 85),
    "small.png": picture(50, width=16, height=16),
}
NAMES = {id_of(data): name for name, data in FILES.items()}
OF = {name: image_id for image_id, name in NAMES.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration that has run without lists, and then with one to drop and one to keep."""
    folder = tmp_path_factory.mktemp("by_hand")
    write_folder(folder / "pool", FILES.items())
    write_folder(folder / "reference", [("copy.jpg", jpeg(20, 95))])
    write(folder / "c.yaml", CONFIG)
    write(folder / "bad.txt", "# not ours", OF["2.png"], OF["3.png"])
    write(folder / "wanted.txt", *(OF[name] for name in ("0.png", "0.jpg", "small.png", "20.png")))
    with in_one_process():
        lodeset("run", folder / "c.yaml", "--until", "retrieve")
        before = entries(folder / "c.yaml")
        write(folder / "c.yaml", CONFIG + "by_hand: {drop: [bad.txt], keep: [wanted.txt]}")
        planned = json.loads(lodeset("plan", folder / "c.yaml", "--json")[0])["stages"]
        lodeset("run", folder / "c.yaml", "--until", "retrieve")
    (folder / "told.json").write_text(json.dumps({"before": before, "planned": planned}))
    yield folder / "c.yaml"


def test_a_run_drops_and_keeps_what_lists_say(finished: Path) -> None:
    told, now = json.loads((finished.parent / "told.json").read_text()), entries(finished)
    assert {NAMES[i] for i in by_image(told["before"]["filter/pool"], "filtered")} == {"small.png"}
    reasons = {NAMES[row["image_id"]]: row["reason"] for row in rows(now["filter/pool"], "filtered")}
    assert reasons == {"2.png": "by_hand", "3.png": "by_hand"}
    assert now["filter/pool"]["rows"]["dropped"] == {"by_hand": 2}
    judged = {NAMES[i]: row for i, row in by_image(now["dedup/pool"], "duplicates").items()}
    assert {name for name, row in judged.items() if row["reason"] == "by_hand"} == {"0.png", "0.jpg", "small.png"}
    assert not judged["20.png"]["kept"] and judged["20.png"]["reason"] == "reference"
    assert judged["0-worse.jpg"]["reason"] == "near"
    assert NAMES[judged["0-worse.jpg"]["matched_id"]] in ("0.png", "0.jpg")
    assert {judged[name]["reason"] for name in ("1.png", "1.jpg")} == {"unique", "near"}
    selected = {NAMES[i] for i in by_image(now["retrieve/all"], "selected")}
    assert selected == {name for name, row in judged.items() if row["kept"]} and len(selected) == 8
    assert now["dedup/pool"]["details"]["kept_by_hand"] == 3
    assert now["dedup/pool"]["details"]["warnings"][0].startswith("1 images of by_hand.keep are images of reference")
    planned = {f"{one['stage']}/{one['set']}": one for one in told["planned"]}
    assert planned["filter/pool"]["reason"] == "by_hand.drop is new: 2 ids; by_hand.keep is new: 4 ids"
    assert {id_ for id_, one in planned.items() if one["action"] == "finished"} >= {"ingest/pool", "embed/pool"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_a_table_is_written_to_is_a_list(finished: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"left.{kind}"
    lodeset("table", finished, "filtered", "--where", "reason=by_hand", "--out", out)
    assert read_list(str(out), "by_hand.drop").ids == tuple(sorted((OF["2.png"], OF["3.png"])))


def test_trace_and_report_say_who_decided(finished: Path, tmp_path: Path) -> None:
    dropped = json.loads(lodeset("trace", finished, OF["2.png"], "--json")[0])
    assert dropped["sentence"] == "dropped by hand (list bad.txt)"
    kept = lodeset("trace", finished, OF["0.jpg"])[0]
    assert "kept by hand (list wanted.txt)" in " ".join(kept.split())
    lodeset("report", finished, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "named by a list of by_hand.drop" in page and "3 images are kept by hand (by_hand.keep)" in page


def test_other_values_of_a_setting_are_counted_with_the_lists(finished: Path) -> None:
    opened = api.open_config(finished)
    made = api.artifacts(opened)
    sets = {"pool": "pool", "reference": "reference"}
    inputs = {"dedup": made["dedup/pool"], "masked": made["filter/pool"]}
    inputs |= {f"images:{name}": made[f"ingest/{name}"] for name in sets}
    inputs |= {f"vectors:{name}": made[f"embed/{name}"] for name in sets}
    images, table, pool = compared.read(opened.store, inputs, sets)
    pairs = compared.stored(table)
    read_again = compared.read_table(compared.table_of(images))
    assert read_again.by_hand is not None
    named = {NAMES[i] for i, kept in zip(images.ids, read_again.by_hand.tolist(), strict=True) if kept}
    assert {"0.png", "0.jpg", "20.png"} <= named <= {"0.png", "0.jpg", "20.png", "small.png"}
    spec, limit = read_as(DedupSpec, made["dedup/pool"].config), Thresholds(0.99, 0.99)
    setting = next(one for one in settings_of(spec, limit, pairs, 0.94) if one.name == "threshold")
    joins = joined(read_again, pairs, limits(setting, spec, limit, images, pairs))
    told = counts(joins, setting, setting.now, spec, pool)
    assert told.dropped == sum(made["dedup/pool"].rows.dropped.values()) == 3


def test_a_set_of_listed_images_goes_all_the_way_to_shards(finished: Path, tmp_path: Path, one_process: None) -> None:
    birds = write(finished.parent / "birds.txt", OF["4.png"], OF["5.png"], OF["2.png"], "f" * 32)
    path = finished.with_name("listed.yaml")
    section = "curated:\n  - {name: birds, pool_ids: birds.txt, include: true, retrieve: {mode: sample, k: 2}}\n"
    section += "gates: [{name: enough, measure: unfilled, set: birds, error: '> 0.5'}]\n"
    path.write_text(finished.read_text() + section)
    before = lodeset("plan", path)[0]
    assert "birds" in before and "by_hand" in before
    lodeset("run", path)
    now = entries(path)
    chosen = {NAMES[row["image_id"]]: row for row in rows(now["retrieve/all"], "selected")}
    own = {name for name, row in chosen.items() if row["mode"] == "by_hand"}
    assert own == {"4.png", "5.png"} and len(chosen) > 2
    assert all(
        row["query_id"] is None or NAMES[row["query_id"]] in ("2.png", "4.png", "5.png") for row in chosen.values()
    )
    assert set(by_image(now["write_shards/all"], "index")) == {OF[name] for name in chosen}
    asked = now["retrieve/birds"]["details"]
    assert (asked["queries"], asked["asked"]) == (3, 6) and len(asked["warnings"]) == 2
    assert "selected for birds (by_hand)" in json.loads(lodeset("trace", path, OF["4.png"], "--json")[0])["sentence"]
    lodeset("report", path, "--out", tmp_path / "report.html")
    assert "birds" in (tmp_path / "report.html").read_text()
    lodeset("card", path, "--out", tmp_path / "card")
    assert "| birds | by_hand |" in (tmp_path / "card/README.md").read_text()
    write(Path(birds), OF["4.png"])
    planned = {f"{one['stage']}/{one['set']}": one for one in json.loads(lodeset("plan", path, "--json")[0])["stages"]}
    assert planned["retrieve/birds"]["reason"] == "pool_ids has changed: 3 ids fewer"
    assert planned["dedup/pool"]["action"] == "finished"


def test_a_take_down_of_listed_images_breaks_no_run(finished: Path, one_process: None) -> None:
    lodeset("forget", finished, OF["3.png"], OF["0.jpg"])
    (finished.parent / "pool/more.png").write_bytes(picture(60, width=64, height=64))
    lodeset("run", finished, "--until", "retrieve")
    now = entries(finished)
    assert {NAMES[row["image_id"]] for row in rows(now["filter/pool"], "filtered")} == {"2.png"}
    assert now["filter/pool"]["details"]["warnings"] == [
        f"by_hand.{key}: 1 of the {count} image_ids of {name} are not in the pool (1 of them were taken out by `lodeset forget`)"
        for key, count, name in (("drop", 2, "bad.txt"), ("keep", 4, "wanted.txt"))
    ]
    kept = {i for i, row in by_image(now["dedup/pool"], "duplicates").items() if row["reason"] == "by_hand"}
    assert {NAMES[i] for i in kept} == {"0.png", "small.png"}
