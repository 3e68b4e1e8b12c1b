"""Hosts and URLs of any spelling against lists of any spelling."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lodeset.pipeline.errors import ConfigError, LodesetError
from lodeset.pipeline.filters.blocklists import Blocklists, address_of, host_of, hosts, starts

LISTS = Blocklists(
    hosts(("Example.COM", "*.münchen.de", "1.2.3.4", "a.b.c")),
    starts(("https://site.org/private/", "http://site.org/private/deeper", "shop.net:8080", "x.io/a?q=")),
)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/x.jpg", "blocked_domain"),
        ("http://img.example.com", "blocked_domain"),
        ("https://user:secret@EXAMPLE.com.:443/..", "blocked_domain"),
        ("https://user@example.com:80/..", "blocked_domain"),
        ("//cdn.example.com/a", "blocked_domain"),
        ("example.com:8080/a", "blocked_domain"),
        ("https://ex%61mple.com/", "blocked_domain"),
        ("https://example.com\\@good.org/", "blocked_domain"),
        ("https://example。com/", "blocked_domain"),
        (" https://example.com/ ", "blocked_domain"),
        ("https://xn--mnchen-3ya.de/a", "blocked_domain"),
        ("https://www.MÜNCHEN.de/a", "blocked_domain"),
        ("http://1.2.3.4:8000/", "blocked_domain"),
        ("https://notexample.com/", None),
        ("https://example.com.evil.org/", None),
        ("https://good.org/?from=example.com", None),
        ("https://example.com@good.org/", None),
        ("https://b.c/", None),
        ("ftp://site.org/private/x", "blocked_url"),
        ("https://site.org/private/deeper/y", "blocked_url"),
        ("https://site.org/priv%61te/x", "blocked_url"),
        ("https://site.org/privately", None),
        ("https://www.site.org/private/", None),
        ("http://shop.net:8080/anything", "blocked_url"),
        ("http://shop.net/anything", None),
        ("https://x.io/a?q=1#top", "blocked_url"),
        ("https://x.io/a", None),
        ("data:image/png;base64,example.com", None),
        ("mailto:me@example.com", None),
        ("http://[::1", None),
        ("http://", None),
        ("", None),
        ("a cat, example.com", None),
    ],
)
def test_urls(url: str, reason: str | None) -> None:
    assert LISTS.judge()(url) == reason


@given(st.text() | st.from_regex(r"https?://[^\s]{0,40}"))
def test_nothing_crashes(text: str) -> None:
    address = address_of(text)
    if address is None:
        assert LISTS.judge()(text) is None
    else:
        assert address.host and not any(c.isspace() or c in "/?#@" for c in address.host)
        assert address.path.startswith("/")
        assert LISTS.judge()(text) in (None, "blocked_domain", "blocked_url")


@given(st.from_regex(r"[A-Za-zäöüß0-9-]{1,8}(\.[A-Za-zäöüß0-9-]{1,8}){0,3}\.?", fullmatch=True))
def test_a_normalised_host_stays_as_it_is(host: str) -> None:
    assert host_of(host_of(host)) == host_of(host)
    assert host_of(f"{host}.") == host_of(host.swapcase()) == host_of(host)


@given(
    st.lists(st.from_regex(r"[ab]/[ab/]{0,5}", fullmatch=True), max_size=12),
    st.lists(st.from_regex(r"[ab]/[ab/]{0,8}", fullmatch=True), min_size=1, max_size=12),
)
def test_starts_are_found_as_a_plain_loop_finds_them(listed: list[str], urls: list[str]) -> None:
    judge = Blocklists((), starts(tuple(listed))).judge()
    for url in urls:
        assert (judge(url) is not None) == any(url.startswith(start) for start in listed)


def test_a_file_holds_one_entry_a_line(tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text("# adult\nexample.com   # the worst\n\n  B.org.\nexample.com\n", encoding="utf-8")
    assert hosts(str(file)) == ("b.org", "example.com")
    file.write_text("good.org\nhttps://example.com/x\n")
    with pytest.raises(ConfigError, match=r"hosts\.txt:2: 'https://example\.com/x' is not a host"):
        hosts(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LodesetError, match="cannot be read as a text file"):
        hosts(str(file))
    with pytest.raises(LodesetError, match=r"filter\.blocked_urls: no file .*none\.txt: give a text file"):
        starts(str(tmp_path / "none.txt"))
    with pytest.raises(LodesetError, match=r"filter\.blocked_domains"):
        hosts(str(tmp_path))


@pytest.mark.parametrize("entry", ["https://a.b", "a.b/c", "a.b:8080", "a b", "data:x"])
def test_what_is_no_host(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"filter\.blocked_domains\.1: .* is not a host"):
        hosts(("good.org", entry))


def test_what_is_no_url() -> None:
    with pytest.raises(ConfigError, match=r"filter\.blocked_urls\.0: 'data:x' is not the start of a URL"):
        starts(("data:x",))
