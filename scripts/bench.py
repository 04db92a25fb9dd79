"""Measure this package, all processes counted: `scripts/bench data` against its peers, `stream`, `prepare`; and
`step`, a training step on one card against its peers.

In: how many generated cases, patches and rounds; which peers.
Out: a table on the terminal; with --json a file of every run's figures.
"""

import sys

from raytrain_brats import home, interrupt

if __name__ == "__main__":
    interrupt.install()
    home.provide()

import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from rich.table import Table

from raytrain_brats import storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import choose, entry, show
from raytrain_brats.data import store as stores
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from scripts.bench_pipelines import common, preparing, scale
from scripts.bench_pipelines.pipelines import ABOUT, OURS, PEERS, Order, Run, missing

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Data:
    """Patches per CPU second of our two routes, through Ray to a training worker, and of other libraries' loaders on
    the same cases, each in a process tree of its own, in turn."""

    cases: int = 8
    """Cases generated; each is different, all are read again and again."""
    grid: int = 240
    """Voxels of a generated case across 240 mm."""
    voxels: Literal["float32", "int16"] = "float32"
    """Data type of the generated images: MSD's files hold float32, those of BraTS int16."""
    patch: int = 128
    """Voxels along each edge of a patch."""
    patches: int = 1024
    """Patches counted in each run, after a warm-up; more where they take less time than can be measured."""
    warm: int = 256
    """Patches of our routes before counting begins; peers take 8."""
    seconds: float = 60.0
    """A run that has not got so far ends after this time."""
    rounds: int = 2
    """Runs of each pipeline, in turn: A B C A B C."""
    routes: str = ",".join(OURS)
    """Of ours, comma-separated."""
    peers: str = ",".join(PEERS)
    """Comma-separated; "" for none. What is not installed is left out with a word."""
    work: str = ""
    """Folder for cases and caches, kept for the next time: empty, new or bench's; by default one that is removed."""
    json: str = ""
    """File for the figures."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write; never an image or a label."""


def data(args: Data) -> None:
    asked = common.names(args.peers, PEERS, "--peers")
    if sys.platform != "linux":
        raise UserError("scripts/bench reads Linux's /proc; run it on Linux")
    skipped = {name: f"{package} is not installed" for name in asked if (package := missing(name))}
    made = common.check_places("data", args)
    pipelines = [*common.names(args.routes, OURS, "--routes"), *(name for name in asked if name not in skipped)]
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        work = Path(args.work or folder).absolute()
        source = _generate(args, work)
        before = os.getloadavg()
        runs: dict[str, list[Run]] = {name: [] for name in pipelines}
        turns = [name for _ in range(args.rounds) for name in pipelines]
        for name in track(turns, "measuring", console=Console(stderr=True), transient=True):
            if name in skipped:
                continue
            try:
                runs[name].append(_run(args, name, work, source))
            except RunFailed as error:
                if name in OURS:
                    raise
                skipped[name] = str(error)  # another library's trouble; the figures of the others stay
        runs = {name: done for name, done in runs.items() if name not in skipped}
        found = _report(args, work, runs, skipped, before)
    _show(found)
    if args.json:
        storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())


def _generate(args: "Data | Stream", work: Path) -> Path:
    """The cases, and the store made of them, unless they are there from an earlier time."""
    voxels = getattr(args, "voxels", "float32")
    source, store = common.cases(work / "source", args.cases, args.grid, voxels), work / "store"
    if not (store / "index.jsonl").exists():
        manifest = scan.open_manifest(str(source))
        preprocessing = {"spacing_mm": 240 / args.grid}
        raw = Source(manifest.root, manifest.convention, preprocessing["spacing_mm"])
        cases = tuple(stores.put(str(store), raw, case, preprocessing) for case in manifest.cases)
        stores.write_index(str(store), replace(manifest, cases=cases), preprocessing)
    return source


def _run(args: Data, name: str, work: Path, source: Path) -> Run:
    """One measurement, in a process of its own."""
    ours, route = name in OURS, name.removesuffix("_alone")
    where, warm = (work / "store" if route == "store" else source), (args.warm if route in OURS else min(8, args.warm))
    order = Order(name, str(where), args.patch, args.patches, warm, args.seconds, 240 / args.grid, str(work))
    return Run(**_in_process("routes" if ours else "peers", asdict(order), name))


def _in_process(module: str, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """What a module of `bench_pipelines` measures in a process of its own. Raises RunFailed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run.json")
        command = [sys.executable, "-m", f"scripts.bench_pipelines.{module}", json.dumps(asked), str(out)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # a cluster of its own: others' work must not count
        environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not out.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RunFailed(f"{name} ended with {done.returncode}: {lines[-1]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _report(
    args: Data, work: Path, runs: dict[str, list[Run]], skipped: dict[str, str], before: tuple[float, float, float]
) -> dict[str, Any]:
    packages = ("raytrain_brats", "ray", "torch", "monai", "pyarrow", "numpy", "nnunetv2", "mosaicml-streaming")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": common.machine(before),
        "versions": {name: version for name in packages if (version := common.version(name))},
        "settings": {name: value for name, value in asdict(args).items() if name not in common.FREE}
        | {
            "patches_per_case": 4,
            "data": f"{args.cases} generated cases, each distinct, read again and again",
            "malloc": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "THP_"))} or "default",
        },
        "pipelines": {
            name: ABOUT[name]
            | {
                "patches_per_cpu_s": round(median(run.patches_per_cpu_s for run in all_runs), 2),
                "patches_per_s": round(median(run.patches_per_s for run in all_runs), 2),
                "peak_mb": round(max(sum(run.peak_mb.values()) for run in all_runs)),
                "disk_bytes": sum(storage.list_files(str(work / ABOUT[name]["disk"])).values()),
                "runs": [asdict(run) | {"patches_per_cpu_s": round(run.patches_per_cpu_s, 2)} for run in all_runs],
            }
            for name, all_runs in runs.items()
        },
        "skipped": skipped,
    }


def _show(found: dict[str, Any]) -> None:
    machine = found["machine"]
    title = f"{machine['cpus']} CPUs, {machine['cpu']}, load {machine['load_before'][0]:.1f}, {found['date']}"
    table = Table("pipeline", "patches per CPU s", "patches/s", "memory MB", "disk MB", title=title)
    for name, row in found["pipelines"].items():
        rates = ", ".join(f"{run['patches_per_cpu_s']:.1f}" for run in row["runs"])
        numbers = f"{row['patches_per_s']:.1f}", f"{row['peak_mb']}", f"{row['disk_bytes'] / 1e6:.0f}"
        rate = f"{row['patches_per_cpu_s']:.1f} ({rates})"
        table.add_row(name, rate, *numbers)
    show(table)
    for name, row in found["pipelines"].items():
        print(f"{name}: {row['output']}; augmentation: {row['augmentation']}; cache: {row['cache']}")
    for name, why in found["skipped"].items():
        print(f"left out: {name}, {why}")


@dataclass(frozen=True)
class Stream:
    """Bytes and CPU time a patch of the stream at several numbers of ranks, as consumers that only take, full-size
    cases, all processes counted."""

    workers: str = "1,2,8,16,64"
    """Numbers of ranks, comma-separated."""
    cases: int = 8
    """Cases generated; each is different, all are read again and again."""
    grid: int = 240
    """Voxels of a generated case across 240 mm."""
    patch: int = 128
    """Voxels along each edge of a patch."""
    patches: int = 512
    """Patches counted in each run, after a warm-up."""
    warm: int = 128
    """Patches before counting begins."""
    seconds: float = 600.0
    """A run that takes longer is given up."""
    routes: str = ",".join(OURS)
    """Comma-separated."""
    work: str = ""
    """Folder for cases and store, kept for the next time: empty, new or bench's; by default one that is removed."""
    json: str = ""
    """File for the figures."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write; never an image or a label."""


def stream(args: Stream) -> None:
    from scripts.bench_pipelines.consumers import stand_ins_per_s  # tasks of Ray, which `step` does without

    routes, numbers = common.names(args.routes, OURS, "--routes"), args.workers.split(",")
    if wrong := [number for number in numbers if not (number.isdigit() and int(number))]:
        raise UserError(f"--workers {wrong[0]!r}: write numbers of ranks from 1, such as 1,8,64")
    made = common.check_places("stream", args)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        work = Path(args.work or folder).absolute()
        source, before = _generate(args, work), os.getloadavg()
        for route in routes:
            where = str(work / "store" if route == "store" else source)
            order = Order(route, where, args.patch, args.patches, args.warm, args.seconds, 240 / args.grid, str(work))
            for workers in track(
                [int(number) for number in numbers], route, console=Console(stderr=True), transient=True
            ):
                asked = asdict(order) | {"workers": workers, "loaded": True}
                loaded = _in_process("consumers", asked, f"{route} at {workers}")
                rate = stand_ins_per_s(workers)  # for some 25 seconds
                asked |= {"loaded": False, "warm": int(8 * rate), "patches": int(16 * rate)}
                handed = _in_process("consumers", asked, f"stand-ins at {workers}")
                rows.append(
                    {"workers": workers, "route": route}
                    | {key: loaded[key] for key in ("cases_per_row", "mb_per_patch", "cpu_ms_per_patch")}
                    | {"coordinator_ms_per_patch": handed["cpu_ms_by_process"].get("SplitCoordinator", 0.0)}
                    | {"object_store_peak_mb": loaded["object_store_peak_mb"]}
                    | {"loaded": loaded, "stand_ins": handed}
                )
    columns = ["workers", "route", "mb_per_patch", "coordinator_ms_per_patch", "cpu_ms_per_patch"]
    columns += ["object_store_peak_mb"]
    table = Table(*columns, title=f"{common.machine(before)['cpu']}, load {before[0]:.1f}")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    show(table)
    print("the coordinators' time: with stand-ins for the voxels, since this machine cannot load cases for many GPUs")
    if args.json:
        found = {"date": time.strftime("%Y-%m-%d"), "machine": common.machine(before), "rows": rows}
        storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Scale:
    """A run of as many tiny cases as the largest data set has, from an S3 server on this machine: seconds to the first
    step, samples a second, memory, bytes of books a checkpoint. Needs EXTRAS=dev."""

    cases: int = 48_884
    """Cases, each distinct, of 16 voxels across."""
    seconds: float = 300.0
    """How long training is watched."""
    json: str = ""
    """File for the figures."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write."""


def watch(args: Scale) -> None:
    if args.cases < 2:
        raise UserError(f"--cases {args.cases}: 2 at least, one to train on and one held out")
    made, before = common.check_places("scale", args), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        found = asdict(scale.measure(Path(folder), args.cases, args.seconds))
    found = {"date": time.strftime("%Y-%m-%d"), "machine": common.machine(before)} | found
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.json:
        storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())


WHAT = {
    "data": "loading patches, against other libraries",
    "stream": "bytes and CPU time a patch at 1 to 64 ranks",
    "step": "a training step on one card, against other libraries",
    "augment": "CPU time of augmentation, against other libraries",
    "scale": "a run of 48,884 tiny cases from a local S3 server",
    "prepare": "CPU seconds a case, size of the store",
}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    name = choose(common.PROGRAM, "benchmark", given, WHAT)
    if isinstance(name, int):
        return name
    if name == "data":
        return entry(Data, data, name, given[1:], common.PROGRAM)
    if name == "stream":
        return entry(Stream, stream, name, given[1:], common.PROGRAM)
    if name == "step":
        from scripts.gpu_parts.bench_step import Step, step  # here: the others' driver does without torch

        return entry(Step, step, name, given[1:], common.PROGRAM)
    if name == "augment":
        from scripts import bench_augment  # here: the others' driver does without torch

        return entry(bench_augment.Options, bench_augment.bench, name, given[1:], common.PROGRAM)
    if name == "scale":
        return entry(Scale, watch, name, given[1:], common.PROGRAM)
    return entry(preparing.Prepare, preparing.prepare, name, given[1:], common.PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
