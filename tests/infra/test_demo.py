"""A demo that cannot be judged says so before it runs; how one ends is tested on a whole run (tests/slow)."""

import json
from pathlib import Path

from commands import asked

from lodeset.infra.demo.world import make_world, write_config


def test_a_demo_whose_configuration_lacks_what_is_judged_says_so(tmp_path: Path) -> None:
    make_world(tmp_path, 200)
    config = write_config(tmp_path)
    text = config.read_text()
    config.write_text(text[: text.index("training:")])
    code, out, _ = asked("demo", tmp_path, "--json")
    told = json.loads(out)
    assert code == 2
    assert "no longer makes train/all, prune/all: remove it" in told["error"]
