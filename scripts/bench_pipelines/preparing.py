"""`scripts/bench prepare`: what a case costs that is prepared, and what its object in the store weighs.

In: how many generated cases and copies of each.
Out: figures on the terminal; with --json a file of them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from raytrain_brats import storage
from raytrain_brats.errors import RunFailed, UserError
from scripts.bench_pipelines import common
from scripts.bench_pipelines.meter import Meter


@dataclass(frozen=True)
class Prepare:
    """CPU seconds a case that `prepare` takes, all its processes counted; the store's size against the files'."""

    cases: int = 8
    """Cases generated, each different."""
    copies: int = 16
    """Files of each case, of the same voxels and of different checksums: all are prepared."""
    grid: int = 240
    """Voxels of a generated case across 240 mm."""
    work: str = ""
    """Folder for the cases, kept for the next time: empty, new or bench's; by default one that is removed."""
    json: str = ""
    """File for the figures."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write; never an image or a label."""


def prepare(args: Prepare) -> None:
    """Of a quarter of the copies and of all, each into a new store: the difference is free of the processes' start."""
    if args.copies < 4:
        raise UserError("--copies must be 4 at least: a quarter of them is for the start")
    made = common.check_places("prepare", args)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        work = Path(args.work or folder).absolute()
        once = common.cases(work / "source", args.cases, args.grid)
        few, _, _ = _prepared(_copies(once, work, args.copies // 4), Path(folder, "few"), args.grid)
        many, stored, files = _prepared(_copies(once, work, args.copies), Path(folder, "many"), args.grid)
    further = args.cases * (args.copies - args.copies // 4)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": common.machine(before),
        "cases": args.cases,
        "copies": args.copies,
        "cpu_s_of_a_quarter": few,
        "cpu_s_of_all": many,
        "cpu_s_per_further_case": {
            kind: round((many.get(kind, 0.0) - few.get(kind, 0.0)) / further, 4) for kind in few | many
        },
        "cpu_s_per_further_case_in_all": round((sum(many.values()) - sum(few.values())) / further, 3),
        "store_bytes": stored,
        "nii_gz_bytes": files,
        "store_over_nii_gz": round(stored / files, 2),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.json:
        storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())


def _copies(once: Path, work: Path, number: int) -> Path:
    """A folder with `number` files of each image and label, which differ in the time that gzip's header tells."""
    folder = work / f"source-x{number}"
    if (folder / "dataset.json").exists():
        return folder
    about = json.loads((once / "dataset.json").read_text())
    pairs = about["training"]
    about["training"] = []
    for pair in pairs:
        for copy in range(number):
            named = {kind: path.replace(".nii.gz", f"_{copy:03d}.nii.gz") for kind, path in pair.items()}
            about["training"].append(named)
            for kind, path in pair.items():
                content, target = (once / path).read_bytes(), folder / named[kind]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content[:4] + copy.to_bytes(4, "little") + content[8:])
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def _prepared(source: Path, store: Path, grid: int) -> tuple[dict[str, float], int, int]:
    """(CPU seconds by kind of process, bytes of the store, bytes of the files) of one `prepare`."""
    command = [sys.executable, "-m", "raytrain_brats.prepare", "--data", str(source), "--store", str(store)]
    command += ["--set", f"preprocess.spacing_mm={240 / grid}"]
    with Meter() as meter:
        begun = time.monotonic()
        environment = os.environ | {"RAY_ADDRESS": "local"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        ended = time.monotonic()
        time.sleep(0.3)  # the meter's next look
    if done.returncode:
        raise RunFailed(f"prepare ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    spent = {kind: s for kind, s in meter.spent(begun, ended).items() if kind != "driver"}  # that is this process
    files = [storage.list_files(str(source / kind)) for kind in ("imagesTr", "labelsTr")]
    objects = storage.list_files(str(store))
    return spent, sum(objects.values()), sum(sum(found.values()) for found in files)
