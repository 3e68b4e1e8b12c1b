"""The report of two runs, and the report for terminals."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from commands import asked
from inspected_world import inspected, make
from report_world import World, make_world
from rich.console import Console

from lodeset.infra.dashboard.data import Data, opened
from lodeset.infra.dashboard.difference import CHANGES, difference
from lodeset.infra.looking import looking
from lodeset.infra.report.compared import EXAMPLES
from lodeset.infra.report.render import Beside, page_of
from lodeset.infra.report.section import Contents, Section
from lodeset.infra.report.text import lines_of
from lodeset.infra.session import Opened, open_store
from lodeset.pipeline.errors import LodesetError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Data, Data]]:
    folder = tmp_path_factory.mktemp("two")
    open_, first = inspected(folder)
    _, second = inspected(folder, decided=1)
    with opened(open_.store, first) as before, opened(open_.store, second) as after:
        yield open_, before, after


def printed(lines: list) -> str:
    console = Console(file=io.StringIO(), width=200)
    for line in lines:
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_comparison_has_the_numbers_of_both_runs(runs: tuple[Opened, Data, Data]) -> None:
    open_, before, after = runs
    told = looking.comparison(open_, 1, 2)
    assert (told.number, told.before, told.not_inspected) == (2, 1, ())
    flows = {what: (was, now) for what, was, now in told.flow}
    kept = [data.artifact("dedup/pool") for data in (before, after)]
    assert flows["left after dedup, with the images of included sets"] == tuple(a.rows.kept for a in kept if a)
    differs = difference(before, after)
    assert {one.title: one.images for one in told.changed} == {
        CHANGES[name][0]: n for name, n in differs.counts.items() if n
    }
    rows = {r["image_id"]: r["outcome"] for r in after.rows("SELECT * FROM inspected WHERE set = 'pool'")}
    entered = next(one for one in told.changed if one.title == CHANGES["entered"][0])
    assert len(entered.examples) == EXAMPLES
    assert {rows[image_id] for image_id, _ in entered.examples} == {"in_shard"}
    assert all(told_.endswith("→ in shard") for _, told_ in entered.examples)
    matrix = differs.matrix
    assert all(matrix[was, now] == n and was != now for was, now, n in told.outcomes)


def test_the_page_shows_it_with_pictures(runs: tuple[Opened, Data, Data], tmp_path: Path) -> None:
    open_, _, _ = runs
    plain = looking.report(open_, tmp_path / "plain.html", 2).read_text()
    page = looking.report(open_, tmp_path / "page.html", 2, compare=1).read_text()
    assert "Compared with run 1" in page and "Compared with run 1" not in plain
    assert page.index('id="funnel"') < page.index('id="compared"') < page.index('id="dropped"')
    assert page.count("data:image/jpeg") > plain.count("data:image/jpeg") + EXAMPLES
    assert "<script" not in page and "no ingested set contains it" not in page
    assert len(page) < 5 * 10**6


def test_runs_that_nobody_inspected_are_named(tmp_path: Path) -> None:
    make(tmp_path, 60)
    opened_ = open_store(make(tmp_path, 60, decided=1))
    told = looking.comparison(opened_, 1, 2)
    assert (told.not_inspected, told.changed) == ((1, 2), ())
    assert any(cause.settings for cause in told.causes)
    page = looking.report(opened_, tmp_path / "page.html", 2, compare=1).read_text()
    assert "--run 1 --make-only" in page
    assert "--run 2 --make-only" in printed(looking.report_text(opened_, 2, 1))
    for run, compare in ((2, 2), (None, 2)):
        with pytest.raises(LodesetError, match="compared with itself"):
            looking.comparison(opened_, compare, run)
    with pytest.raises(LodesetError):
        looking.comparison(opened_, 9, 2)


def test_pictures_of_images_that_have_gone_come_from_the_earlier_run(
    runs: tuple[Opened, Data, Data], tmp_path: Path
) -> None:
    open_, before, _ = runs
    report = before.inspected.held
    (gone,) = before.rows("SELECT image_id FROM inspected WHERE set = 'pool' ORDER BY row LIMIT 1")
    section = Section(
        id="gone", title="Gone", collect=lambda finished: Contents(pictures=[gone["image_id"]]),
        template="{% from 'macros.html.jinja' import picture with context %}{{ picture('" + gone["image_id"] + "') }}",
    )  # fmt: skip
    without = {id_: one for id_, one in report.artifacts.items() if one.stage == "write_shards"}
    stages = report.stages({})
    page = page_of(open_.store, stages, without, "t", Beside(section, report.artifacts))
    assert page.count("data:image/jpeg") == 1
    assert page_of(open_.store, stages, without, "t", Beside(section, {})).count("data:image/jpeg") == 0


def test_the_text_has_the_figures_of_the_page(tmp_path: Path) -> None:
    world: World = make_world(tmp_path)
    text = printed(lines_of(world.report()))
    for title in ("Funnel", "Retrieval", "Training", "Accuracy", "Pruning, job 1: entropic"):
        assert re.search(rf"^{title}$", text, re.MULTILINE)
    report = world.report()
    for step in report.steps:
        line = next(line for line in text.splitlines() if line.startswith(f"{step.stage}/{step.set} "))
        for reason, count in step.dropped.items():
            assert f"{reason} {count:,}" in line
    assert re.search(r"flowers +sample, k = 9 +\S+ +10 +8 +1 +1 +0 ", text)
    assert re.search(r"train +1,000 +8 +32,000 +4571.4 +7.0 s +10 +0.01", text)
    assert re.search(r"birds +trained +100 +62.5 %", text)
    assert re.search(r"random +0.1 +40.0 % +800 +30.0 % +20.0 % +1.50", text)


def test_names_from_outside_are_no_markup(tmp_path: Path) -> None:
    report = make_world(tmp_path).report()
    report = replace(report, retrieved=tuple(replace(one, set="[bold]x[/bold][red]") for one in report.retrieved))
    assert "[bold]x[/bold][red]" in printed(lines_of(report))


def test_the_command_prints_tables_or_writes_a_page(runs: tuple[Opened, Data, Data], tmp_path: Path) -> None:
    open_, _, _ = runs
    code, out, _ = asked("report", open_.path, "--text", "--compare", 1, "--run", 2)
    assert code == 0
    assert "Compared with run 1" in out and "entered the selection" in out
    assert asked("report", open_.path, "--text", "--json")[0] == 2
    code, out, _ = asked("report", open_.path, "--compare", 1, "--out", tmp_path / "page.html")
    assert code == 0 and "Compared with run 1" in (tmp_path / "page.html").read_text()
    assert asked("report", open_.path, "--compare", 2, "--out", tmp_path / "other.html")[0] == 1
