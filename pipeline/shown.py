r"""Make text safe to show on terminals, in logs and on pages: without secrets and without active characters.

Names, captions, URLs and error messages come from crawls and from other libraries. Two things in them must not reach a
reader: credentials (the password of a URL, the signature of a presigned one, tokens and keys in a driver's messages),
and characters that a terminal executes or that reorder text (escape sequences, carriage returns, bidirectional
controls).

Tables keep what is needed to open a source again, so `locations.uri` holds such a URL unchanged. Everything that is
derived from tables for people, or leaves the store, passes through here: the command line, logs, reports, and the
`.json` members of shards.
"""

from __future__ import annotations

import json
import re
from typing import Any

HIDDEN = "***"

# Parameters whose values are always secrets, by the end of their names.
_SECRET = (
    r"(?:password|passwd|passphrase|pwd|secret|secret[-_]?(?:access[-_]?)?key|access[-_]?key|account[-_]?key|api[-_]?key"
    r"|private[-_]?key|subscription[-_]?key|shared[-_]?key|token|jwt|signature|credentials?|hmac|sas"
    r"|authorization|connection[-_]?string)"
)
# Parameters that are secrets only in URLs, because they mean nothing in other text.
_IN_URLS = (
    r"(?:sig|sign|key|auth|access[-_]?key[-_]?id|key[-_]?pair[-_]?id|policy|j?session(?:[-_]?id)?|sid|pass|pw|code|assertion"
    r"|ticket|hdne[at]s?|__gda__|otp)"
)
# Repetitions are bounded: this reads untrusted text and must not take quadratic time.
_USER = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]{0,31})(:/{2,4})"
    r"([^\s/?#'\"<>]{0,999}@|[^\s/@:'\"<>]{0,255}:(?!\d{0,5}(?:/|$))[^\s@'\"<>]{0,499}@)"
)
_PARAMETER = re.compile(rf"(?i)([?&;#](?:[\w.%-]{{0,64}}{_SECRET}|{_IN_URLS})=)[^&;#\s'\"<>]+")
_QUOTED = re.compile(rf"(?i)(\b[\w-]{{0,64}}{_SECRET}['\"]?\s{{0,4}}[:=]\s{{0,4}}(['\"]))(?:(?!\2).){{1,4096}}(\2)")
_ASSIGNED = re.compile(rf"(?i)(\b[\w-]{{0,64}}{_SECRET}=)[^\s,;&'\"<>)\]}}]+")
_HEADER = re.compile(r"(?i)(\bauthorization['\"]?\s?[:=]\s?['\"]?(?:bearer|basic|token|aws4-hmac-sha256)\s)[^\s'\",]+")
_JWT = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")
_AWS_KEY = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
# Only text with one of these is examined further; most text has none.
# Tokens with recognizable prefixes: Hugging Face, GitHub, GitLab, OpenAI and Anthropic, Slack, Google.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-(?:proj-|ant-(?:\w+-)?)?\w{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{30,})"
)
_SUSPECT = re.compile(rf"(?i):/|=|{_SECRET}|eyJ|AKIA|ASIA|hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox|AIza")

# Controls (C0, DEL, C1), bidirectional marks, invisible spaces, line separators, tags, halves of surrogate pairs.
# Joiners stay, because emoji and several scripts need them.
_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def without_secrets(text: str) -> str:
    """The text with `***` in place of credentials: `https://***@host/a.tar?X-Amz-Signature=***`."""
    if not _SUSPECT.search(text):
        return text
    text = _USER.sub(_user, text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    text = _QUOTED.sub(rf"\1{HIDDEN}\3", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, _AWS_KEY.sub(HIDDEN, _JWT.sub(HIDDEN, text)))


def _user(match: re.Match[str]) -> str:
    scheme, slashes, user = match[1], match[2], match[3][:-1]
    name, colon, _ = user.partition(":")
    # In a web address a token can be the user name itself; elsewhere a name without a password is only a name
    # (abfs://container@account).
    web = scheme.lower() in ("http", "https", "ftp", "ftps")
    kept = HIDDEN if web else f"{name}:{HIDDEN}" if colon else name
    return f"{scheme}{slashes}{kept}@"


def visible(text: str, lines: bool = False) -> str:
    r"""The text with active characters escaped (`\x1b`, `\u202e`, `\n`); `lines` keeps line breaks and tabs."""

    def written(match: re.Match[str]) -> str:
        sign = match[0]
        if lines and sign in "\n\t":
            return sign
        code = ord(sign)
        escape = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        return _SHORT.get(sign, escape)

    return _ACTING.sub(written, text)


def shown(value: object, lines: bool = False) -> str:
    """Any value as text that is safe to show; `lines` keeps line breaks and tabs."""
    return visible(without_secrets(str(value)), lines)


def redacted(value: Any) -> Any:
    """JSON-like data with the credentials removed from every text in it."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: redacted(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry) for entry in value]
    return value


def json_text(value: Any) -> str:
    """Compact JSON in UTF-8 whose active characters are written as JSON escapes: the same data, safe to display."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return _ACTING.sub(lambda match: json.dumps(match[0])[1:-1], text)
