"""Credentials and characters that act never reach a reader."""

from __future__ import annotations

import json
import time

import pytest

from lodeset.pipeline.shown import json_text, redacted, shown, visible


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://user:pass@host/a.tar", "https://***@host/a.tar"),
        ("https://ghp_token@host/a", "https://***@host/a"),
        ("ftp://user:p@ss@host/a", "ftp://***@host/a"),
        ("https://user:p/ss@host/a", "https://***@host/a"),
        ("sftp://user:pass@host/a", "sftp://user:***@host/a"),
        ("hdfs://user@host/a", "hdfs://user@host/a"),
        ("abfs://container@account.example/a", "abfs://container@account.example/a"),
        ("https://h/a.jpg?X-Amz-Date=1&X-Amz-Signature=ab12&w=3", "https://h/a.jpg?X-Amz-Date=1&X-Amz-Signature=***&w=3"),
        ("https://h/a.jpg?X-Goog-Credential=me%40x&X-Goog-Signature=ab", "https://h/a.jpg?X-Goog-Credential=***&X-Goog-Signature=***"),
        ("https://h/a?sv=2024&sig=a%2Fb%3D&se=2026", "https://h/a?sv=2024&sig=***&se=2026"),
        ("https://h/a#access_token=ab.cd", "https://h/a#access_token=***"),
        ("https://h/a?key=AIza&size=3", "https://h/a?key=***&size=3"),
        ("two: http://a:b@c/d, http://e:f@g", "two: http://***@c/d, http://***@g"),
        ("S3FileSystem(key='A', secret='B')", "S3FileSystem(key='A', secret='***')"),
        ('{"aws_secret_access_key": "B"}', '{"aws_secret_access_key": "***"}'),
        ("account_key=abc; next", "account_key=***; next"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer ***"),
        ("denied for hf_" + "aB3" * 11, "denied for ***"),
        ("ghp_" + "aB3" * 12 + ": bad credentials", "***: bad credentials"),
        ("sk-ant-api03-" + "aB3" * 10, "***"),
        ("https://h/a;jsessionid=12?pass=x&w=3", "https://h/a;jsessionid=***&w=3"),
        ("key AKIAIOSFODNN7EXAMPLE was refused", "key *** was refused"),
    ],
)  # fmt: skip
def test_credentials_are_hidden(text: str, told: str) -> None:
    assert shown(text) == told
    assert shown(told) == told
    assert redacted({"a": [text]}) == {"a": [told]}


@pytest.mark.parametrize(
    "text",
    [
        "/data/a@b/c.tar",
        "/data/hf_internal_testing/sk-images-of-cats-and-dogs/task-1",
        "s3://bucket/crawl/*.tar",
        "http://host:8080/p@2x.jpg",
        "hf://datasets/one/two@main/a.parquet",
        "257 class tokens: 3, max_tokens=5, monkey=2",
        "https://h/a?id=3&page=2",
        "Ärger, 図, emoji 👩‍🚀 and می‌خواهم",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert shown(text) == text


def test_acting_characters_are_written_out() -> None:
    assert shown("a\x1b[2Jb\x07\r\n\x9b31m") == r"a\x1b[2Jb\x07\r\n\x9b31m"
    assert shown("photo\u202egnp.exe\u2066\u200b\ufeff\U000e0041") == r"photo\u202egnp.exe\u2066\u200b\ufeff\U000e0041"
    assert visible("one\ntwo\x1b", lines=True) == "one\ntwo\\x1b"
    assert shown("\udcff").encode() == b"\\udcff"


def test_json_for_shards_is_the_same_data_without_acting_characters() -> None:
    tree = {"caption": "a\x1b[31m\x7f\x9b \u202eb\U000e0041 \u200fשלום", "n": [1, None]}
    text = json_text(tree)
    assert json.loads(text) == tree
    assert text == visible(text)
    assert "שלום" in text


@pytest.mark.parametrize("piece", ["a://b:c", "://", "a-", "&a", "token='", "authorization:", "eyJaaaaaaaaa."])
def test_hostile_text_takes_no_longer_than_other_text(piece: str) -> None:
    started = time.process_time()
    shown(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 5
