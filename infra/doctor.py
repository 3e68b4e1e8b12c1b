"""Test what works on this machine, and say what to install for what does not."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from fsspec.utils import get_protocol

from lodeset.infra.quiet import others_quiet
from lodeset.pipeline.shown import shown

if TYPE_CHECKING:
    from lodeset.infra.config import Config

NODE_S = 30.0  # for a node of a cluster to answer


@dataclass(frozen=True)
class Check:
    """The result of one test. `needed` says whether lodeset requires it."""

    name: str
    works: bool
    needed: bool
    told: str


def examine() -> list[Check]:
    """Test everything for real: imports, a Beam pipeline, a Ray cluster, a write."""
    checks = [_machine()]
    for module, needed, way_out in (
        ("faiss", True, "pip install 'lodeset[cpu]' (or [gpu])"),
        ("onnxruntime", True, "pip install onnxruntime"),
        ("torch", True, "pip install torch"),
        (
            "transformers",
            False,
            "pip install 'lodeset[hf]', to embed with Hugging Face models or your own exported ones",
        ),
    ):
        checks.append(_tried(module, needed, functools.partial(_version, module), way_out))
    checks.append(_tried("image codecs", True, _codecs, "pip install --upgrade pillow"))
    checks.append(_tried("Apache Beam", True, _beam, "pip install apache-beam"))
    checks.append(_tried("Ray", True, _ray, "pip install 'ray[data,default,train]'"))
    checks.append(
        _tried("GPU", False, _gpu, "none is required; for one, install a CUDA build of torch, and lodeset[gpu]")
    )
    return checks


def examine_setting(config: Config) -> list[Check]:
    """Test what a configuration needs of its surroundings: rights and behavior of the store, clocks, disk, shared memory, and the
    nodes of a Ray cluster that it joins.
    """
    checks = [
        _tried(
            "store", True, functools.partial(_store, config.store), "correct `store:`, its permissions or credentials"
        ),
        _tried("clock", True, functools.partial(_clock, config.store), "synchronize the clocks (NTP)"),
    ]
    if get_protocol(config.store) in ("file", "local"):
        checks.append(_tried("disk", True, functools.partial(_disk, config.store), "free some space, or `lodeset gc`"))
    cluster_ = config.resources.cluster
    if cluster_.address == "local":
        size = int(cluster_.object_store_mb * 2**20)
        checks.append(_tried("shared memory", True, functools.partial(_shared_memory, size), "enlarge /dev/shm"))
    else:
        way = "see docs/guides/cluster.md: the address, the token, and the same versions on every node"
        checks.append(_tried("Ray cluster", True, functools.partial(_nodes, config), way))
    return checks


def _store(url: str) -> str:
    """Write, read, and put the same name twice: the second put must be refused, or two runs may both believe they were first."""
    from lodeset.pipeline.dag.store import Store

    store, name, started = Store(url), f".doctor-{uuid.uuid4().hex}", time.monotonic()
    store.prepare()
    try:
        first, second = store.put_absent(name, b"first"), store.put_absent(name, b"second")
        said = store.read(name)
    finally:
        store.delete(name)
    if not first or second or said != b"first":
        raise RuntimeError(f"a conditional put is not kept: put {first}, put again {second}, read {said!r}")
    return f"{shown(url)}: written, read, conditional put kept, in {1_000 * (time.monotonic() - started):.0f} ms"


def _clock(url: str) -> str:
    from lodeset.pipeline.dag.claims import LEASE_SECONDS, store_clock
    from lodeset.pipeline.dag.store import Store

    store = Store(url)
    before = time.time()
    there = store_clock(store)
    skew = there - (before + time.time()) / 2
    if abs(skew) > LEASE_SECONDS:
        raise RuntimeError(f"the store's clock differs by {skew:+.0f} s from this machine's")
    return f"the store's clock differs by {skew:+.1f} s from this machine's"


def _disk(url: str) -> str:
    from lodeset.pipeline.dag.store import Store

    told = shutil.disk_usage(Store(url).root)
    if told.free < 2**30:
        raise RuntimeError(f"{told.free / 2**30:.2f} of {told.total / 2**30:.0f} GiB are free where the store lies")
    return f"{told.free / 2**30:.0f} of {told.total / 2**30:.0f} GiB are free where the store lies"


def _shared_memory(needed: int) -> str:
    if not Path("/dev/shm").is_dir():
        return "this system has none of its own"
    free = shutil.disk_usage("/dev/shm").free
    if free < needed:
        raise RuntimeError(f"/dev/shm has {free / 2**20:.0f} MiB free, and Ray reserves {needed / 2**20:.0f}")
    return f"/dev/shm has {free / 2**20:.0f} MiB free, Ray reserves {needed / 2**20:.0f}"


def _nodes(config: Config) -> str:
    """Ask every node for its versions, and whether it sees a file that was just put into the store."""
    from lodeset.infra.session import cluster_of
    from lodeset.pipeline.dag.store import Store
    from lodeset.pipeline.engines.ray import cluster, on_every_node

    store, name = Store(config.store), f".doctor-{uuid.uuid4().hex}"
    store.put_absent(name, b"")
    try:
        with cluster(cluster_of(config.resources.cluster), 1) as joined:
            answers = on_every_node(functools.partial(_facts, config.store, name), joined.address, NODE_S)
    finally:
        store.delete(name)
    here = _versions()
    for node, answer in answers.items():
        if answer is None:
            raise RuntimeError(f"node {node} did not answer within {NODE_S:.0f} s")
        versions, sees = answer
        wrong = [f"{name} {versions[name]} instead of {here[name]}" for name in here if versions[name] != here[name]]
        if wrong:
            raise RuntimeError(f"node {node} has {', '.join(wrong)}")
        if not sees:
            raise RuntimeError(f"node {node} does not see the store {shown(config.store)}")
    return f"{len(answers)} nodes answer, have these versions ({', '.join(f'{k} {v}' for k, v in here.items())}) and see the store"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        n: importlib.metadata.version(n) for n in ("ray", "lodeset", "torch")
    }


def _facts(store: str, name: str) -> tuple[dict[str, str], bool]:
    from lodeset.pipeline.dag.store import Store

    return _versions(), Store(store).read(name) is not None


def _tried(name: str, needed: bool, attempt: Callable[[], str], way_out: str) -> Check:
    try:
        with others_quiet():
            return Check(name, True, needed, attempt())
    except Exception as error:
        # Any error is the result of the test.
        return Check(name, False, needed, f"{_short(error)} -> {way_out}")


def _short(error: Exception) -> str:
    """An error in one line; what engines print before the last line is a traceback."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
    return last if isinstance(error, RuntimeError | ImportError) else f"{type(error).__name__}: {last}"


def _machine() -> Check:
    from lodeset.infra.config import Config, cpus_of

    cores = cpus_of(Config(pool="."))
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free
    summary = f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free, {free / 2**30:.0f} GiB disk free here"
    return Check("machine", memory.available > 2 * 2**30 and free > 2**30, True, summary)


def _version(module: str) -> str:
    imported = importlib.import_module(module)
    return str(getattr(imported, "__version__", "installed"))


def _codecs() -> str:
    from PIL import Image, features

    from lodeset.pipeline.algorithms.images.decoding import FORMATS

    Image.init()
    missing = [name for name in FORMATS if name not in Image.OPEN]
    if missing:
        raise RuntimeError(f"this Pillow cannot decode {', '.join(missing)}")
    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "plain libjpeg (slower)"
    return f"Pillow {importlib.metadata.version('pillow')} with {jpeg}: {', '.join(FORMATS)}"


def _beam() -> str:
    import apache_beam as beam

    from lodeset.pipeline.engines.beam import attempted, pipeline, raise_failures

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        with pipeline(2, {}) as p:
            _, failures = attempted(p | beam.Create([mark]), "write", _mark)
            raise_failures(failures)
        if not mark.exists():
            raise RuntimeError("a worker process did nothing")
    took = time.monotonic() - started
    return f"{importlib.metadata.version('apache-beam')}, a pipeline in worker processes in {took:.1f} s"


def _mark(path: Path) -> None:
    path.touch()


def _ray() -> str:
    from lodeset.pipeline.dag.cluster import LOCAL
    from lodeset.pipeline.engines.ray import cluster, map_items

    started = time.monotonic()
    with cluster(LOCAL, 1) as joined:
        if list(map_items(_square, [3], cpus=1, address=joined.address)) != [9]:
            raise RuntimeError("a task returned a wrong answer")
    return f"{importlib.metadata.version('ray')}, a cluster and a task in {time.monotonic() - started:.1f} s"


def _square(x: int) -> int:
    return x * x


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
