"""The report over a small store that is made by hand, so that every figure on the page is known."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from report_world import HOSTILE, ORDER, World, make_world, table

import lodeset.pipeline
from lodeset.infra.report import collect, pictures, trained
from lodeset.infra.report.contents import Copy
from lodeset.infra.report.header import flow, tiles
from lodeset.infra.report.reasons import REASONS
from lodeset.infra.report.render import pictured, render
from lodeset.pipeline.dag.store import Rows, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.stages.ingest.culprits import _REASONS as REASON_OF
from lodeset.pipeline.tables import records


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


# -- what is collected


def test_copies_are_told_with_how_they_were_found(world: World) -> None:
    dedup, ids = world.report().dedup, world.ids
    assert dedup is not None
    assert [(group.size, group.keeper) for group in dedup.largest] == [(3, ids["00.jpg"]), (2, ids["01.jpg"])]
    first, second = (group.copies for group in dedup.largest)
    assert first == (
        Copy(ids["copy-of-0.jpg"], ids["00.jpg"], True, pytest.approx(0.8), 3, "mirror"),  # type: ignore[arg-type]  # a float32
        Copy(ids["by-hash.jpg"], ids["00.jpg"], True, None, 1, "identity"),
    )
    # Its edge to the kept image was refuted, so that edge says nothing of why it is in the group.
    assert second == (Copy(ids["chained.jpg"], ids["01.jpg"], False, None, None, None),)
    assert [(leak.image_id, leak.matched_id) for leak in dedup.leaks] == [(ids["leak.jpg"], ids["ref.jpg"])]


@pytest.mark.parametrize(("verified", "direct"), [(True, True), (None, True), (False, False)])
def test_a_meeting_of_hashes_stands_unless_pixels_refute_it(world: World, verified: bool | None, direct: bool) -> None:
    like = world.artifacts["dedup/pool"]
    edges = world.store.table(like.tables["edges"]).to_pylist()
    told = [{**edge, "verified": verified} if edge["similarity"] is None else edge for edge in edges]
    tables = {**like.tables, "edges": [pa.Table.from_pylist(told, schema=records.EDGES)]}
    world.add("dedup", "pool", tables, like.rows, like.details, like.config)
    dedup = world.report().dedup
    assert dedup is not None
    (by_hash,) = (c for group in dedup.largest for c in group.copies if c.image_id == world.ids["by-hash.jpg"])
    assert (by_hash.direct, by_hash.phash_distance) == (direct, 1 if direct else None)


def test_examples_of_every_reason(world: World) -> None:
    report, ids = world.report(), world.ids
    found = {(one.set, one.reason): (one.count, one.image_ids) for one in report.dropped}
    assert found == {
        ("pool", "min_side"): (1, (ids["tiny.jpg"],)),
        ("pool", "exact_duplicate"): (1, (ids["01.jpg"],)),  # again.jpg, in the part that does not own its bytes
        ("pool", "not_finite"): (1, (ids["09.jpg"],)),
    }
    assert [(one.set, one.reason, one.count, len(one.examples)) for one in report.rejected] == [
        (name, "corrupt", 7, collect.REJECTS_SHOWN) for name in ("pool", "test-set", "flowers")
    ]


def test_scores_of_filters_and_what_their_thresholds_drop(world: World, tmp_path: Path) -> None:
    report = world.report()
    (one,) = report.scored
    assert (one.filter, one.keep, one.threshold, one.images, one.dropped) == ("nsfw", "below", 0.88, 19, 1)
    assert one.edges == tuple(pytest.approx(n / 10) for n in range(11))
    assert one.counts == (2,) * 9 + (1,)
    assert [dict(d.scores) for d in report.dropped if d.stage == "filter"] == [{world.ids["tiny.jpg"]: 8.0}]
    text = Page(world.write(tmp_path / "page.html")).text
    assert "keeps below 0.88: drops 1 of 19 by itself" in text

    wide = table(records.SCORES, *((world.ids[f"{n:02}.jpg"], "aesthetic", n - 3.0) for n in range(10)))
    world.add("score", "pool", {"scores": [wide]}, Rows(10, 10), config={"scorers": {"aesthetic": {}}})
    judging = {"classifiers": {"aesthetic": {"keep": "above", "threshold": 0.0, "place": 0}}}
    world.add("filter", "pool", {"filtered": []}, Rows(10, 10), config=judging)
    (one,) = world.report().scored
    assert (one.dropped, sum(one.counts), one.edges[0], one.edges[-1]) == (3, 10, -3, 6)


def test_images_without_vector_are_looked_for_in_every_file(world: World) -> None:
    vectors = world.artifacts["embed/pool"].tables["vectors"]
    ids = world.store.table(vectors)["image_id"]
    world.add(
        "embed",
        "pool",
        {"vectors": [pa.table({"image_id": ids[n::3]}) for n in range(3)]},
        Rows(19, 18, {"not_finite": 1}),
    )
    assert [one.image_ids for one in world.report().dropped if one.stage == "embed"] == [(world.ids["09.jpg"],)]


def test_clusters_queries_and_calibration_agree_with_the_tables(world: World) -> None:
    report, ids = world.report(), world.ids
    assert report.clusters is not None and report.calibration is not None
    even, odd = ([ids[f"{n:02}.jpg"] for n in range(first, 9, 2)] for first in (0, 1))
    assert [(c.number, c.size, c.image_ids) for c in report.clusters.largest] == [
        (0, 5, tuple(sorted(even))),
        (2, 4, tuple(sorted(odd))),
    ]
    assert (report.clusters.sizes, report.clusters.empty) == ((5, 4), 1)
    (query,) = report.retrieved[0].queries
    assert (query.query_id, query.found) == (ids["query.jpg"], 9)
    assert [hit for hit, _ in query.hits] == [ids[f"{n:02}.jpg"] for n in range(8, 8 - collect.HITS_SHOWN, -1)]
    assert report.retrieved[0].median_similarity == pytest.approx(0.4)
    jpeg_kind = report.calibration.kinds[0]
    assert (jpeg_kind.low, jpeg_kind.median, jpeg_kind.high) == pytest.approx((0.1, 0.5, 0.9))


def test_a_long_training_is_thinned_to_its_last_line(world: World) -> None:
    (training, finished) = world.report().training
    assert (training.stage, finished.stage) == ("train", "finish")
    steps = [line["step"] for line in training.lines]
    assert steps[0] == 1 and steps[-1] == 1000 and len(steps) <= trained.POINTS + 1
    assert steps == sorted(set(steps))


def test_pictures_are_bounded_however_much_there_is(world: World) -> None:
    """60 groups of 40, 30 clusters of 40, 20 curated sets of 5 queries with 20 hits, 90 drops of each of 9 reasons."""
    names = [f"{n:032x}" for n in range(10_000)]
    large = replace(world, store=Store(f"{world.store.url}-large"), stages={}, artifacts={})

    keepers = [(names[n], names[n], True, "unique", None, None) for n in range(0, 2400, 40)]
    copies = [(names[n], names[n - n % 40], False, "near", names[n - n % 40], 0.5) for n in range(2400) if n % 40]
    lost = [
        (names[n], names[n], False, "included" if n % 2 else "reference", names[n + 1000], 0.9)
        for n in range(3000, 3100)
    ]
    verdicts = [
        table(records.DUPLICATES, *keepers),
        table(records.DUPLICATES, *copies),
        table(records.DUPLICATES, *lost),
    ]
    leaks = [
        table(
            records.LEAKS,
            *((f"r{n % 7}" if n % 2 == 0 else "i", names[n + 1000], names[n], 0.9, True) for n in range(3000, 3100)),
        )
    ]
    roles = {**{f"r{n}": "reference" for n in range(7)}, "i": "included"}
    like = world.artifacts["dedup/pool"]
    details = {
        **like.details,
        "leaks": {name: {"role": role, "dropped": 7, "images": 7} for name, role in roles.items()},
    }
    counts = Rows(2500, 60, {"near": 2340, "reference": 50, "included": 50})
    tables = {"duplicates": verdicts, "edges": [], "leaks": leaks}
    large.add("dedup", "pool", tables, counts, details, like.config)

    clusters = table(records.CLUSTERS, *((names[n], n % 30, [0]) for n in range(1200)))
    large.add("cluster", "pool", {"clusters": [clusters]}, Rows(1200, 1200), {"k": 30, "largest": 40, "empty": 0})
    asked = {"asked": 100, "retrieved": 100, "distinct": 100, "collisions": 0, "short": 0, "capped": 0}
    for s in range(20):
        hits = [(names[s * 100 + n], f"s{s}", "sample", names[9000 + s * 10 + n % 5], 0.5, None) for n in range(100)]
        large.add(
            "retrieve", f"s{s}", {"matches": [table(records.MATCHES, *hits)]}, Rows(100, 100), asked, {"mode": "sample"}
        )
    dropped = table(records.FILTERED, *((names[5000 + n], f"reason-{n % 9}", 0.5, 0.6) for n in range(810)))
    large.add("filter", "pool", {"filtered": [dropped]}, Rows(810, 0, {f"reason-{n}": 90 for n in range(9)}))

    dedup = large.report().dedup
    assert dedup is not None
    # Every reference set has a turn before one has a second.
    assert len({pair.image_id for pair in dedup.leaks}) == collect.LEAKS_SHOWN
    assert {int(pair.image_id, 16) % 7 for pair in dedup.leaks[:7]} == set(range(7))
    assert [(one.set, one.role) for one in dedup.leaked] == list(roles.items())
    shown = pictured(large.sections())
    assert len(shown) == len(set(shown))
    assert 300 < len(shown) <= 400


# -- pictures


def test_a_picture_is_the_image_made_small() -> None:
    gradient = np.linspace(0, 255, 900, dtype=np.uint8)[None, :].repeat(600, axis=0)
    uri = pictures.data_uri(Image.fromarray(np.stack([gradient] * 3, axis=-1)))
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as small:
        assert small.size == (112, 75)
        row = np.asarray(small.convert("L"), np.float64)[37]
    assert np.abs(row - np.linspace(0, 255, 112)).max() < 6


def test_an_image_smaller_than_a_picture_is_not_blown_up() -> None:
    body = pictures.data_uri(Image.new("RGB", (9, 5))).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(body))) as small:
        assert small.size == (9, 5)


def test_sources_that_are_gone_or_changed_leave_the_others_and_a_reason(world: World) -> None:
    (world.sources / "00.jpg").unlink()
    (world.sources / "03.jpg").write_bytes(b"something else")
    # 01.jpg has a second place, again.jpg.
    (world.sources / "01.jpg").unlink()
    wanted = [world.ids[n] for n in ("00.jpg", "01.jpg", "02.jpg", "03.jpg", "04.jpg")]
    found = pictures.load(world.store, world.artifacts, [*wanted, "f" * 32], 10_000)
    assert [bool(found[i].uri) for i in wanted] == [False, True, True, False, True]
    assert "is gone since it was listed" in found[wanted[0]].missing
    assert "changed since it was listed" in found[wanted[3]].missing
    assert found["f" * 32].missing == "no ingested set contains it"
    assert not any(found[i].missing for i in (wanted[1], wanted[2], wanted[4]))
    assert 'class="gone"' in world.write(world.sources.parent / "page.html")


def test_an_unknown_protocol_is_a_reason_too(world: World) -> None:
    place = (world.sources / "02.jpg").as_uri().replace("file:", "nosuch:")
    rows = table(records.LOCATIONS, ("pool", place, "", 0, world.ids["02.jpg"], 1))
    images = world.artifacts["ingest/pool"].tables["images"]
    world.add("ingest", "pool", {"locations": [rows], "images": list(images)}, Rows(1, 1))
    assert (
        "nosuch"
        in pictures.load(world.store, world.artifacts, [world.ids["02.jpg"]], 10_000)[world.ids["02.jpg"]].missing
    )


def test_secrets_in_addresses_are_not_shown() -> None:
    assert pictures.public("s3://key:secret@host/a/b.tar") == "s3://host/a/b.tar"
    assert pictures.public("https://host/b.jpg?X-Signature=abc") == "https://host/b.jpg"
    assert pictures.public("/data/what?.jpg") == "/data/what?.jpg"
    assert pictures.short_name("https://u:p@host/x/b.tar?token=1", "dir/7.jpg") == "dir/7.jpg in b.tar"


# -- the page


class Page(HTMLParser):
    """Tags, attributes, visible text and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_untrusted_text_stays_text(world: World, tmp_path: Path) -> None:
    page = Page(world.write(tmp_path / "page.html", title=HOSTILE))
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "iframe", "object", "embed", "link", "base", "form"})
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert (
        page.text.count(HOSTILE) == 2 + 2 * 3 * collect.REJECTS_SHOWN
    )  # the title twice; names and details, as they are


def test_nothing_is_fetched_and_the_policy_says_so(world: World, tmp_path: Path) -> None:
    text = world.write(tmp_path / "page.html")
    page = Page(text)
    addresses = [
        a[name] or "" for _, a in page.tags for name in ("src", "href", "srcset", "data", "action") if name in a
    ]
    assert all(address.startswith(("data:image/jpeg;base64,", "data:image/png;base64,", "#")) for address in addresses)
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= {
        p.strip() for p in policy.split(";")
    }


def test_every_section_can_be_reached_and_ids_are_unique(world: World, tmp_path: Path) -> None:
    page = Page(world.write(tmp_path / "page.html"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    targets = [(a["href"] or "")[1:] for tag, a in page.tags if tag == "a"]
    assert len(targets) == 11 and len(ids) == len(set(ids)) and set(targets) <= set(ids)


def test_patches_as_colours_stand_beside_their_image(world: World, tmp_path: Path) -> None:
    page = Page(world.write(tmp_path / "page.html"))
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img" and (a["src"] or "").startswith("data:image/png")]
    assert [base64.b64decode(one.partition(",")[2]) for one in sources] == [b"\x89PNG image", b"\x89PNG picture"]


def test_the_page_tells_the_figures(world: World, tmp_path: Path) -> None:
    text = Page(world.write(tmp_path / "page.html")).text
    for told in (
        "1 leaks removed", "for test-set", "0.800 · 3 bits · mirror", "by hash · 1 bit", "through other copies", "kept, of 3",
        "sample, k = 9", "8 images in 23 WebDataset shards, 46.0 KiB", "and 3 more", "1,000 steps over 8 images (32,000 seen) on 2 workers",
        "2 could not be read", "62.5 %", "37.5 %", "cls + patches, 0.002", "of patches in the finished network",
        "blocks.0.attn", "1.50 ± 0.25", "magnitude+refit", "5.0 M", "0.61 (calibrated)", "0.45 (configured)",
        "test-set reference 1 1", "flowers sample, k = 9 – 10 8 1 1 0 3", "3 images are selected by several sets",
        "added flowers sample 2 removed near 1 removed gone 4", "3.0 KiB in shards no longer count",
    ):  # fmt: skip
        assert told in text, told


def test_the_pools_way_is_counted(world: World) -> None:
    report = world.report()
    assert [n for _, n in flow(report.steps)] == [27, 19, 18, 18, 9, 8, 8]
    assert [tile.value for tile in tiles(report)] == ["27", "19", "3", "1", "8", "50.0 %"]


def test_a_line_a_method_and_every_reason_explained(world: World, tmp_path: Path) -> None:
    page = Page(world.write(tmp_path / "page.html"))
    assert (
        sum(tag == "polyline" for tag, _ in page.tags) == 2 * 4 + 6 + 6
    )  # loss, dino, ibot, lr of two runs; methods; their legend
    reasons = {r for a in world.artifacts.values() for r in a.rows.dropped}
    assert reasons <= set(REASONS) and all(REASONS[r] in page.text for r in reasons)


@pytest.mark.parametrize("finished", range(len(ORDER) + 1))
def test_what_is_not_finished_is_said_in_a_line(world: World, tmp_path: Path, finished: int) -> None:
    done = [*ORDER[:finished], *(["finish"] if "train" in ORDER[:finished] else [])]
    world.artifacts = {id_: a for id_, a in world.artifacts.items() if a.stage in done}
    text = Page(world.write(tmp_path / "page.html")).text
    for stage in ORDER[finished:]:
        if stage in ("embed", "score", "filter", "calibrate"):  # these have no section of their own
            continue
        together = ("train", "finish") if stage == "train" else (stage,)
        waiting = ", ".join(id_ for id_, one in world.stages.items() if one.name in together)
        assert f"Not finished: {waiting}." in text


def test_what_the_configuration_lacks_is_said(world: World, tmp_path: Path) -> None:
    lacking = ("train", "finish", "evaluate", "prune", "cluster")
    world.stages = {id_: stage for id_, stage in world.stages.items() if stage.name not in lacking}
    world.artifacts = {id_: artifact for id_, artifact in world.artifacts.items() if id_ in world.stages}
    text = Page(world.write(tmp_path / "page.html")).text
    assert all(f"This configuration has no stage {name}." in text for name in lacking if name != "finish")


def test_the_same_store_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    assert world.write(tmp_path / "deep" / "er" / "a.html") == world.write(tmp_path / "b.html")
    assert world.write(tmp_path / "b.html") == (tmp_path / "b.html").read_text()
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in ("", ".html")] == []  # no temporary file is left


def test_a_place_that_cannot_be_written_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LodesetError, match=r"cannot be written to .*page\.html .*choose another path"):
        world.write(tmp_path / "file" / "page.html")


def test_an_image_that_several_parts_of_the_page_show_is_read_once(world: World) -> None:
    report = world.report()
    sections = world.sections()
    found = pictures.load(world.store, world.artifacts, pictured(sections), 10_000)
    page = render(report, sections, found, "a run")
    assert all(picture.uri in page for picture in found.values())
    assert page.count(found[world.ids["00.jpg"]].uri) == 2  # kept of its group, and in its cluster


def test_every_reason_that_ingest_gives_is_explained() -> None:
    package = Path(lodeset.pipeline.__file__).parent
    given = {
        reason
        for path in package.rglob("*.py")
        for reason in re.findall(r'(?:Unreadable\(|reason=|"reason": )"([a-z_]+)"', path.read_text(encoding="utf-8"))
    } | set(REASON_OF.values())
    assert len(given) > 15 and given <= set(REASONS), given - set(REASONS)
