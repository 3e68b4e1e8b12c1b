"""A change of one setting as a patch of the configuration file: the smallest edit of its text, so comments and order stay."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from lodeset.pipeline.documents import parsed
from lodeset.pipeline.errors import ConfigError, LodesetError

Path = Sequence[str]


class PatchError(LodesetError):
    """The text cannot be edited safely; `--set` changes the setting for a run all the same."""


def patch(text: str, name: str, path: Path, value: float) -> str:
    """The unified diff that sets `path` (such as `("dedup", "min_score")`) in a configuration file; empty if it has this value.

    Raises:
        PatchError: the file says this setting in a way that an edit of one place cannot change alone.
        ConfigError: the text is not valid YAML.
    """
    return unified(text, edited(text, path, value), name)


def edited(text: str, path: Path, value: float) -> str:
    """The text with the setting changed, or added in its section. See `patch`."""
    before = parsed(text, "the configuration")
    after = text if _at(before, path) == value else _Editor(text).set(path, written(value))
    return _checked(after, _with(before, path, lambda _: value), path)


def extended(text: str, path: Path, item: Mapping[str, Any] | str) -> str:
    """The text with one more item at the end of the list at `path`, such as `("by_hand", "drop")`.

    Raises:
        PatchError: the file says this list in a way that an edit of one place cannot change alone.
        ConfigError: the text is not valid YAML.
    """
    before = parsed(text, "the configuration")
    now = _at(before, path)
    if now is not None and not isinstance(now, list):
        raise _refused(path, "it is not a list")
    if item in (now or ()):
        raise PatchError(f"{'.'.join(path)} has {_in_a_line(item)} already: give the new one another name")
    after = _Editor(text).append(path, _in_a_line(item))
    return _checked(after, _with(before, path, lambda items: [*(items or ()), item]), path)


def _checked(after: str, expected: Any, path: Path) -> str:
    """The edited text, if it means what it should.

    Raises:
        PatchError: it means something else.
    """
    try:
        if parsed(after, "the patched configuration") == expected:
            return after
    except ConfigError:
        pass
    raise _refused(path, "the file is written in a way that a small edit cannot keep")


def _with(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """The tree with what stands at `path` changed; sections that it lacks are made."""
    if not path:
        return change(tree)
    key, *rest = path
    section = tree if isinstance(tree, dict) else {}
    return {**section, key: _with(section.get(key), rest, change)}


def _in_a_line(item: Mapping[str, Any] | str) -> str:
    """An item as YAML of one line."""
    text: str = yaml.safe_dump(item, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def written(value: float) -> str:
    """A number as YAML reads it back: never with an exponent, which YAML 1.1 takes for text."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def unified(before: str, after: str, name: str) -> str:
    """A unified diff that `patch` and `git apply` accept."""
    shown = name if re.fullmatch(r"[\w.+-]+", name, re.ASCII) else "lodeset.yaml"
    lines = difflib.unified_diff(_lines(before), _lines(after), f"a/{shown}", f"b/{shown}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str) -> list[str]:
    """Its lines as `patch` counts them: only line feeds end one."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _refused(path: Path, why: str) -> PatchError:
    return PatchError(
        f"{'.'.join(path)} cannot be patched: {why}. Change it by hand, or run with `--set {'.'.join(path)}=VALUE`"
    )


class _Loader(yaml.SafeLoader):
    """Composes nodes, and remembers which of them several places share."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.shared: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        named = self.check_event(yaml.AliasEvent) or getattr(self.peek_event(), "anchor", None) is not None  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if named:
            self.shared.add(id(node))
        return node


class _Editor:
    def __init__(self, text: str) -> None:
        self.text = text
        self.newline = "\r\n" if "\r\n" in text else "\n"
        loader = _Loader(text)
        try:
            self.root = loader.get_single_node()
        finally:
            loader.dispose()
        self.shared = loader.shared

    def set(self, path: Path, value: str) -> str:
        node = self.root
        if node is None:
            return self._appended(path, value)
        for depth, key in enumerate(path):
            if id(node) in self.shared:
                raise _refused(path, "an anchor (`&` or `*`) shares its section with another place")
            if not isinstance(node, yaml.MappingNode):
                return self._in_place_of(node, path, depth, value)
            if any(one.tag == "tag:yaml.org,2002:merge" for one, _ in node.value):
                raise _refused(path, "its section takes keys over from another place (`<<`)")
            found = next((child for name, child in node.value if name.value == key), None)
            if found is None:
                return self._added(node, path, depth, value)
            node = found
        return self._replaced(node, path, value)

    def append(self, path: Path, item: str) -> str:
        node = self.root
        for key in path:
            if isinstance(node, yaml.MappingNode):
                node = next((child for name, child in node.value if name.value == key), None)
            else:
                node = None
            if node is not None and id(node) in self.shared:
                raise _refused(path, "an anchor (`&` or `*`) shares it with another place")
        if not isinstance(node, yaml.SequenceNode):
            return self.set(path, f"[{item}]")
        if node.flow_style:
            end = node.end_mark.index - 1  # its bracket
            while self.text[end - 1] in " \t\r\n,":
                end -= 1
            return self._with(end, end, f", {item}" if node.value else item)
        at = _end(node)
        if at is None:
            raise _refused(path, "its last item spans several lines")
        return self._line_after(at, " " * node.start_mark.column + f"- {item}" + self.newline)

    def _replaced(self, node: yaml.Node, path: Path, value: str) -> str:
        """The value of a key that is there."""
        if id(node) in self.shared:
            raise _refused(path, "an anchor (`&` or `*`) shares its value with another place")
        start, end = node.start_mark.index, node.end_mark.index
        if not isinstance(node, yaml.ScalarNode) or node.style in ("|", ">") or "\n" in self.text[start:end]:
            raise _refused(path, "its value is not a single word")
        return self._with(start, end, value if end > start else f" {value}")

    def _in_place_of(self, node: yaml.Node, path: Path, depth: int, value: str) -> str:
        """A section that is there, but holds nothing."""
        start, end = node.start_mark.index, node.end_mark.index
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:null":
            raise _refused(path, f"`{'.'.join(path[:depth])}` is not a section")
        if end > start:  # null or ~
            return self._with(start, end, "{" + _flow(path[depth:], value) + "}")
        line = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        indent = len(line) - len(line.lstrip(" ")) + 2
        return self._line_after(start, self._block(path[depth:], value, indent))

    def _added(self, node: yaml.MappingNode, path: Path, depth: int, value: str) -> str:
        """A key that its section lacks, as the last one there."""
        if node.flow_style:
            if not node.value:
                at = node.start_mark.index + 1
                return self._with(at, at, _flow(path[depth:], value))
            at = _end(node.value[-1][1])
            if at is None:
                raise _refused(path, "the last value of its section spans several lines")
            return self._with(at, at, f", {_flow(path[depth:], value)}")
        if depth == 0:
            return self._appended(path, value)
        at = _end(node)
        if at is None:
            raise _refused(path, "the last value of its section spans several lines")
        return self._line_after(at, self._block(path[depth:], value, node.value[0][0].start_mark.column))

    def _appended(self, path: Path, value: str) -> str:
        """A section that the file lacks, at its end."""
        text = self.text if not self.text or self.text.endswith("\n") else self.text + self.newline
        return text + self._block(path, value, 0)

    def _block(self, path: Path, value: str, indent: int) -> str:
        *parents, last = path
        lines = [" " * (indent + 2 * n) + f"{key}:" for n, key in enumerate(parents)]
        lines.append(" " * (indent + 2 * len(parents)) + f"{last}: {value}")
        return "".join(line + self.newline for line in lines)

    def _line_after(self, at: int, block: str) -> str:
        """The text with whole lines after the one that holds `at`, whose comment stays with it."""
        end = self.text.find("\n", at)
        if end < 0:
            return self.text + self.newline + block
        return self._with(end + 1, end + 1, block)

    def _with(self, start: int, end: int, new: str) -> str:
        return self.text[:start] + new + self.text[end:]


def _flow(path: Path, value: str) -> str:
    *parents, last = path
    return "".join(f"{key}: {{" for key in parents) + f"{last}: {value}" + "}" * len(parents)


def _end(node: yaml.Node) -> int | None:
    """Where the text of a node ends; block collections themselves reach to the next token. None for texts of several lines."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return None
    return int(node.end_mark.index)
