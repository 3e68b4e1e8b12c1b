"""A Grafana board on the metrics of lodeset, as JSON to import."""

from __future__ import annotations

from typing import Any

# Title, PromQL, unit of Grafana, width of 24. The first are made from the store, the last exported by Ray's nodes.
PANELS = (
    ("State", "lodeset_run_state == 1", "none", 6),
    ("Makes progress", "lodeset_run_moving", "bool_yes_no", 6),
    ("Last news", "lodeset_run_heard_seconds", "s", 6),
    ("Time since the last finished run", "time() - lodeset_run_finished_timestamp_seconds", "s", 6),
    ("Running stages", "lodeset_stage_fraction", "percentunit", 12),
    ("Without progress for", "lodeset_stage_still_seconds", "s", 12),
    ("Rows of the last run by outcome", "sum by (stage, outcome) (lodeset_rows)", "short", 12),
    ("Seconds of the last run by stage", "lodeset_stage_seconds", "s", 12),
    ("Images in shards", "lodeset_images", "short", 12),
    ("Bytes that no longer count", "lodeset_dead_bytes", "bytes", 12),
    ("Units per second", "sum by (stage, unit) (rate(ray_lodeset_units_total[5m]))", "short", 12),
    ("Parts per minute", "60 * sum by (stage) (rate(ray_lodeset_parts_total[5m]))", "short", 12),
)


def board() -> dict[str, Any]:
    """The board: a panel each, in rows of 24 columns, for one data set chosen at the top."""
    panels, x, y = [], 0, 0
    for number, (title, query, unit, width) in enumerate(PANELS, start=1):
        if x + width > 24:
            x, y = 0, y + 8
        panels.append(
            {
                "id": number,
                "type": "stat" if width == 6 else "timeseries",
                "title": title,
                "datasource": {"type": "prometheus", "uid": "${source}"},
                "gridPos": {"x": x, "y": y, "w": width, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "targets": [
                    {
                        "refId": "A",
                        "expr": _of_set(query),
                        "legendFormat": "{{state}}" if title == "State" else "__auto",
                    }
                ],
                "options": {"textMode": "name"} if title == "State" else {},
            }
        )
        x += width
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    data_set = {
        "name": "data_set",
        "type": "query",
        "label": "Data set",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": "label_values(lodeset_run_state, data_set)",
        "refresh": 2,
    }
    return {
        "title": "lodeset",
        "uid": "lodeset",
        "schemaVersion": 39,
        "time": {"from": "now-7d", "to": "now"},
        "refresh": "1m",
        "templating": {"list": [source, data_set]},
        "panels": panels,
    }


def _of_set(query: str) -> str:
    """The query for the chosen data set; Ray's own metrics do not know it."""
    for name in ("run_state", "run_moving", "run_heard_seconds", "run_finished_timestamp_seconds", "stage_fraction",
                 "stage_still_seconds", "rows", "stage_seconds", "images", "dead_bytes"):  # fmt: skip
        query = query.replace(f"lodeset_{name}", f'lodeset_{name}{{data_set="$data_set"}}')
    return query
