"""What `scripts/bench data` compares: orders for one measurement, its figures, what each pipeline hands over.

In: what a pipeline's process read off its meter. Out: a `Run`.
"""

import importlib.util
from dataclasses import dataclass

from scripts.bench_pipelines.meter import Meter

_OURS = {
    "output": "int16 + uint8 label, with each channel's mean and std",
    "augmentation": "none here: on the training device, after this",
}
_MONAI = {"output": "float32, 3 label channels", "augmentation": "flip, scale, shift on the CPU"}
ABOUT: dict[str, dict[str, str]] = {
    "raw": _OURS | {"cache": "none; .nii.gz, page cache warm", "disk": "source"},
    "store": _OURS | {"cache": "prepared Parquet, page cache warm", "disk": "store"},
    "raw_alone": _OURS | {"cache": "none; .nii.gz, page cache warm; one process, no Ray", "disk": "source"},
    "store_alone": _OURS | {"cache": "prepared Parquet, page cache warm; one process, no Ray", "disk": "store"},
    "monai_dataset": _MONAI | {"cache": "none; .nii.gz, page cache warm", "disk": "source"},
    "monai_cache": _MONAI | {"cache": "all cases in memory, filled before counting", "disk": "source"},
    "monai_persistent": _MONAI | {"cache": "on disk, filled before counting", "disk": "monai_persistent"},
    "monai_smartcache": _MONAI | {"cache": "half in memory, a quarter of it replaced each epoch", "disk": "source"},
    "nnunet": {
        "output": "float32, 3 label regions",
        "augmentation": "none (its validation transforms)",
        "cache": "blosc2 files, page cache warm",
        "disk": "nnunet",
    },
    "mosaic": {
        "output": "int16 + uint8 label",
        "augmentation": "none",
        "cache": "MDS zstd shards, unpacked to a local copy",
        "disk": "mosaic",
    },
}
"""What each pipeline hands over and how, and the folder that holds what it reads."""
OURS = ("raw", "store")
PEERS = tuple(name for name in ABOUT if name not in OURS)
_PACKAGES = {"nnunet": "nnunetv2", "mosaic": "streaming"}


def missing(pipeline: str) -> str:
    """The package that a pipeline needs and this Python does not have, else an empty string."""
    package = _PACKAGES.get(pipeline)
    return package if package and not importlib.util.find_spec(package) else ""


@dataclass(frozen=True)
class Order:
    """What to measure: `source` is a folder of cases or a store, `seconds` ends a slow pipeline early."""

    pipeline: str
    source: str
    patch: int
    patches: int
    warm: int
    seconds: float
    spacing_mm: float
    work: str


LEAST_S = 0.5
"""Seconds that counting takes at least, five looks of the meter: patches that lay ready when it began cost no time,
and there would be nothing to divide by."""


def enough(order: Order, patches: int, since_s: float) -> bool:
    """Whether to stop counting, `since_s` seconds after it began."""
    return since_s >= LEAST_S and (patches >= order.patches or (patches > 0 and since_s > order.seconds))


@dataclass(frozen=True)
class Run:
    """One measurement. Seconds are user and system time of all processes together, by what the process is."""

    patches: int
    wall_s: float
    cpu_s: dict[str, float]
    page_faults: dict[str, float]
    peak_mb: dict[str, float]

    @property
    def patches_per_cpu_s(self) -> float:
        return self.patches / max(1e-3, sum(self.cpu_s.values()))

    @property
    def patches_per_s(self) -> float:
        return self.patches / self.wall_s


def counted(meter: Meter, begun: float, ended: float, patches: int) -> Run:
    """What the meter saw between two points in time."""
    cpu_s, faults = (meter.spent(begun, ended, what) for what in ("cpu_s", "faults"))
    peak = {kind: round(mb, 1) for kind, mb in sorted(meter.peak_mb().items(), key=lambda item: -item[1])}
    return Run(patches, round(ended - begun, 3), cpu_s, faults, peak)
