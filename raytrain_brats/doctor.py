"""Check a machine, or the cluster, before a run: `raytrain-brats doctor [--run-dir URI] [--data URI]`.

In: this machine; every node of a cluster, where one answers; the places of data and runs, a recipe.
Out: a line for each thing that was looked at; one that is wrong says what to do. Exit code 1 when something is.

Each node looks at itself (`look`) and the driver judges what they tell (`judge`), so that what is judged can be tested
without such a machine. Nothing is left behind: the object that tries the rights is deleted again.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from packaging.requirements import Requirement

from raytrain_brats import config as recipes
from raytrain_brats import s3, storage
from raytrain_brats.cli import Uri, default, entry
from raytrain_brats.config import Config
from raytrain_brats.errors import RunFailed, UserError

OPEN_FILES, OPEN_FILES_ALONE = 65_536, 4_096
"""That Ray wants of a cluster's nodes; below which it warns."""
SKEW_S, NODE_SKEW_S = 60.0, 5.0
"""S3 refuses requests that are 15 minutes off; the second: times in events and reports would mislead."""
STORE_BYTES_PER_CPU = 160_000_000
"""Of the object store that a run without a cluster starts, as in `ray_ext/cluster.py`."""
RUN_BYTES = 2_000_000_000
"""A run folder: three checkpoints of the largest recipe, books and events."""


@dataclass(frozen=True)
class Args:
    """Check this machine, or the cluster that is there, before a run: one line for each check."""

    run_dir: Uri = ""
    """Where the run will be (local or s3://); by default RAYTRAIN_BRATS_RUN_DIR."""
    data: Uri = ""
    """Where the cases are; by default RAYTRAIN_BRATS_DATA."""
    store: Uri = ""
    """Where the prepared cases are or will be; by default RAYTRAIN_BRATS_STORE."""
    recipe: str = ""
    """By default RAYTRAIN_BRATS_RECIPE, else segresnet."""


@dataclass(frozen=True)
class Finding:
    about: str
    wrong: str = ""
    """What is wrong and what to do; "" when nothing is."""

    def __str__(self) -> str:
        return f"wrong  {self.about}: {self.wrong}" if self.wrong else f"ok     {self.about}"


@dataclass
class Machine:
    """What a node tells of itself."""

    host: str
    python: str
    versions: dict[str, str]
    unfit: list[str]
    """Packages whose version is not one that this package asks for, in words."""
    cpus: int
    memory_bytes: int
    shared_bytes: int
    """Of /dev/shm, in all."""
    open_files: int
    """The hard limit, up to which Ray raises its own."""
    time: float
    cards: list[str] = field(default_factory=list)
    card_faults: list[str] = field(default_factory=list)


def look(edge: int = 64) -> dict[str, Any]:
    """A `Machine` as a mapping; runs on the node. `edge`: voxels of the convolution that a GPU tries."""
    import resource

    names = ("ray", "torch", "monai", "numpy", "raytrain_brats")
    versions = {name: version for name in names if (version := _version(name))}
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0  # noqa: S108
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = hard if hard != resource.RLIM_INFINITY else sys.maxsize
    python, host = platform.python_version(), socket.gethostname()
    found = Machine(host, python, versions, _unfit(), os.cpu_count() or 1, pages, shared, files, time.time())
    found.cards, found.card_faults = _cards(edge)
    return asdict(found)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unfit() -> list[str]:
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires("raytrain_brats") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a checkout that is not installed: what it needs is not recorded
    found = []
    for one in needed:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        version = _version(one.name)
        if not version or not one.specifier.contains(version, prereleases=True):
            found.append(f"{one.name} {version or 'is missing'} (asked for: {one.specifier})")
    return found


def _cards(edge: int) -> tuple[list[str], list[str]]:
    """(GPUs, what is wrong with them)."""
    import torch

    from raytrain_brats.learn import convolution_check

    if not torch.cuda.is_available():
        there = os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")
        why = f"torch {torch.__version__} sees none of this machine's NVIDIA GPUs"
        hint = "nvidia-smi must list them; install a torch built for CUDA, no newer than the driver (docs/ec2.md)"
        return [], [f"{why}; {hint}"] if there else []
    cards, faults = [], []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        card = convolution_check.card_of(device)
        cards.append(str(card))
        if problem := convolution_check.not_built(card):
            faults.append(problem)
        else:
            measured = convolution_check.measure(device, edge, convolution_check.precisions(card))
            faults += convolution_check.findings(card, measured)
    return cards, faults


def judge(machine: Machine, here: Machine, cluster: bool, own_s: float) -> Iterator[Finding]:
    """What a node's facts mean; `here`: the driver's, with which it must agree. `own_s`: the driver's clock when it
    looked."""
    name = machine.host
    old = tuple(map(int, machine.python.split(".")[:2])) < (3, 11)
    other = [
        f"{what} {machine.versions.get(what, 'missing')}, here {here.versions.get(what, 'missing')}"
        for what in ("ray", "raytrain_brats", "torch")
        if machine.versions.get(what) != here.versions.get(what)
    ]
    if machine.python.split(".")[:2] != here.python.split(".")[:2]:
        other.append(f"Python {machine.python}, here {here.python}")
    problems = (["Python 3.11 or later is needed"] if old else []) + machine.unfit + other
    remedy = "install the same on all machines: scripts/venv, or pip install -c constraints.txt -e ."
    told = ", ".join(f"{what} {version}" for what, version in machine.versions.items())
    yield Finding(f"{name}: Python {machine.python}, {told}", f"{'; '.join(problems)}; {remedy}" if problems else "")
    for card in machine.cards if not machine.card_faults else ():
        yield Finding(f"{name}: {card}: its convolutions are right")
    yield from (Finding(f"{name}: GPU", fault) for fault in machine.card_faults)
    store = int(0.3 * machine.memory_bytes) if cluster else machine.cpus * STORE_BYTES_PER_CPU
    small = f"Ray's object store wants {_gb(store)}; enlarge it: mount -o remount,size={_gb(store, 'G')} /dev/shm, or "
    small += f"docker run --shm-size={_gb(store, 'g')}; on a disk instead it is many times slower"
    yield Finding(f"{name}: /dev/shm has {_gb(machine.shared_bytes)}", small if machine.shared_bytes < store else "")
    files = OPEN_FILES if cluster else OPEN_FILES_ALONE
    few = f"Ray wants {files:,}: ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} of the service"
    yield Finding(f"{name}: {machine.open_files:,} open files allowed", few if machine.open_files < files else "")
    if cluster:
        off = machine.time - own_s
        late = "set the clocks by NTP: systemctl enable --now chrony" if abs(off) > NODE_SKEW_S else ""
        yield Finding(f"{name}: clock {off:+.1f} s from this machine's", late)


def _gb(count: int, unit: str = " GB") -> str:
    return f"{count / 1e9:.1f}{unit}" if unit == " GB" else f"{-(-count // 10**9)}{unit}"


def of_cluster(config: Config, here: Machine) -> Iterator[Finding]:
    """Every node that is alive; then whether workers leave CPUs for data tasks. Raises UserError when none answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raytrain_brats.ray_ext import cluster

    cluster.connect()
    # No CPU, so that it is not behind a run; nodes without GPUs of their own see all of the machine's
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    for node in [n for n in ray.nodes() if n["Alive"]]:
        at, began = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), time.time()
        try:
            machine = Machine(**ray.get(task.options(scheduling_strategy=at).remote(), timeout=120))
        except ray.exceptions.RayError as error:
            why = " ".join(str(error).split())[:200]
            host = node["NodeManagerHostname"]
            yield Finding(f"{host}: a task", f"it did not run ({why}); the package must be installed there, as here")
            continue
        own_s = min(max(machine.time, began), time.time())  # somewhere between question and answer
        yield from judge(machine, here, True, own_s)
    try:
        found = cluster.measure(config.run, config.train.global_batch)
        tasks = "as many data tasks as fit" if found.tasks is None else f"{found.tasks} data tasks"
        yield Finding(f"cluster: {found.low} to {found.high} workers of {found.cpus:g} CPUs, {tasks}")
    except UserError as error:
        yield Finding("cluster: workers and data tasks", str(error))


def of_place(what: str, uri: str, written: bool) -> Iterator[Finding]:
    """Whether a place can be read, and written where it must be; on S3 with each right, and by the clock."""
    about = f"{what} {uri}"
    if not storage.is_s3(uri):
        there = os.path.isdir(uri)
        yield _tried(about, lambda: storage.check_writable(uri) if written else storage.list_files(uri))
        if written and not there:
            with contextlib.suppress(OSError):
                os.rmdir(uri)
        return
    if written:
        probe = storage.join(uri, f"doctor-{uuid.uuid4().hex}")
        yield _tried(f"{about}: put, head, get, change, delete", lambda: _try_object(probe))
    else:
        yield _tried(f"{about}: list, get", lambda: _try_reading(uri))
    yield _tried(f"{about}: clock", lambda: _try_clock(uri))


def _tried(about: str, attempt: Callable[[], Any]) -> Finding:
    try:
        attempt()
    except FileNotFoundError:
        return Finding(about, "it does not exist; correct the name, or make it")
    except (UserError, OSError) as error:
        return Finding(about, " ".join(str(error).split()))
    return Finding(about)


def _try_object(probe: str) -> None:
    """Each right that a run needs below its folder; and that this S3 keeps what documents rely on."""
    content = uuid.uuid4().bytes
    rights: list[tuple[str, Callable[[], Any]]] = [
        ("s3:PutObject", lambda: s3.put(probe, content)),
        ("s3:GetObject (head)", lambda: s3.head(probe)),
        ("s3:GetObject", lambda: s3.get(probe)),
        ("s3:ListBucket", lambda: s3.list_below(probe)),
        ("s3:DeleteObject", lambda: s3.delete(probe)),
    ]
    for right, attempt in rights:
        try:
            attempt()
        except (UserError, OSError) as error:
            raise UserError(f"{error}; what was asked for needs {right}, which the node's role must have") from error
    s3.put(probe, content)
    try:
        s3.put(probe, content, IfNoneMatch="*")
    except FileExistsError:
        return
    finally:
        s3.delete(probe)
    raise UserError(
        "this S3 ignores If-None-Match: two drivers could both own a run; use S3, or MinIO of 2024-10 or later"
    )


def _try_reading(uri: str) -> None:
    found = s3.list_below(uri)
    if not found:
        raise FileNotFoundError(uri)
    smallest = min(found, key=lambda key: found[key][0])
    s3.get(storage.join(uri, smallest), check=False)


def _try_clock(uri: str) -> None:
    from email.utils import parsedate_to_datetime

    at, bucket, _ = s3.locate(uri)
    with s3.translated(uri):
        answer = at.list_objects_v2(Bucket=bucket, MaxKeys=1)
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    off = time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    if abs(off) > SKEW_S:
        raise UserError(f"this machine's clock is {off:+.0f} s from S3's; set it by NTP: systemctl enable --now chrony")


def of_room(args: Args) -> Iterator[Finding]:
    """Disk space of what will be written here: the run, and a store, which is no larger than what it is made of."""
    run_dir, store = default(args.run_dir, "RUN_DIR"), default(args.store, "STORE")
    data = default(args.data, "DATA")
    wanted = [("run folder", run_dir, RUN_BYTES)]
    if store and data and not storage.exists(storage.join(storage.normal(store), "index.jsonl")):
        wanted.append(("store", store, sum(storage.list_files(storage.normal(data)).values())))
    for what, uri, size in wanted:
        if not uri or storage.is_s3(uri):
            continue
        folder = os.path.abspath(uri)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        more = f"{_gb(size)} are wanted; free some, or give another place" if free < size else ""
        yield Finding(f"{what} {uri}: {_gb(free)} free", more)


def work(args: Args) -> None:
    from raytrain_brats.ray_ext import start_up

    config = recipes.load(default(args.recipe, "RECIPE") or "segresnet")
    here, found = Machine(**look()), []

    def tell(findings: Iterator[Finding]) -> None:
        for one in findings:
            found.append(one)
            print(one, flush=True)

    address = ""
    try:
        address = start_up.address()
    except UserError as error:
        tell(iter([Finding("cluster", str(error))]))
    tell(of_cluster(config, here) if address else judge(here, here, False, time.time()))
    places = (("run folder", args.run_dir, "RUN_DIR", True), ("store", args.store, "STORE", True))
    for what, given, name, written in (*places, ("data", args.data, "DATA", False)):
        if uri := default(given, name):
            tell(of_place(what, storage.normal(uri), written))
    tell(of_room(args))
    wrong = sum(bool(one.wrong) for one in found)
    if wrong:
        raise RunFailed(f"{wrong} of {len(found)} checks found something wrong, as told above")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "doctor", argv)


if __name__ == "__main__":
    sys.exit(main())
