"""Vectors that were made elsewhere: how they are found, and what is told of those that are none."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import inline
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lodeset.pipeline.config import CurationConfig, load
from lodeset.pipeline.dag.stage import Context, Outcome
from lodeset.pipeline.dag.store import Artifact, Rows, Store
from lodeset.pipeline.embedders.config import PrecomputedEmbedder
from lodeset.pipeline.embedders.models import identity
from lodeset.pipeline.embedders.precomputed import Found, look_up, vector_files
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.graph import build
from lodeset.pipeline.stages import embed
from lodeset.pipeline.tables import records
from lodeset.pipeline.tables.vectors import read_vectors

IDS = [f"{n:032x}" for n in range(0xAB, 0xAB + 4)]
WANTED = pa.table(
    {
        "image_id": IDS,
        "uri": ["/data/pool/0.jpg", "/data/pool/b/1.jpg", "/data/a.tar", "/data/a.tar"],
        "member": ["", "", "x/2.jpg", "x/3.jpg"],
    }
)
V = np.arange(1, 9, dtype=np.float32).reshape(4, 2)


def looked_up(path: Path, wanted: pa.Table = WANTED, **knobs: Any) -> Found:
    config = PrecomputedEmbedder.model_validate({"kind": "precomputed", "path": str(path), **knobs})
    return look_up(config, vector_files(config), wanted)


def written(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def lists(vectors: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([None if v is None else list(v) for v in vectors], kind or pa.list_(pa.float32()))


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        [i.upper() for i in IDS],
        [str(uuid.UUID(i)) for i in IDS],
        [bytes.fromhex(i) for i in IDS],
        pa.array([bytes.fromhex(i) for i in IDS], pa.binary(16)),
        pa.array(IDS).dictionary_encode(),
        pa.array(IDS, pa.large_string()),
    ],
)
def test_ids_however_they_are_written(tmp_path: Path, ids: Any) -> None:
    found = looked_up(written(tmp_path / "v.parquet", image_id=ids, vector=lists(V)), WANTED.take([3, 1]))
    assert found.rows.tolist() == [0, 1] and not found.without
    np.testing.assert_array_equal(found.vectors, V[[3, 1]])


@pytest.mark.parametrize(
    "columns",
    [
        {"uri": [*WANTED["uri"].to_pylist()], "member": [None, "", "x/2.jpg", "x/3.jpg"]},
        {"URI": ["file:///data/pool/0.jpg", "/data/pool/b/1.jpg", "/data/a.tar/x/2.jpg", "/data/a.tar/x/3.jpg"]},
        {"image_id": ["7", "8", "9", "10"], "uri": WANTED["uri"].to_pylist(), "member": WANTED["member"].to_pylist()},
    ],
)
def test_uris_of_files_and_of_members(tmp_path: Path, columns: dict[str, Any]) -> None:
    found = looked_up(written(tmp_path / "v.parquet", **columns, vector=lists(V)))
    assert found.rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(found.vectors, V)


def test_the_uri_of_an_archive_means_none_of_its_members(tmp_path: Path) -> None:
    found = looked_up(written(tmp_path / "v.parquet", uri=["/data/a.tar"], vector=lists(V[:1])))
    assert found.without == {"no_vector": 4}


def test_relative_uris_start_from_a_folder_that_is_named(tmp_path: Path) -> None:
    keys = ["pool/0.jpg", "./pool/b/1.jpg", "a.tar/x/2.jpg", "/data/a.tar/x/3.jpg"]
    path = written(tmp_path / "v.parquet", uri=keys, vector=lists(V))
    assert looked_up(path).rows.tolist() == [3]
    found = looked_up(path, folder="/data/")
    np.testing.assert_array_equal(found.vectors, V)
    assert looked_up(path, folder="/elsewhere").without == {"no_vector": 3}
    (tmp_path / "c.yaml").write_text("pool: [x]\nembed: {semantic: {kind: precomputed, path: v.parquet, folder: .}}\n")
    assert load(CurationConfig, tmp_path / "c.yaml").embed.semantic.folder == str(tmp_path)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float16(), 2),
        pa.list_(pa.int32()),
    ],
)
def test_lists_of_any_numbers(tmp_path: Path, kind: pa.DataType) -> None:
    cells = V.astype(np.float16) if "halffloat" in str(kind) else V
    numbers = pa.array([list(v) for v in cells], kind)
    np.testing.assert_array_equal(looked_up(written(tmp_path / "v.parquet", image_id=IDS, vector=numbers)).vectors, V)


@pytest.mark.parametrize(
    ("cells", "without"),
    [
        ([None, *V[1:]], {"null_vector": 1}),
        ([V[0], [], None, V[3]], {"null_vector": 2}),
        ([V[0], [0, 0], V[2], V[3]], {"zero_vector": 1}),
    ],
)
def test_vectors_that_are_none_are_counted(tmp_path: Path, cells: Any, without: dict[str, int]) -> None:
    found = looked_up(written(tmp_path / "v.parquet", image_id=IDS, vector=lists(cells)))
    assert found.without == without and len(found.rows) == 4 - sum(without.values())
    np.testing.assert_array_equal(found.vectors, V[found.rows])


def test_two_vectors_for_one_image_are_none_unless_they_are_the_same(tmp_path: Path) -> None:
    keys = [IDS[0], IDS[1], IDS[0], IDS[1], "f" * 32]
    path = written(tmp_path / "v.parquet", image_id=keys, vector=lists([V[0], V[1], V[2], V[1], V[3]]))
    found = looked_up(path)
    assert found.rows.tolist() == [1] and found.without == {"no_vector": 2, "several_vectors": 1}


def test_one_name_of_two_images_means_neither(tmp_path: Path) -> None:
    """As a tar may hold two members of one name."""
    twice = pa.table({"image_id": IDS[:2], "uri": ["/a.tar"] * 2, "member": ["x.jpg"] * 2})
    found = looked_up(written(tmp_path / "v.parquet", uri=["/a.tar/x.jpg"], vector=lists(V[:1])), twice)
    assert found.without == {"no_vector": 2}


@pytest.mark.parametrize("folder", ["vec [v2]", "a*b?", "{x,y}", "plain"])
def test_folders_and_files_with_the_signs_of_globs(tmp_path: Path, folder: str) -> None:
    written(tmp_path / folder / "one [1].parquet", image_id=IDS[:2], vector=lists(V[:2]))
    written(tmp_path / folder / "below/two.PARQUET", uri=["/data/a.tar/x/3.jpg"], vector=lists(V[3:]))
    (tmp_path / folder / "notes.txt").write_text("no vectors")
    assert looked_up(tmp_path / folder).rows.tolist() == [0, 1, 3]
    assert looked_up(tmp_path / folder / "one [1].parquet").rows.tolist() == [0, 1]
    if folder == "plain":
        assert looked_up(tmp_path / "pl*" / "*.parquet").rows.tolist() == [0, 1]
    config = PrecomputedEmbedder(kind="precomputed", path=str(tmp_path / folder))
    before = identity(config)
    written(tmp_path / folder / "three.parquet", image_id=["c"], vector=lists(V[:1]))
    assert identity(config) != before


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image_id": ["a"], "embedding": [[1.0]]}, "no column `vector`; its columns are: image_id, embedding"),
        (
            {"name": ["a"], "vector": [[1.0]]},
            "neither a column `image_id` nor a column `uri`; its columns are: name, vector",
        ),
        ({"image_id": IDS[:2], "vector": [[1.0], [1.0, 2.0]]}, r"several widths: \[1, 2\]"),
        (
            {"image_id": IDS[:1], "vector": [b"abcd"]},
            r"holds binary, but vectors must be lists of numbers.*np\.frombuffer",
        ),
        ({"image_id": IDS[:1], "vector": ["[0.1, 0.2]"]}, "holds string, but vectors must be lists of numbers"),
        ({"image_id": IDS[:1], "vector": [[[1.0, 2.0]]]}, "holds list<.*list<.*vectors must be lists of numbers"),
        ({"image_id": IDS[:1], "vector": [1.5]}, "holds double, but vectors must be lists"),
    ],
)
def test_files_that_hold_no_vectors_are_refused(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    with pytest.raises(LodesetError, match=told):
        looked_up(written(tmp_path / "x.parquet", **columns))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(LodesetError, match=r"broken\.parquet cannot be read as Parquet"):
        looked_up(tmp_path / "broken.parquet")
    for absent in ("none.parquet", "no*.parquet", "none [1]"):
        with pytest.raises(LodesetError, match="no precomputed vectors at"):
            looked_up(tmp_path / absent)


# -- the stage


def ingested(store: Store, ids: list[str], folder: str = "/data/pool") -> Artifact:
    places = [
        {"set": "pool", "uri": f"{folder}/{n}.jpg", "member": "", "offset": 0, "image_id": i, "size_bytes": 9}
        for n, i in enumerate(ids)
    ]
    tables = {
        "images": pa.Table.from_pylist([{"image_id": i, "set": "pool", "size_bytes": 9} for i in ids], records.IMAGES),
        "locations": pa.Table.from_pylist(places, records.LOCATIONS),
    }
    files = store.commit_part("ingest", f"{len(ids)}{len(folder)}", tables).files
    return inline.artifact(
        "ingest", "pool", Outcome({n: (files[n],) for n in ("images", "locations")}, Rows(len(ids), len(ids)))
    )


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    inline.without_engine(embed, monkeypatch)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/0.jpg").write_bytes(b"listed, and not read")
    store = Store(str(tmp_path / "runs"))

    def run(path: Path, ids: list[str] = IDS, folder: str = "/data/pool", set_: str = "pool") -> tuple[Outcome, Store]:
        semantic = {"kind": "precomputed", "path": str(path)}
        dedup = {"threshold": 0.9, "reference_threshold": 0.9}
        tree = {"store": store.url, "pool": [str(tmp_path / "pool")], "embed": {"semantic": semantic}, "dedup": dedup}
        tree["targets"] = [{"name": "target", "uri": str(tmp_path / "pool")}]
        stage = build(CurationConfig.model_validate(tree))[f"embed/{set_}"]
        context = Context(store, stage, stage.name, {"images": ingested(store, ids, folder)}, 1, lambda _: None)
        outcome = embed.run(context)
        assert outcome.rows.balanced()
        return outcome, store

    return run


def test_every_image_is_accounted_for(tmp_path: Path, ran: Any) -> None:
    ids = [f"{n:032x}" for n in range(8)]
    cells = [None, [0, 0], [np.nan, 1], [np.inf, 1], [1e39, 1], [3, 4], [5, 12]]
    outcome, store = ran(
        written(tmp_path / "v.parquet", image_id=ids[:7], vector=lists(cells, pa.list_(pa.float64()))), ids
    )
    assert dict(outcome.rows.dropped) == {"not_finite": 3, "no_vector": 1, "null_vector": 1, "zero_vector": 1}
    found, vectors = read_vectors(store, outcome.tables["vectors"])
    assert found == ids[5:7]
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [5 / 13, 12 / 13]], atol=1e-3)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"uri": ["pool/0.jpg"]},
            r"none of the 4 images of `pool` \(no_vector 4\).*uri pool/0\.jpg; .*/data/pool/0\.jpg.*folder",
        ),
        ({"image_id": ["000012"]}, r"no_vector 4.*image_id 000012; the first image is image_id 0{30}ab"),
        ({"image_id": IDS[:1], "vector": [None]}, r"\(no_vector 3, null_vector 1\)$"),
        ({"image_id": IDS, "vector": [[0.0, 0.0]] * 4}, r"\(zero_vector 4\)$"),
        ({"image_id": [], "vector": []}, "has no rows"),
    ],
)
def test_vectors_of_no_use_stop_the_run(tmp_path: Path, ran: Any, columns: dict[str, Any], told: str) -> None:
    keys = {name: pa.array(values, pa.string()) for name, values in columns.items() if name != "vector"}
    path = written(tmp_path / "v.parquet", **keys, vector=lists(columns.get("vector", [[1.0, 2.0]])))
    with pytest.raises(LodesetError, match=told):
        ran(path)


def test_images_that_moved_are_looked_up_again(tmp_path: Path, ran: Any) -> None:
    path = written(tmp_path / "v.parquet", uri=["/data/pool/0.jpg", "/data/there/1.jpg"], vector=lists(V[:2]))
    assert ran(path)[0].rows.kept == 1
    assert read_vectors(ran(path)[1], ran(path, folder="/data/there")[0].tables["vectors"])[0] == [IDS[1]]


def test_a_target_may_do_without_vectors(tmp_path: Path, ran: Any) -> None:
    """They say how good the embedder is; a trained network is evaluated without them."""
    path = written(tmp_path / "v.parquet", image_id=["another"], vector=lists(V[:1]))
    outcome, _ = ran(path, set_="target")
    assert dict(outcome.rows.dropped) == {"no_vector": 4} and outcome.tables["vectors"] == ()
