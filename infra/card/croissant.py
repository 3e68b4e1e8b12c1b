"""The Croissant file of a run (version 1.1): its files with their digests, and what records they hold."""

from __future__ import annotations

import json
import time
from typing import Any

from lodeset.infra.card.facts import Facts
from lodeset.infra.card.words import licence_ids, sentence

VERSION = "http://mlcommons.org/croissant/1.1"
# The specification's own context (mlcroissant 1.1.1 warns of every other one).
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_INDEX = {
    "image_id": ("sc:Text", "first 128 bits of the SHA-256 of the image's bytes, 32 hexadecimal digits"),
    "shard": ("sc:Text", "the tar that holds the image, relative to the folder of the index"),
    "offset": ("sc:Integer", "where the image's bytes start in the tar"),
    "size_bytes": ("sc:Integer", "number of these bytes"),
}
_JSON = "JSON: width, height, format, why the image was selected, and what its source said (label, caption, url, licence, extra)"
_FROM_NAME = {"extract": {"fileProperty": "filename"}, "transform": {"regex": "^([0-9a-f]{32})"}}


def croissant(facts: Facts, base: str) -> bytes:
    """The file; `base` leads from its folder to that of the store (`../../`)."""
    tree = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": facts.run.name,
        "description": sentence(facts),
        "url": "README.md",
        "version": f"{facts.run.number}.0.0",
        "datePublished": time.strftime("%Y-%m-%d", time.gmtime(facts.run.ended)),
        "license": _licences(facts),
        "distribution": _distribution(facts, base),
        "recordSet": [
            _records("images", "image-files", "the images of the shards", ("image", "sc:ImageObject", "the image")),
            _records(
                "descriptions",
                "json-files",
                "what is known of each image of the shards, by the same image_id",
                ("json", "sc:Text", _JSON),
            ),
            _index(),
        ],
    }
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def _licences(facts: Facts) -> list[str]:
    known = licence_ids(facts.licences)
    if known:
        return [f"https://spdx.org/licenses/{spdx}.html" for spdx in known.values()]
    told = [licence for licence, _ in facts.licences.counts]
    return [*told, *(["unknown"] if facts.licences.silent or not told else [])]


def _distribution(facts: Facts, base: str) -> list[dict[str, Any]]:
    tars = [
        {
            "@type": "cr:FileObject",
            "@id": file.path,
            "name": file.path,
            "description": f"{file.rows:,} images" if file.rows else "images",
            "contentUrl": f"{base}{file.path}",
            "contentSize": f"{file.size_bytes} B",
            "encodingFormat": "application/x-tar",
            "sha256": file.sha256,
        }
        for file in facts.shards
    ]
    index = {
        "@type": "cr:FileObject",
        "@id": "index.parquet",
        "name": "index.parquet",
        "description": "which images count, and where they lie",
        "contentUrl": f"{base}{facts.index.path}",
        "contentSize": f"{facts.index.size_bytes} B",
        "encodingFormat": "application/x-parquet",
        "sha256": facts.index.sha256,
    }
    within = [{"@id": file.path} for file in facts.shards]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": id_,
            "name": id_,
            "description": description,
            "containedIn": within,
            "encodingFormat": formats,
            "includes": patterns,
        }
        for id_, description, formats, patterns in (
            ("image-files", "the images, as their sources had them", _image_formats(facts), _patterns(facts)),
            ("json-files", "what is known of each image", "application/json", "*.json"),
        )
    ]
    return [index, *tars, *sets]


_MIME = {"jpg": "jpeg", "tif": "tiff", "ppm": "x-portable-pixmap"}


def _image_formats(facts: Facts) -> list[str]:
    return [f"image/{_MIME.get(extension, extension)}" for extension in facts.extensions]


def _patterns(facts: Facts) -> list[str]:
    return [f"*.{extension}" for extension in facts.extensions]


def _records(id_: str, files: str, description: str, content: tuple[str, str, str]) -> dict[str, Any]:
    """The members of one kind; an image and its JSON have the same `image_id`. It is no formal reference: mlcroissant 1.1.1
    cannot join what it reads from several tars."""
    name, kind, of = content
    key = _field(f"{id_}/image_id", "sc:Text", _INDEX["image_id"][1], {"fileSet": {"@id": files}, **_FROM_NAME})
    source = {"fileSet": {"@id": files}, "extract": {"fileProperty": "content"}}
    return {
        "@type": "cr:RecordSet",
        "@id": id_,
        "name": id_,
        "description": description,
        "key": {"@id": f"{id_}/image_id"},
        "field": [key, _field(f"{id_}/{name}", kind, of, source)],
    }


def _index() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "index",
        "name": "index",
        "description": "the images that count, in the order of the shards",
        "key": {"@id": "index/image_id"},
        "field": [
            _field(
                f"index/{column}",
                kind,
                description,
                {"fileObject": {"@id": "index.parquet"}, "extract": {"column": column}},
            )
            for column, (kind, description) in _INDEX.items()
        ],
    }


def _field(id_: str, kind: str, description: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": id_,
        "name": id_,
        "description": description,
        "dataType": kind,
        "source": source,
    }
