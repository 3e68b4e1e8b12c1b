"""The worked example of a report section."""

import re
from pathlib import Path

from extending import extended, run

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import pyarrow as pa
sys.path.append(sys.argv[1])
from report_world import make_world
from lodeset.pipeline.tables import records

world = make_world(Path(sys.argv[2]))
urls = ["http://b.example/x", "http://b.example/y", "https://<i>.example/", None, "http://["]
urls += [f"http://{n}.example/{path}" for n in range(12) for path in range(3)]
rows = [{"image_id": f"{n:032x}", "url": url} for n, url in enumerate(urls)]
made = world.artifacts["ingest/pool"]
said = [pa.Table.from_pylist(some, schema=records.METADATA) for some in (rows[:7], rows[7:])]
world.add("ingest", "pool", {**made.tables, "metadata": said}, made.rows, made.details, made.config)
page = world.write(Path(sys.argv[2]) / "page.html")
section = page[page.index('<section id="hosts">'):]
print(section[:section.index("</section>")])

del world.artifacts["ingest/pool"]
page = world.write(Path(sys.argv[2]) / "page.html")
assert "Not finished: ingest/pool." in page[page.index('<section id="hosts">'):]
"""


def test_a_report_section_is_one_file_and_one_line(tmp_path: Path) -> None:
    """Its figures are those of the table, over several files; text from outside is escaped; without its stage it says so."""
    copy = extended("A report section", tmp_path)
    (tmp_path / "world").mkdir()
    section = run(copy, SCRIPT, str(Path(__file__).parents[1]), str(tmp_path / "world"))
    assert "2 images have no URL" in section
    hosts = re.findall("<bdi>(.*?)</bdi>", section)
    assert len(hosts) == 10 and all(f"{n}.example" in hosts for n in range(10))
    assert '<td class="n">3</td>' in section and "<i>" not in section


GATE_SCRIPT = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
folder = Path(sys.argv[2])
from report_world import make_world
from lodeset.infra import api
from lodeset.pipeline.dag.runs import Wanted, record

world = make_world(folder)
artifacts = {id_: world.store.commit_artifact(one) for id_, one in world.artifacts.items()}
record(world.store, Wanted("lodeset", None, "", {}, tuple(artifacts)), artifacts, {}, 0.0, 1.0)
gate = "{name: trap, measure: largest_cluster, error: '> 50 %'}"
(folder / "c.yaml").write_text(f"store: ./store\\npool: [gone/]\\ngates: [{gate}]\\n")
(result,) = api.gates(api.open_store(folder / "c.yaml")).results
print(result.status, result.value == 5 / 9)
print("`largest_cluster` (share): share of the images" in str(api.schema()))
"""


def test_a_measure_is_one_file_and_one_line(tmp_path: Path) -> None:
    copy = extended("A measure for gates", tmp_path)
    (tmp_path / "world").mkdir()
    assert run(copy, GATE_SCRIPT, str(Path(__file__).parents[1]), str(tmp_path / "world")).split() == [
        "error",
        "True",
        "True",
    ]
