"""Which files a source means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from builders import picture, write_folder, write_parquet, write_tar

from lodeset.pipeline.config import Ingest, Source
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.sources.files import Bytes, escaped, unescaped
from lodeset.pipeline.sources.listing import expand
from lodeset.pipeline.sources.reading import Location, read_images
from lodeset.pipeline.sources.slices import split_loose
from lodeset.pipeline.stages.ingest.run import ingest_slice


def test_globs_folders_and_hidden_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", [])
    write_tar(tmp_path / "a.tar", [])
    write_folder(tmp_path / "loose", [("x/1.png", b"1"), ("2.png", b"2"), (".DS_Store", b"3")])
    files = expand([Source(uri=str(tmp_path / "*.tar")), Source(uri=str(tmp_path / "loose"))], "pool")
    assert [(f.kind, f.relative) for f in files] == [
        ("tar", "a.tar"),
        ("tar", "b.tar"),
        ("loose", "2.png"),
        ("loose", "x/1.png"),
    ]
    twice = expand([Source(uri=str(tmp_path / "a.tar")), Source(uri=str(tmp_path / "*.tar"))], "pool")
    assert [f.relative for f in twice] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("uri", "told"), [("none.tar", "nothing is at"), ("none*", "nothing is at"), ("empty", "holds no files")]
)
def test_nothing_there(tmp_path: Path, uri: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LodesetError, match=told):
        expand([Source(uri=str(tmp_path / uri))], "pool")


def test_archives_of_other_kinds_and_unknown_protocols_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.bz2").write_bytes(b"x")
    with pytest.raises(LodesetError, match="unpack it"):
        expand([Source(uri=str(tmp_path / "a.tar.bz2"))], "pool")
    with pytest.raises(LodesetError, match="cannot be opened"):
        expand([Source(uri="nosuch://a/b.tar")], "pool")


def names(*paths: Path) -> list[str]:
    return [f.relative for f in expand([Source(uri=str(p)) for p in paths], "pool")]


def test_a_glob_means_hidden_files_only_where_it_says_so(tmp_path: Path) -> None:
    write_folder(
        tmp_path, [(".git/objects/1", b"x"), ("seen/2.png", b"x"), (".cache/3.png", b"x"), ("a/.old/4.png", b"x")]
    )
    assert names(tmp_path / "*") == ["2.png"]
    assert names(tmp_path / "**" / "*.png") == ["2.png"]
    assert names(tmp_path / ".cache" / "*.png") == ["3.png"]
    assert names(tmp_path / ".c*") == ["3.png"]


def test_one_parquet_file_may_hold_two_columns_of_images(tmp_path: Path) -> None:
    path = str(write_parquet(tmp_path / "a.parquet", [picture(1)], photo=[picture(2)]))
    files = expand([Source(uri=path), Source(uri=path, image="photo"), Source(uri=path)], "pool")
    assert [(f.image, f.namesakes) for f in files] == [("image", 0), ("photo", 1)]


def test_a_path_with_the_signs_of_a_glob_means_itself(tmp_path: Path) -> None:
    assert names(write_tar(tmp_path / "new [1]" / "p.tar", [])) == ["p.tar"]
    write_tar(tmp_path / "new 1" / "q.tar", [])
    assert names(tmp_path / "new [1]") == ["p.tar"]


# -- links and what is no file


def test_links_are_followed_and_every_folder_is_listed_once(tmp_path: Path) -> None:
    write_folder(tmp_path, [("elsewhere/far.png", b"1"), ("elsewhere/deep/x.png", b"2"), ("pool/b/near.png", b"3")])
    pool = tmp_path / "pool"
    (pool / "a").symlink_to("b")  # comes before what it leads to
    (pool / "b" / "up").symlink_to(pool)
    (pool / "c").symlink_to(tmp_path / "elsewhere")
    (pool / "one.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (pool / "lost.png").symlink_to(tmp_path / "nowhere")
    (pool / "round.png").symlink_to("round.png")
    os.mkfifo(pool / "pipe.png")
    files = expand([Source(uri=str(pool))], "pool")
    read = [f.relative for f in files if not f.refused]
    assert read == ["b/near.png", "c/deep/x.png", "c/far.png", "one.png"]
    refused = {f.relative: f.refused for f in files if f.refused}
    assert sorted(refused) == ["a", "b/up", "lost.png", "pipe.png", "round.png"]
    assert "leads nowhere" in refused["lost.png"] and "listed already" in refused["a"] and "pipe" in refused["pipe.png"]
    (piece,) = split_loose(files, 10**6)
    rejects = ingest_slice("pool", piece, Ingest())[0]["rejects"].to_pylist()
    assert {Path(row["uri"]).name for row in rejects if row["reason"] == "not_a_file"} == {
        Path(p).name for p in refused
    }


def test_which_of_two_links_counts_does_not_depend_on_the_file_system_s_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, [("far/x.png", b"1"), ("pool/near.png", b"2")])
    for name in ("a", "b", "c"):
        (tmp_path / "pool" / name).symlink_to(tmp_path / "far")
    scandir = os.scandir

    class Ordered(list[Any]):
        def __enter__(self) -> Ordered:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    for backwards in (False, True):
        monkeypatch.setattr(
            os, "scandir", lambda path, b=backwards: Ordered(sorted(scandir(path), key=lambda e: e.name, reverse=b))
        )
        files = expand([Source(uri=str(tmp_path / "pool"))], "pool")
        assert [f.relative for f in files if not f.refused] == ["a/x.png", "near.png"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fdinfo"), reason="a folder whose entries vanish while it is listed")
def test_what_cannot_be_listed_behind_a_link_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = write_folder(tmp_path / "pool", [("a.png", picture(1)), ("own/b.png", picture(2))])
    write_folder(tmp_path / "far", [("deep/x.png", picture(3))])
    (pool / "p").symlink_to("/proc/self/fdinfo")
    (pool / "q").symlink_to(tmp_path / "far")
    scandir = os.scandir

    def denied(path: str) -> Any:
        if path.endswith(unreadable):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    unreadable = "/q/deep"
    refused = {f.relative: f.refused for f in expand([Source(uri=str(pool))], "pool") if f.refused}
    assert refused.pop("q/deep") == "a folder behind a link that cannot be listed: Permission denied"
    assert refused, "the descriptor of the listing itself is gone after it"
    assert all(name.startswith("p/") and "behind a link" in why for name, why in refused.items())
    unreadable = "/own"
    with pytest.raises(LodesetError, match=r"cannot be listed: .*Permission denied"):
        expand([Source(uri=str(pool))], "pool")


def test_a_linked_tar_and_a_linked_root(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "far" / "a.tar", [])
    (tmp_path / "near.tar").symlink_to(path)
    (tmp_path / "folder").symlink_to(path.parent)
    assert names(tmp_path / "near.tar", tmp_path / "folder") == ["near.tar", "a.tar"]


# -- names that are not UTF-8


ODD = [
    "caf\udce9.png",
    "caf\\xe9.png",
    "a\\x5cxe9.png",
    "\udcff\udcfe/x.png",
    "caf\u00e9.png",
    "100%.png",
    "a\\b.png",
    "a::b.png",
]


@pytest.mark.parametrize("name", ODD)
def test_escapes_can_be_undone(name: str) -> None:
    assert unescaped(escaped(name)) == name
    assert escaped(name).encode().decode() == escaped(name)


def test_escapes_tell_names_apart_and_leave_the_usual_ones() -> None:
    assert len({escaped(name) for name in ODD}) == len(ODD)
    assert [name for name in ODD if escaped(name) == name] == ["caf\u00e9.png", "100%.png", "a\\b.png", "a::b.png"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes there only")
def test_files_whose_names_are_not_utf8_are_read(tmp_path: Path) -> None:
    data = {name: picture(seed) for seed, name in enumerate(ODD)}
    write_folder(tmp_path / "p\udcfc", data.items())
    (piece,) = split_loose(expand([Source(uri=str(tmp_path / "p*"))], "pool"), 10**6)
    tables, _ = ingest_slice("pool", piece, Ingest())
    assert tables["images"].num_rows == len(ODD)
    tables["locations"].validate(full=True)
    columns = ["image_id", "uri", "member", "offset", "size_bytes"]
    places = [Location(**row) for row in tables["locations"].select(columns).to_pylist()]
    assert {d for _, d in read_images(places)} == set(data.values())


def test_a_name_with_two_colons_is_no_chain_of_file_systems(tmp_path: Path) -> None:
    write_folder(tmp_path / "p::q", [("a::b.png", picture(1)), ("a::nosuch", picture(1))])
    memory = fsspec.filesystem("memory")
    for name in ("a::b.png", "a::nosuch"):
        memory.pipe_file(f"/two-colons/{name}", picture(1))
    try:
        for uri in (str(tmp_path / "p::q"), f"file://{tmp_path}", "memory://two-colons"):
            files = expand([Source(uri=uri)], "pool")
            assert [f.relative.rsplit("/", 1)[-1] for f in files] == ["a::b.png", "a::nosuch"]
            for file in files:
                with Bytes(file.uri) as opened:
                    assert opened.read() == picture(1), file.uri
    finally:
        memory.rm("/two-colons", recursive=True)
