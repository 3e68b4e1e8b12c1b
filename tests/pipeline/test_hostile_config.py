"""Configurations as they are mistyped, and as they are made to do harm: each ends soon, with one sentence in the words of YAML."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from lodeset.infra.config import read
from lodeset.pipeline.config import CurationConfig, load
from lodeset.pipeline.documents import MOST_BYTES
from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.problems import nearest


def told(folder: Path, text: str | bytes, *overrides: str) -> str:
    path = folder / "lodeset.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read(path, overrides)
    message = str(caught.value)
    assert not any(
        word in message for word in ("tuple", "valid dictionary", "instance of", "Input should", "Traceback")
    )
    return message


def bomb(line: str) -> str:
    """Ten times ten times ... : 10^12 entries in a few hundred characters."""
    names = "abcdefghijklm"
    return "a: &a [x]\n" + "".join(
        line.format(one=one, ten=",".join([f"*{before}"] * 10)) for before, one in pairwise(names)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb("{one}: &{one} [{ten}]\n"), "has more than 100,000 entries"),
        (bomb("{one}: &{one} {{<<: [{ten}]}}\n").replace("[x]", "{x: 1}"), "has more than 100,000 entries"),
        ("pool: &a [*a]", "an alias (*name) is inside the value that it refers to"),
        ("pool: &a {x: {y: *a}}", "an alias (*name) is inside the value that it refers to"),
        ("pool: " + "[" * 900, "nested more than 64 levels"),
        ("- " * 20_000, "nested more than 64 levels"),
        ("pool: " + "x" * MOST_BYTES, "is larger than"),
        ("dedup: {k: " + "9" * 100_000 + "}", "(100,000 characters)` cannot be understood"),
        ("dedup: {k: " + "9" * 30 + "}", "is too large a number"),
        ("shards: {seed: 0x" + "f" * 5_000 + "}", "is too large a number"),
        ("name: 2024-13-45", "line 1, column 7"),
        ("name: !!bool perhaps", "`perhaps` cannot be understood"),
        ("pool: a\nname: b\npool: c", "the key `pool` appears twice, in lines 1 and 3"),
        ("pool: *.tar", 'quote a text that starts with `*`, e.g. "*.tar"'),
        ("pool: a: b", "quote a text that contains `: `"),
        ("dedup:\n\tk: 3", "indent with spaces, not with tabs"),
        ("pool: a\x07", "special characters are not allowed"),
        (b"pool: caf\xe9", "is not UTF-8 text (byte 9)"),
        ("pool: a".encode("utf-16"), "is not UTF-8 text"),
        ("", "not nothing; it needs the key `pool:`"),
    ],
)
def test_documents_that_do_harm_are_refused_soon(tmp_path: Path, text: str | bytes, expected: str) -> None:
    started = time.process_time()
    assert expected in told(tmp_path, text)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pool: 3", "pool = 3: expected a list"),
        ("reference: 3", "reference = 3: expected a list"),
        ("training: {crops: {global_scale: 3}}", "global_scale = 3: expected a list"),
        ("dedup: [1]", "dedup = [1]: expected a section"),
        ("training: yes", "training = true: expected a section"),
        ("dedup:", "dedup = null: expected a section: keys and values on indented lines, but there is no value"),
        ("name: no", "name = false: expected text: put quotes around it"),
        ("name: 2024-01-01", "expected text: put quotes around it"),
        ("dedup: {closeups: maybe}", "dedup.closeups = 'maybe': expected true or false"),
        ("dedup: {verify: pixel}", "dedup.verify = 'pixel': expected 'none' or 'pixels'"),
        ("dedup: {k: 1.5}", "dedup.k = 1.5: expected a whole number"),
        ("dedup: {k: 1e2}", "expected a whole number: write 100"),
        ("training: {steps: '10,000'}", "write 10000, without commas"),
        ("dedup:\n  threshold: 0,5", "dedup.threshold = '0,5': expected a number: 0,5 has a decimal comma; write 0.5"),
        ("dedup: {min_score: '-1,25'}", "-1,25 has a decimal comma; write -1.25"),
        ("dedup: {threshold: 0,5}", "dedup.5: a comma between braces separates entries: if it is a decimal comma"),
        ("filter: {min_sharpness: 20%}", "write 0.2 for 20%"),
        ("embed: {semantic: {}}", "its kind is missing"),
        ("embed: {semantic: {kind: onxx}}", "kind 'onxx' is unknown: expected one of 'patch_dictionary'"),
        ("cluster: {k: []}", "or a list of 1 or more"),
        ("cluster: {k: [3, a]}", "cluster.k.1 = 'a': expected a whole number"),
        ("on: 3", "true: a key must be text"),
        ("3: 4", "3: a key must be text"),
        ("reference: {name: a b, uri: x}", "reference.0.name = 'a b': expected letters, digits"),
        ("min-side: 3", "min-side: unknown key; did you mean `filter.min_side`?"),
        ("filter: {min-side: 3}", "filter.min-side: unknown key; did you mean `min_side`?"),
        ("dedup: {re-ference-threshold: 3}", "did you mean `reference_threshold`?"),
        ("no-such-key-at-all: 3", "no-such-key-at-all: unknown key; known keys: balance"),
        ("'a[b]-c': 3", "a[b]-c: unknown key"),
        ("'': 3", "'': unknown key"),
        ('"\\e[31m": 3', r"\x1b[31m: unknown key"),
        ("training: {optimizer: {}}", "did you mean `optimiser`?"),
        ("store: s3:/bucket/runs", "a URL has two slashes after the colon: s3://bucket/runs"),
        ("store: ~nobody-of-this-name/x", "this user has no home folder"),
        ('store: "a\\0b"', "cannot contain a NUL"),
    ],
)
def test_messages_speak_yaml(tmp_path: Path, text: str, expected: str) -> None:
    needed = "" if text.startswith("pool") else "pool: p\n"
    assert expected in told(tmp_path, needed + text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dedup.threshold=0,5", "write 0.5"),
        ("dedup.k=" + "9" * 100_000, "cannot be understood"),
        ("dedup.k-x=3", "dedup.k-x: unknown key"),
        ("x" * 100_000 + "=3", "xxx...: unknown key"),
        ("dedup.k.x=3", "dedup.k = {x: 3}: expected a whole number"),
        ("pool=*.tar", "quote a text"),
        ("dedup.threshold=&a [*a]", "an alias"),
        ("curated.0.retrieve.k=3", "there is no list with an entry 0"),
        ("dedup..k=3", "dedup.'': unknown key"),
        ("\x1b[31m", r"--set \x1b[31m: expected key.path=value"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, override: str, expected: str) -> None:
    message = told(tmp_path, "pool: p", override)
    assert expected in message
    assert len(message) < 1_000


def test_the_nearest_key_is_really_near() -> None:
    known = ("threshold", "k", "min_side", "path", "folder", "images", "verify")
    for word, near in (
        ("treshold", "threshold"), ("Threshold", "threshold"), ("kk", "k"), ("minside", "min_side"), ("paht", "path"),
        ("image", "images"), ("verfiy", "verify"), ("images_per_set", "images"),
    ):  # fmt: skip
        assert nearest(word, known) == near
    for word in ("colour", "x", "zebra", "", "limit", "depth", "holder_of_things"):
        assert nearest(word, known) is None


def test_sets_may_be_written_short(tmp_path: Path) -> None:
    path = tmp_path / "lodeset.yaml"
    path.write_text(
        "pool: {uri: crawl}\n"
        "curated: [birds/*.tar, {uri: trees.tar, include: true}]\n"
        "reference: [a/test/, b/test, pool, 's3://bucket/val-{000..009}.tar?versionId=3', 'odd name (1).parquet']\n"
        "targets: birds.parquet\n"
    )
    config = load(CurationConfig, path)
    assert [one.uri for one in config.pool] == [str(tmp_path / "crawl")]
    assert [(one.name, one.retrieve.mode) for one in config.curated] == [("birds", "sample"), ("trees", "as_is")]
    names = [one.name for one in config.reference]
    assert names == ["test", "b-test", "reference-pool", "val", "odd-name-1"]
    assert config.reference[1].uri == str(tmp_path / "b/test")
    assert [(one.name, one.label) for one in config.targets] == [("targets-birds", "label")]
    assert load(CurationConfig, path, ("reference=one",)).reference[0].name == "one"
