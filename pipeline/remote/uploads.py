"""Multipart uploads that nobody finished: S3 keeps their parts, and charges for them, until they are aborted.

A driver aborts an upload that fails. One that is killed, or whose abort fails too, leaves it open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lodeset.pipeline.dag.place import Place


@dataclass(frozen=True)
class OpenUpload:
    """One upload that was begun: where its file would be in the place, and when it began."""

    path: str
    upload_id: str
    started: datetime | None


def orphaned_uploads(place: Place) -> list[OpenUpload]:
    """The uploads below a place that are not finished; one that is under way looks the same. None where it is not S3."""
    if place.local or not hasattr(place.fs, "list_multipart_uploads"):
        return []
    bucket, _, prefix = place.root.partition("/")
    start = f"{prefix}/" if prefix else ""
    found = (
        OpenUpload(one["Key"].removeprefix(start), one["UploadId"], one.get("Initiated"))
        for one in _listed(place.fs, bucket, start)
        if one["Key"].startswith(start)
    )
    return sorted(found, key=lambda one: (one.path, one.upload_id))


def abort(place: Place, uploads: Iterable[OpenUpload]) -> None:
    """Ends uploads, with their parts; one that was finished or aborted in between is none any more."""
    bucket, _, prefix = place.root.partition("/")
    for one in uploads:
        try:
            key = f"{prefix}/{one.path}" if prefix else one.path
            place.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=one.upload_id)
        except FileNotFoundError:
            continue


def _listed(fs: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Every page: the driver's own call gives the first 1,000 uploads of the whole bucket."""
    markers: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
