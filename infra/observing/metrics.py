"""The state and the totals of a data set in Prometheus' text format, from its store.

A batch job ends between two scrapes. What the store holds stays: the output is made for node_exporter's textfile collector, or for
a push. Labels are names of stages, sets and reasons, never image_ids, paths or runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lodeset.infra.looking.now import Now
from lodeset.infra.looking.summary import Summary
from lodeset.pipeline.dag.manifests import Run

STATES = ("never run", "running", "silent", "killed", "failed", "stopped", "done")
Sample = tuple[Mapping[str, str], float]


def exposition(name: str, now: Now, summary: Summary, stages: Iterable[Mapping[str, Any]], run: Run | None) -> str:
    """Every metric of a data set, with its help and type (Prometheus text format 0.0.4)."""
    own = {"data_set": name}
    entries = [entry for entry in stages if entry["finished"]]
    rows: list[Sample] = []
    for entry in entries:
        of = {**own, "stage": entry["stage"], "set": entry["set"]}
        rows.append(({**of, "outcome": "kept"}, entry["rows"]["kept"]))
        rows += [({**of, "outcome": reason}, count) for reason, count in entry["rows"]["dropped"].items()]
    at_work = [stage for stage in now.stages if stage.state == "running"]

    def of_stage(id_: str) -> dict[str, str]:
        return {**own, "stage": id_.partition("/")[0], "set": id_.partition("/")[2]}

    metrics: list[tuple[str, str, list[Sample]]] = [
        ("run_state", "1 for the state of the last attempt to run, 0 for the others.",
         [({**own, "state": state}, float(now.state == state)) for state in STATES]),
        ("run_moving", "Whether the run makes progress; absent if nobody can tell.",
         [] if now.moving is None else [(own, float(now.moving))]),
        ("run_heard_seconds", "Seconds since the last news of the attempt.", [] if now.heard is None else [(own, now.heard)]),
        ("run_exit_code", "Exit code of the last attempt.", [] if now.exit_code is None else [(own, now.exit_code)]),
        ("stage_fraction", "How far a running stage is, 0 to 1.", [(of_stage(s.id), s.fraction) for s in at_work]),
        ("stage_still_seconds", "Seconds since a running stage last made progress.", [(of_stage(s.id), s.still_for) for s in at_work]),
        ("stage_parts_done", "Committed parts of a running stage.",
         [(of_stage(s.id), s.parts_done) for s in at_work if s.parts_done is not None]),
        ("rows", "Rows of the last finished run by stage, set and outcome: kept, or the reason why they were dropped.", rows),
        ("stage_seconds", "Seconds that each stage of the last finished run took.",
         [(of_stage(f"{e['stage']}/{e['set']}"), e["seconds"]) for e in entries]),
        ("run_number", "Number of the last finished run.", [] if run is None else [(own, run.number)]),
        ("run_finished_timestamp_seconds", "When the last finished run ended.", [] if run is None else [(own, run.ended)]),
        ("images", "Images that count in the shards.", [] if summary.images is None else [(own, summary.images)]),
        ("dead_bytes", "Bytes of images in shards that no longer count.", [(own, summary.dead_bytes)]),
    ]  # fmt: skip
    lines = []
    for metric, help_, samples in metrics:
        if samples:
            lines += [f"# HELP lodeset_{metric} {help_}", f"# TYPE lodeset_{metric} gauge"]
            lines += [f"lodeset_{metric}{{{_labels(labels)}}} {float(value)!r}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return re.sub(r'["\\\n]', lambda match: {"\n": r"\n"}.get(match[0], "\\" + match[0]), value)
