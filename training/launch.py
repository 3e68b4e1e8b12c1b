"""Start a training run: in this process, or in many processes with Ray Train.

Ray is imported where it is used, because it reads the token of its cluster on import, and
`pipeline.engines.ray.cluster` sets one.
"""

import contextlib
import ctypes
import json
import logging
import os
import platform
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import torch

from lodeset.pipeline.dag.child import last_line
from lodeset.pipeline.engines.ray import SCRATCH, placed
from lodeset.pipeline.errors import LodesetError
from lodeset.training.away import Away, RunFolder, read, workplace
from lodeset.training.checkpoint import newest_step
from lodeset.training.config import TrainingConfig
from lodeset.training.index import Shards
from lodeset.training.loop import SUMMARY, train_loop
from lodeset.training.origin import Origin

# Ray's messages about a lost worker: during training, and before its first step.
LOST_TYPES = (
    "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "RayActorError",
    "ActorDiedError",
    "ActorUnavailableError",
)
# torch's messages about a lost process that another one waited for.
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "DataLoader worker (pid")

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def train_inline(config: TrainingConfig, shards: Shards, folder: Path, origin: Origin | None = None) -> dict[str, Any]:
    """Train in this process on the CPU, with the threads that torch is set to; otherwise as `train_loop`."""
    device = torch.device("cpu")
    return train_loop(config=config, shards=shards, folder=folder, rank=0, world_size=1, device=device, origin=origin)


def launch(
    config: TrainingConfig, shards: Shards, folder: RunFolder, cpus: int, origin: Origin | None = None
) -> dict[str, Any]:
    """Train on Ray Train workers and return the run's summary (see `train_loop`); Ray must be initialized.

    One worker per GPU if Ray has GPUs, otherwise one per CPU core of the budget `cpus`, or `config.workers`. The cores
    are divided evenly: each worker gets that many threads. `folder`, `shards` and `origin` must be reachable from every
    worker: on a file system that all of them mount, or in a remote store.

    Raises:
        LodesetError: `config.workers` exceeds the budget, workers were lost more than `config.max_failures` times in a
            row, or an error that `train_loop` raised on a worker.
    """
    arguments = {
        "config": config.model_dump(mode="json"),
        "shards": shards.model_dump(mode="json"),
        "folder": folder if isinstance(folder, Away) else str(folder.resolve()),
        "origin": origin.model_dump_json() if origin is not None else None,
    }
    restarts = in_a_row = 0
    newest = _newest_step(folder)
    while (lost := _fit(config, arguments, folder, cpus)) is not None:
        before, newest = newest, _newest_step(folder)
        in_a_row = 1 if newest > before else in_a_row + 1
        if in_a_row > config.max_failures:
            raise LodesetError(
                f"training lost a worker {in_a_row} times without a checkpoint in between; the last cause: {lost}: "
                "check the machine's memory and logs, then run again to continue from the newest checkpoint "
                f"(training.max_failures is {config.max_failures})"
            )
        restarts += 1
        log.warning("a training worker was lost (%s): continuing from the newest checkpoint", lost)
    summary = cast(dict[str, Any], json.loads(read(folder, SUMMARY) or b"{}"))
    return summary | {"restarts": restarts}


def _newest_step(folder: RunFolder) -> int:
    return folder.newest_step() if isinstance(folder, Away) else newest_step(folder)


def _fit(config: TrainingConfig, arguments: dict[str, Any], folder: RunFolder, cpus: int) -> str | None:
    """Start as many workers as the cluster can run now; return None when they are done, or how a worker was lost.

    Ray Train's own `FailureConfig` would also restart after errors that only the user can correct.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: dict[str, float] = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), min(cpus, max(1, int(resources.get("CPU", 1))))
    workers = plan_workers(config, cpus, gpus)
    use_gpu = gpus > 0
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads, where = threads_of(workers, cpus, nodes), placed()
    if not isinstance(folder, Away):
        folder.mkdir(parents=True, exist_ok=True)
    with _bookkeeping(folder) as (scratch, file_system):
        backend = "nccl" if use_gpu else "gloo"
        one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
        meeting = {"backend": backend, "file": f"{scratch}/meeting"} if one_machine else None
        scaling: dict[str, Any] = {
            "num_workers": workers,
            "use_gpu": use_gpu,
            "resources_per_worker": {"CPU": threads} | ({"GPU": 1} if use_gpu else {}) | where.get("resources", {}),
            "label_selector": where.get("label_selector"),
        }
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**arguments, "threads": threads, "meeting": meeting, "attempt": uuid.uuid4().hex[:12]},
            torch_config=_met_in_a_file(backend) if one_machine else TorchConfig(backend=backend),
            scaling_config=ray.train.ScalingConfig(**scaling),
            # Checkpoints are the loop's own; Ray only keeps its bookkeeping, which nobody reads afterwards.
            run_config=ray.train.RunConfig(storage_path=scratch, storage_filesystem=file_system, name="train"),
        )
        try:
            with _interrupts_kept():
                trainer.fit()
        except ray.train.WorkerGroupError as error:
            failures = list(error.worker_failures.values())
            causes = [failure for failure in map(_cause, failures) if failure is not None]
            if causes:
                raise causes[0] from None
            lost = next((cause for cause in map(_lost, failures) if cause is not None), None)
            if lost is not None:
                return lost
            first = _root(failures[0])
            raise LodesetError(
                f"training failed on {len(failures)} of {workers} workers: {type(first).__name__}: {last_line(first)}"
            ) from error
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            lost = _lost(error)
            if lost is None:
                raise
            return lost
    return None


@contextlib.contextmanager
def _bookkeeping(folder: RunFolder) -> Iterator[tuple[str, Any]]:
    """Where Ray keeps its bookkeeping, and on which file system (None: the local one).

    That of a local cluster can disappear with it; that of another cluster must be on storage that all nodes see.
    """
    if SCRATCH in os.environ or not isinstance(folder, Away):
        chosen = os.environ.get(SCRATCH) or str(folder)
        with tempfile.TemporaryDirectory(prefix="lodeset-train-", dir=chosen) as scratch:
            yield scratch, None
        return
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    relative = folder.name(f".ray-{uuid.uuid4().hex[:12]}")
    try:
        yield folder.store.path(relative), PyFileSystem(FSSpecHandler(folder.store.fs.driver))
    finally:
        folder.store.delete_folder(relative)


def _met_in_a_file(backend: str) -> Any:
    """Let the workers join one another themselves (see `_meet`): PyTorch's default is a server on all interfaces
    without a secret, which several machines need and a single one does not.
    """
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class NoServer(Backend):
        share_cuda_visible_devices = True  # as in Ray's own backend for PyTorch

    class OneMachine(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return NoServer

    return OneMachine(backend=backend)


@contextlib.contextmanager
def _meet(meeting: dict[str, str] | None, rank: int, size: int) -> Iterator[None]:
    """Join the workers of one machine through a file; does nothing if Ray Train has already joined them."""
    if meeting is None:
        yield
        return
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    torch.distributed.init_process_group(
        meeting["backend"], init_method=f"file://{meeting['file']}", rank=rank, world_size=size
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Restore the handler of SIGINT: Ray's `fit` installs its own and leaves it behind (2.60), after which interrupts
    are ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def plan_workers(config: TrainingConfig, cpus: int, gpus: int) -> int:
    """The number of workers for a budget: the most that divide the batch and get at least two images each, or as
    configured.

    Raises:
        LodesetError: more workers are configured than there are GPUs, or cores if there are no GPUs.
    """
    available = min(gpus, cpus) if gpus else cpus  # a worker on a GPU needs a core, too
    if config.workers is None:
        return max(n for n in range(1, available + 1) if n == 1 or (config.batch % n == 0 and config.batch // n >= 2))
    if config.workers > available:
        kind = "GPUs that have a CPU core" if gpus else "CPU cores"
        raise LodesetError(f"training.workers {config.workers} exceeds the budget of {available} {kind}: lower it")
    return config.workers


def threads_of(workers: int, cpus: int, nodes: Sequence[int]) -> int:
    """Threads of each worker: an even share of the cores, but no more than the nodes (cores of each) can give so many workers."""
    even = max(1, cpus // workers)
    return next((n for n in range(even, 1, -1) if sum(cores // n for cores in nodes) >= workers), 1)


def _worker(arguments: dict[str, Any]) -> None:
    """Train on one worker. Metrics go to metrics.jsonl; ray.train.report would add nothing and block until Ray's
    controller polls (2 s).
    """
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(arguments["threads"])
    cv2.setNumThreads(0)
    _keep_memory()
    context = ray.train.get_context()
    away = arguments["folder"] if isinstance(arguments["folder"], Away) else None
    rank, size = context.get_world_rank(), context.get_world_size()
    try:
        with (
            workplace(arguments["attempt"]) if away is not None else _as_it_is(arguments["folder"]) as folder,
            _meet(arguments["meeting"], rank, size),
        ):
            train_loop(
                config=TrainingConfig.model_validate(arguments["config"]),
                shards=Shards.model_validate(arguments["shards"]),
                folder=folder,
                rank=rank,
                world_size=size,
                device=get_device(),
                origin=Origin.model_validate_json(arguments["origin"]) if arguments["origin"] is not None else None,
                away=away,
            )
    except OSError as error:
        raise LodesetError(
            f"training cannot continue in {error.filename or arguments['folder']}: {error.strerror or error}: free some space or "
            "fix the problem there and run again to continue from the newest checkpoint"
        ) from error


@contextlib.contextmanager
def _as_it_is(folder: str) -> Iterator[Path]:
    yield Path(folder)


def _keep_memory() -> None:
    """Make glibc keep freed memory: a step's activations are as large as the previous ones, and fresh pages cost up to
    5 % of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that glibc accepts


def _lost(failure: BaseException) -> str | None:
    """How a process was lost, if the failure is about that: the failed process itself, or another one that waited for
    it.
    """
    gone = getattr(failure, "health_check_failure", None)  # Ray's attribute for a process that no longer answers
    if gone is not None:
        return f"{type(gone).__name__}: {last_line(gone)}"
    for seen in _chain(failure):
        if type(seen).__name__ in LOST_TYPES or any(sign in str(seen) for sign in LOST):
            return last_line(seen)
    return None


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """An error and the errors inside the wrappers that Ray puts around it."""
    seen: BaseException | None = failure
    while seen is not None:
        yield seen
        seen = getattr(seen, "cause", None) or getattr(seen, "controller_failure", None) or seen.__cause__


def _cause(failure: BaseException) -> LodesetError | None:
    """The error that is meant for the user, if the failure contains one."""
    return next((seen for seen in _chain(failure) if isinstance(seen, LodesetError)), None)


def _root(failure: BaseException) -> BaseException:
    return list(_chain(failure))[-1]
