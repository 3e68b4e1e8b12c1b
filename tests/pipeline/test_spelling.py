"""Known metadata is found whatever its spelling and place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import picture, write_folder, write_parquet, write_tar
from whole import read

from lodeset.pipeline.sources.metadata import field_of, fields_of, from_fields, label_text, partition_fields, told


@pytest.mark.parametrize("key", ["url", "URL", "Image URL", "imageUrl", "source-url", "\ufeffurl", "Original_Url"])
def test_an_address_is_known_by_any_spelling(key: str) -> None:
    said = from_fields({key: "https://e.org/1.jpg", "TEXT": "a cat", "License": "CC0", "Class Name": "cat"})
    assert (said.url, said.caption, said.licence, said.label) == ("https://e.org/1.jpg", "a cat", "CC0", "cat")
    assert said.extra is None


def test_of_several_spellings_the_known_one_counts_and_nothing_is_lost() -> None:
    said = from_fields({"URL": "https://e.org/a", "url": "https://e.org/b", "Label": 3, "class_name": "cat"})
    assert (said.url, said.label) == ("https://e.org/b", "3")
    assert json.loads(said.extra or "") == {"URL": "https://e.org/a", "class_name": "cat"}
    row = {"label": said.label, "url": said.url, "extra": said.extra}
    assert (field_of(row, "class_name"), field_of(row, "label"), field_of(row, "Label")) == ("cat", "3", "3")
    assert field_of({"extra": '{"Split": "test"}'}, "split") == "test"
    assert field_of({"extra": None, "label": None}, "split") is None


@pytest.mark.parametrize("value", [3, 3.0, "3", "3.0", " 3\n", "\ufeff3"])
def test_a_class_has_one_name_whatever_its_type(value: object) -> None:
    assert from_fields({"label": value}).label == "3"


def test_values_that_are_no_whole_numbers_stay() -> None:
    assert [told(v) for v in (2.5, True, 1e300, -3.0)] == ["2.5", "True", "1e+300", "-3"]
    assert [label_text(t) for t in ("v1.0", "3.5", "-4.00", "1.0.0")] == ["v1.0", "3.5", "-4", "1.0.0"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_are_no_part_of_what_is_said(encoding: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    assert fields_of(".json", (mark + '{"url": "https://e.org/ü"}').encode(encoding)) == {"url": "https://e.org/ü"}
    assert fields_of(".cls", (mark + "7\r\n").encode(encoding)) == {"label": "7"}


def test_partitions_are_read_from_folders_and_the_file_s_own_word_stands_above(tmp_path: Path) -> None:
    assert partition_fields("/d/label=a%20cat/split=test/x=1.jpg") == {"label": "a cat", "split": "test"}
    assert partition_fields("/d/=x/label=__HIVE_DEFAULT_PARTITION__/9a=b/1.jpg") == {}
    write_folder(
        tmp_path / "p", [("label=cat/1.png", picture(1)), ("label=dog/2.png", picture(2)), ("label=dog/2.cls", b"wolf")]
    )
    assert {s.metadata.label for s in read(tmp_path / "p")} == {"cat", "wolf"}
    write_parquet(tmp_path / "q" / "label=7" / "0.parquet", [picture(3)], split=["test"])
    write_parquet(tmp_path / "q" / "label=8" / "0.parquet", [picture(4)], label=[None])
    assert [s.metadata.label for s in read(tmp_path / "q")] == ["7", "8"]
    tar = write_tar(tmp_path / "t" / "split=test" / "a.tar", [("label=owl/1.png", picture(5))])
    (one,) = read(tar)
    assert (one.metadata.label, one.metadata.extra) == ("owl", '{"split": "test"}')
