"""What a card says of a run is true, its programs read the shards, and it comes and goes with what it describes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from builders import id_of, picture, write_folder
from commands import lodeset
from inline import in_one_process
from PIL import Image

import lodeset as package
from lodeset.infra import api, session
from lodeset.infra.card.facts import Licences, _public, facts
from lodeset.infra.card.readme import _patterns, readme, text
from lodeset.infra.card.words import licence_ids, size_category
from lodeset.infra.looking import looking
from lodeset.infra.upkeep.gc import collect
from lodeset.pipeline.dag.runs import Wanted, artifacts_of, record
from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.errors import ConfigError, LodesetError

CONFIG = """store: ./runs
pool: [pool/]
curated:
  - {name: mine, uri: mine/, include: true, retrieve: {mode: sample, k: 3}}
filter: {min_side: 32}
dedup: {threshold: 0.99, reference_threshold: 0.99, verify: none}
cluster: {k: 2}
shards: {size_mb: 0.03}
embed: {semantic: {kind: patch_dictionary, words: 8}}
"""
BY = "https://creativecommons.org/licenses/by/4.0/"
HOSTILE = "a|b <script>x</script> `c` https://u:hunter2@h.org/x?sig=123456"
PRIVATE = "https://example.org/private.png"


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed, width=64, height=64))).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Of the pool: 9 PNGs and 3 JPEGs, and one that is too small."""
    named = {f"{n}.png": picture(n, width=64, height=64) for n in range(9)}
    return {**named, **{f"{n}.jpg": jpeg(n) for n in range(9, 12)}, "small.png": picture(50, width=16, height=16)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a configuration that has run."""
    folder = tmp_path_factory.mktemp("card")
    said = [{"license": BY, "url": PRIVATE}, {"license": BY}, {"license": HOSTILE}, {"caption": "no licence"}]
    sidecars = {f"{n}.json": json.dumps(one).encode() for n, one in enumerate(said)}
    write_folder(folder / "pool", [*images().items(), *sidecars.items()])
    own = {f"own-{n}.png": picture(100 + n, width=64, height=64) for n in range(2)}
    write_folder(folder / "mine", [*own.items(), ("own-0.json", json.dumps({"license": BY}).encode())])
    (folder / "c.yaml").write_text(CONFIG)
    with in_one_process():
        lodeset("run", folder / "c.yaml")
    yield folder


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> Path:
    """The same to change."""
    shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copy2)
    return tmp_path / "copy/c.yaml"


def cards(folder: Path, number: int = 1) -> Path:
    return folder / f"runs/cards/{number:06d}"


def front_of(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    tree: dict[str, Any] = yaml.safe_load(front)
    return tree


def index_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "runs/shards").glob("*/index.parquet")
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def sized(folder: Path) -> set[str]:
    return {f"{row['image_id']} (64, 64)" for row in index_of(folder)}


# Its reader leaves files open, and warns of rdflib's ways, so it has a process of its own.
VALIDATE = """
import json, logging, sys
import mlcroissant
logging.disable()
found = mlcroissant.Dataset("croissant.json")
issues = found.metadata.ctx.issues
plain = {bytes: bytes.decode, int: int}
told = {"version": found.metadata.ctx.conforms_to.value, "errors": list(issues.errors), "warnings": list(issues.warnings)}
for name in ("index", "images", "descriptions"):
    rows = [{key.partition("/")[2]: value for key, value in row.items()} for row in found.records(name)]
    told[name] = [{key: plain.get(type(v), lambda image: image.size)(v) for key, v in row.items()} for row in rows]
print(json.dumps(told))
"""


def printed(program: str, folder: Path, home: Path) -> str:
    """What a program prints that runs in a folder, without a network."""
    told = {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_croissant_is_valid_and_leads_to_every_image(finished: Path, tmp_path: Path) -> None:
    found = json.loads(printed(VALIDATE, cards(finished), tmp_path))
    assert found["version"] == "http://mlcommons.org/croissant/1.1" and not found["errors"]
    # Nothing to cite is known of a run.
    assert len(found["warnings"]) == 1 and "croissant/citeAs" in found["warnings"][0]
    path = cards(finished) / "croissant.json"
    tree = json.loads(path.read_text())
    files = [one for one in tree["distribution"] if one["@type"] == "cr:FileObject"]
    assert {Path(one["contentUrl"]).suffix for one in files} == {".tar", ".parquet"}
    for one in files:
        data = (path.parent / one["contentUrl"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), f"{len(data)} B") == (one["sha256"], one["contentSize"])
    index = index_of(finished)
    assert found["index"] == index
    ids = {row["image_id"] for row in index}
    shown = {row["image_id"]: row["image"] for row in found["images"]}
    described = {row["image_id"]: json.loads(row["json"]) for row in found["descriptions"]}
    assert set(shown) == set(described) == ids and all(size == [64, 64] for size in shown.values())
    assert all(one["image_id"] == image_id for image_id, one in described.items())


def test_the_front_matter_finds_exactly_the_shards(finished: Path) -> None:
    front = front_of(cards(finished))
    (split,) = front["configs"][0]["data_files"]
    found = {one.resolve() for pattern in split["path"] for one in cards(finished).glob(pattern)}
    assert found == {one.resolve() for one in (finished / "runs/shards").rglob("*.tar")} and len(found) > 1
    assert front["license"] == "other" and front["size_categories"] == ["n<1K"]


def test_of_earlier_folders_only_shards_that_hold_what_counts(finished: Path) -> None:
    opened = api.open_store(finished / "c.yaml")
    found = facts(opened.store, looking.held(opened))
    earlier = File("shards/before/shard-000001.tar", 1, 2, "")
    grown = replace(found, shards=(earlier, *found.shards), dead=3)
    assert _patterns(grown, "../../") == ["../../shards/before/shard-000001.tar", f"../../{found.folder}/*.tar"]
    assert _patterns(replace(grown, shards=(earlier,)), "") == ["shards/before/shard-000001.tar"]
    assert "The shards also hold 3 images that do not count" in readme(grown, "").decode()


def test_hugging_face_datasets_reads_the_shards_by_the_card(finished: Path, tmp_path: Path) -> None:
    """Images of two formats, and JSON with other keys in every sample."""
    read = (
        "import os, warnings; warnings.simplefilter('ignore')\n"
        "from datasets import load_dataset\n"
        "rows = load_dataset(os.getcwd(), split='train')\n"
        "for row in rows: print(row['json']['image_id'], (row['png'] or row['jpg']).size)\n"
    )
    assert set(printed(read, cards(finished), tmp_path).splitlines()) == sized(finished)


def test_the_program_on_the_card_reads_the_shards(finished: Path, tmp_path: Path) -> None:
    program = (cards(finished) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert set(printed(program, cards(finished), tmp_path).splitlines()) == sized(finished)


def test_composition_reasons_and_licences_are_counted(finished: Path) -> None:
    page = (cards(finished) / "README.md").read_text()
    by_id = {id_of(data): name for name, data in images().items()}
    chosen = [by_id[row["image_id"]] for row in index_of(finished) if row["image_id"] in by_id]
    assert chosen and len(index_of(finished)) == len(chosen) + 2
    assert f"| mine | as_is | 2 |  | 2 |\n| mine | sample | 2 | 6 | {len(chosen)} |" in page
    assert "| filter/pool | 13 | 12 | min\\_side 1 |" in page and "- min\\_side: shorter side below filter.min" in page
    by = 1 + len({"0.png", "1.png"} & set(chosen))
    hostile = int("2.png" in chosen)
    silent = len(index_of(finished)) - by - hostile
    assert f"| {BY} | {by} |" in page and f"| none told | {silent} |" in page
    extensions = {one: sum(name.endswith(one) for name in chosen) for one in ("png", "jpg")}
    assert f"`png` ({extensions['png'] + 2})" in page
    run = Store(str(finished / "runs")).run(1)
    assert f"| lodeset | {run.versions['lodeset']} |" in page and "| requirements.lock | sha256:" in page


def test_a_card_is_passed_on_without_secrets_places_and_sources(finished: Path) -> None:
    for name in ("README.md", "croissant.json"):
        page = (cards(finished) / name).read_text()
        assert not [one for one in ("hunter2", "123456", "<script>", PRIVATE, str(finished), "own-0") if one in page]
    assert text("a|b\n<i>`x`") == "a\\|b\\\\n\\<i\\>\\`x\\`"
    told = {"uri": "https://u:p@h.org/a.tar?sig=12345&n=1", "token": "abc", "path": "/home/me/net.onnx", "k": 3}
    assert _public("", {"x": [told]}) == {
        "x": [{"uri": "https://***@h.org/a.tar?sig=***&n=1", "token": "***", "path": "…/net.onnx", "k": 3}]
    }


def test_the_same_run_gives_the_same_bytes(config: Path) -> None:
    folder = cards(config.parent)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder.parent)
    out, _ = lodeset("card", config, "--json")
    assert json.loads(out)["readme"] == str(folder / "README.md")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(before) == 2
    assert package.load(config).status().summary.card == str(folder / "README.md")


def test_a_card_for_a_copy_of_the_shards(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    done = package.load(config).card(out)
    for folder in done.shards:
        shutil.copytree(config.parent / "runs" / folder, out / folder)
    (split,) = front_of(out)["configs"][0]["data_files"]
    found = {one.name for pattern in split["path"] for one in out.glob(pattern)}
    assert found == {one.name for one in (config.parent / "runs/shards").rglob("*.tar")}
    tree = json.loads((out / "croissant.json").read_text())
    urls = [one["contentUrl"] for one in tree["distribution"] if "contentUrl" in one]
    assert all((out / url).is_file() and not url.startswith((".", "/")) for url in urls)
    said, _ = lodeset("card", config, "--out", out)
    assert f"copy these to the same places below {out}" in said
    with pytest.raises(ConfigError, match="it is in the store"):
        api.card(api.open_store(config), config.parent / "runs/release")


def test_a_take_down_takes_the_cards_and_a_new_one_knows_nothing_of_the_image(config: Path) -> None:
    gone = next(row["image_id"] for row in index_of(config.parent))
    count = len(index_of(config.parent))
    lodeset("forget", config, gone)
    assert not cards(config.parent).exists() and package.load(config).status().summary.card is None
    api.card(api.open_store(config))
    for path in cards(config.parent).iterdir():
        assert gone not in path.read_text()
    page = (cards(config.parent) / "README.md").read_text()
    assert f"{count - 1} images, selected" in page
    (index,) = (config.parent / "runs/shards").glob("*/index.parquet")
    assert hashlib.sha256(index.read_bytes()).hexdigest() in page


def test_a_card_goes_with_its_run(config: Path) -> None:
    store = Store(str(config.parent / "runs"))
    first = store.run(1)
    asked = Wanted(first.name, first.limit, "write_shards", first.config, tuple(first.stages))
    assert record(store, asked, artifacts_of(store, first), {}, 0.0, 0.0).number == 2
    api.card(api.open_store(config), run=2)
    done = collect(store, {}, keep=1)
    assert done.sums["foreign"] == (0, 0) and not cards(config.parent).exists()
    assert sorted(one.name for one in cards(config.parent, 2).iterdir()) == ["README.md", "croissant.json"]
    assert not api.verify(config).damage


def test_what_goes_wrong_with_a_card_fails_no_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = api.open_store(config)
    shutil.rmtree(cards(config.parent))
    (index,) = (config.parent / "runs/shards").glob("*/index.parquet")
    index.write_bytes(b"nothing")
    monkeypatch.setattr(logging.getLogger("lodeset"), "propagate", True)
    with caplog.at_level(logging.WARNING, "lodeset"):
        session.keep(opened, opened.store.run(1))
    assert "the card of its shards could not be written" in caplog.text and not cards(config.parent).exists()


def test_there_is_no_card_without_shards(config: Path) -> None:
    shutil.rmtree(config.parent / "runs/runs")
    with pytest.raises(LodesetError, match=r"no finished run of .* has shards to describe"):
        api.card(api.open_store(config))


def test_licences_that_the_hub_knows() -> None:
    def ids(*texts: str, silent: int = 0) -> dict[str, str]:
        return licence_ids(Licences(tuple((one, 1) for one in texts), (0, 0), silent, 0))

    assert ids("http://creativecommons.org/licenses/by-nc-sa/2.0/deed.de", "CC0") == {
        "cc-by-nc-sa-2.0": "CC-BY-NC-SA-2.0",
        "cc0-1.0": "CC0-1.0",
    }
    assert ids("CC BY 4.0") == {"cc-by-4.0": "CC-BY-4.0"}
    assert ids("CC BY 4.0", silent=1) == ids("CC BY 4.0", "mine") == ids("CC BY-NC-ND 2.0") == {}
    assert [size_category(n) for n in (999, 1_000, 10**9)] == ["n<1K", "1K<n<10K", "1B<n<10B"]
