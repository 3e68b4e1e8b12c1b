"""The reasons for which rows are dropped, explained."""

from __future__ import annotations

from collections.abc import Mapping

from lodeset.infra.report import charts
from lodeset.infra.report.contents import Report, Scored

# A reason that is not listed here is shown only by its name.
REASONS = {
    "empty": "files of 0 bytes",
    "not_an_image": "other files that do not start like any supported image format",
    "corrupt": "image files that do not decode",
    "too_many_pixels": "above ingest.max_pixels, according to the header",
    "too_many_bytes": "above ingest.max_bytes",
    "too_long_a_side": "a side longer than ingest.max_side, according to the header",
    "too_many_decoded_bytes": "would take more memory than ingest.max_decoded_mb, according to the header",
    "too_many_frames": "animations of more than ingest.max_frames frames",
    "too_slow": "could not be decoded within ingest.max_seconds",
    "too_much_memory": "could not be decoded within ingest.worker_memory_gb",
    "killed_decoder": "images that kill the process that decodes them",
    "unsupported_format": "formats that are not read, or only with `pip install 'lodeset[formats]'` (HEIC, JPEG XL)",
    "location_not_removable": "contain a location that ingest.strip_location cannot remove",
    "unreadable_archive": "archives or parts of them, row groups of a Parquet file, or rows of a list that cannot be "
    "read",
    "truncated": "tars that end in the middle of a member; images without their end, with `ingest.truncated: reject`",
    "not_a_file": "links inside an archive, links and paths that lead nowhere or out of their folder, devices and "
    "the like",
    "bad_metadata": "a sidecar that cannot be parsed; its image stays",
    "metadata_without_image": "a sidecar whose image is missing",
    "repeated_metadata": "a sidecar that another one of the same sample replaces",
    "ambiguous_metadata": "a sidecar that shares a part of its name with images but has the name of none of them",
    "excluded": "left out by `members` of a source",
    "archive": "archives within archives, compressed files and other containers that are not unpacked",
    "wrong_image_column": "Parquet files or lists whose images are in another column, or are not encoded",
    "no_image_column": "Parquet files or lists without a column of images",
    "not_encoded": "Parquet cells with text, paths or numbers instead of an encoded image",
    "exact_duplicate": "further locations of the same bytes",
    "forgotten": "taken out by `lodeset forget`",
    "by_hand": "named by a list of by_hand.drop",
    "min_side": "shorter side below filter.min_side",
    "max_aspect": "longer side more than filter.max_aspect times the shorter",
    "blank": "luminance deviation of the thumbnail below filter.blank",
    "blur": "sharpness below filter.min_sharpness",
    "blocked_domain": "from a host of filter.blocked_domains, or a subdomain",
    "blocked_url": "from a URL that starts with one of filter.blocked_urls",
    "not_finite": "the embedder returned a vector that is not finite",
    "no_vector": "not among the precomputed vectors",
    "null_vector": "a null or an empty list instead of a precomputed vector",
    "zero_vector": "a precomputed vector of zeros",
    "several_vectors": "different precomputed vectors for one image",
    "near": "near-duplicates of a kept image",
    "semantic": "mean the same as another image of their cluster (dedup.semantic)",
    "reference": "in a reference set, or a copy of an image there",
    "included": "copies of an image of an included set",
    "not_sampled": "not in the sample for the fit; not lost",
    "collision": "found by several queries of the set, counted once",
    "not_drawn": "in a matching cluster, but not drawn from it",
    "capped": "drawn from a matching cluster, but above the set's limit",
    "several_sets": "selected by several sets, stored once",
    "no_label": "target images without a label",
    "other_split": "target images in neither gallery nor test",
}


def explained(report: Report) -> Mapping[str, str]:
    """`REASONS`, and the names of the classifiers that filter."""
    return REASONS | {scored.filter: _classifies(scored) for scored in report.scored if scored.filter not in REASONS}


def _classifies(scored: Scored) -> str:
    return f"the classifier {scored.filter} keeps scores {scored.keep} {charts.number(scored.threshold)}"
