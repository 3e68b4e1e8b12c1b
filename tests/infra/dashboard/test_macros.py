"""The parts that pages are made of."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from lodeset.infra.dashboard.gallery import Thumb
from lodeset.infra.dashboard.render import address, environment
from lodeset.infra.dashboard.site import Site
from lodeset.infra.session import open_store

HOSTILE = "\"><script>alert(1)</script>' onerror=alert(2)"


class Tags(HTMLParser):
    """The elements and attributes of a page, as a browser reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.values: set[str | None] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values |= {value for _, value in attrs}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    config = tmp_path / "a zoo.yaml"
    config.write_text("name: zoo\nstore: ./store\npool: [images/]\n")
    return Site(opened=open_store(config), token="a-token-of-the-tests", port=1, base_path="/x")


@pytest.fixture
def templates(site: Site) -> Environment:
    return environment(site)


def made(templates: Environment, source: str, **values: Any) -> str:
    return templates.from_string("{% import 'macros.html.jinja' as ui %}" + source).render(**values)


def test_a_gallery_names_every_image_and_trusts_none(templates: Environment) -> None:
    images = [
        Thumb(image_id="a" * 32, src="/x/1.webp", href="/x/image/a", outcome="near", caption=HOSTILE, mark="dropped"),
        Thumb(image_id="b" * 32, src="/x/2.webp", alt=HOSTILE),
        Thumb(image_id="c" * 32, src="", caption=HOSTILE),
    ]
    page = made(templates, "{{ ui.gallery(images) }}", images=images)
    assert "<script" not in page
    assert page.count("<figure") == 3
    assert re.findall(r'<img [^>]*alt="([^"]*)"', page)[0] == "image aaaaaaaa"
    tags = Tags()
    tags.feed(page)
    assert tags.names == {"ul", "li", "figure", "a", "span", "img", "figcaption"}
    assert not any(name.startswith("on") or name == "style" for name in tags.attributes)
    assert HOSTILE in tags.values  # as the text of an attribute
    assert 'class="badge lost"' in page and "near-duplicates of a kept image" in page


def test_bars_are_drawn_to_scale(templates: Environment) -> None:
    page = made(templates, "{{ ui.bar([(30, 'kept'), (10, 'lost')], 40, '75 % kept') }}")
    widths = [(float(x), float(width)) for x, width in re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', page)]
    assert widths == [(0, 750), (750, 250)]
    assert "style=" not in page and 'aria-label="75 % kept"' in page
    assert "<rect" not in made(templates, "{{ ui.bar([(0, 'kept')], 0, 'nothing') }}")


def test_commands_can_be_pasted(templates: Environment, site: Site) -> None:
    page = made(templates, "{{ ui.command(command_line('run', '--set', 'a.b=c d')) }}")
    assert f"lodeset run &#39;{site.opened.path}&#39; --set &#39;a.b=c d&#39;" in page


def test_a_pager_offers_only_what_is_there(templates: Environment) -> None:
    page = made(templates, "{{ ui.pager('1 to 2', none, url('/map', after=3)) }}")
    assert "Next" in page and 'href="/x/map?after=3"' in page and "Previous" not in page


def test_addresses_are_below_the_base_path_and_keep_what_they_are_given(site: Site, templates: Environment) -> None:
    assert address(site, "/map") == "/x/map"
    assert address(site, "/map", run=3, text="a&b=c d", cluster=[1, 2], lasso=None, label="") == (
        "/x/map?run=3&text=a%26b%3Dc+d&cluster=1&cluster=2"
    )
    # Words that stand for secrets elsewhere are only names of parameters here.
    assert made(templates, "{{ url('/map', token='abc', key='def', text='<b>') }}") == (
        "/x/map?token=abc&amp;key=def&amp;text=%3Cb%3E"
    )


def test_secrets_and_marks_that_turn_text_around_are_not_shown(templates: Environment) -> None:
    page = made(templates, "{{ a }} {{ b }}", a="s3://key:secret@bucket/x", b="gpj.\u202eexe")
    assert "secret" not in page and "\u202e" not in page
