"""The dataset card of a run: Markdown with the YAML front matter that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from lodeset.infra.card.facts import Facts
from lodeset.infra.card.words import licence_ids, sentence, size_category
from lodeset.infra.report.reasons import REASONS
from lodeset.infra.report.words import size
from lodeset.pipeline.dag.store import File
from lodeset.pipeline.shown import visible

SHARDS_SHOWN = 50
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>()#|~!$&])")


def readme(facts: Facts, base: str) -> bytes:
    """The card; `base` leads from its folder to that of the store (`../../`)."""
    front = yaml.safe_dump(_front(facts, base), sort_keys=False, allow_unicode=True, width=120)
    sections = (
        _summary(facts),
        _composition(facts),
        _dropped(facts),
        _licences(facts),
        _files(facts, base),
        _reading(facts, base),
        _provenance(facts),
    )
    body = "\n".join(line for section in sections for line in (*section, ""))
    return f"---\n{front}---\n\n{body}".encode()


def _front(facts: Facts, base: str) -> dict[str, Any]:
    known = list(licence_ids(facts.licences))
    features = [
        *({"name": extension, "dtype": "image"} for extension in facts.extensions),
        {"name": "json", "dtype": "json"},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]
    return {
        "pretty_name": f"{facts.run.name}, run {facts.run.number}",
        **_licence(facts, known),
        "size_categories": [size_category(facts.images)],
        "tags": ["image", "webdataset", "lodeset"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _patterns(facts, base)}]}],
        # Images of several formats have members of several names, and `datasets` finds the names by itself only where all
        # samples have the same.
        "dataset_info": {"config_name": "default", "features": features},
    }


def _licence(facts: Facts, known: Sequence[str]) -> dict[str, Any]:
    if known:
        return {"license": known[0] if len(known) == 1 else list(known)}
    if not facts.licences.counts:
        return {"license": "unknown"}
    return {"license": "other", "license_name": "several", "license_link": "#licenses"}


def _patterns(facts: Facts, base: str) -> list[str]:
    """The shards as seen from the card. All tars of the run's own folder count; of earlier folders, some."""
    own = f"{facts.folder}/"
    earlier = [f"{base}{file.path}" for file in facts.shards if not file.path.startswith(own)]
    fresh = [f"{base}{own}*.tar"] if any(file.path.startswith(own) for file in facts.shards) else []
    return [*earlier, *fresh]


def _summary(facts: Facts) -> list[str]:
    run = facts.run
    lines = [f"# {text(run.name)}, run {run.number}", "", f"{text(sentence(facts))}."]
    if run.limit is not None:
        lines += ["", f"This is a trial: the pool was a sample of {run.limit:,} files."]
    if run.rolled_back is not None:
        lines += ["", f"This record is a rollback: what run {run.rolled_back.to} made counts again."]
    return lines


def _composition(facts: Facts) -> list[str]:
    if not facts.contributions:
        return ["## Composition", "", "The run has no record of what each set selected."]
    rows = [
        (text(one.set), one.mode, _count(one.own), _count(one.retrieved), f"{one.images:,}")
        for one in facts.contributions
    ]
    lines = [
        "## Composition",
        "",
        *_table(("set", "mode", "images of the set", "hits", "images in the shards"), rows, numbers=3),
    ]
    if facts.shared:
        lines += ["", f"{facts.shared:,} images were selected by several sets and are counted for each of them."]
    return lines


def _dropped(facts: Facts) -> list[str]:
    rows = [
        (step.id, f"{step.taken:,}", f"{step.kept:,}", ", ".join(f"{text(r)} {n:,}" for r, n in step.dropped.items()))
        for step in facts.steps
    ]
    reasons = dict.fromkeys(reason for step in facts.steps for reason in step.dropped)
    explained = [f"- {text(reason)}: {text(REASONS[reason])}" for reason in reasons if reason in REASONS]
    lines = ["## What was dropped, and why", "", *_table(("stage", "in", "kept", "dropped"), rows, numbers=2, first=1)]
    return [*lines, *(["", *explained] if explained else [])]


def _licences(facts: Facts) -> list[str]:
    told = facts.licences
    rows = [(text(licence), f"{count:,}") for licence, count in told.counts]
    if told.others[0]:
        rows.append((f"{told.others[0]:,} further licenses", f"{told.others[1]:,}"))
    rows.append(("none told", f"{told.silent:,}"))
    lines = [
        "## Licenses",
        "",
        "As the sources of the images state them; nobody has verified them.",
        "",
        *_table(("license", "images"), rows, numbers=1),
    ]
    if told.several:
        lines += ["", f"For {told.several:,} images, sources state different licenses; each is counted."]
    return lines


def _files(facts: Facts, base: str) -> list[str]:
    named = ", ".join(f"`{extension}` ({count:,})" for extension, count in facts.extensions.items())
    dead = (
        f" The shards also hold {facts.dead:,} images that do not count: they were dropped or taken out of the selection "
        "after the shards had been written. `index.parquet` does not list them."
        if facts.dead
        else ""
    )
    return [
        "## Files and fields",
        "",
        f"{len(facts.shards):,} {'shard' if len(facts.shards) == 1 else 'shards'} in the WebDataset format, "
        f"{size(facts.size_bytes)}.{dead} Each sample is two members of a tar:",
        "",
        f"- `<image_id>.<extension>`: the encoded image. Images by extension: {named or 'unknown'}.",
        "- `<image_id>.json`: `image_id`, `set`, `width`, `height`, `format`, why the image was `selected` (a list of set, "
        "mode, query and similarity), and, where the source said so, `label`, `caption`, `url`, `licence` and `extra`.",
        "",
        "`image_id` is the first 128 bits of the SHA-256 of the image's bytes, as 32 hexadecimal digits.",
        "",
        f"`{base}{facts.index.path}` lists the images that count: `image_id`, `shard` (relative to the folder of the "
        "index), `offset` and `size_bytes` (of the image in the tar). `croissant.json` describes all of this for programs.",
    ]


def _reading(facts: Facts, base: str) -> list[str]:
    keys = ";".join(facts.extensions) or "jpg"
    return [
        "## Reading",
        "",
        "From the folder of this card, with webdataset:",
        "",
        "```python",
        "import pyarrow.parquet as pq",
        "import webdataset as wds",
        "",
        f'folder = "{base}{facts.folder}/"',
        'index = pq.read_table(folder + "index.parquet")',
        'urls = sorted({folder + shard for shard in index["shard"].to_pylist()})',
        'counting = set(index["image_id"].to_pylist())',
        'samples = wds.WebDataset(urls, shardshuffle=False).select(lambda sample: sample["__key__"] in counting)',
        f'for image, told in samples.decode("pil").to_tuple("{keys}", "json"):',
        '    print(told["image_id"], image.size)',
        "```",
        "",
        "or with datasets, which reads everything that the shards hold:",
        "",
        "```python",
        "import os",
        "",
        "from datasets import load_dataset",
        "",
        'images = load_dataset(os.getcwd(), split="train")',
        "```",
    ]


def _provenance(facts: Facts) -> list[str]:
    run = facts.run
    versions = [(name, text(version)) for name, version in run.versions.items()]
    shards = [(f"`{file.path}`", f"`{file.sha256}`") for file in facts.shards[:SHARDS_SHOWN]]
    lines = [
        "## Provenance",
        "",
        f"- run: {run.number}" + (f" (after run {run.before})" if run.before is not None else ""),
        f"- began: {_date(run.began)}",
        f"- ended: {_date(run.ended)}",
        f"- index: SHA-256 `{facts.index.sha256}`",
        f"- shards: SHA-256 `{digest_of(facts.shards)}` of the list of their SHA-256",
        "",
        *_table(("made with", "version"), versions),
        "",
        *_table(("shard", "SHA-256"), shards),
    ]
    if len(facts.shards) > SHARDS_SHOWN:
        lines += ["", f"`croissant.json` has the digests of all {len(facts.shards):,} shards."]
    config = yaml.safe_dump(dict(facts.config), sort_keys=False, allow_unicode=True, width=120)
    fence = "`" * max(3, 1 + max((len(run_) for run_ in re.findall("`+", config)), default=0))
    return [
        *lines,
        "",
        "The configuration, without credentials, places and resources:",
        "",
        f"{fence}yaml",
        *visible(config, lines=True).splitlines(),
        fence,
    ]


def digest_of(shards: Iterable[File]) -> str:
    """The SHA-256 of the digests of all shards, a line each, in the order of the run."""
    return hashlib.sha256("".join(f"{file.sha256}\n" for file in shards).encode()).hexdigest()


# -- Markdown


def text(value: str) -> str:
    """Text from outside, on one line and without a meaning in Markdown or HTML."""
    return _ACTIVE.sub(r"\\\1", visible(value))


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0, first: int | None = None
) -> Iterator[str]:
    """A table whose `numbers` columns (from `first` on; by default the last ones) are aligned to the right."""
    start = len(head) - numbers if first is None else first
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---:' if start <= n < start + numbers else '---' for n in range(len(head)))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
