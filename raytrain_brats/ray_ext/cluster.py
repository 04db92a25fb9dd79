"""The Ray cluster a command runs on: found or started, measured, refused when it is too small. Runs in the driver.

In: the environment (RAY_ADDRESS, a `ray start`ed cluster, or nothing), the config's `run` section.
Out: a connection; `Resources` that fit; ordered parallel maps.
"""

import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data  # sets its logger up, which `connect` quiets
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain_brats import interrupt, storage
from raytrain_brats.config import Run
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.parts import OwnPart
from raytrain_brats.ray_ext import gpu_map, importable, roles, start_up
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.ray_ext.internals import data as ray_data

T = TypeVar("T")
R = TypeVar("R")

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # else a traceback for each task beside the one whose error is reported
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is noticed, and report() returns, this fast
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # after a node loss Ray asks for too many workers this long
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_prestart_worker_first_driver": "0",  # one process per CPU, 43 MB each; none of our tasks was seen to use one
    "RAY_num_workers_soft_limit": "16",  # else Ray keeps ending and restarting idle processes beyond one per CPU
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; silences a warning
    # Threads of a CPU worker that wait for each other spin 30 times shorter: 0.6 of the CPU time where something else
    # runs beside them, 0.9 where nothing does, and in both no slower (SegResNet, two threads on two cores).
    "GOMP_SPINCOUNT": "10000",
}

STORE_BYTES_PER_CPU, PREPARED_STORE_BYTES_PER_CPU = 110_000_000, 160_000_000
"""Object store of a cluster that we start; the second where cases come from a store, which reads twice as fast and lost
a fifth of its rate with less. Ray would take 30 % of the memory and use all of it in turn, and a process's
first access to each page costs some 2 microseconds: 15 ms a case more until it has touched every page."""

COMING_STORE_BYTES = 16_000_000_000
"""Object store of a node that an autoscaler will add, as far as we know: 30 % of the memory of the smallest we name."""

# Where S3 is: workers on other nodes inherit their node's environment, not ours. Never credentials: the dashboard
# shows these variables.
_PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", storage.PATIENCE)
_JOINED = {"RAY_DATA_CLUSTER_SCALING_UP_UTIL_THRESHOLD": "inf"}  # the reason is in roles.py
_PATIENCE_S = "180"  # a run survives an outage of S3 of this length; a command that starts does not wait so long


@dataclass(frozen=True)
class Resources:
    """What a run uses: workers from `low` to `high`, each with `cpus` and `gpus`; data tasks of `cpus_per_task` each,
    `tasks` at a time (None: as many as fit, also on nodes that join later); `prefetch` rows ahead per rank; an
    object store of `store_bytes` over all nodes."""

    low: int
    high: int
    cpus: float
    gpus: int
    cpus_per_task: float
    tasks: int | None
    prefetch: int
    store_bytes: int
    on_train_nodes: bool = False
    """Whether data tasks also use CPUs that workers leave on training nodes."""

    @property
    def workers(self) -> roles.Workers:
        return roles.Workers(self.high, self.cpus, self.gpus)


def connect(
    local_cpus: int | None = None, held_bytes: int = 0, prepared: bool = False, own: Iterable[OwnPart] = ()
) -> None:
    """Join the cluster of RAY_ADDRESS or of `ray start` on this machine; else start one inside this process.

    `local_cpus`: logical CPUs of a started one (by default the machine's, 2 at least); `held_bytes`: what
    the cases of a step will hold of its object store, which is then twice as large at least; `prepared`: whether they
    come from a store; `own`: what all nodes must be able to import.
    Raises UserError when nothing answers at RAY_ADDRESS, when Ray cannot run from here, or when a node lacks a part.
    """
    if not ray.is_initialized():
        _begin(local_cpus, held_bytes, prepared)
    importable.check(own)


def _begin(local_cpus: int | None, held_bytes: int, prepared: bool) -> None:
    start_up.check_folder()
    logging.getLogger(core.TOKEN_LOGGER).setLevel(logging.ERROR)  # it reports at every start that tokens are used
    with interrupt.gracefully(0):  # nothing has to be saved yet, and Ray's start may block the main thread for long
        per_cpu = PREPARED_STORE_BYTES_PER_CPU if prepared else STORE_BYTES_PER_CPU
        address = start_up.address()
        with start_up.telling(f"joining Ray at {address}" if address else "starting Ray on this machine"):
            _connect(address, local_cpus, held_bytes, per_cpu)
        interrupt.again()


_started_here = False


def started_here() -> bool:
    """Whether this process started the cluster it is connected to: then no one else uses it, and it ends with us."""
    return _started_here


def _connect(address: str, local_cpus: int | None, held_bytes: int, bytes_per_cpu: int) -> None:
    global _started_here
    _started_here = not address
    if interrupt.installed():
        core.keep_own_signals()
    core.stop_auto_connect()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    verbose = bool(os.environ.get("RAYTRAIN_BRATS_VERBOSE"))
    for handler in [] if verbose else logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the console; its log file still gets everything
            handler.setLevel(logging.ERROR)
    quiet: Any = {"log_to_driver": verbose, "logging_level": "WARNING" if verbose else "ERROR"}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = (job.get("runtime_env") or {}).get("env_vars") or {}  # Ray rejects a variable that is given twice
    os.environ.setdefault(storage.PATIENCE, _PATIENCE_S)
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ and name not in given}
    passed |= {name: value for name, value in _JOINED.items() if name not in given}
    joining = quiet | {"runtime_env": {"env_vars": passed}}  # a cluster that we start inherits them instead, faster
    if address:
        try:
            ray.init(address=address, **joining)
        except (ConnectionError, TimeoutError, RuntimeError, ray.exceptions.RayError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot join the Ray cluster at {address} from here ({why}); run the command on one of its nodes, or "
                "unset RAY_ADDRESS to use this machine alone"
            ) from error
        return
    start_up.make_room()
    ray_data.count_nothing()
    cpus = local_cpus or max(2, os.cpu_count() or 1)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # 110 MB, and nobody drains this one node
    most = int(0.3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    memory = min(most, max(2 * held_bytes, cpus * bytes_per_cpu))
    try:
        with core.fewer_processes(logs=verbose):
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=memory, **quiet)
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray raises a plain Exception
            raise
        raise RunFailed(
            "Ray did not start in time: this machine is overloaded; the same command again goes on"
        ) from error


def measure(run: Run, global_batch: int) -> Resources:
    """Resources that the connected cluster can give.

    Raises UserError where Ray would wait for ever without a message: when `high` workers leave no CPU for data tasks.
    """
    train, data = roles.part("train"), roles.part("data")
    cpus = sum(n.get("CPU", 0.0) for n in data.nodes)
    gpus = int(sum(n.get("GPU", 0) for n in train.nodes))
    low, high = (1, min(global_batch, max(1, gpus))) if run.workers == "auto" else _range(run.workers)
    wanted = run.gpus_per_worker if run.gpus_per_worker is not None else int(gpus > 0)
    if high > global_batch:
        raise UserError(
            f"run.workers {low}:{high}: more workers than train.global_batch = {global_batch}; "
            "every worker needs a sample of each step"
        )
    if wanted and high < gpus:
        print(
            f"{gpus - high} of {gpus} GPUs stay idle: {high} workers at most, by "
            f"{'--workers' if run.workers != 'auto' else f'train.global_batch = {global_batch}'}",
            file=sys.stderr,
        )
    if wanted and 0 < gpus < low:
        raise UserError(f"run.workers {low}:{high}: the cluster has {gpus} GPUs; lower --workers or add nodes")
    per_worker = run.cpus_per_worker or (1.0 if wanted else 0.5)
    per_task = run.cpus_per_task or (0.5 if cpus <= 4 else 1.0)
    workers = roles.Workers(high, per_worker, wanted)
    room = sum(workers.on(node) for node in train.nodes)
    if train.selector and room < (high if train.grows else low):  # the autoscaler adds all nodes asked for, or none
        raise UserError(
            f"run.workers {low}:{high}: nodes labelled role: train have room for {room} workers of {per_worker:g} CPUs"
            f"{' and a GPU' if wanted else ''}; lower --workers, or "
            f"{'raise max_workers in the YAML of the cluster' if train.grows else 'add nodes'}"
        )
    fitting = max(low, min(high, room))
    taken = 0.0 if train.selector and data.selector else fitting * per_worker
    awaited = wanted and not gpus  # the GPU nodes that an autoscaler will add bring their own CPUs
    if taken + per_task > cpus and not awaited:
        most = math.floor((cpus - per_task) / per_worker)
        remedy = f"use --workers {min(low, most)}:{most}, or " if most >= 1 else ""
        raise UserError(
            f"{fitting} workers of {per_worker:g} CPUs leave no CPU for data tasks of {per_task:g} on this cluster of "
            f"{cpus:g} CPUs; {remedy}lower run.cpus_per_worker or run.cpus_per_task, or add CPUs"
        )
    idle = _idle_on_train_nodes(run, workers, per_task)
    # On a small machine each process matters: 0.25 GB, and its first access to each page of the object store. One data
    # task per CPU that no worker uses is enough.
    tasks = run.data_tasks or (max(1, int(cpus + idle - taken)) if cpus + idle <= 4 and not data.grows else None)
    stores = [*data.nodes, *(train.nodes if data.selector else [])]
    store_bytes = int(sum(node.get("object_store_memory", COMING_STORE_BYTES) for node in stores))
    prefetch = run.prefetch or (4 if wanted else 1)
    on_train = idle > 0 or run.data_on_train_nodes is True
    return Resources(low, high, per_worker, wanted, per_task, tasks, prefetch, store_bytes, on_train)


def _idle_on_train_nodes(run: Run, workers: roles.Workers, per_task: float) -> float:
    """CPUs of training nodes that data tasks may use; 0.0 where nodes have no roles, or none has room for a task.

    With `auto` also where an autoscaler might add a training node for tasks that wait: when the workers do not ask for
    every such node themselves.
    """
    train = roles.part("train")
    if run.data_on_train_nodes is False or not (train.selector and roles.part("data").selector):
        return 0.0
    beyond = train.grows and sum(workers.on(node) for node in train.nodes) > workers.most
    if beyond and run.data_on_train_nodes == "auto":
        return 0.0
    return sum(cpus for node in train.nodes if (cpus := workers.idle_cpus(node)) >= per_task)


def _range(workers: str) -> tuple[int, int]:
    low, _, high = workers.partition(":")
    return int(low), int(high or low)


def check_shared(written: dict[str, str], read: dict[str, str] | None = None) -> None:
    """Raises UserError unless every node sees these local folders, {what it is: where it is}.

    Tested by writing a file into those in `written`, so a mounted network folder passes and a local one does not.
    """
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != ray.get_runtime_context().get_node_id()]
    probe = f"probe-{uuid.uuid4().hex}"
    probes = {what: storage.join(uri, probe) for what, uri in written.items() if not storage.is_s3(uri)}
    paths = probes | {what: uri for what, uri in (read or {}).items() if not storage.is_s3(uri)}
    if not others or not paths:
        return

    @ray.remote(num_cpus=0)
    def missing(paths: dict[str, str]) -> list[str]:
        return [what for what, path in paths.items() if not os.path.exists(path)]

    try:
        for path in probes.values():
            storage.write_bytes(path, b"")
        for node in others:
            at = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            for what in ray.get(missing.options(scheduling_strategy=at).remote(paths)):
                folder, host = paths[what].removesuffix(f"/{probe}"), node["NodeManagerHostname"]
                raise UserError(
                    f"{what} {folder} is not seen by node {host}; "
                    "with several machines give an s3:// place or a folder that all of them mount (FSx, NFS)"
                )
    finally:
        for path in probes.values():
            storage.delete(path)


def at_once(on_gpus: bool = False) -> int:
    """How many items `parallel_map` works on at a time."""
    totals = ray.cluster_resources()
    if on_gpus and (gpus := int(totals.get("GPU", 0))):
        return gpus
    return max(1, int(max(totals.get("CPU", 0), roles.part("data").largest_cpus)))


def parallel_map(
    function: Callable[[Any], R],
    items: Iterable[T],
    on_gpus: bool = False,
    read: Callable[[T], Any] | None = None,
    failed: Callable[[T, Exception], R] | None = None,
) -> Iterator[R]:
    """`map` over the cluster's CPUs (or GPUs, when it has some), results in order, a bounded number in flight.

    With `read` the function gets what that makes of an item: ahead of the GPUs, on CPUs. An exception of either is
    raised here as it was, without Ray's wrapping; with `failed` its result stands for the item's instead, also where
    the item has ended its process again and again.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0)) if on_gpus else 0
    where = roles.part("train" if gpus else "data")
    try:
        if gpus:
            yield from gpu_map.gpu_map(function, items, gpus, where.selector, _ahead(read, gpus), failed)
            return
        yield from _cpu_map(gpu_map.after(read, function) if read else function, items, where.selector, failed)
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None


def _ahead(read: Callable[[Any], Any] | None, gpus: int) -> gpu_map.Ahead | None:
    """Where a map over GPUs reads: in tasks where its processes leave a CPU, else in these."""
    if read is None:
        return None
    data, train = roles.part("data"), roles.part("train")
    own = sum(node.get("CPU", 0.0) for node in data.nodes) - (0 if data.selector and train.selector else gpus)
    return gpu_map.Ahead(read, data.selector, in_tasks=own >= 1)


def _cpu_map(
    function: Callable[[Any], R], items: Iterable[T], labels: dict[str, str], failed: Callable[[T, Exception], R] | None
) -> Iterator[R]:
    options: Any = {"num_cpus": 1, "max_retries": 2} | ({"label_selector": labels} if labels else {})
    task: Any = ray.remote(**options)(lambda item: function(item))
    width, running = 2 * at_once(), list[tuple[T, Any]]()

    def result() -> R:
        item, reference = running.pop(0)
        try:
            found: R = ray.get(reference)
        except ray.exceptions.RayError as error:  # its own, or the end of its process
            if failed is None:
                raise
            return failed(item, getattr(error, "cause", None) or error)
        return found

    for item in items:
        running.append((item, task.remote(item)))
        if len(running) >= width:
            yield result()
    while running:
        yield result()


def data_map(function: Callable[[dict[str, Any]], dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[Any]:
    """`function` of every row, by Ray Data over the cluster's CPUs; results in order of completion."""
    data = roles.part("data")
    roles.keep_apart(data)
    cpus = sum(node.get("CPU", 0.0) for node in data.nodes)
    blocks = min(len(rows), 16 * max(1, int(cpus)))  # enough for an even load, fewer tasks than rows
    made = ray.data.from_items(rows, override_num_blocks=blocks).map(function, num_cpus=min(1.0, cpus))
    made.context.execution_options.label_selector = data.selector or None
    made.context.memory_usage_poll_interval_s = None  # reading a process's memory map costs milliseconds a task
    yield from made.iter_rows()


def spread(
    function: Callable[[dict[str, Any]], dict[str, Any]], rows: list[dict[str, Any]], folder: str
) -> Iterator[Any] | None:
    """As `data_map`, if there is a cluster of several machines, or one that can grow; else None, and no Ray is started.

    Raises UserError when a machine does not see `folder`, or no cluster answers at RAY_ADDRESS.
    """
    if not ray.is_initialized() and not start_up.address():
        return None
    connect()
    data = roles.part("data")
    if len(data.nodes) < 2 and not data.grows:
        return None
    check_shared({}, {"data folder": folder})
    return data_map(function, rows)
