"""Gates on a finished run that was made by hand: every figure below can be counted in `report_world`."""

from __future__ import annotations

import io
import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import encoded, id_of, picture, write_folder
from commands import lodeset
from PIL import Image
from pydantic import ValidationError
from report_world import World, make_world

import lodeset as package
from lodeset.infra import api
from lodeset.infra.config import read
from lodeset.infra.dashboard.making import found as inspected
from lodeset.infra.gates.accepted import accepted, baselines
from lodeset.infra.gates.check import IMAGES_KEPT, Result
from lodeset.infra.gates.condition import misfit, parsed, written
from lodeset.infra.gates.config import Gate
from lodeset.infra.gates.measures import MEASURES
from lodeset.infra.looking.held import configuration
from lodeset.pipeline.dag.manifests import File
from lodeset.pipeline.dag.runs import Wanted, record
from lodeset.pipeline.dag.store import Rows, Store
from lodeset.pipeline.errors import ConfigError, LodesetError

CONFIG: dict[str, Any] = {
    "store": "./store",
    "pool": ["gone/*.tar"],
    "reference": [{"name": "test-set", "uri": "gone-reference/"}],
    "curated": [
        {
            "name": "flowers",
            "uri": "gone-flowers/",
            "retrieve": {"mode": "sample", "k": 4},
            "expected": {"images": 1, "final": 10},
        }
    ],
    "targets": [{"name": "birds", "uri": "gone-birds/"}],
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A finished run of every stage, under a configuration whose sources are gone."""
    made = make_world(tmp_path)
    shards = made.artifacts["write_shards/all"]
    details = {name: told for name, told in shards.details.items() if name != "since"}
    made.artifacts["write_shards/all"] = replace(shards, details=details)
    configure(tmp_path)
    run(made, tmp_path)
    return made


def configure(folder: Path, *gates: Mapping[str, Any]) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "gates": list(gates)}))
    return path


def run(world: World, folder: Path, **changes: Any) -> int:
    """Records what the world's artifacts are as one run."""
    artifacts = {id_: world.store.commit_artifact(one) for id_, one in world.artifacts.items()}
    wanted = Wanted("lodeset", None, "", configuration(read(folder / "c.yaml")), tuple(artifacts))
    return record(world.store, replace(wanted, **changes), artifacts, {}, 100.0, 160.0).number


def found(config: Path, run: int | None = None) -> dict[str, Result]:
    return {one.gate: one for one in api.gates(api.open_store(config), run).results}


# -- conditions


@pytest.mark.parametrize(
    ("text", "unit", "accepted", "breached", "fine"),
    [
        ("> 10", "images", None, 11, 10),
        (">=10", "images", None, 10, 9),
        ("< 3", "images", None, 2, 3),
        ("== 0", "images", None, 0, 1),
        ("!= 0", "images", None, 1, 0),
        ("> 5 %", "share", None, 0.051, 0.05),
        ("> 0.05", "share", None, 0.051, 0.05),
        ("> 2 h", "seconds", None, 7_201, 7_200),
        ("> 1.5 GB", "bytes", None, 1_500_000_001, 1_500_000_000),
        ("< 0.9 of accepted", "images", 100, 89, 90),
        ("<   90 %   of  accepted", "images", 100, 89, 90),
        ("> 2 of accepted", "share", 0.1, 0.21, 0.2),
        ("> 2 of accepted", "images", 0, 1, 0),
        ("> 1e3", "images", None, 1_001, 1_000),
    ],
)
def test_a_condition_says_what_is_wrong(
    text: str, unit: Any, accepted: float | None, breached: float, fine: float
) -> None:
    condition = parsed(text)
    assert condition.relative == (accepted is not None) and misfit(condition, unit) is None
    assert condition.breached(breached, unit, accepted) and not condition.breached(fine, unit, accepted)


@pytest.mark.parametrize(
    "text",
    ["10", ">", "> ten", "> -1", "=> 1", "> 5 parsecs", "> 5 GB of accepted", "> 5 of", "> 1 2", "> .5", "> nan"],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected a comparison and a number|unit `(parsecs|of)` is unknown|takes a share"
    ):
        parsed(text)


def test_values_are_written_in_their_unit() -> None:
    assert [written(1234, "images"), written(0.051, "share"), written(61, "seconds")] == ["1,234", "5.1 %", "61.0 s"]
    assert [written(999, "bytes"), written(1_500, "bytes"), written(2.5e12, "bytes")] == ["999 B", "1.5 kB", "2.5 TB"]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"measure": "kep"}, r"gates\.0\.measure = 'kep': unknown measure; did you mean `kept`"),
        ({"error": "10"}, r"gates\.0\.error = '10': expected a comparison and a number"),
        ({"error": 10}, r"gates\.0\.error = 10: expected text: put quotes around it"),
        ({"error": "> 5 %"}, r"error: `> 5 %`: what is measured are numbers of images: use a plain number"),
        ({"error": None}, "give `warn`, `error` or both"),
        ({"reason": "near"}, "the measure `kept` has no use for `reason`: it takes stage, set"),
        ({"set": "pool"}, "the measure `kept` of a `set` needs the `stage`, too"),
        ({"measure": "dropped"}, "the measure `dropped` needs `stage`"),
        ({"measure": "seconds", "error": "> 1 GB"}, "what is measured are seconds: use s, min, h"),
        ({"measure": "leaks", "set": "birds"}, r"gates\.0\.set birds: expected a reference set.*: test-set"),
        ({"measure": "knn", "set": "bird"}, r"gates\.0\.set bird: expected a target set: birds"),
        ({"severity": "error"}, r"gates\.0\.severity: unknown key; known keys: error, measure, name, network"),
        ({"name": "two words"}, r"gates\.0\.name = 'two words': expected letters, digits"),
    ],
)
def test_a_mistake_names_the_key_and_what_is_allowed(tmp_path: Path, gate: dict[str, Any], message: str) -> None:
    told = {"name": "one", "measure": "kept", "error": "< 1", **gate}
    configure(tmp_path, {key: value for key, value in told.items() if value is not None})
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "c.yaml")


def test_a_name_stands_for_one_gate(tmp_path: Path) -> None:
    configure(tmp_path, *[{"name": "one", "measure": "kept", "error": "< 1"}] * 2)
    with pytest.raises(ConfigError, match=r"gates\.1\.name one: gates\.0 has this name already"):
        read(tmp_path / "c.yaml")


def test_a_gate_on_what_the_configuration_lacks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_folder(tmp_path / "pool", [("a.png", picture(1))])
    gates = [
        {"name": "a", "measure": "dropped", "stage": "dedupp", "error": "> 1"},
        {"name": "b", "measure": "kept", "stage": "ingest", "set": "poll", "error": "< 1"},
        {"name": "c", "measure": "seconds", "stage": "train", "error": "> 1 h"},
    ]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"store": "./runs", "pool": ["pool/"], "gates": gates}))
    _, err = lodeset("run", path, code=2)
    assert "gates.0 (a): measures dedupp/all, which this configuration does not have: did you mean dedup/pool?" in err
    assert "gates.1 (b): measures ingest/poll" in err and "gates.2 (c): measures train/all" in err
    assert not (tmp_path / "runs").exists()


def test_the_schema_tells_every_measure_with_its_unit_and_what_it_reads() -> None:
    described = api.schema()["$defs"]["Gate"]["properties"]["measure"]
    assert described["enum"] == [one.name for one in MEASURES]
    for one in MEASURES:
        assert one.function.__doc__ and f"`{one.name}` ({one.unit})" in described["description"]
    assert "pattern" in json.dumps(api.schema()["$defs"]["Gate"]["properties"]["error"])


# -- measures


@pytest.mark.parametrize(
    ("gate", "value", "images"),
    [
        ({"measure": "kept"}, 8, None),
        ({"measure": "kept", "stage": "ingest", "set": "flowers"}, 1, None),
        ({"measure": "kept_share", "stage": "dedup"}, 9 / 13, None),
        ({"measure": "dropped", "stage": "ingest"}, 8, None),
        ({"measure": "dropped", "stage": "ingest", "reason": "corrupt"}, 7, None),
        ({"measure": "dropped", "stage": "ingest", "reason": "too_slow"}, 0, None),
        ({"measure": "dropped_share", "stage": "ingest", "reason": "corrupt"}, 7 / 27, None),
        ({"measure": "dropped", "stage": "filter", "reason": "min_side"}, 1, ["tiny.jpg"]),
        ({"measure": "dropped", "stage": "dedup"}, 4, ["copy-of-0.jpg", "by-hash.jpg", "chained.jpg", "leak.jpg"]),
        ({"measure": "duplicates"}, 3 / 13, ["copy-of-0.jpg", "by-hash.jpg", "chained.jpg"]),
        ({"measure": "leaks"}, 1, ["leak.jpg"]),
        ({"measure": "leaks", "set": "test-set"}, 1, ["leak.jpg"]),
        ({"measure": "leaks_in_shards"}, 1, ["leak.jpg"]),
        ({"measure": "drift"}, 0.25, None),
        ({"measure": "shortfall"}, 0.2, None),
        ({"measure": "unfilled", "set": "flowers"}, 0.1, None),
        ({"measure": "knn"}, 0.625, None),
        ({"measure": "knn", "set": "birds", "network": "embedder"}, 0.8, None),
        ({"measure": "seconds"}, 60, None),
        ({"measure": "seconds", "stage": "dedup"}, 2, None),
    ],
)  # fmt: skip
def test_measures_are_what_can_be_counted(
    world: World, tmp_path: Path, gate: dict[str, Any], value: float, images: list[str] | None
) -> None:
    buried = [
        (world.ids[name], "a.tar", 0, 1, reason) for name, reason in (("leak.jpg", "reference"), ("03.jpg", "near"))
    ]
    shards = world.artifacts["write_shards/all"]
    from report_world import table

    from lodeset.pipeline.tables import records

    file = world.store.write_named("by-hand.parquet", table(records.TOMBSTONES, *buried))
    tables = {**shards.tables, "tombstones": (file,)}
    world.artifacts["write_shards/all"] = replace(shards, fingerprint="buried", tables=tables)
    details = {"k": 3, "levels": [3], "mean_squared_distance": 1.0, "drift": 0.25}
    world.add("fit_clusters", "pool", {}, Rows(9, 9), details=details)
    dedup = world.artifacts["dedup/pool"]
    world.artifacts["dedup/pool"] = replace(dedup, fingerprint="timed", seconds=2.0)
    run(world, tmp_path)
    config = configure(tmp_path, {"name": "g", "error": ">= 0", **gate})
    result = found(config)["g"]
    assert result.value == pytest.approx(value) and result.status == "error"
    assert result.images == (None if images is None else len(images))
    if images is not None:
        rows = package.load(config).table("breaches")
        assert sorted(rows["image_id"].to_pylist()) == sorted(world.ids[name] for name in images)
        assert set(rows["gate"].to_pylist()) == {"g"}


def test_bytes_count_a_file_once(world: World, tmp_path: Path) -> None:
    files = [File("a", 1, 100, ""), File("b", 1, 10, ""), File("a", 1, 100, "")]
    world.artifacts = {
        f"{stage}/pool": replace(world.artifacts["dedup/pool"], stage=stage, fingerprint=stage, tables={"t": (x, y)})
        for stage, x, y in (("ingest", files[0], files[1]), ("embed", files[1], files[2]))
    }
    run(world, tmp_path)
    gates = [{"name": "all", "measure": "bytes"}, {"name": "of-one", "measure": "bytes", "stage": "ingest"}]
    config = configure(tmp_path, *({**gate, "error": "> 1 TB"} for gate in gates))
    assert {name: one.value for name, one in found(config).items()} == {"all": 110, "of-one": 110}


# -- statuses


def test_a_condition_of_the_accepted_run_is_not_compared_without_one(world: World, tmp_path: Path) -> None:
    config = configure(
        tmp_path,
        {"name": "relative", "measure": "kept", "error": "< 0.9 of accepted"},
        {"name": "both", "measure": "kept", "warn": "< 0.9 of accepted", "error": "< 1"},
        {"name": "worse", "measure": "kept", "warn": "< 0.9 of accepted", "error": "> 1"},
        {"name": "absolute", "measure": "kept", "error": "< 1"},
    )
    results = found(config)
    assert {name: one.status for name, one in results.items()} == {
        "relative": "not compared",
        "both": "not compared",
        "worse": "error",
        "absolute": "ok",
    }
    assert "no run is accepted (`lodeset accept`)" in results["relative"].told
    out, _ = lodeset("gates", config, code=3)
    assert "1 error, 1 ok, 2 not compared (run 1 against no accepted run)" in out
    # Once a run is accepted, the next one is compared with it.
    assert "run 1 is accepted" in lodeset("accept", config, "--by", "me", "--why", "looked at it")[0]
    assert {one.status for one in found(config).values()} == {"ok", "error"}
    shards = world.artifacts["write_shards/all"]
    world.artifacts["write_shards/all"] = replace(shards, fingerprint="fewer", rows=Rows(8, 6, {"x": 2}))
    assert run(world, tmp_path) == 2
    results = found(config)
    assert [results[name].status for name in ("relative", "both", "absolute")] == ["error", "warn", "ok"]
    assert results["relative"].accepted == 8 and results["relative"].told == "6 < 0.9 of accepted = 7"
    # What happened before is still known, and can be asked for.
    assert {one.status for one in found(config, 1).values()} == {"ok", "error"}
    event = accepted(world.store, "lodeset", None)
    assert event is not None and (event.number, event.run, event.by, event.why) == (1, 1, "me", "looked at it")


def test_the_last_event_counts_and_none_is_changed(world: World, tmp_path: Path) -> None:
    config, events = configure(tmp_path), tmp_path / "store/accepted"
    lodeset("accept", config)
    first = (events / "000001.json").read_bytes()
    run(world, tmp_path, until="dedup")
    event = json.loads(lodeset("accept", config, "--json")[0])
    assert (event["number"], event["run"], event["limit"]) == (2, 2, None) and event["by"] and event["at"].endswith("Z")
    lodeset("accept", config, "--run", "1")
    assert [one.name for one in sorted(events.iterdir())] == ["000001.json", "000002.json", "000003.json"]
    assert (events / "000001.json").read_bytes() == first
    assert baselines(world.store) == {1}
    out, _ = lodeset("status", config)
    assert "run 2, finished" in out and "the accepted run is 1" in out
    told = json.loads(lodeset("status", config, "--json", "--run", "1")[0])
    assert told["accepted"] == told["run"] == 1 and told["rolled_back"] is None


def test_only_a_run_of_the_data_set_that_is_there_can_be_accepted(world: World, tmp_path: Path) -> None:
    config = configure(tmp_path)
    run(world, tmp_path, limit=5)
    assert (
        "run 2 is one of lodeset with --limit 5, and not of lodeset"
        in lodeset("accept", config, "--run", "2", code=2)[1]
    )
    assert "run 2 is accepted" in lodeset("accept", config, "--limit", "5")[0]
    assert baselines(world.store) == {2} and accepted(world.store, "lodeset", None) is None
    assert "has no run 7" in lodeset("accept", config, "--run", "7", code=1)[1]
    world.store.delete_artifact(world.artifacts["dedup/pool"])
    _, err = lodeset("accept", config, code=1)
    assert "run 1 cannot be accepted: 1 of its" in err and "(dedup/pool)" in err


def test_what_was_not_made_is_an_error_that_says_so(world: World, tmp_path: Path) -> None:
    """Unless the run was to stop before: then it is said, and no error."""
    gates = [
        {"name": "late", "measure": "knn", "error": "< 0.1"},
        {"name": "early", "measure": "kept", "stage": "ingest", "error": "< 1"},
    ]
    config = configure(tmp_path, *gates)
    everything = tuple(world.artifacts)
    world.artifacts = {id_: one for id_, one in world.artifacts.items() if id_.startswith("ingest/")}
    run(world, tmp_path, until="ingest", stages=everything)
    results = found(config)
    assert results["late"].status == "not reached" and results["early"].status == "ok"
    assert results["late"].told == "run 2 was to stop after ingest, before evaluate/all"
    out, _ = lodeset("gates", config)
    assert "1 ok, 1 not reached" in out
    # A run of a configuration without targets, and one whose artifact was removed since.
    run(world, tmp_path)
    assert found(config)["late"].status == "error"
    assert found(config)["late"].told.startswith("run 3 has no stage evaluate/all; its stages are ingest/pool")
    world.store.delete_artifact(world.artifacts["ingest/pool"])
    assert "the artifact of ingest/pool that run 3 made is gone" in found(config)["early"].told
    lodeset("gates", config, code=3)
    # The same of the accepted run is no error of this one.
    with pytest.raises(LodesetError, match="no finished run of lodeset with --limit 9"):
        api.gates(api.open_store(config, limit=9))


def test_the_first_fit_of_clusters_has_no_drift(world: World, tmp_path: Path) -> None:
    details = {"k": 3, "levels": [3], "mean_squared_distance": 1.0}
    world.add("fit_clusters", "pool", {}, Rows(9, 9), details=details)
    run(world, tmp_path)
    result = found(configure(tmp_path, {"name": "d", "measure": "drift", "error": "> 20 %"}))["d"]
    assert result.status == "not compared" and "there is no drift yet" in result.told


def test_a_configuration_without_gates_has_none_to_compare(world: World, tmp_path: Path) -> None:
    assert "has no gates: add a section `gates`" in lodeset("gates", configure(tmp_path), code=2)[1]


# -- results


def test_results_are_written_and_kept(world: World, tmp_path: Path) -> None:
    config = configure(
        tmp_path,
        {"name": "bad", "measure": "duplicates", "error": "> 1 %"},
        {
            "name": "files",
            "measure": "dropped",
            "stage": "ingest",
            "reason": "corrupt",
            "warn": "> 1",
            "error": "> 100",
        },
        {"name": "new", "measure": "kept", "warn": "< 0.5 of accepted"},
        {"name": "fine", "measure": "leaks", "error": "> 1"},
    )
    out, _ = lodeset("gates", config, "--markdown", tmp_path / "g.md", "--junit", tmp_path / "g.xml", "--json", code=3)
    told = json.loads(out)
    assert told["status"] == "error" and [one["status"] for one in told["results"]] == [
        "error",
        "warn",
        "not compared",
        "ok",
    ]
    suite = ET.parse(tmp_path / "g.xml").getroot()[0]
    assert suite.tag == "testsuite" and {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "0", "skipped": "1",
    }  # fmt: skip
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"bad": ["failure"], "files": ["system-out"], "new": ["skipped"], "fine": ["system-out"]}
    page = (tmp_path / "g.md").read_text()
    assert page.startswith("## Gates of run 1: error\n") and "| ❌ error | bad | duplicates | 23.08 % |" in page
    assert f"`lodeset table {config} breaches --where gate=bad`" in page
    assert f"`lodeset table {config} rejects --of ingest/pool --where reason=corrupt`" in page
    # The store keeps the same, once however often it is asked, and no image_id outside of its tables.
    kept = tmp_path / "store/gates/000001"
    assert sorted(one.name for one in kept.iterdir()) == ["0001.json", "0001.md", "0001.xml"]
    assert not any(image_id in one.read_text() for one in kept.iterdir() for image_id in world.ids.values())
    status = json.loads(lodeset("status", config, "--json")[0])
    assert status["gates"] == told
    assert "1 error, 1 warn, 1 ok, 1 not compared (run 1 against no accepted run)" in lodeset("status", config)[0]
    configure(tmp_path, {"name": "fine", "measure": "leaks", "error": "> 1"})
    assert "gates: 1 ok" in lodeset("gates", config)[0]
    assert (
        len(list(kept.glob("*.json"))) == 2
        and json.loads(lodeset("status", config, "--json")[0])["gates"]["status"] == "ok"
    )
    assert "cannot write" in lodeset("gates", config, "--junit", tmp_path / "no/g.xml", code=1)[1]


def test_not_more_images_are_kept_than_a_person_can_use(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert IMAGES_KEPT >= 10_000
    monkeypatch.setattr("lodeset.infra.gates.check.IMAGES_KEPT", 2)
    config = configure(tmp_path, {"name": "bad", "measure": "duplicates", "error": "> 1 %"})
    result = found(config)["bad"]
    assert (result.images, result.kept) == (3, 2) and package.load(config).table("breaches").num_rows == 2
    assert "3 images, of which 2 are kept" in (tmp_path / "store/gates/000001/0001.md").read_text()


# -- with a run


@pytest.fixture
def tiny(tmp_path: Path, one_process: None) -> Path:
    """A configuration of a few images, to be run."""
    write_folder(tmp_path / "pool", [(f"{n}.png", picture(n, width=64, height=64)) for n in range(12)])
    tree = {
        "store": "./runs",
        "pool": ["pool/"],
        "dedup": {"threshold": 0.99, "reference_threshold": 0.99, "verify": "none"},
        "cluster": {"k": 2},
        "embed": {"semantic": {"kind": "patch_dictionary", "words": 8}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "c.yaml"


def gated(config: Path, *gates: Mapping[str, Any]) -> None:
    """Gives a configuration these gates instead of its own."""
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "gates": list(gates)}))


def test_a_breached_gate_ends_the_run_with_3_and_the_run_stays(tiny: Path) -> None:
    config = tiny
    same = {"name": "same", "measure": "kept", "error": "< 0.9 of accepted"}
    gated(config, {"name": "enough", "measure": "kept", "error": "< 100"}, same)
    out, err = lodeset("run", config, "--json", code=3)
    told = json.loads(out)  # one document, as ever
    assert told["run"] == 1 and told["images"] == 12 and told["gates"]["status"] == "error"
    assert "gate enough was breached: kept: 12 < 100. Run 1 is recorded, and what it made stays" in err
    assert len(package.load(config).dataset()) == 1
    lodeset("status", config, "--check", code=3)
    # Again: nothing runs, and the gate is as breached; what the dashboard shows is made all the same.
    assert inspected(api.open_store(config)) is None
    lodeset("run", config, "--json", "--inspect", code=3)
    assert inspected(api.open_store(config)) is not None
    assert json.loads(lodeset("status", config, "--json")[0])["run"] == 1
    with pytest.raises(LodesetError, match="gate enough was breached") as breach:
        package.load(config).run(watch=lambda event: None)
    assert breach.value.exit_code == 3
    # Another gate is no other run.
    gated(config, {"name": "enough", "measure": "kept", "error": "< 10"})
    out, err = lodeset("run", config)
    assert "gates: 1 ok (run 1 against no accepted run)" in err
    assert Store(str(config.parent / "runs")).run_numbers() == [1]
    _, err = lodeset("run", config, "--until", "dedup")
    assert "1 not reached" in err


def test_deletions_know_the_images_behind_a_gate(tiny: Path) -> None:
    small = [id_of(picture(n, width=10, height=10)) for n in range(2)]
    write_folder(tiny.parent / "pool", [(f"small-{n}.png", picture(n, width=10, height=10)) for n in range(2)])
    gated(tiny, {"name": "small", "measure": "dropped", "stage": "filter", "reason": "min_side", "warn": "> 0"})
    lodeset("run", tiny)
    assert sorted(package.load(tiny).table("breaches")["image_id"].to_pylist()) == sorted(small)
    api.gc(api.open_store(tiny), keep=1, older_than=0)
    assert package.load(tiny).table("breaches").num_rows == 2
    lodeset("forget", tiny, small[0])
    assert package.load(tiny).table("breaches")["image_id"].to_pylist() == [small[1]]
    # A changed bit of the results, of their pages, or of an event is found, and the next evaluation makes them again.
    lodeset("accept", tiny)
    lodeset("gates", tiny)
    results = tiny.parent / "runs/gates/000001"
    stem = max(results.glob("*.json")).stem
    event = tiny.parent / "runs/accepted/000001.json"
    for file in (*(results / f"{stem}.{suffix}" for suffix in ("md", "xml", "json")), event):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert f"{file.parent.name}/{file.name}" in lodeset("verify", tiny, code=1)[0]
        lodeset("run", tiny)
        lodeset("verify", tiny, "--deep")
        assert file.exists() == (file.suffix in (".md", ".xml"))
    assert max(results.glob("*.json")).stem > stem
    # The part is a part like any other: found damaged, and made again by the next evaluation.
    lodeset("verify", tiny, "--deep")
    for file in (tiny.parent / "runs/parts/gates").rglob("*.parquet"):
        file.write_bytes(b"x" * file.stat().st_size)
    lodeset("verify", tiny, "--deep", code=1)
    lodeset("run", tiny)
    lodeset("verify", tiny, "--deep")
    assert package.load(tiny).table("breaches")["image_id"].to_pylist() == [small[1]]


def test_a_gate_alone_says_what_it_needs() -> None:
    with pytest.raises(ValidationError, match="needs `stage`"):
        Gate(name="g", measure="kept_share", error="< 1")
    assert Gate(name="g", measure="dropped", stage="ingest", set="pool", reason="corrupt", error="> 1").about == (
        "dropped of ingest/pool (corrupt)"
    )


def test_every_command_of_the_guide_does_what_it_says(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, with the guide's own gates; new images come before each run."""
    guide = (Path(__file__).parents[2] / "docs/guides/gates.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^lodeset (.*)$", guide, re.MULTILINE)
    assert len(commands) == 9
    tree = {
        "pool": ["images/"],
        "dedup": {"threshold": 0.99, "reference_threshold": 0.99, "verify": "none"},
        "cluster": {"k": 2},
        "embed": {"semantic": {"kind": "patch_dictionary", "words": 8}},
        **yaml.safe_load(block),
    }
    (tmp_path / "lodeset.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)

    def more(number: int) -> None:
        named = [(f"{number}-{n}.png", picture(100 * number + n, width=64, height=64)) for n in range(12)]
        write_folder(tmp_path / "images", named)

    copies = [(f"copy-{n}.bmp", Image.open(io.BytesIO(picture(n, width=64, height=64)))) for n in range(6)]
    write_folder(tmp_path / "images", [(name, encoded(image, "BMP")) for name, image in copies])
    seen = []
    for number, command in enumerate(commands):
        words = shlex.split(command)
        if words[0] == "run":
            more(number)
        elif words[0] == "rollback":
            more(50)
            lodeset("run", "lodeset.yaml")
        seen.append("".join(lodeset(*words)))
    run_, gates_, written_, table_, accept_, rollback_, status_, plan_, again_ = seen
    assert "1 warn, 3 ok, 1 not compared (run 1 against no accepted run)" in run_ and "enough-images" in gates_
    assert (tmp_path / "gates.md").exists() and (tmp_path / "gates.xml").exists() and "time" in written_
    assert len(table_.splitlines()) == 1 + len(copies) and "run 1 is accepted" in accept_
    assert "what run 1 made counts again, and what run 2 made does not" in rollback_
    assert "rolled back to run 1" in status_ and "full of banners" in status_
    assert "would be refused: nothing that shards are made from has changed since run 2" in plan_
    assert "(run 4 against run 1, the accepted one)" in again_
