"""Ray: one local cluster per run (or an existing cluster), one job per stage.

A job's actors, tasks and objects end with its driver, so nothing of a stage reaches the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import cloudpickle
import psutil

from lodeset.pipeline import children
from lodeset.pipeline.children import import_path
from lodeset.pipeline.dag.background import repeating
from lodeset.pipeline.dag.child import (
    ENVIRONMENT,
    LOST_RAY,
    NO_ROOM,
    RAY_OPTIONS,
    ray_on_demand,
    reported_to,
    waits_for,
)
from lodeset.pipeline.dag.cluster import ON_DEMAND, Cluster, Joined
from lodeset.pipeline.dag.stage import Progress
from lodeset.pipeline.engines.failures import caught, unwrapped
from lodeset.pipeline.engines.room import lacks, share_of
from lodeset.pipeline.errors import LodesetError
from lodeset.pipeline.remote.settings import environment

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def cluster(wanted: Cluster, cpus: int) -> Iterator[Joined]:
    """A Ray cluster that lives as long as the block: a local one of `cpus` cores, or the one that there is.

    The local cluster is a process of its own (`python -m lodeset.pipeline.engines.ray`), which ends when its standard
    input does. It listens only on the loopback interface, and only processes that inherit its token can use it.

    Raises:
        LodesetError: the local cluster did not start, or no cluster answers.
    """
    if not wanted.local:
        yield Joined(wanted.address, _cores_of(wanted))
        return
    _clear_abandoned()
    # Ray puts Unix sockets here, whose paths are limited to 107 characters. Only this user can enter the folder (0700).
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())
    # This process and the host hold the lock together: a folder whose lock is free is abandoned.
    lock = os.open(os.path.join(folder, _LOCK), os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    chosen = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        # Despite its name: with 0, Ray uses 127.0.0.1 for its node (2.60) and binds only to loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        SCRATCH: folder,
    }
    before = {name: os.environ.get(name) for name in (*chosen, _HOST)}
    os.environ.update(chosen)
    log = os.path.join(folder, "host.log")
    with open(log, "wb") as errors:
        host = children.started(
            "pipeline.engines.ray",
            "host",
            str(cpus),
            folder,
            str(wanted.object_store_bytes),
            environment={**ENVIRONMENT, **_NO_METRICS},
            pass_fds=[lock],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert host.stdout is not None
    try:
        started = children.started_at(host.pid)
        cluster_address = _address_of(host, log)
        os.environ[_HOST] = f"{host.pid} {started}"
        yield Joined(cluster_address, cpus, {name: os.environ[name] for name in before})
    finally:
        children.let_go(host)
        with contextlib.suppress(subprocess.TimeoutExpired):
            host.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(host.pid, signal.SIGKILL)
        host.wait()
        host.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# Ray's metrics ports require no token (2.60). A port of -1 cannot be bound, which its servers log and tolerate.
_NO_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
# The folder of the local cluster, for data that a stage need not keep; it is removed with the cluster however the run
# ends.
SCRATCH = "LODESET_SCRATCH"
# The process that hosts the local cluster, and its start time.
_HOST = "LODESET_RAY_HOST"
_PREFIX, _LOCK = "lodeset-ray-", "lock"
_START_S, _JOIN_S = 120.0, 40.0
# How long a process may take to notice by itself that its cluster is gone.
_NOTICE_S = 20.0
_DEAD = 2  # of a node (`ray.core.generated.autoscaler_pb2.NodeStatus`)
_LOOK_S = 5.0  # between two looks at what is pending
_SILENT_S = 50.0  # without an answer of the cluster


def _parent() -> str:
    return "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()


def _clear_abandoned() -> None:
    """Remove the folders of clusters that were killed together with the processes that would have removed them."""
    for folder in Path(_parent()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _address_of(host: subprocess.Popen[bytes], log: str) -> str:
    """The address that the host prints once its cluster is up. Ray's own processes may keep its pipe open after it
    ended.
    """
    assert host.stdout is not None
    deadline, output = time.monotonic() + _START_S, b""
    while host.poll() is None and time.monotonic() < deadline:
        if not select.select([host.stdout], [], [], 0.2)[0]:
            continue
        more = os.read(host.stdout.fileno(), 4096)
        output += more
        for line in output.split(b"\n")[:-1]:
            if line.startswith(b"address "):
                return line.split()[1].decode()
        if not more:
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        host.wait(timeout=1.0)
    ended = "was stopped or killed" if host.poll() is not None else f"was not up after {_START_S:.0f} s"
    with open(log, encoding="utf-8", errors="replace") as file:
        tail = file.read()[-2000:].strip()
    raise LodesetError(f"Ray did not start on this machine: it {ended} (`lodeset doctor` tests it)\n{tail}".rstrip())


def _cores_of(wanted: Cluster) -> int:
    """The cores of a cluster that is there, or as configured: an autoscaler may add nodes.

    Raises:
        LodesetError: none answers, with Ray's own reason (another version, a token that is missing or wrong).
    """
    asked = [sys.executable, "-m", "lodeset.pipeline.engines.ray", "cores", wanted.address]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=_JOIN_S, env={**os.environ, **import_path(), **ENVIRONMENT}
        )
    except subprocess.TimeoutExpired:
        raise LodesetError(
            f"no Ray cluster answered at {wanted.address} within {_JOIN_S:.0f} s: check the address (of the GCS, usually "
            "port 6379), the network, and that RAY_AUTH_MODE and the token here are those of the cluster"
        ) from None
    told = [line for line in done.stdout.splitlines() if line.startswith("cores ")]
    if not told:
        why = ([line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
        raise LodesetError(f"no Ray cluster answers at {wanted.address}: {why}")
    there = int(told[0].split()[1])
    if there < 1 and wanted.cpus is None:
        raise LodesetError(
            f"the Ray cluster at {wanted.address} has no CPU cores for workers now: add a node, or say in "
            "resources.ray.cpus how many an autoscaler will add"
        )
    return there if wanted.cpus is None else wanted.cpus


def _tell_cores(address: str) -> None:
    import ray

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    print("cores", int(ray.cluster_resources().get("CPU", 0)), flush=True)
    os._exit(0)


def _host(cpus: int, folder: str, object_store_bytes: int) -> None:
    """Start a local cluster, print its address, and keep it until standard input ends or one of its own processes
    does.
    """
    import ray

    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        # Ray opens its folder to everybody (0777), so it gets one inside a folder that nobody else can enter.
        _temp_dir=os.path.join(folder, "r"),
        object_store_memory=object_store_bytes,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    needed = [p for p in psutil.Process().children() if p.name() in ("gcs_server", "raylet")]
    print("address", ray.get_runtime_context().gcs_address, flush=True)
    gone = threading.Event()
    children.when_asker_ends(gone.set)
    while all(_runs(p) for p in needed):
        if gone.wait(0.5):
            # The parent may not have been able to remove the folder.
            threading.Timer(15.0, os._exit, (1,)).start()
            ray.shutdown()
            break
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _lost() -> bool:
    """Whether the local cluster's host is gone."""
    host = os.environ.get(_HOST, "").split()
    if len(host) != 2:
        return False
    with contextlib.suppress(psutil.Error):
        return children.started_at(int(host[0])) != host[1] or not _runs(psutil.Process(int(host[0])))
    return True


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """End this process if its cluster is gone, or can never give what is asked of it: waiting would never end. What it waits for
    meanwhile is told."""
    import ray

    gcs, patience = ray.get_runtime_context().gcs_address, _options().get("wait_for_nodes", 60.0) - 2 * _LOOK_S
    raylet: Any = importlib.import_module("ray._raylet")  # compiled: its types are not known
    head = raylet.GcsClient(gcs)
    unanswered = lacking = looked = time.monotonic()
    moved = [looked]
    figures: list[Progress] = []

    def note(_: str, progress: Progress) -> None:
        seen = replace(progress, waits_for="")
        if figures != [seen]:
            figures[:], moved[0] = [seen], time.monotonic()

    def look() -> float:
        nonlocal unanswered, lacking, looked
        if _lost() and not ended.wait(_NOTICE_S):
            _end("the local Ray cluster is gone (killed, or out of memory)", LOST_RAY)
        now = time.monotonic()
        if now - looked < _LOOK_S:
            return 1.0
        looked = now
        try:
            why, possible = _pending(head)
        except Exception as error:
            # The head may be starting again.
            waits_for(f"an answer of the Ray cluster at {gcs} ({type(error).__name__})")
            if now - unanswered > _SILENT_S and not ended.is_set():
                _end(f"the Ray cluster at {gcs} has not answered for {_SILENT_S:.0f} s", LOST_RAY)
            return 1.0
        unanswered = now
        waits_for(why)
        # What is pending may be another user's: a stage that makes progress lacks nothing.
        if possible or moved[0] > lacking:
            lacking = now
        elif now - lacking > patience and not ended.is_set():
            _end(f"waited {patience:.0f} s for {why}", NO_ROOM)
        return 1.0

    with reported_to(note), repeating(look, 1.0) as ended:
        yield


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Counts what a stage reports in metrics of Ray, which its nodes export for Prometheus: `ray_lodeset_units_total`,
    `ray_lodeset_parts_total` and `ray_lodeset_fraction`, by stage. A local cluster exports nothing."""
    from ray.util.metrics import Counter, Gauge

    tags = ("stage", "unit")
    units = Counter("lodeset_units_total", "images, pairs or others that stages have dealt with", tags)
    parts = Counter("lodeset_parts_total", "parts that stages have committed", ("stage",))
    fraction = Gauge("lodeset_fraction", "how far a phase of a stage is, 0 to 1", ("stage",))
    last: Progress | None = None

    def note(stage: str, now: Progress) -> None:
        nonlocal last
        if last is None or now.phase != last.phase:
            last = replace(now, count=0)  # the first parts of a phase are those that were found finished
        more = now.count - last.count
        if more > 0:
            units.inc(more, {"stage": stage, "unit": now.unit})
        made = (now.parts_done or 0) - (last.parts_done or 0)
        if made > 0:
            parts.inc(made, {"stage": stage})
        fraction.set(now.fraction, {"stage": stage})
        last = now

    with reported_to(note):
        yield


def _end(why: str, code: int) -> None:
    print(why, file=sys.stderr, flush=True)
    if code == LOST_RAY:  # whose folder nobody else removes
        shutil.rmtree(os.environ.get(SCRATCH, ""), ignore_errors=True)
    os._exit(code)


def _pending(head: Any) -> tuple[str, bool]:
    """What work of a cluster (a client of its GCS) waits for, empty if nothing waits; and whether its nodes could give that."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(head)
    nodes = [dict(node.total_resources) for node in state.node_states if node.status != _DEAD]
    single = [dict(r.request.resources_bundle) for r in state.pending_resource_requests for _ in range(r.count)]
    gangs = [[dict(r.resources_bundle) for r in gang.requests] for gang in state.pending_gang_resource_requests]
    return lacks(nodes, [[one] for one in single] + gangs)


def _options() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.environ.get(RAY_OPTIONS, "{}"))
    return told


def placed() -> dict[str, Any]:
    """Options of tasks and actors that put the workers of this stage where they are configured to run."""
    where = _options().get("placement", {})
    named = {"resources": where.get("resources"), "label_selector": where.get("labels")}
    return {name: value for name, value in named.items() if value}


@contextlib.contextmanager
def job(address: str | None) -> Iterator[None]:
    """Join the cluster for one stage; its workers see the variables of this process's environment that they are to see."""
    if address == ON_DEMAND:
        address = ray_on_demand()  # before Ray is imported, which then reads its settings from the environment
    import ray

    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    options = _options()
    passed = {name: os.environ[name] for name in options.get("env", ()) if name in os.environ}
    try:
        # Ray puts the current working directory first on the import path of its workers (2.60).
        with contextlib.chdir(os.environ.get(SCRATCH, "/")):
            ray.init(
                address=address,
                logging_level=logging.WARNING,
                log_to_driver=False,
                namespace=options.get("namespace"),
                runtime_env={"env_vars": {**ENVIRONMENT, **passed, **import_path(), **environment()}},
            )
    except ConnectionError as error:
        raise LodesetError(f"no Ray cluster answers at {address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with _watched(), _counted():
        try:
            yield
        finally:
            ray.shutdown()


def in_place(items: Sequence[Item], seconds: Callable[[Item], float] | None) -> bool:
    """Whether these items are dealt with in this process: where Ray is local, and starting it takes longer or gives nothing."""
    allowed = _options().get("in_place_s", 0.0)
    little = len(items) <= 1 or (seconds is not None and sum(map(seconds, items)) <= allowed)
    return allowed > 0 and little


def map_items(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    cpus: int,
    address: str | None,
    seconds: Callable[[Item], float] | None = None,
) -> Iterator[Result]:
    """Apply `function` to each item in Ray tasks of one core, at most `cpus` at a time; results arrive in any order.

    Little work is done in this process: `seconds` says how long an item takes a core, roughly; without it, all work is much.

    Raises:
        LodesetError: an error that the function raised in a worker.
    """
    pending = list(items)
    if in_place(pending, seconds):
        yield from map(function, pending)
        return
    with job(address):
        import ray

        remote: Any = ray.remote(num_cpus=1, max_retries=2, **placed())(lambda item: caught(function, item))
        running: list[Any] = []
        while pending or running:
            while pending and len(running) < cpus:
                running.append(remote.remote(pending.pop(0)))
            ready, running = ray.wait(running, num_returns=1)
            for reference in ready:
                yield unwrapped(cast(Result, ray.get(reference)))


def on_every_node(work: Callable[[], Result], address: str, seconds: float) -> dict[str, Result | None]:
    """What `work` returns on each node that is alive, by its address; None where there was no answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with job(address):
        asked: dict[str, Any] = {}
        for node in ray.nodes():
            if node["Alive"]:
                pinned: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote: Any = ray.remote(num_cpus=0, scheduling_strategy=pinned, max_retries=0)(work)
                asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = remote.remote()
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        return {name: ray.get(reference) if reference in ready else None for name, reference in asked.items()}


@dataclass(frozen=True)
class Pool:
    """A pool of workers, and the resources of each."""

    actors: int
    cpus_each: int
    gpus_each: int


def pool_for(items: int, cpus: int, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """One worker per core; if a node has GPUs, one worker per GPU, with an even share of the cores to decode for it.

    `nodes` are the resources of each node in Ray's terms ({"CPU": 16.0, "GPU": 2.0}). A worker requests no more than
    every node with a GPU has for it; otherwise it would wait forever.
    """
    hosts = [(int(n.get("CPU", 0)), int(n["GPU"])) for n in nodes if n.get("GPU", 0) >= 1 and n.get("CPU", 0) >= 1]
    if not hosts:
        return Pool(min(cpus, items), 1, 0)
    actors = min(sum(min(host) for host in hosts), cpus, items)
    return Pool(actors, max(1, min(cpus // actors, *(c // g for c, g in hosts))), 1)


def cores() -> int:
    """The number of cores of the calling worker; 1 outside Ray."""
    if "ray" not in sys.modules:  # importing it takes half a second
        return 1
    import ray

    if not ray.is_initialized():
        return 1
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def map_with_state(
    make: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    *,
    cpus: int,
    address: str | None,
    gpu: bool = False,
    seconds: Callable[[Item], float] | None = None,
) -> Iterator[Result]:
    """Like `map_items`, through Ray Data with a pool of actors, each of which calls `make` once (to load a network).

    An item is a whole part, read in order by one actor, so that batches never cross parts. With `gpu` each actor has
    its own GPU if the cluster has any (Ray sets CUDA_VISIBLE_DEVICES). A single item without a GPU is processed in this
    process, because starting actors takes seconds; so is little work (`seconds`, as of `map_items`).
    """
    pending = list(items)
    if not pending:
        return
    if (len(pending) == 1 and not gpu) or in_place(pending, seconds):
        yield from map(make(), pending)
        return

    class Worker:
        def __init__(self) -> None:
            self.function: Callable[[Any], Any] | None = None

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            # Loaded on first use instead of in __init__, so that a bad file is reported by its own clear error.
            def work(item: Any) -> Any:
                if self.function is None:
                    self.function = make()
                return self.function(item)

            return {"result": [cloudpickle.dumps(caught(work, cloudpickle.loads(item))) for item in row["item"]]}

    with job(address):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if gpu else []
        pool = pool_for(len(pending), cpus, nodes)
        # Pickled here: Ray Data would try to convert each item to an Arrow value first, and warn that it cannot.
        rows = ray.data.from_items([{"item": cloudpickle.dumps(i)} for i in pending], override_num_blocks=len(pending))
        mapped = rows.map_batches(
            Worker,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus_each,
            num_gpus=pool.gpus_each or None,
            **placed(),
        )
        for row in mapped.iter_rows():
            yield unwrapped(cloudpickle.loads(row["result"]))


class Everywhere(Protocol):
    """Runs a function on the object that every actor holds; the results are in the order of the actors."""

    def __call__(self, work: Callable[[Any], Result]) -> list[Result]: ...


@contextlib.contextmanager
def holding(
    make: Callable[[Item], Any], items: Iterable[Item], *, cpus_each: int, address: str | None
) -> Iterator[Everywhere]:
    """One actor per item, which holds `make(item)` in memory as long as the block lasts.

    The function to run is sent to the cluster's object store once instead of once per actor.

    Raises:
        LodesetError: an error that `make` or the function raised in an actor.
    """

    class Holder:
        def __init__(self, item: Any) -> None:
            self.item, self.held = item, None

        def run(self, pickled: bytes) -> Any:
            # Made on first use instead of in __init__, so that a bad file is reported by its own clear error.
            if self.held is None:
                self.held = make(self.item)
            return caught(cloudpickle.loads(pickled), self.held)

        def answer(self, pickled: bytes) -> Any:
            return caught(self.run, pickled)

    with job(address):
        import ray

        wanted = list(items)
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        remote: Any = ray.remote(num_cpus=share_of(cores, len(wanted), cpus_each), **placed())(Holder)
        actors = [remote.remote(item) for item in wanted]

        def everywhere(work: Callable[[Any], Result]) -> list[Result]:
            sent = ray.put(cloudpickle.dumps(work))
            return [unwrapped(unwrapped(r)) for r in ray.get([actor.answer.remote(sent) for actor in actors])]

        yield everywhere


if __name__ == "__main__":
    if sys.argv[1] == "host":
        _host(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        _tell_cores(sys.argv[2])
