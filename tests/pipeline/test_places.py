"""Where a photograph was taken leaves its metadata, however that is spelt and nested; what only sounds so stays."""

import json
from typing import Any

import pytest

from lodeset.pipeline.sources.metadata import fields_of, from_fields
from lodeset.pipeline.sources.places import is_place

PLACES = [
    *(
        "lat",
        "Lat",
        "LATITUDE",
        "gps_lat",
        "gpsLat",
        "GPSLatitude",
        "GPSLatitudeRef",
        "EXIF:GPSLongitude",
        "exif.gps.lat",
    ),
    *(
        "latlng",
        "lat_lng",
        "latLng",
        "LatLon",
        "position_lat",
        "positionLat",
        "user_location",
        "userLocation",
        "Location",
    ),
    *("photo location", "geo", "geo_point", "geoLocation", "GeoTag", "coordinates", "Coord", "start-coords", "lat1"),
    *("lon", "lng", "userLng", "altitude", "gps-altitude", "gpslatitude", "center.longitude", "ｌａｔ"),
]
OTHERS = [
    *("label", "caption", "flat", "plate", "translation", "long_caption", "longest_side", "geometry_type", "geology"),
    *("colon", "latency", "relative", "allocation", "url", "elongation", "salon", "latent"),
]


PLACES += [
    "latitud",
    "Longitude (deg)",
    "postal_code",
    "plusCode",
    "street-address",
    "utm_zone",
    "緯度",
    "photolat",
    "minLon",
    "imglng",
]
OTHERS += ["utm_source", "street", "label_text", "tala"]


@pytest.mark.parametrize("name", PLACES)
def test_places_are_known(name: str) -> None:
    assert is_place(name, 48.2085)


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_stay(name: str) -> None:
    assert not is_place(name, 48.2)


def test_long_is_a_place_where_it_is_a_number() -> None:
    assert is_place("long", 16.4) and is_place("photo_long", "16.4")
    assert not is_place("long", "a long text") and not is_place("is_long", True)


NESTED: list[dict[str, Any]] = [
    {"photo": {"taken": {"at": {"lat": 48.2085, "n": 1}}}},
    {"tags": [{"tag": "GPSLatitude", "value": 48.2085}, {"tag": "Make", "value": "x"}]},
    {"tags": [["lat", 48.2085], ["iso", 100]]},
    {"raw": json.dumps({"user_location": [48.2085], "kept": 1})},
    {"raw": json.dumps([json.dumps({"GPS": "48.2085"})])},
    {"feature": {"type": "Feature", "geometry": {"type": "Point", "coordinates": [16.4, 48.2085]}}},
    {"raw": '\n {"lat": 48.2085}'},
    {"raw": json.dumps(json.dumps({"lat": 48.2085}))},
    {"tags": [{"TagName": "GPSLatitude", "Data": "48.2085"}, {"id": "GPSLongitude", "print": "48.2085 E"}]},
    {"a": [[[{"positionLat": "48.2085"}]]]},
]


@pytest.mark.parametrize("tree", NESTED)
def test_places_are_dropped_at_every_depth(tree: dict[str, Any]) -> None:
    told = from_fields(fields_of(".json", json.dumps({**tree, "caption": "a cat"}).encode()))
    assert told.caption == "a cat"
    assert "48.2085" not in (told.extra or "")


def test_what_says_no_place_is_untouched() -> None:
    tree = {
        "flat": 0.9731,
        "salon": 0.1234,
        "quoted": '"so"',
        "tags": [{"name": "street", "value": 0.9}],
        "list": ["location", "map"],
        "said": '{"a": 1}',
        "broken": "{lat: 1",
        "size": [3, 4],
    }
    assert json.loads(from_fields(fields_of(".json", json.dumps(tree).encode())).extra or "") == tree
