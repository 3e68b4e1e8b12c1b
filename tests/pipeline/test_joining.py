"""Whose metadata is it: sidecars of names with dots, and which members of a source are images."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from builders import id_of, picture, write_folder, write_tar
from whole import read, rejects

from lodeset.pipeline.config import Source
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.choice import Members, matches
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.members import Member, joined


def told(*names: str) -> dict[str, list[str] | str]:
    """Image -> its sidecars, sidecar that describes nothing -> why."""
    found = joined([Member(name, n, 1) for n, name in enumerate(names)])
    return {m.name: m.reason or [s.name for s in m.sidecars] for m in found}


@pytest.mark.parametrize(
    "stems",
    [
        ["img_0.5_a", "img_0.7_b", "2024.01.02_cat", "2024.02.03_dog", "plain"],
        ["Track 2.0", "Track 2.5", "Track 2"],
        ["Dr. Smith", "Dr. Jones", "Dr"],
        ["photo", "photo.final", "photo.final.2"],
        ["v1.2.3", "v1.2.4", "v1.2", "v1"],
        ["a/1.0", "b/1.0", "a.b/1.0"],
    ],
)
@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_each_image_has_its_own_sidecar(tmp_path: Path, stems: list[str], kind: str) -> None:
    """Whatever the order: images first, sidecars first, side by side."""
    images = [(f"{stem}.png", picture(n)) for n, stem in enumerate(stems)]
    sidecars = [(f"{stem}.json", json.dumps({"url": f"https://e.org/{stem}"}).encode()) for stem in stems]
    if kind == "folder":
        sources = [write_folder(tmp_path / "loose", images + sidecars)]
    else:
        beside = [m for pair in zip(images, sidecars, strict=True) for m in pair]
        orders = [beside, images + sidecars, sidecars + images, images + sidecars[::-1]]
        sources = [write_tar(tmp_path / f"{n}.tar", members) for n, members in enumerate(orders)]
    for source in sources:
        found = {id_of(s.data): s.metadata.url for s in read(source) if s.data}
        assert found == {id_of(picture(n)): f"https://e.org/{stem}" for n, stem in enumerate(stems)}
        assert rejects(source) == []


def test_an_image_does_not_get_what_is_said_of_a_missing_one() -> None:
    assert told("img_0.5_a.jpg", "img_0.7_b.json") == {"img_0.5_a.jpg": [], "img_0.7_b.json": "ambiguous_metadata"}
    assert told("22.png", "22.json", "22.05.png") == {"22.png": ["22.json"], "22.05.png": []}
    assert told("Track 2.jpg", "Track 2.0.txt")["Track 2.0.txt"] == "ambiguous_metadata"
    assert told(".hidden.1.jpg", ".hidden.2.json")[".hidden.1.jpg"] == []
    assert told("x.json", "y.jpg") == {"x.json": "metadata_without_image", "y.jpg": []}
    for there, gone in (("photo.final", "photo.draft"), ("www.e.org.a", "www.e.org.b"), ("a.left", "a.right")):
        assert told(f"{there}.jpg", f"{gone}.json") == {f"{there}.jpg": [], f"{gone}.json": "ambiguous_metadata"}
    apart = told("dr.smith.jpg", "dr.smith.json", "dr.jones.json")
    assert apart == {"dr.smith.jpg": ["dr.smith.json"], "dr.jones.json": "ambiguous_metadata"}


def test_members_of_one_webdataset_sample_share_what_is_said_of_it() -> None:
    assert told("1.jpg", "1.seg.png", "1.json") == {"1.jpg": ["1.json"], "1.seg.png": ["1.json"]}
    assert told("1.left.jpg", "1.right.jpg", "1.json") == {"1.left.jpg": ["1.json"], "1.right.jpg": ["1.json"]}
    assert told("1.rgb.jpg", "1.depth.png", "1.meta.json") == {
        "1.rgb.jpg": ["1.meta.json"],
        "1.depth.png": ["1.meta.json"],
    }
    for word in ("caption", "cls_labels", "exif", "image_meta"):
        assert told("1.rgb.jpg", "1.mask.png", f"1.{word}.json")["1.mask.png"] == [f"1.{word}.json"]
    assert told("v.000001.jpg", "v.000002.jpg", "v.json")["v.000002.jpg"] == ["v.json"]
    assert told("a.jpg.json", "a.png.json", "a.jpg", "a.png", "a.txt") == {
        "a.jpg": ["a.txt", "a.jpg.json"],
        "a.png": ["a.txt", "a.png.json"],
    }


def test_sidecars_are_merged_and_the_nearest_name_counts(tmp_path: Path) -> None:
    members = [
        ("1.left.png", picture(1)),
        ("1.json", b'{"licence": "CC0", "caption": "of both", "shot": 7}'),
        ("1.left.txt", b"the left one"),
        ("2.png", picture(2)),
        ("2.meta.json", b'{"url": "https://e.org/far", "label": "cat"}'),
        ("2.json", b'{"URL": "https://e.org/near"}'),
    ]
    one, two = (s.metadata for s in read(write_tar(tmp_path / "a.tar", members)))
    assert (one.licence, one.caption, one.extra) == ("CC0", "the left one", '{"shot": 7}')
    assert (two.url, two.label) == ("https://e.org/near", "cat")


def test_names_that_begin_alike_cost_linear_time() -> None:
    crowds = [
        [f"img_0.{n:06}.jpg" for n in range(20_000)] + [f"img_0.{n:06}.json" for n in range(0, 40_000, 2)],
        [f"a.b{n}.jpg" for n in range(20_000)] + [f"a.c{n}.json" for n in range(20_000)],
        ["a.jpg"] + [f"a.c{n}.json" for n in range(40_000)],
        ["a." * 2_000 + f"{n}.jpg" for n in range(400)] + ["a." * 2_000 + f"{n}.json" for n in range(400)],
        [f"{kind}{n % 3}.{'jpg' if n % 2 else 'json'}" for n in range(20_000) for kind in "ab"],
    ]
    for crowd in crowds:
        started = time.process_time()
        found = joined([Member(name, n, 1) for n, name in enumerate(crowd)])
        assert time.process_time() - started < 5
        assert max(len(m.sidecars) for m in found) <= 16


# -- which members are images


def test_patterns_mean_names_at_any_depth_and_paths_from_the_source_on() -> None:
    for name, pattern in [
        ("a/x.GIF", "*.gif"),
        ("a/masks/x.png", "masks/"),
        ("masks/x.png", "**/masks/**"),
        ("b/masks/x.png", "**/masks/**"),
        ("2019/raw/x.png", "2019/raw"),
        ("a/b/x.png", "a/*.png"),
        ("x.seg.png", "*.seg.png"),
    ]:
        assert matches(name, (pattern,)), (name, pattern)
    for name, pattern in [("b/2019/raw/x", "2019/raw"), ("x.png", "x"), ("masks.png", "masks"), ("a.jpg", "*.gif")]:
        assert not matches(name, (pattern,)), (name, pattern)


@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize("members", ["*.jpg", {"exclude": ["*.seg.png", "thumbs"]}, {"include": ["[0-9].jpg"]}])
def test_masks_and_thumbnails_are_left_out_and_counted(tmp_path: Path, kind: str, members: object) -> None:
    from lodeset.pipeline.dag.store import Store
    from lodeset.pipeline.sources.reading import read_slice
    from lodeset.pipeline.sources.slices import cut, split_loose
    from lodeset.pipeline.stages.ingest.draw import members as listed

    files = [
        ("1.jpg", picture(1)),
        ("1.seg.png", picture(2)),
        ("1.json", b'{"label": "a"}'),
        ("thumbs/1.png", picture(3)),
    ]
    files.append(("thumbs/1.txt", b"small"))
    path = write_tar(tmp_path / "a.tar", files) if kind == "tar" else write_folder(tmp_path / "loose", files)
    source = Source.model_validate({"uri": str(path), "members": members})
    found = expand([source], "pool")
    if kind == "tar":
        pieces = cut(found[0], listed(Store(str(tmp_path / "store")), found[0]), 10**6)
    else:
        pieces = split_loose(found, 10**6)
    samples = [s for piece in pieces for s in read_slice(piece, 10**6)]
    assert [(id_of(s.data), s.metadata.label) for s in samples if s.data] == [(id_of(picture(1)), "a")]
    assert {s.reason for s in samples if not s.data} == {"excluded"}
    assert sum(s.reason == "excluded" for s in samples) in (2, 3), "two images, and a sidecar where patterns mean it"


def test_two_sources_may_not_want_different_members_of_one_file(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", []))
    with pytest.raises(LodesetError, match="different `members`"):
        expand([Source(uri=path), Source(uri=path, members=Members(include=("*.jpg",)))], "pool")
    assert len(expand([Source(uri=path), Source(uri=path)], "pool")) == 1


def test_what_a_source_excludes_is_not_looked_at(tmp_path: Path) -> None:
    names = ["a/1.png", "a/thumbs/1.png", "b.gif", "2.png", "thumbs.png", "deep/thumbs/x/3.png"]
    folder = write_folder(tmp_path / "pool", [(name, b"x") for name in names])
    exclude = ("thumbs", "*.gif")
    assert [f.relative for f in expand([Source(uri=str(folder), exclude=exclude)], "pool")] == [
        "2.png",
        "a/1.png",
        "thumbs.png",
    ]
    globbed = expand([Source(uri=str(folder / "**" / "*.png"), exclude=("a/", "deep/thumbs"))], "pool")
    assert sorted(f.relative for f in globbed) == ["2.png", "thumbs.png"]
    with pytest.raises(LodesetError, match="holds no files but 2 that `exclude` leaves out"):
        expand([Source(uri=str(folder / "a"), exclude=("*",))], "pool")
