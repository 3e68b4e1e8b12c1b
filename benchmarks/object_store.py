"""A whole run with training and pruning on an object store of which 5 % of the requests fail, against one without faults.

    python benchmarks/object_store.py [--reads] [FOLDER]

The store is moto's S3 server on the loopback interface, behind a proxy that spoils answers (`tests/fault_proxy.py`).
Three runs of the same small world: on a local store, on S3, and on S3 with faults. Shards, index, models and the tensors
of the last checkpoint are compared by digest. Prints a table. With `--reads`, prints instead how many bytes of a remote
source leave the server when it is read three times, as ingest, embed and write_shards do, with and without the cache of
the machine.
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

from lodeset.pipeline.config import Source
from lodeset.pipeline.sources.containers import LOOSE
from lodeset.pipeline.sources.listing import SourceFile, expand
from lodeset.pipeline.sources.reading import read_slice
from lodeset.pipeline.sources.slices import Slice, cut, members_of, split_loose

SILENCE_S = 3.0  # instead of 30, so that the table is there today


def main(folder: Path) -> None:
    config = world(folder / "world", recover=True)
    size = sum(path.stat().st_size for path in (config.parent / "pool").rglob("*") if path.is_file())
    print(f"sources: {size:,} bytes")
    print("| store | seconds | requests | faults | bytes sent | of sources | repeated | same files | same weights |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    local = run(placed(config, "local", "./local"))
    told("local", local, None, local)
    os.environ["LODESET_SILENCE_S"] = str(SILENCE_S)
    with s3_server("bucket") as address:
        copied_to(config, "s3://bucket/world")
        for name, rates in (("S3", {}), ("S3, 5 % fail", RATES)):
            os.environ["LODESET_CACHE_DIR"] = str(folder / f"cache {name}")
            with FaultProxy(address, rates, seed=5, silence_s=2 * SILENCE_S) as proxy:
                with environment(AWS_ENDPOINT_URL=proxy.url):
                    here = f"s3://bucket/{re.sub('[^a-z0-9]+', '-', name.lower())}"
                    made = run(placed(config, "remote", here, "s3://bucket/world"))
                told(name, made, proxy, local)


def reads(folder: Path) -> None:
    config = world(folder / "world", recover=True)
    with s3_server("bucket") as address:
        copied_to(config, "s3://bucket/world")
        print("| source | cache | bytes of the source | requests | bytes sent |")
        print("| --- | --- | --- | --- | --- |")
        for source in ("pool/*.tar", "pool/loose"):
            for cache_gb in ("0", "10"):
                os.environ |= {"LODESET_CACHE_GB": cache_gb, "LODESET_CACHE_DIR": str(folder / f"cache {cache_gb}")}
                with FaultProxy(address, {}) as proxy, environment(AWS_ENDPOINT_URL=proxy.url):
                    files = expand([Source(uri=f"s3://bucket/world/{source}")], "pool")
                    before = proxy.requests
                    for _ in range(3):
                        for piece in pieces(files):
                            for _ in read_slice(piece, 10**9):
                                pass
                    size = sum(file.size_bytes for file in files)
                    seen = f"{proxy.requests - before} | {proxy.sent['bucket/world']:,}"
                    print(f"| {source} | {cache_gb} GiB | {size:,} | {seen} |", flush=True)


def pieces(files: list[SourceFile]) -> list[Slice]:
    packed = [one for file in files if file.kind != LOOSE for one in cut(file, members_of(file), 2**20)]
    return packed + split_loose([file for file in files if file.kind == LOOSE], 2**20)


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
    work, folders = (reads if "--reads" in sys.argv else main), [one for one in sys.argv[1:] if one != "--reads"]
    if folders:
        work(Path(folders[0]))
    else:
        with tempfile.TemporaryDirectory(prefix="lodeset-object-store-") as scratch:
            work(Path(scratch))
