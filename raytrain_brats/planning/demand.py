"""What a run asks of its machines: the figures from which the plan and the simulation are both made.

In: a recipe, a number of cases, a fleet, rates. Out: a `Demand`; UserError where a rate or a price is missing.
Runs in the driver.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from raytrain_brats import config as recipes
from raytrain_brats.config import Config, Validate
from raytrain_brats.errors import UserError
from raytrain_brats.planning.prices import Machine, near
from raytrain_brats.planning.rates import FULL_EDGE, Rates

GROUP_RANKS, TASK_CASES, SEGMENT_TASKS, ROW_CASES = 32, 4, 1024, 8
PREFETCH = 4
"""As in `data/stream.py` and `ray_ext/cluster.py`, which this room does not import; a test compares them."""
DEVICE_SHARE, HOST_SHARE, RARER = 0.25, 0.25, 19.0
"""As in `run/feed.py` (of shared memory half, which is half of a machine's) and `run/cadence.py`."""

STORE_SHARE = 0.3 * 0.3
"""Of a node's memory: the object store's, and of that what `data/stream.py` leaves to rows on their way."""
_MEASURED_OVERLAP = 0.5
"""Of windows, when those of a case were counted; twice the windows an axis at twice that step."""
_MEASURED_AT = 4
"""Patches a case when the coordinators were measured; their time is per row, and a row is of whole cases."""


@dataclass(frozen=True)
class Fleet:
    """The machines of a run."""

    train: Machine
    nodes: int
    data: Machine
    data_nodes: int
    head: Machine
    spot: bool = False
    """Training and data nodes on spot; the head is not."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.train.gpus

    def __str__(self) -> str:
        data = f", {self.data_nodes} x {self.data.kind}" if self.data_nodes else ""
        return f"{self.nodes} x {self.train.kind} ({self.gpus} x {self.train.gpu}){data}"


@dataclass(frozen=True)
class Demand:
    """Seconds are wall time of one resource, unless they are CPU seconds; MB are 10^6 bytes."""

    samples: int
    epoch_samples: int
    global_batch: int
    patches_per_case: int
    ranks: int
    """That work; GPUs beyond the global batch do not."""
    nodes: int
    compute_s: float
    """Of a step on the rank with most samples."""
    reduce_s: float
    """Of a step's gradients between the ranks; not hidden behind the computation."""
    cpus: float
    """For data tasks, and where there is no GPU also for steps."""
    cpus_per_task: float
    """Logical: a task that waits for S3 keeps its own."""
    case_cpu_s: float
    case_wait_s: float
    """For S3, while the task or the rank that reads does nothing else."""
    step_cpu_s: float
    """CPU seconds of a sample that compete with data tasks; 0 with GPUs."""
    other_cpus: float
    """CPUs that Ray's own processes take all the time, where steps need CPUs; 0 with GPUs."""
    case_read_mb: float
    case_gets: int
    case_sent_mb: float
    gets_per_s: float
    task_node_mb_s: float
    """Network of all nodes on which data tasks run, one way."""
    on_train: float
    """Share of the data tasks that run on training nodes."""
    train_node_mb_s: float
    """Network of one training node, one way."""
    deal_s: float
    """Of all coordinators together, a patch."""
    coordinators: int
    pause_s: float
    store_mb: float
    """Object store of all nodes, for rows that no rank has taken yet."""
    residency: str
    """`stream`: Ray Data brings cases anew each epoch; else they stay after the first."""
    alone_case_s: float
    """A rank's own reading of a case that then stays."""
    checkpoint_s: float
    checkpoint_stall_s: float
    validation_s: float
    """0 where nothing is validated."""
    start_s: float
    """Boot, launch, checksums."""
    prepare_s: float
    recover_s: float
    join_s: float
    interruptions_per_s: float
    """Of one node on spot; 0 on demand."""
    replacement_s: float
    validate_samples: int = 0
    """0: after epochs, rarer where that would take long."""
    checkpoint_samples: int = 0
    """0: after `checkpoint_s`; else the plan makes seconds of it."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.reduce_s

    @property
    def epochs(self) -> float:
        return self.samples / self.epoch_samples

    @property
    def cold_epochs(self) -> float:
        """Epochs' worth of cases that must be read: all of them, or, where cases stay, once on every node."""
        return self.epochs if self.residency == "stream" else min(self.epochs, float(self.nodes))


def demand(config: Config, recipe: str, cases: int, fleet: Fleet, rates: Rates, route: str) -> Demand:
    """Raises UserError."""
    held_out = cases // 5
    train, data, validate = config.train, config.data, config.validate_
    if train.reduction == "exact":
        raise UserError("train.reduction=exact: only `fast` is planned; no rate of samples one by one is known")
    batch, k, ranks = train.global_batch, data.patches_per_case, min(fleet.gpus, train.global_batch)
    network = _network(config, recipe, rates)
    patch = math.prod(data.patch_xyz) / FULL_EDGE**3
    cpu = rates.of("data.vcpu")
    sample_s = patch / _step_rate(fleet.train, network, rates)
    worked = -(-batch // ranks)
    compute = worked * sample_s / (rates.of("reduce.in_node") if ranks > 1 else 1.0) + rates.of("step.tail_s")
    used_nodes = -(-ranks // fleet.train.gpus)
    full = rates.of("network.share") * 125.0  # MB/s of a Gb/s
    idle = max(0, fleet.train.vcpus - fleet.train.gpus) * used_nodes
    case_mb, read_mb, gets = rates.of("data.case_mb"), rates.of(f"data.{route}_mb"), 2 if route == "raw" else 1
    cpus = float(fleet.data_nodes * fleet.data.vcpus + idle)
    reading = cases * (rates.of("start.checksum") if route == "raw" else 0.0) / 1e3 / cpus
    prepare = cases * rates.of("prepare.case") / 1e3 / cpus if route == "store" else 0.0
    return Demand(
        samples=(cases - held_out) * k * train.epochs,
        epoch_samples=(cases - held_out) * k,
        global_batch=batch,
        patches_per_case=k,
        ranks=ranks,
        nodes=used_nodes,
        compute_s=compute,
        reduce_s=_reduce_s(fleet.train, used_nodes, network, rates),
        cpus=cpus,
        cpus_per_task=config.run.cpus_per_task or 1.0,
        case_wait_s=gets * rates.of("s3.latency") + read_mb / rates.of("s3.stream"),
        case_cpu_s=rates.of(f"data.{route}") / 1e3 / cpu,
        step_cpu_s=0.0,
        other_cpus=0.0,
        case_read_mb=read_mb,
        case_gets=gets,
        case_sent_mb=min(case_mb, rates.between("box", k) * patch),
        gets_per_s=rates.of("s3.gets"),
        on_train=idle / cpus if cpus else 0.0,
        task_node_mb_s=full * (fleet.data_nodes * fleet.data.network_gbps + used_nodes * fleet.train.network_gbps),
        train_node_mb_s=full * fleet.train.network_gbps,
        deal_s=rates.between("deal", ranks) * _MEASURED_AT / k / 1e3 / cpu,
        coordinators=-(-ranks // GROUP_RANKS),
        pause_s=rates.of("pause.execution"),
        store_mb=STORE_SHARE * 1e3 * (fleet.data_nodes * fleet.data.memory_gb + used_nodes * fleet.train.memory_gb),
        residency=_residency(data.residency, fleet.train, 1.25 * (cases - held_out) * case_mb),
        alone_case_s=rates.of(f"data.{route}_alone") / 1e3 / cpu,
        checkpoint_s=config.checkpoint.every_s,
        checkpoint_samples=config.checkpoint.every_samples or 0,
        validate_samples=validate.every_samples or 0,
        checkpoint_stall_s=rates.of("checkpoint.stall"),
        validation_s=-(-min(validate.max_cases, held_out) // ranks) * _case_s(validate, sample_s / patch, rates),
        start_s=rates.of("start.boot") + rates.of("start.launch") + reading,
        prepare_s=prepare,
        recover_s=rates.of("recover.node"),
        join_s=rates.of("recover.join"),
        interruptions_per_s=rates.of("spot.interruptions") / 3600 if fleet.spot else 0.0,
        replacement_s=rates.of("spot.replacement"),
    )


def _case_s(validate: Validate, sample_s: float, rates: Rates) -> float:
    """Of a held-out case: its windows, each of a full-size patch, by one GPU, then its scores by one CPU."""
    windows = rates.of("validate.windows") * (_MEASURED_OVERLAP / (1 - validate.overlap)) ** 3
    views = 8 if validate.mirror else 1
    return views * windows * rates.of("validate.window") * sample_s + rates.of("validate.score") / rates.of("data.vcpu")


def _reduce_s(machine: Machine, nodes: int, network: str, rates: Rates) -> float:
    """Each node sends and receives the gradients about twice; within a node it is part of the step's rate."""
    if nodes < 2:
        return 0.0
    speed = rates.of("reduce.of_network") * 125.0 * machine.network_gbps
    return 2 * (nodes - 1) / nodes * rates.of(f"gradient.{network}") / speed


def _residency(asked: str, machine: Machine, set_mb: float) -> str:
    if asked != "auto" or set_mb >= HOST_SHARE * 1e3 * machine.memory_gb:
        return asked if asked != "auto" else "stream"
    return "device" if set_mb < DEVICE_SHARE * 1e3 * machine.gpu_gb else "host"


def _network(config: Config, recipe: str, rates: Rates) -> str:
    """The recipe whose network it is, by which rates are named. Raises UserError for one that no rate is of."""
    known = sorted({network for networks in rates.steps().values() for network in networks})
    if (own := Path(recipe).stem) in known:
        return own
    for name in known:
        if name in recipes.recipe_names() and recipes.load(name).network == config.network:
            return name
    raise UserError(
        f"recipe {recipe}: its network is of none of the recipes that rates are known of ({', '.join(known)}); measure "
        f"one and give --rates FILE with a line such as `step.A100.{own}: PATCHES-A-SECOND`"
    )


def _step_rate(machine: Machine, network: str, rates: Rates) -> float:
    known = rates.steps()
    if network not in known.get(machine.gpu, []):
        cards = sorted(card for card, networks in known.items() if network in networks)
        raise UserError(
            f"no rate of {network}'s step on {machine.gpu or machine.kind}; {near(machine.gpu, cards)} Measure it with "
            "scripts/bench step --json FILE, and give --rates FILE"
        )
    return rates.of(f"step.{machine.gpu}.{network}")
