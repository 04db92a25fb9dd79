"""What all benchmarks share: options that are checked, generated cases, the machine and the file of figures.

In: the options of a benchmark.
Out: where it may write; what the file says of how and where it was made.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib

from raytrain_brats import outputs, storage
from raytrain_brats.errors import UserError
from raytrain_brats.synthetic import phantom

PROGRAM = "scripts/bench"

FREE = ("work", "json", "overwrite")  # does not alter what is measured


def check_places(what: str, args: Any) -> dict[str, Any]:
    """What the figures' file says of its making. Raises UserError, before anything is measured, when the file or the
    work folder is none of bench's."""
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    made = {"made_by": f"{PROGRAM} {what}", "asked": settings}
    if args.json:

        def ours(content: bytes) -> bool:
            with contextlib.suppress(ValueError, AttributeError):
                return bool(made.items() <= json.loads(content).items())
            return False

        outputs.claim_file(args.json, ours, overwrite=args.overwrite, option="--json")
    if getattr(args, "work", ""):
        there = sorted(storage.list_files(args.work).keys() - {storage.PROBE})
        ours_too = any(maker.startswith("bench ") for maker in outputs.recorded(args.work)["makers"])
        if storage.is_s3(args.work) or (there and not ours_too):
            what = f"holds {there[0]} and is not bench's" if there else "is not on this machine"
            raise UserError(f"--work {args.work} {what}; give an empty or new folder")
        outputs.claim(args.work, "bench", {}, option="--work")
    return made


def names(given: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} {unknown[0]}: not known; there are {', '.join(known)}")
    return names


def cases(folder: Path, number: int, grid: int, voxels: str = "float32") -> Path:
    """A folder of generated cases, unless it is there."""
    what: Any = {"seed": 1, "grid": grid, "anatomy": "procedural", "voxels": voxels}
    if len(phantom.missing(str(folder), number, **what)[1]) >= number:  # none is finished
        phantom.write_set(str(folder), number, **what)
    found: list[Any] = [nib.load(path) for path in (folder / "imagesTr").glob("*.nii.gz")]  # headers alone
    if {(image.shape[0], image.get_data_dtype().name) for image in found} != {(grid, voxels)} or len(found) != number:
        raise UserError(
            f"{folder} does not hold {number} cases of {grid} voxels across as {voxels}; give another --work"
        )
    return folder


def machine(before: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "cpu": cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "load_before": before,
        "load_after": os.getloadavg(),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu() -> str:
    """The processor's name; some virtual machines do not tell it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.partition(":")[::2] for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{told.get('vendor_id', '')} {told.get('model name', platform.machine())}".strip()
