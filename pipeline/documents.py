"""YAML as people and strangers write it: one way to read it, which ends soon and says where and what is wrong."""

from __future__ import annotations

from typing import IO, Any

import yaml

from lodeset.pipeline.errors import ConfigError
from lodeset.pipeline.shown import shown

MOST_BYTES = 2**20  # a configuration is a few kB
MOST_ENTRIES = (
    100_000  # with every alias counted as what it stands for: a few lines of aliases can stand for 10^9 entries
)
MOST_DEPTH = 64
LARGEST = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """Like yaml.safe_load, but a value that cannot be made is an error with a place, and no key may stand twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            # E.g. `2024-13-45`, `!!int x`, a number of more digits than Python converts.
            problem = f"`{_short(node)}` cannot be understood: quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        if isinstance(value, int) and abs(value) > LARGEST:
            problem = f"`{_short(node)}` is too large a number ({LARGEST} is the largest): quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


def read_text(file: IO[bytes], name: str) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it is too large, or no text in UTF-8.
    """
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{name} is larger than {MOST_BYTES:,} bytes: a configuration has a few thousand; is it one?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no text in UTF-8 (byte {error.start}): save it as UTF-8") from None


def parsed(text: str, name: str) -> Any:
    """What a YAML document says.

    Raises:
        ConfigError: it is not valid, too deep, or stands for too much; `name` and the line say where.
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
    """Refuses what would grow without bound once aliases are followed.

    Raises:
        ConfigError: too many entries, too deep, or an alias within what it stands for.
    """
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in above:
            raise ConfigError(f"{name}: an alias (*name) stands within what it stands for: write it out")
        if depth > MOST_DEPTH:
            raise _too_deep(name)
        above.add(id(node))
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [one for pair in node.value for one in pair]
        total = 1 + sum(size(one, depth + 1) for one in inside)
        above.discard(id(node))
        if total > MOST_ENTRIES:
            raise ConfigError(
                f"{name} stands for more than {MOST_ENTRIES:,} entries once its aliases (*name) are followed: write out "
                "what is meant"
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
            problem = f"`{_short(key)}` stands twice, in lines {seen[key.value]} and {line}: keep one"
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
        return f'{problem}: put quotes around a text that begins with `*`, e.g. "*.tar"'
    if "mapping values are not allowed" in problem:
        return f"{problem}: put quotes around a text that holds `: `, or mend the indentation"
    if "cannot start any token" in problem or "undefined tag" in problem or "not determine a constructor" in problem:
        return f"{problem}: put quotes around a text that begins with a sign such as @ ` % & !"
    return problem
