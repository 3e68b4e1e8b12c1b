import dataclasses
import functools
import math
from pathlib import Path
from typing import ClassVar, get_args, get_type_hints

import pytest
from builders import picture, write_folder

from lodeset.infra import dag
from lodeset.infra.config import Config
from lodeset.pipeline.config import Dedup
from lodeset.pipeline.dag.fingerprint import canonical, digest, optional
from lodeset.pipeline.dag.stage import Context, Input, Outcome, Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Rows
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.references import resolved


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
    for change in ({"name": "b"}, {"version": 2}, {"spec": {"k": 2}}):
        assert stage(**change).fingerprint({}) != base


def test_inputs_enter_by_fingerprint_or_by_content() -> None:
    above = stage("ingest")
    by_all, by_images = stage(inputs={"x": Input(above)}), stage(inputs={"x": Input(above, "images")})
    assert by_all.fingerprint({}) is None
    here, moved = artifact(above, "1", {"images": "i"}), artifact(above, "2", {"images": "i"})
    assert by_all.fingerprint({above.id: here}) != by_all.fingerprint({above.id: moved})
    assert by_images.fingerprint({above.id: here}) == by_images.fingerprint({above.id: moved})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
    VERSION: ClassVar[int] = 1
    k: int
    later: int | None = optional()
    always: int | None = None


def test_a_dataclass_is_what_its_fields_say_and_an_optional_one_counts_only_when_it_is_set() -> None:
    assert canonical(Knobs(k=1)) == {"k": 1, "always": None}
    assert digest(Knobs(k=1)) == digest({"always": None, "k": 1}) != digest(Knobs(k=1, later=2))


def test_what_a_manifest_holds_is_read_by_type() -> None:
    assert read_as(Knobs, {"k": 3, "of a newer version": 1}) == Knobs(k=3)
    with pytest.raises(LodesetError, match=r"lacks k \(Knobs\): another version of lodeset wrote it"):
        read_as(Knobs, {"later": 1})


def test_every_function_of_a_stage_is_there_and_takes_what_its_stage_carries(tmp_path: Path) -> None:
    """Stages name their functions, so that a plan loads none of them."""
    write_folder(tmp_path / "pool", [("a.png", picture(0))])
    write_onnx = {"path": str(tmp_path / "n.onnx")}
    (tmp_path / "n.onnx").write_bytes(b"model")
    tree = {
        "store": str(tmp_path / "store"),
        "pool": [{"uri": str(tmp_path / "pool")}],
        "curated": [{"name": "a", "uri": str(tmp_path / "pool"), "retrieve": {"mode": "sample", "k": 1}}],
        "targets": [{"name": "t", "uri": str(tmp_path / "pool"), "label": "l", "split": "s"}],
        "cluster": {"k": 1},
        "balance": {"images": 1},
        "filter": {"faces": write_onnx, "min_sharpness": 0.1},
        "training": {"finish": {"global_size": 64}},
        "pruning": [{"sweep": [0.1]}],
    }
    for stage in dag.build(Config.model_validate(tree)).values():
        function = stage.function
        assert isinstance(function, functools.partial) and isinstance(function.args[0], str), stage.id
        hints = get_type_hints(resolved(function.args[0]))
        spec, runtime = get_args(hints["context"])
        assert type(stage.spec) is spec, stage.id
        assert type(stage.runtime) is runtime, stage.id
