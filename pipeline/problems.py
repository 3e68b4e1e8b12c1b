"""What pydantic finds wrong with a configuration, in the words of the file."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel


def explained(model: type[BaseModel], problems: list[Any]) -> list[str]:
    """One line a key; what the members of a union each have to say is joined."""
    schema = model.model_json_schema()
    told: dict[str, list[str]] = {}
    for problem in problems:
        path = _path(schema, problem["loc"])
        where = ".".join(path) or "(top level)"
        if problem["type"] == "extra_forbidden":
            hint = _hint(path[-1], _keys_near(schema, problem["loc"][:-1]))
            line, message = where, f"unknown key; {hint}"
        elif problem["type"] == "missing":
            line, message = where, "required, and missing"
        else:
            value = repr(problem.get("input"))
            line = f"{where} = {value if len(value) <= 80 else value[:77] + '...'}"
            message = re.sub(r"^Value error, ", "", problem["msg"])
        if message not in told.setdefault(line, []):
            told[line].append(message)
    return [f"  {line}: {', or '.join(messages)}" for line, messages in told.items()]


def _hint(key: str, known: list[str]) -> str:
    """What may be meant by a key that is not known where it is; `known` are those of all members of a union."""
    if key in known:
        return "it belongs to another kind or method than the one chosen"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"


def _path(schema: dict[str, Any], location: tuple[Any, ...]) -> list[str]:
    """The keys and list positions of a location, without the names of union members that pydantic puts between them."""
    path: list[str] = []
    for at, step in enumerate(location):
        last = at == len(location) - 1
        if (
            isinstance(step, int)
            or step in _keys_near(schema, location[:at])
            or (last and "[" not in step and "-" not in step)
        ):
            path.append(str(step))
    return path


def _keys_near(schema: dict[str, Any], location: tuple[Any, ...]) -> list[str]:
    """Property names at `location`; a union contributes the names of all its members."""
    nodes = [schema]
    for step in (*location, None):
        expanded: list[dict[str, Any]] = []
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
            # A union's discriminator value appears in the location but not in the schema: stay where we are.
            nodes = [node["properties"][step] for node in expanded if step in node.get("properties", {})] or expanded
    return []
