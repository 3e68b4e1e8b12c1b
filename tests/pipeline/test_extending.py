"""The worked examples of source kinds, filters and embedders."""

import json
import struct
from pathlib import Path
from typing import Any

from builders import picture
from extending import extended, run

TESTS = str(Path(__file__).parents[1])
POOL = """
import json, sys
from pathlib import Path
import pytest
sys.path.append(sys.argv[1])
from inline import ran, without_engine
from pools import Pool
from lodeset.infra.config import Config
from lodeset.pipeline import graph
from lodeset.pipeline.dag.store import Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages import embed, filter, score

patch = pytest.MonkeyPatch()
without_engine(score, patch)
without_engine(embed, patch)
patch.setattr(filter, "map_items", lambda function, items, **_: map(function, items))
folder = Path(sys.argv[2])
pool = Pool(folder, Store(str(folder / "runs")), {})
ingested = pool.ingested()
"""


def told(copy: Path, code: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return json.loads(run(copy, code, TESTS, str(folder)).splitlines()[-1])


def record(number: int, data: bytes, labels: int = 0, piece: int = 0) -> bytes:
    payload = struct.pack("<IfQQ", labels, 1.0, number, 0) + bytes(4 * labels) + data
    return struct.pack("<II", 0xCED7230A, piece << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


READ = """
import json, sys
from lodeset.pipeline.algorithms.images.decoding import image_id
from lodeset.pipeline.config import Source
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.reading import Location, read_images, read_slice
from lodeset.pipeline.sources.slices import chosen_members, cut, members_of
from lodeset.pipeline.specs import listing_of

(file,) = expand([Source(uri=sys.argv[2] + "/*.rec")], "pool")
pieces = cut(file, chosen_members(file, members_of(file)), 3_000)
samples = [sample for piece in pieces for sample in read_slice(piece, 10**6)]
good = [s for s in samples if not s.reason]
places = [Location(image_id(s.data), s.uri, s.member, s.offset, s.size_bytes) for s in good]
assert [data for _, data in read_images(places)] == [s.data for s in good]
print(json.dumps([len(pieces), [(s.member, s.data.hex(), s.reason) for s in samples]]))
"""


def test_a_source_kind_is_one_file_and_one_line(tmp_path: Path) -> None:
    images = [picture(n) for n in range(5)]
    records = [record(n, data, labels=n % 3) for n, data in enumerate(images)]
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "a.rec").write_bytes(
        b"".join(records[:3]) + record(9, b"x", piece=1) + b"".join(records[3:]) + b"\x0a#torn"
    )
    pieces, samples = told(extended("A source kind", tmp_path), READ, folder)
    assert pieces > 1
    assert [(name, bytes.fromhex(data)) for name, data, reason in samples if not reason] == [
        (f"{n:010d}.jpg", data) for n, data in enumerate(images)
    ]
    assert [reason for *_, reason in samples if reason] == ["unreadable_archive"] * 2


MASKED = """
config = pool.config(min_side=1, **KNOBS)
made = pool.filtered(config, ingested)
stages = graph.build(config)
schema = Config.model_json_schema()["$defs"]["Filter"]["properties"]
wrong = ""
try:
    pool.config(**{next(iter(KNOBS)): -1})
except ValueError as error:
    wrong = str(error)
print(json.dumps([pool.reasons(made), dict(stages["filter/pool"].config), list(schema), "greater than 0" in wrong]))
"""


def test_a_filter_of_tables_is_one_file_and_one_line(tmp_path: Path) -> None:
    """PNG files of noise have many bits a pixel, the one of a single color few."""
    copy = extended("A filter of tables", tmp_path)
    dropped, spec, knobs, refused = told(copy, POOL + "KNOBS = {'min_bits_per_pixel': 2.0}" + MASKED, tmp_path / "pool")
    assert dropped == {"blank": "bits_per_pixel"}
    assert spec == {"min_side": 1, "min_bits_per_pixel": 2.0} and refused
    assert knobs[-2:] == ["min_bits_per_pixel", "faces"]


def test_a_filter_of_pixels_is_one_file_and_one_line(tmp_path: Path) -> None:
    """What is reddest is most colorful."""
    copy = extended("A filter of pixels", tmp_path)
    dropped, spec, knobs, refused = told(copy, POOL + "KNOBS = {'min_colorfulness': 60.0}" + MASKED, tmp_path / "pool")
    assert dropped and set(dropped.values()) == {"colorless"} and "red" not in dropped
    assert spec == {"min_side": 1, "min_colorfulness": 60.0} and refused
    assert knobs[-2:] == ["min_colorfulness", "faces"]


EMBEDDED = """
from lodeset.infra.config import read
path = folder / "lodeset.yaml"
path.write_text(f"store: {pool.store.url}\\npool: [{folder / 'pool'}]\\n")
config = read(path, ("embed.semantic={kind: color_histogram, bins: 3}",))
stage = graph.build(config)["embed/pool"]
made = ran(pool.store, stage, {"ingest/pool": ingested})
rows = pool.store.table(made.tables["vectors"]).to_pylist()
wrong = []
for embedder in ("{kind: color_histogram, bins: 1}", "{kind: color_histogram, bin: 3}", "{kind: other}"):
    try:
        read(path, (f"embed.semantic={embedder}",))
    except LodesetError as error:
        wrong.append(str(error))
print(json.dumps([{pool.names[r["image_id"]]: r["vector"] for r in rows}, dict(stage.config), wrong]))
"""


def test_an_embedder_is_one_file_and_one_line(tmp_path: Path) -> None:
    vectors, spec, wrong = told(extended("An embedder", tmp_path), POOL + EMBEDDED, tmp_path / "pool")
    assert spec == {"embedder": {"kind": "color_histogram", "bins": 3}}
    assert {len(vector) for vector in vectors.values()} == {27}
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-2 for vector in vectors.values())
    # One color, (90, 100, 110): the middle of three steps in each channel.
    assert vectors["blank"].index(1.0) == 1 * 9 + 1 * 3 + 1
    assert "embed.semantic.bins" in wrong[0] and "2" in wrong[0]
    assert "did you mean `bins`" in wrong[1]
    assert "color_histogram" in wrong[2]
