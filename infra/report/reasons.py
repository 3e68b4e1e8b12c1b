"""Why rows are dropped, in words."""

from __future__ import annotations

from collections.abc import Mapping

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Report, Scored

# A reason that is not listed here is shown by its name alone.
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
    "unreadable_archive": "archives, or parts of them, row groups of a Parquet file, or rows of a list that cannot be read",
    "truncated": "tars that end in the middle of a member; images without their end, with `ingest.truncated: reject`",
    "not_a_file": "links inside an archive, links and paths that lead nowhere or out of their folder, devices and the like",
    "bad_metadata": "a sidecar that cannot be parsed; its image stays",
    "metadata_without_image": "a sidecar whose image is missing",
    "repeated_metadata": "a sidecar in whose place another of the same sample counts",
    "ambiguous_metadata": "a sidecar that shares a part of its name with images and is named after none of them",
    "excluded": "left out by `members` of a source",
    "archive": "archives within archives, compressed files and other files of files, which are not unpacked",
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


def explained(report: Report) -> Mapping[str, str]:
    """`REASONS`, and the names of the classifiers that filter."""
    return REASONS | {one.filter: _classifies(one) for one in report.scored if one.filter not in REASONS}


def _classifies(one: Scored) -> str:
    return f"the classifier {one.filter} keeps scores {one.keep} {charts.number(one.threshold)}"
