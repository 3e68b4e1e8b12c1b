"""Which fields of metadata say where a photograph was taken: nobody's business downstream, however they are spelt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Words of a name, where it is written_so, soWritten or so-written.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PLACE_WORDS = frozenset(
    [
        "lat",
        "lats",
        "lon",
        "lons",
        "lng",
        "latitude",
        "longitude",
        "altitude",
        "gps",
        "location",
        "locations",
        "coordinate",
        "coordinates",
        "coord",
        "coords",
        "latlng",
        "latlon",
        "latitud",
        "longitud",
        "lattitude",
        "longitute",
        "latdeg",
        "londeg",
        "longdeg",
        "address",
        "postcode",
        "zipcode",
        "sublocation",
        "easting",
        "northing",
        "mgrs",
        "pluscode",
        "what3words",
        "w3w",
    ]
)
# Words of one name that mean a place together.
_PLACE_PAIRS = (
    "postalcode",
    "pluscode",
    "placename",
    "placeid",
    "thegeom",
    "streetaddress",
    "utmx",
    "utmy",
    "utme",
    "utmn",
    "utmzone",
)
# Parts of names that are run together. "exif" holds GPS among others.
_PLACE_PARTS = (
    *(
        "latitude",
        "longitude",
        "longtitude",
        "latlng",
        "latlon",
        "lnglat",
        "lonlat",
        "gps",
        "geotag",
        "geoloc",
        "geopos",
    ),
    *("geopoint", "coordinates", "userlocation"),
)
_PLACE_STARTS = ("geo", "gps", "exif")
_NO_PLACE = ("geometr", "geolog")
# `imglat`, `minlon`: names that are run together, where the value looks like one.
_RUN_TOGETHER = re.compile(r"(?<!f)(?<!p)lat$|(?<!co)(?<!sa)(?<!me)lon$|lng$|^(?:lat|lng)[a-z]$")
_ELSEWHERE = ("緯度", "経度", "纬度", "经度", "широта", "долгота", "위도", "경도")
# {"key": "GPSLatitude", "value": ...}: fields told as pairs.
_KEYS = ("key", "name", "tag", "field", "k", "id", "tagname", "tag_name", "property")
_VALUES = ("value", "val", "values", "v", "data", "text", "raw", "print", "printable")
_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d*)?\s*")


def is_place(name: str, value: Any = None) -> bool:
    """Whether a field says a place by its name. `long` is also a word: it does where the value is a number."""
    plainly = unicodedata.normalize("NFKC", name)
    words = [word.lower() for word in _WORD.findall(plainly)]
    joined = "".join(words)
    if not words:
        return any(part in plainly for part in _ELSEWHERE)
    if joined.startswith(_NO_PLACE):
        return False
    if joined.startswith(_PLACE_STARTS) or any(part in joined for part in _PLACE_PARTS):
        return True
    if not _PLACE_WORDS.isdisjoint((*words, joined)) or joined in _PLACE_PAIRS:
        return True
    return (words[-1] == "long" and _numeric(value)) or (_RUN_TOGETHER.search(joined) is not None and _degrees(value))


def _degrees(value: Any) -> bool:
    """Whether a value is a number with at least four digits behind the point, which places have and scores seldom."""
    told = str(value).strip() if isinstance(value, str | float) else ""
    return _numeric(told) and len(told.partition(".")[2]) >= 4 and abs(float(told)) <= 180


def _numeric(value: Any) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def says_place(value: Any) -> bool:
    """Whether a value is one field told as a pair, such as {"tag": "GPSLatitude", "value": 1.5} or ["lat", 1.5], and that a place."""
    if isinstance(value, list | tuple):
        named = len(value) == 2 and isinstance(value[0], str) and _numeric(value[1])
        return named and is_place(value[0], value[1])
    if not isinstance(value, Mapping):
        return False
    lowered = {str(key).lower(): told for key, told in value.items()}
    name = next((lowered[key] for key in _KEYS if isinstance(lowered.get(key), str)), None)
    values = [lowered[key] for key in _VALUES if key in lowered]
    return name is not None and bool(values) and is_place(name, values[0])
