"""Test what works on this machine, and say what to install for what does not."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lodeset.infra.quiet import others_quiet


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
