"""What lodeset passes on, shards and pages, gives no credentials away and holds nothing that acts."""

from __future__ import annotations

import json

from lodeset.infra.report.pictures import public, short_name
from lodeset.infra.report.render import environment
from lodeset.pipeline.shown import visible
from lodeset.pipeline.stages.write_shards import _told

SIGNED = "https://me:word@host/a.jpg?X-Amz-Signature=abcdef&w=1"


def test_what_shards_say_of_an_image() -> None:
    said = {
        "label": "cat",
        "caption": "a\x1b[31m \u202ecat\x9b",
        "url": SIGNED,
        "licence": None,
        "extra": json.dumps({"from": [SIGNED], "page": {"link": "https://h/x?access_token=tok&id=3"}, "n": 3}),
    }
    copy = {**said, "copy_id": "1" * 32}
    text = _told({"image_id": "0" * 32, "width": 3, "derived_from": None}, said, [copy], [{"mode": "as_is"}])
    assert not any(secret in text for secret in ("word", "abcdef", "tok&", "me:"))
    assert text == visible(text)
    tree = json.loads(text)
    assert tree["caption"] == said["caption"]
    assert tree["url"] == "https://***@host/a.jpg?X-Amz-Signature=***&w=1"
    assert tree["extra"]["page"] == {"link": "https://h/x?access_token=***&id=3"}
    assert tree["extra"]["n"] == 3
    assert tree["metadata_of_copies"][0]["url"] == tree["url"]


def test_what_a_page_shows() -> None:
    page = environment("lodeset.infra.report").from_string(
        "<p>{{ name }}</p><img src='{{ picture }}'>{{ markup | safe }}"
    )
    told = page.render(name=f"x\u202e\x1b {SIGNED} <b>", picture="data:image/png;base64,aa=", markup="<i>\n</i>")
    assert told == (
        r"<p>x\u202e\x1b https://***@host/a.jpg?X-Amz-Signature=***&amp;w=1 &lt;b&gt;</p>"
        "<img src='data:image/png;base64,aa='><i>\n</i>"
    )


def test_names_of_places() -> None:
    for uri in (SIGNED, "https://me:wo/rd@host/a.jpg?sig=1", "https://token@host/a.jpg"):
        assert public(uri) == "https://host/a.jpg"
    assert short_name(SIGNED, "") == "a.jpg"
    assert public("/x/a?b@c.jpg") == "/x/a?b@c.jpg"
