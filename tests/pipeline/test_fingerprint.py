import dataclasses
import math

import pytest

from lodeset.pipeline.config import Dedup
from lodeset.pipeline.dag.fingerprint import canonical, digest
from lodeset.pipeline.dag.stage import Context, Input, Outcome, Stage
from lodeset.pipeline.dag.store import Artifact, Rows


def nothing(context: Context) -> Outcome:
    return Outcome({}, Rows(0, 0))


def stage(name: str = "a", **changes: object) -> Stage:
    return dataclasses.replace(Stage(name, "pool", 1, "ray", nothing, {"k": 1}), **changes)


def artifact(of: Stage, fingerprint: str, content: dict[str, str] | None = None) -> Artifact:
    return Artifact(of.name, of.set, of.version, fingerprint, {}, {}, {}, Rows(0, 0), content or {})


def test_order_and_kind_of_container_do_not_matter() -> None:
    assert digest({"a": (1, 2), "b": None}) == digest({"b": None, "a": [1, 2]})
    assert digest(Dedup()) == digest(Dedup().model_dump())


@pytest.mark.parametrize("value", [{"a": {"b": [print]}}, {"a": {"b": [math.nan]}}, {"a": {"b": [object()]}}])
def test_what_cannot_be_hashed_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"a\.b\[0\]"):
        canonical(value)


def test_only_what_a_thing_is_enters() -> None:
    base = stage().fingerprint({})
    assert stage(runtime={"part_images": 7}, max_cpus=3, seconds_per_image=9.0, set="other").fingerprint({}) == base
    for change in ({"name": "b"}, {"version": 2}, {"config": {"k": 2}}):
        assert stage(**change).fingerprint({}) != base


def test_inputs_enter_by_fingerprint_or_by_content() -> None:
    above = stage("ingest")
    by_all, by_images = stage(inputs={"x": Input(above)}), stage(inputs={"x": Input(above, "images")})
    assert by_all.fingerprint({}) is None
    here, moved = artifact(above, "1", {"images": "i"}), artifact(above, "2", {"images": "i"})
    assert by_all.fingerprint({above.id: here}) != by_all.fingerprint({above.id: moved})
    assert by_images.fingerprint({above.id: here}) == by_images.fingerprint({above.id: moved})
