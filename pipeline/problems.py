"""Translate pydantic's validation errors into the words of the configuration file."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from lodeset.pipeline.shown import shown

_QUOTE = "'"
_COMMA = re.compile(r"\s*[+-]?(\d*),(\d+)\s*")


def explained(model: type[BaseModel], problems: Sequence[Any], tree: Any) -> list[str]:
    """One line per key; the messages of the members of a union are joined. `tree` is the content of the file."""
    schema = model.model_json_schema()
    messages_by_line: dict[str, list[str]] = {}
    paths = [_path(schema, tuple(problem["loc"]), tree, problem["type"]) for problem in problems]
    for problem, path in zip(problems, paths, strict=True):
        location = tuple(problem["loc"])
        if problem["type"] not in _OF_KEYS and any(len(p) > len(path) and p[: len(path)] == path for p in paths):
            continue  # a union member's message about the whole, or a list that lacks its bad entry
        where = _written(path)
        if problem["type"] == "extra_forbidden":
            line, message = where, f"unknown key; {_hint(path, _keys_near(schema, location[:-1]), schema)}"
        elif problem["type"] == "invalid_key":
            line, message = _bad_key(path[:-1], location[-1], tree)
        elif problem["type"] == "missing":
            line, message = where, "required, but missing"
        else:
            value = in_yaml(problem.get("input"))
            # Problems between sections name the place themselves.
            line = f"{where} = {value if len(value) <= 80 else value[:77] + '...'}" if path else ""
            message = _message(problem)
        if message not in messages_by_line.setdefault(line, []):
            messages_by_line[line].append(message)
    return [f"  {line}{': ' if line else ''}{_joined(messages)}" for line, messages in messages_by_line.items()]


def _joined(messages: Sequence[str]) -> str:
    """Alternatives, the most specific first; `expected` is written once."""
    ordered = sorted(messages, key=lambda message: "write " not in message)
    first, *rest = ordered
    return ", or ".join([first, *(message.removeprefix("expected ") for message in rest)])


_OF_KEYS = ("extra_forbidden", "invalid_key", "missing")
# Descriptions of the patterns of names; other patterns are shown as they are.
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "letters, digits, `.`, `_` and `-`, at most 64, a letter or digit first",
    r"^[a-z][a-z0-9_-]{0,63}$": "lower-case letters, digits, `_` and `-`, at most 64, a letter first",
}
_EXPECTED = {
    "list": "expected a list, e.g. [a, b]",
    "section": "expected a section: keys and values on indented lines",
    "text": "expected text",
    "number": "expected a number",
    "whole": "expected a whole number",
    "switch": "expected true or false",
}
_KINDS = {
    "tuple_type": "list",
    "list_type": "list",
    "set_type": "list",
    "frozen_set_type": "list",
    "dict_type": "section",
    "mapping_type": "section",
    "model_type": "section",
    "model_attributes_type": "section",
    "string_type": "text",
    "float_type": "number",
    "float_parsing": "number",
    "int_type": "whole",
    "int_parsing": "whole",
    "int_parsing_size": "whole",
    "int_from_float": "whole",
    "bool_type": "switch",
    "bool_parsing": "switch",
}


def _message(problem: Mapping[str, Any]) -> str:
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx") or {}
    if kind in _KINDS:
        expected = _EXPECTED[_KINDS[kind]]
        return expected + _advice(_KINDS[kind], value)
    match kind:
        case "literal_error" | "enum":
            return f"expected {context['expected']}"
        case "union_tag_invalid":
            return f"{context['discriminator'].strip(_QUOTE)} {in_yaml(context['tag'])} is unknown: expected one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"its {context['discriminator'].strip(_QUOTE)} is missing"
        case "greater_than_equal":
            return f"expected a number of {_number(context['ge'])} or more"
        case "greater_than":
            return f"expected a number above {_number(context['gt'])}"
        case "less_than_equal":
            return f"expected a number of {_number(context['le'])} or less"
        case "less_than":
            return f"expected a number below {_number(context['lt'])}"
        case "finite_number":
            return "expected a finite number"
        case "too_short":
            return f"expected a list of {context['min_length']} or more entries, but it has {context['actual_length']}"
        case "too_long":
            return f"expected a list of at most {context['max_length']} entries, but it has {context['actual_length']}"
        case "string_too_short":
            return "expected text that is not empty"
        case "string_pattern_mismatch":
            return f"expected {_PATTERNS.get(context['pattern'], 'text of the form ' + context['pattern'])}"
    return re.sub(r"^(Value error, |Assertion failed, )", "", str(problem["msg"]))


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _advice(expected: str, value: Any) -> str:
    """What was probably meant by a value of another type."""
    if value is None:
        return ", but there is no value"
    if expected == "text" and isinstance(value, int | float | datetime.date):
        return ": put quotes around it"
    if expected in ("number", "whole") and isinstance(value, str):
        return _number_meant(value, expected == "whole")
    return ""


def _number_meant(text: str, whole: bool) -> str:
    comma = _COMMA.fullmatch(text)
    if comma and not (whole and len(comma[2]) == 3):
        return f": {text.strip()} has a decimal comma" + ("" if whole else f"; write {text.strip().replace(',', '.')}")
    if re.fullmatch(r"\s*[+-]?\d{1,3}(,\d{3})+\s*", text):
        return f": write {text.strip().replace(',', '')}, without commas"
    percent = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*%\s*", text)
    if percent and not whole:
        return f": write {float(percent[1]) / 100:g} for {text.strip()}"
    try:
        number = float(text)
    except ValueError:
        return ""
    return f": write {int(number)}" if whole and number.is_integer() and abs(number) < 1e15 else ""


def _bad_key(section: Sequence[str], key_found: Any, tree: Any) -> tuple[str, str]:
    """The location of a key that is not text, and what to do about it."""
    for step in section:
        tree = (
            tree[int(step)] if isinstance(tree, list | tuple) else tree.get(step) if isinstance(tree, Mapping) else None
        )
    entries = tree.items() if isinstance(tree, Mapping) else ()
    key, value = next(((k, v) for k, v in entries if not isinstance(k, str) and k == key_found), (key_found, key_found))
    where = _written([*section, in_yaml(key)])
    if isinstance(key, int) and not isinstance(key, bool) and value is None:
        return where, f"a comma between braces separates entries: if it is a decimal comma, write a point, e.g. 0.{key}"
    return where, "a key must be text: put quotes around it"


def _written(path: Sequence[str]) -> str:
    steps = (shown(step) or "''" for step in path)
    return ".".join(step if len(step) <= 60 else f"{step[:57]}..." for step in steps)


# -- keys


def _hint(path: Sequence[str], known: Sequence[str], schema: Mapping[str, Any]) -> str:
    """A hint for a key that is unknown in its section; `known` are the keys of all members of a union."""
    key = path[-1]
    if key in known:
        return "it belongs to another kind or method than the chosen one"
    near = nearest(key, known)
    if near:
        return f"did you mean `{near}`?"
    elsewhere = _sections_with(key, schema)
    if elsewhere:
        return f"did you mean {' or '.join(f'`{key}`' for key in elsewhere)}?"
    return f"known keys: {', '.join(sorted(known))}"


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` is probably a misspelling of; None if none is close enough."""
    plain = _plain(word)
    candidates = []
    for candidate in known:
        other = _plain(candidate)
        shorter = min(len(plain), len(other))
        allowed = 1 if shorter <= 4 else 2 if shorter <= 8 else 3
        # One word inside the other: `max_pixels_per_image`, `sharp`.
        inside = shorter >= 4 and (plain.startswith(other) or other.startswith(plain))
        distance = 0 if plain == other else _distance(plain, other)
        if len(plain) <= 64 and (inside or (distance <= allowed and distance < max(len(plain), len(other)))):
            candidates.append((distance, candidate))
    return min(candidates)[1] if candidates else None


def _plain(word: str) -> str:
    return re.sub(r"[-_ .]", "", word.lower())[:65]


def _distance(first: str, second: str) -> int:
    """Number of insertions, deletions, substitutions and swaps of neighboring characters (Damerau and Levenshtein)."""
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def _sections_with(key: str, schema: Mapping[str, Any]) -> list[str]:
    """Full names of this key in the sections of the top level."""
    pairs = ((section, known) for section in schema.get("properties", {}) for known in _keys_near(schema, (section,)))
    return [f"{section}.{known}" for section, known in pairs if _plain(known) == _plain(key)][:3]


def _path(schema: Mapping[str, Any], location: tuple[Any, ...], tree: Any, kind: str) -> list[str]:
    """The keys and list positions of a location, without the names of union members that pydantic inserts."""
    path: list[str] = []
    node = tree
    for at, step in enumerate(location):
        last = at == len(location) - 1
        if isinstance(node, Mapping) and step in node:
            path.append(str(step))
            node = node[step]
        elif isinstance(step, int) or (last and kind in ("missing", "extra_forbidden", "invalid_key")):
            path.append(str(step))
            node = node[step] if isinstance(node, list | tuple) and isinstance(step, int) and step < len(node) else None
        elif step in _keys_near(schema, location[:at]):
            path.append(str(step))
            node = None
    return path


def _keys_near(schema: Mapping[str, Any], location: tuple[Any, ...]) -> list[str]:
    """Property names at `location`; a union contributes the names of all its members."""
    nodes: list[Mapping[str, Any]] = [schema]
    for step in (*location, None):
        expanded: list[Mapping[str, Any]] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if "$ref" in node:
                stack.append(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
            stack.extend(node.get("anyOf", []) + node.get("oneOf", []))
            expanded.append(node)
        if step is None:
            return sorted({key for node in expanded for key in node.get("properties", {})})
        if isinstance(step, int):
            nodes = [node["items"] for node in expanded if "items" in node] or expanded
        else:
            # A union's discriminator value appears in the location but not in the schema: stay at this level.
            nodes = [node["properties"][step] for node in expanded if step in node.get("properties", {})] or expanded
    return []


def in_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float() if math.isnan(value) or math.isinf(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        case str():
            return "'" + shown(value).replace("'", "''") + "'"
        case Mapping():
            return "{" + ", ".join(f"{shown(key)}: {in_yaml(entry)}" for key, entry in list(value.items())[:40]) + "}"
        case list() | tuple():
            return "[" + ", ".join(in_yaml(entry) for entry in value[:40]) + "]"
    return shown(value)
