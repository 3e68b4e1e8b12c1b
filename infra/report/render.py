"""The report as a file: collect, read the pictures, draw the charts, fill the template."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lodeset.infra.report import charts
from lodeset.infra.report.collect import collect, pictured
from lodeset.infra.report.contents import Calibration, Clusters, Dedup, Report, Scored, Step, Training
from lodeset.infra.report.pictures import Picture, load
from lodeset.infra.report.pruned import Drawn, drawn, report_of, smallest_k
from lodeset.pipeline.dag.stage import Stage, read_as
from lodeset.pipeline.dag.store import Artifact, Store
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.shown import shown
from lodeset.pipeline.specs import Listed

TEMPLATE, PRUNED = "page.html.jinja", "pruned.html.jinja"

# Why rows are dropped, in words. A reason that is not listed here is shown by its name alone.
REASONS = {
    "empty": "files of 0 bytes",
    "not_an_image": "other files; they do not start as any supported image format does",
    "corrupt": "image files that do not decode",
    "too_many_pixels": "above ingest.max_pixels, judged by the header",
    "too_many_bytes": "above ingest.max_bytes",
    "too_long_a_side": "a side longer than ingest.max_side, judged by the header",
    "too_many_decoded_bytes": "would take more memory than ingest.max_decoded_mb, judged by the header",
    "too_many_frames": "animations of more than ingest.max_frames frames",
    "too_slow": "not decoded within ingest.max_seconds",
    "too_much_memory": "not decoded within ingest.worker_memory_gb",
    "killed_decoder": "images that kill the process that decodes them",
    "unsupported_format": "pictures in formats that are not read, or only with `pip install 'lodeset[formats]'` (HEIC, JPEG XL)",
    "location_not_removable": "say where they were taken, in a way that ingest.strip_location cannot remove",
    "unreadable_archive": "parts of a tar, or row groups of a Parquet file, that cannot be read",
    "truncated": "tars that end in the middle of a member; images without their end, with `ingest.truncated: reject`",
    "not_a_file": "links inside a tar, links that lead nowhere, devices and the like",
    "bad_metadata": "a sidecar that cannot be parsed; its image stays",
    "metadata_without_image": "a sidecar whose image is missing",
    "repeated_metadata": "a sidecar in whose place another of the same sample counts",
    "ambiguous_metadata": "a sidecar that shares a part of its name with images and is named after none of them",
    "excluded": "left out by `members` of a source",
    "archive": "zip archives, compressed files and other files of files, which are not unpacked",
    "wrong_image_column": "Parquet files whose images lie in another column, or are not encoded",
    "no_image_column": "Parquet files without a column of images",
    "not_encoded": "Parquet cells with text, paths or numbers in place of an encoded image",
    "exact_duplicate": "further places of the same bytes",
    "forgotten": "taken out by `lodeset forget`",
    "min_side": "shorter side below filter.min_side",
    "max_aspect": "longer side more than filter.max_aspect times the shorter",
    "blank": "luminance deviation of the thumbnail below filter.blank",
    "blur": "sharpness below filter.min_sharpness",
    "blocked_domain": "from a host of filter.blocked_domains, or below one",
    "blocked_url": "from a URL that starts like one of filter.blocked_urls",
    "not_finite": "the embedder gave a vector that is not finite",
    "no_vector": "not among the precomputed vectors",
    "null_vector": "a null or an empty list in place of a precomputed vector",
    "zero_vector": "a precomputed vector of zeros",
    "several_vectors": "different precomputed vectors for one image",
    "near": "near-duplicates of a kept image",
    "reference": "in a reference set, or a copy of an image there",
    "included": "copies of an image that an included set brings itself",
    "not_sampled": "not in the sample that is fitted on; not lost",
    "collision": "found by several queries of the set, counted once",
    "not_drawn": "in a cluster that images are drawn from, beyond what is drawn",
    "capped": "drawn from a matching cluster, beyond the set's limit",
    "several_sets": "wanted by several sets, stored once",
    "no_label": "target images without a label",
    "other_split": "target images in neither gallery nor test",
}

# Curves of metrics.jsonl: (key, label of the y axis).
LOSS_TERMS = (
    ("loss", "total loss"),
    ("dino", "DINO term (image level), nats"),
    ("ibot", "iBOT term (patch level), nats"),
    ("koleo", "KoLeo term (spread)"),
)
SIGNS_OF_COLLAPSE = (
    ("teacher_entropy", "teacher entropy, nats"),
    ("feature_rank", "effective rank of features"),
    ("feature_std", "feature deviation (1 = spread)"),
    ("koleo_distance", "distance to nearest feature"),
)


@dataclass(frozen=True)
class Tile:
    """One figure of the header."""

    value: str
    label: str


def write_report(
    store: Store, stages: Mapping[str, Stage], artifacts: Mapping[str, Artifact], path: Path, title: str
) -> Path:
    """Writes one HTML file that needs nothing else, and returns its path.

    `stages` is the whole graph and `artifacts` what of it is finished, both by stage id; sections without an artifact
    say so. The same store gives the same bytes. Sources that are gone leave placeholders with the reason.

    Raises:
        LodesetError: the store lacks a file that a manifest lists, or `path` cannot be written.
    """
    return save(page_of(store, stages, artifacts, title), path)


def page_of(store: Store, stages: Mapping[str, Stage], artifacts: Mapping[str, Artifact], title: str) -> str:
    """That page.

    Raises:
        LodesetError: the store lacks a file that a manifest lists.
    """
    report = collect(store, stages, artifacts)
    found = load(store, artifacts, pictured(report), _max_pixels(stages))
    return render(report, found, title, [drawn(one, store.read) for one in report.pruned])


def write_pruned(job: Mapping[str, Any], read: Callable[[str], bytes | None], path: Path, title: str) -> Path:
    """A page of one pruning job by itself, of what it reported; `read` gives the bytes of a file that the report names.

    Raises:
        LodesetError: `path` cannot be written.
    """
    template = _environment().get_template(PRUNED)
    return save(template.render(title=title, jobs=[drawn(report_of(job), read)], smallest_k=smallest_k), path)


def save(page: str, path: Path) -> Path:
    """Writes a page, whole or not at all.

    Raises:
        LodesetError: `path` cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise LodesetError(f"the page cannot be written to {path} ({error.strerror}): choose another path") from error
    return path


def harmless(value: Any) -> Any:
    """Text from outside, before it is put into a page: without credentials, and with nothing that turns text around."""
    return shown(value, lines=True) if type(value) is str and not value.startswith("data:") else value


def _environment() -> Environment:
    folder = resources.files("lodeset.infra.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=harmless,
    )
    environment.filters |= {
        "count": _count,
        "compact": _compact,
        "percent": _percent,
        "size": _size,
        "duration": _duration,
        "short": charts.number,
        "date": _date,
        "tree": _tree,
    }
    return environment


def render(report: Report, found: Mapping[str, Picture], title: str, jobs: Sequence[Drawn]) -> str:
    """The page; `found` holds the pictures by image_id, `jobs` are those of pruning."""
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            report=report,
            pictures=found,
            reasons=REASONS | {one.filter: _classifies(one) for one in report.scored if one.filter not in REASONS},
            score_charts=[(one, _score_chart(one)) for one in report.scored],
            tiles=tiles(report),
            flow=flow(report.steps),
            sets=list(dict.fromkeys(step.set for step in report.steps)),
            seen_reasons=list(dict.fromkeys(reason for step in report.steps for reason in step.dropped)),
            ks={one.target: sorted({k for by_k in one.knn.values() for k in by_k}, key=int) for one in report.scores},
            smallest_k=smallest_k,
            calibration_chart=_calibration_chart(report.calibration, report.dedup),
            cluster_chart=_cluster_chart(report.clusters),
            loss_charts=[_curves(one, LOSS_TERMS) for one in report.training],
            collapse_charts=[_curves(one, SIGNS_OF_COLLAPSE) for one in report.training],
            jobs=jobs,
        )
    )


def _max_pixels(stages: Mapping[str, Stage]) -> int:
    found = (read_as(Listed, stage.config).max_pixels for stage in stages.values() if stage.name == "ingest")
    return max((int(limit) for limit in found), default=0) or 1


# -- figures


def flow(steps: Sequence[Step]) -> list[tuple[str, int]]:
    """(what, how many images) of the pool's way into the shards, as far as it went."""
    done = {(step.stage, step.set): step for step in steps if step.finished}
    way = (
        ("ingest", "pool", "files listed", "taken"),
        ("ingest", "pool", "distinct, readable images", "kept"),
        ("embed", "pool", "embedded", "kept"),
        ("filter", "pool", "left by the filter", "kept"),
        ("dedup", "pool", "left by dedup, with the images of included sets", "kept"),
        ("retrieve", "all", "selected", "kept"),
        ("write_shards", "all", "in shards", "kept"),
    )
    return [(what, int(getattr(done[stage, set_], field))) for stage, set_, what, field in way if (stage, set_) in done]


def tiles(report: Report) -> list[Tile]:
    """The header's figures, as far as their stages are finished."""
    found = [
        Tile(_count(n), what) for what, n in flow(report.steps) if what in ("files listed", "distinct, readable images")
    ]
    if report.dedup:
        dropped = report.dedup.dropped
        found.append(Tile(_count(dropped.get("near", 0)), "near-duplicates removed"))
        found.append(Tile(_count(dropped.get("reference", 0)), "leaks removed: images that reference sets hold"))
    if report.shards:
        found.append(Tile(_count(report.shards.images), "images in shards"))
    for scores in report.scores:
        for k, accuracy in list(scores.knn.get("trained", {}).items())[:1]:
            found.append(Tile(_percent(accuracy), f"kNN on {scores.target}, trained (k\u00a0=\u00a0{k})"))
    return found


def _calibration_chart(calibration: Calibration | None, dedup: Dedup | None) -> Markup:
    if calibration is None:
        return Markup("")
    spans = [charts.Span(k.kind, k.low, k.median, k.high, 1 if k.kind == "stranger" else 0) for k in calibration.kinds]
    marks = []
    if dedup is not None:
        marks = [
            charts.Mark("reference threshold", dedup.details.reference_threshold),
            charts.Mark("threshold", dedup.details.threshold),
        ]
    return charts.range_chart(spans, "cosine similarity to the original (10 % to 90 %, median)", marks)


def _classifies(one: Scored) -> str:
    return f"the classifier {one.filter} keeps scores {one.keep} {charts.number(one.threshold)}"


def _score_chart(one: Scored) -> Markup:
    bars = [
        (f"{charts.number(low)}–{charts.number(high)}", float(n))
        for (low, high), n in zip(pairwise(one.edges), one.counts, strict=True)
    ]
    return charts.bar_chart(bars, f"score of {one.filter}", "images", width=max(320, 62 * len(bars)))


def _cluster_chart(clusters: Clusters | None) -> Markup:
    """Clusters by size, in bins that double."""
    if clusters is None or not clusters.sizes:
        return Markup("")
    edges = [1]
    while edges[-1] <= clusters.sizes[0]:
        edges.append(edges[-1] * 2)
    bins = [(low, high - 1, sum(low <= size < high for size in clusters.sizes)) for low, high in pairwise(edges)]
    first = next(n for n, (_, _, count) in enumerate(bins) if count)
    bars = [(f"{low}" if low == high else f"{low}–{high}", float(count)) for low, high, count in bins[first:]]
    return charts.bar_chart(bars, "images in the cluster", "clusters", width=max(320, 70 * len(bars)))


def _curves(training: Training, wanted: Sequence[tuple[str, str]]) -> list[Markup]:
    drawn = []
    for colour, (name, label) in enumerate(wanted):
        points = [(line["step"], line[name]) for line in training.lines if name in line]
        drawn.append(charts.line_chart([charts.Series(label, points, colour)], "step", label))
    return [chart for chart in drawn if chart]


# -- words


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _compact(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return _count(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:,.0f} {unit}" if unit == "bytes" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min {rest} s"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _tree(config: Mapping[str, object]) -> str:
    return json.dumps(dict(config), indent=2, ensure_ascii=False, default=str)
