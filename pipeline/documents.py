"""Read YAML from people and from untrusted sources: it always ends soon and reports what is wrong and where."""

from __future__ import annotations

from typing import IO, Any

import yaml

from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown

MOST_BYTES = 2**20  # a configuration has a few kB
MOST_ENTRIES = 100_000  # counted after expanding aliases: a few lines of aliases can stand for 10^9 entries
MOST_DEPTH = 64
LARGEST = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """Like yaml.safe_load, but a value that cannot be constructed is an error with a position, and duplicate keys are
    refused.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            # For example `2024-13-45`, `!!int x`, or a number with more digits than Python converts.
            problem = f"`{_short(node)}` cannot be understood: quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        if isinstance(value, int) and abs(value) > LARGEST:
            problem = f"`{_short(node)}` is too large a number (the largest is {LARGEST}): quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


def read_text(file: IO[bytes], name: str) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it is too large, or is not UTF-8 text.
    """
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(
            f"{name} is larger than {MOST_BYTES:,} bytes, but a configuration has a few thousand: is it the right file?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def parsed(text: str, name: str) -> Any:
    """The content of a YAML document.

    Raises:
        ConfigError: it is not valid, too deep, or expands to too much; the message contains `name` and the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{name} is not valid YAML{_place(error)}: {_problem(error, text)}") from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ConfigError(f"{name} is not valid YAML: {shown(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise _too_deep(name) from None
    finally:
        if loader is not None:
            loader.dispose()


def _too_deep(name: str) -> ConfigError:
    return ConfigError(f"{name} is not valid YAML for a configuration: it is nested more than {MOST_DEPTH} levels deep")


def _measure(root: yaml.Node, name: str) -> None:
    """Refuse documents that would grow without bound when their aliases are expanded.

    Raises:
        ConfigError: too many entries, too deep, or an alias inside its own anchor.
    """
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in above:
            raise ConfigError(f"{name}: an alias (*name) is inside the value that it refers to: write the value out")
        if depth > MOST_DEPTH:
            raise _too_deep(name)
        above.add(id(node))
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [child for pair in node.value for child in pair]
        total = 1 + sum(size(child, depth + 1) for child in inside)
        above.discard(id(node))
        if total > MOST_ENTRIES:
            raise ConfigError(
                f"{name} has more than {MOST_ENTRIES:,} entries when its aliases (*name) are expanded: write out "
                "what you mean"
            )
        sizes[id(node)] = total
        return total

    size(root, 0)


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            problem = f"the key `{_short(key)}` appears twice, in lines {seen[key.value]} and {line}: keep one of them"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen[key.value] = line


def _short(node: yaml.Node) -> str:
    text = shown(node.value) if isinstance(node, yaml.ScalarNode) else str(node.tag)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text):,} characters)"


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    problem = shown(error.problem or "it cannot be read")
    if problem.startswith("but ") and error.context:
        problem = f"{shown(error.context)}, {problem}"
    mark = error.problem_mark
    before = text[: mark.index] if mark is not None and mark.index is not None else ""
    if "'\\t'" in (error.problem or ""):
        return f"{problem}: indent with spaces, not with tabs"
    if before.endswith("*") or "undefined alias" in problem:
        return f'{problem}: quote a text that starts with `*`, e.g. "*.tar"'
    if "mapping values are not allowed" in problem:
        return f"{problem}: quote a text that contains `: `, or correct the indentation"
    if "cannot start any token" in problem or "undefined tag" in problem or "not determine a constructor" in problem:
        return f"{problem}: quote a text that starts with a sign such as @ ` % & !"
    return problem
