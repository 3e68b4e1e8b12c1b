"""A patch of the configuration changes what it says, where it says it, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from lodeset.infra.dashboard.patches import PatchError, edited, extended, patch

KEY = ("dedup", "min_score")

CASES = {
    "comment": ("store: ./runs\ndedup:\n  min_score: 4.0   # copies\n  k: 64\n", "  min_score: 5.2   # copies\n"),
    "quotes": ('dedup: {"min_score": 4, k: 64}  # all\n', 'dedup: {"min_score": 5.2, k: 64}  # all\n'),
    "quoted value": ("dedup:\n  'min_score': '4.0'\n", "  'min_score': 5.2\n"),
    "empty value": ("dedup:\n  min_score:   # none\n  k: 3\n", "  min_score: 5.2   # none\n"),
    "section without it": (
        "dedup:\n    k: 64   # neighbors\n\n# the rest\nshards: {}\n",
        "    k: 64   # neighbors\n    min_score: 5.2\n\n# the rest\n",
    ),
    "after a list": ("dedup:\n  keeper:\n  - area\n  - quality # last\nshards: {}\n", "  - quality # last\n  min_score: 5.2\n"),
    "flow without it": ("dedup: {threshold: auto, keeper: [area]}\n", "dedup: {threshold: auto, keeper: [area], min_score: 5.2}\n"),
    "flow of several lines": ("dedup: {\n  k: 64,\n}\n", "dedup: {\n  k: 64, min_score: 5.2,\n}\n"),
    "empty flow": ("dedup: {}\n", "dedup: {min_score: 5.2}\n"),
    "no value": ("pool: x\ndedup:   # later\n# min_score: 3\nstore: y\n", "dedup:   # later\n  min_score: 5.2\n# min_score: 3\n"),
    "null": ("dedup: null # none\n", "dedup: {min_score: 5.2} # none\n"),
    "no section": ("pool: x\n# dedup: {min_score: 3}\n", "# dedup: {min_score: 3}\ndedup:\n  min_score: 5.2\n"),
    "no last newline": ("pool: x", "pool: x\ndedup:\n  min_score: 5.2\n"),
    "key at the end": ("dedup:\n  min_score: 4", "dedup:\n  min_score: 5.2"),
    "json": ('{"pool": "x"}', '{"pool": "x", dedup: {min_score: 5.2}}'),
    "windows": ("pool: x\r\ndedup:\r\n  k: 3\r\nstore: y\r\n", "  k: 3\r\n  min_score: 5.2\r\nstore: y\r\n"),
    "anchors elsewhere": ("a: &a x\npool: *a\ndedup: {min_score: 4}\n", "dedup: {min_score: 5.2}\n"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "there"), CASES.values(), ids=CASES)
def test_the_smallest_edit_is_made(text: str, there: str) -> None:
    after = edited(text, KEY, 5.2)
    assert there in after
    before, now = yaml.safe_load(text), yaml.safe_load(after)
    assert now["dedup"].pop("min_score") == 5.2
    (before.get("dedup") or {}).pop("min_score", None)
    assert {**before, "dedup": before.get("dedup") or {}} == now
    kept = [line for line in text.split("\n") if "#" in line and "min_score" not in line and "null" not in line]
    assert all(line in after for line in kept)


@pytest.mark.parametrize(("text", "there"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("program", ["patch", "git"])
def test_the_patch_applies(tmp_path: Path, program: str, text: str, there: str) -> None:
    file = tmp_path / "lodeset.yaml"
    file.write_bytes(text.encode())
    (tmp_path / "x.patch").write_bytes(patch(text, "lodeset.yaml", KEY, 5.2).encode())
    command = {"patch": ["patch", "--binary", str(file), "x.patch"], "git": ["git", "apply", "x.patch"]}[program]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=20)
    assert file.read_bytes() == edited(text, KEY, 5.2).encode()


@pytest.mark.parametrize(
    "text",
    [
        "x: &d {min_score: 4}\ndedup: *d\n",
        "dedup: &d\n  min_score: 4\ny: *d\n",
        "x: &v 4\ndedup:\n  min_score: *v\n",
        "x: &d {k: 1}\ndedup:\n  <<: *d\n",
        "dedup: [1, 2]\n",
        "dedup: some text\n",
        "dedup:\n  min_score: [4]\n",
        "dedup:\n  min_score: >\n    4\n",
        "pool: x\n...\n",
    ],
)
def test_what_one_edit_cannot_change_alone_is_refused(text: str) -> None:
    with pytest.raises(PatchError, match=r"--set dedup\.min_score="):
        edited(text, KEY, 5.2)


def test_a_value_that_is_there_needs_no_patch() -> None:
    assert patch("dedup: {min_score: 5.20}\n", "lodeset.yaml", KEY, 5.2) == ""


def test_numbers_are_written_without_exponents() -> None:
    assert edited("dedup: {min_score: 4}\n", KEY, 0.0001) == "dedup: {min_score: 0.0001}\n"
    assert edited("dedup: {phash_distance: 4}\n", ("dedup", "phash_distance"), 2) == "dedup: {phash_distance: 2}\n"


# -- lists

LISTS = {
    "no section": ("pool: x\n", "pool: x\nby_hand:\n  drop: [lists/a.txt]\n"),
    "section without it": ("by_hand:\n  keep: [k.txt]\n", "by_hand:\n  keep: [k.txt]\n  drop: [lists/a.txt]\n"),
    "flow": ("by_hand: {drop: [x.txt]} # mine\n", "by_hand: {drop: [x.txt, lists/a.txt]} # mine\n"),
    "flow with a last comma": ("by_hand:\n  drop: [x.txt, ]\n", "by_hand:\n  drop: [x.txt, lists/a.txt, ]\n"),
    "empty flow": ("by_hand: {drop: []}\n", "by_hand: {drop: [lists/a.txt]}\n"),
    "block": (
        "by_hand:\n  drop:\n  - x.txt  # blurred\n# all\npool: x\n",
        "by_hand:\n  drop:\n  - x.txt  # blurred\n  - lists/a.txt\n# all\npool: x\n",
    ),
    "deeper block": ("by_hand:\n  drop:\n    - x.txt", "by_hand:\n  drop:\n    - x.txt\n    - lists/a.txt\n"),
    "no value": ("by_hand:\n  drop:\n", "by_hand:\n  drop: [lists/a.txt]\n"),
}


@pytest.mark.parametrize(("text", "expected"), LISTS.values(), ids=LISTS)
def test_a_list_gets_one_more_item(text: str, expected: str) -> None:
    assert extended(text, ("by_hand", "drop"), "lists/a.txt") == expected


def test_an_item_can_be_a_section() -> None:
    item = {"name": "birds", "pool_ids": "lists/birds.txt", "retrieve": {"mode": "sample", "k": 4}}
    text = "curated:\n- name: cats\n  uri: cats/\n  retrieve:\n    mode: sample  # four\npool: x\n"
    after = extended(text, ("curated",), item)
    assert yaml.safe_load(after)["curated"][1] == item and after.startswith(text[: text.index("pool")])
    assert yaml.safe_load(extended("pool: x\n", ("curated",), item)) == {"pool": "x", "curated": [item]}


@pytest.mark.parametrize(
    "text",
    [
        "x: &l [a]\nby_hand: {drop: *l}\n",
        "by_hand: {drop: x.txt}\n",
        "by_hand: x\n",
        "by_hand:\n  drop:\n  - >\n   a\n",
    ],
)
def test_a_list_that_one_edit_cannot_extend_is_refused(text: str) -> None:
    with pytest.raises(PatchError, match=r"by_hand"):
        extended(text, ("by_hand", "drop"), "lists/a.txt")
