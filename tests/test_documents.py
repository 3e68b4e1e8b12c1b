"""What the documents show is true: configurations load, commands and options exist, links and paths lead somewhere."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from lodeset.infra.cli.main import app
from lodeset.infra.config import read

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    )
)
FOLDERS = ("pipeline", "training", "pruning", "infra", "docs", "benchmarks", "recipes", "tests", "lodeset")
EXTENDING = "docs/extending.md"  # its examples name what they add; tests of their own apply them
COLUMNS = 120
COMMANDS: Any = typer.main.get_command(app)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def fenced(document: str) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def prose(document: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def inline(document: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(document))]


def configurations() -> list[Any]:
    """Blocks of YAML: whole configurations, or sections of one."""
    return [
        pytest.param(block, id=f"{document}-{number}")
        for document in DOCUMENTS
        if document != EXTENDING
        for number, (language, block) in enumerate(fenced(document))
        if language == "yaml"
    ]


@pytest.mark.parametrize("block", configurations())
def test_a_configuration_that_is_shown_loads(block: str, tmp_path: Path) -> None:
    shown = yaml.safe_load(block)
    file = tmp_path / "lodeset.yaml"
    file.write_text(block if "pool" in shown else f"{block}\npool: [images/]\n")
    assert set(shown) <= read(file).model_fields_set


def command_lines(document: str) -> list[str]:
    """What is typed in blocks of code, without prompts, comments and the output below it."""
    lines = [
        line.removeprefix("$ ") for language, block in fenced(document) if not language for line in block.splitlines()
    ]
    return [line for line in lines if re.match(r"(\.venv/bin/)?lodeset ", line)]


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, e.g. `render kubernetes`, and the words after it."""
    command: Any = COMMANDS
    while words and words[0] in getattr(command, "commands", ()):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_command_lines_that_are_shown_are_understood() -> None:
    tried = 0
    for document in DOCUMENTS:
        for line in command_lines(document):
            command, arguments = resolved(shlex.split(line, comments=True)[1:])
            assert command is not COMMANDS, f"{document}: {line}"
            with command.make_context(command.name, arguments):  # raises UsageError
                tried += 1
    assert tried > 10


def options(command: Any) -> set[str]:
    return {option for one in command.params for option in one.opts} | {"--help"}


def test_commands_in_a_sentence_exist_with_their_options() -> None:
    for document in DOCUMENTS:
        for code in inline(document):
            command, rest = resolved(code.removeprefix("lodeset ").split())
            given = {word.split("=")[0] for word in rest if word.startswith("--")}
            if code.startswith("lodeset ") and rest[:1] not in (["COMMAND"], ["--version"]):
                assert command is not COMMANDS, f"{document}: `{code}`"
            if command is not COMMANDS:
                assert given <= options(command), f"{document}: `{code}`"


def defined(file: Path) -> set[str]:
    """Names at the top of a module."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def module_file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_python_that_is_shown_imports_what_is_there() -> None:
    tried = 0
    for document in DOCUMENTS:
        for language, block in fenced(document):
            if language != "python" or document == EXTENDING:
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lodeset"):
                    file = module_file(node.module or "")
                    assert file.is_file(), f"{document}: {node.module}"
                    assert {alias.name for alias in node.names} <= defined(file), f"{document}: {ast.unparse(node)}"
                    tried += 1
    assert tried


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document: str) -> None:
    here = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" not in target and not target.startswith("#"):
            assert (here / target.partition("#")[0]).exists(), f"link to {target}"
    for code in inline(document) if document != EXTENDING else ():
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+(\.(py|md|yaml|npz|jinja)|/)", code):
            assert (ROOT / code).exists(), f"`{code}`"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_of_code_are_closed(document: str) -> None:
    fences = re.findall(r"^```(\w*)", text_of(document), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2]), fences


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_of_one_width(document: str) -> None:
    text = re.sub(r"^```diff\n.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    wide = [
        line for line in text.splitlines()
        if len(line) > COLUMNS and not line.startswith(("|", "![", "#"))
    ]  # fmt: skip
    assert not wide, wide[0]


def test_the_index_of_decisions_is_complete() -> None:
    index = text_of("docs/decisions/index.md")
    files = sorted(file for file in (ROOT / "docs/decisions").glob("*.md") if file.name != "index.md")
    for number, file in enumerate(files, 1):
        heading, title = file.read_text().splitlines()[0].removeprefix("# ").split(". ", 1)
        assert f"| {heading} | [{title}]({file.name}) |" in index
        assert heading == str(number) and file.name.startswith(f"{number:04}-")
