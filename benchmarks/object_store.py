"""A whole run with training and pruning on an object store of which 5 % of the requests fail, against one without faults.

    python benchmarks/object_store.py [FOLDER]

The store is moto's S3 server on the loopback interface, behind a proxy that spoils answers (`tests/fault_proxy.py`).
Three runs of the same small world: on a local store, on S3, and on S3 with faults. Shards, index, models and the tensors
of the last checkpoint are compared by digest. A fourth run, on S3 without the cache of the machine, shows what that
saves. Prints a table.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from buckets import environment, s3_server
from fault_proxy import FaultProxy
from object_stores import RATES, Made, copied_to, placed, run, world

SILENCE_S = 3.0  # instead of 30, so that the table is there today


def main(folder: Path) -> None:
    config = world(folder / "world")
    size = sum(path.stat().st_size for path in (config.parent / "pool").rglob("*") if path.is_file())
    print(f"sources: {size:,} bytes")
    print("| store | seconds | requests | faults | bytes sent | of sources | repeated | same files | same weights |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    local = run(placed(config, "local", "./local"))
    told("local", local, None, local)
    os.environ["LODESET_SILENCE_S"] = str(SILENCE_S)
    with s3_server("bucket") as address:
        copied_to(config, "s3://bucket/world")
        for name, rates, cache_gb in (("S3", {}, 10), ("S3, 5 % fail", RATES, 10), ("S3, no cache", {}, 0)):
            os.environ["LODESET_CACHE_DIR"] = str(folder / f"cache {name}")
            os.environ["LODESET_CACHE_GB"] = str(cache_gb)
            with FaultProxy(address, rates, seed=5, silence_s=2 * SILENCE_S) as proxy:
                with environment(AWS_ENDPOINT_URL=proxy.url):
                    here = f"s3://bucket/{re.sub('[^a-z0-9]+', '-', name.lower())}"
                    made = run(placed(config, "remote", here, "s3://bucket/world"))
                told(name, made, proxy, local)


def told(name: str, made: Made, proxy: FaultProxy | None, local: Made) -> None:
    repeated = re.search(r"slow: (.*waited)", made.told)
    same = (f"{sum(digests[key] == value for key, value in mine.items())} of {len(digests)}" for digests, mine in (
        (local.digests, made.digests), (local.weights, made.weights)))  # fmt: skip
    seen: tuple[object, ...] = ("", "", "", "")
    if proxy is not None:
        of_sources = f"{proxy.sent['bucket/world']:,}"
        seen = (proxy.requests, sum(proxy.faults.values()), f"{proxy.bytes_sent:,}", of_sources)
    print("|", name, "|", round(made.seconds, 1), "|", *(f"{one} |" for one in seen), repeated[1] if repeated else "none", "|",
          *(f"{one} |" for one in same), flush=True)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="lodeset-object-store-") as scratch:
            main(Path(scratch))
