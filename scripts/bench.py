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
    if sys.argv[1:2] == ["step"]:
        import scripts.gpu_parts  # noqa: F401 - where Ray is not installed, names stand in for it

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import nibabel as nib
from rich.console import Console
from rich.progress import track
from rich.table import Table

from raytrain_brats import outputs, storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import choose, entry, show
from raytrain_brats.data import store as stores
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.synthetic import phantom
from scripts.bench_pipelines import scale
from scripts.bench_pipelines.meter import Meter
from scripts.bench_pipelines.pipelines import ABOUT, OURS, PEERS, Order, Run, missing

PROGRAM = "scripts/bench"
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
    asked = _names(args.peers, PEERS, "--peers")
    if sys.platform != "linux":
        raise UserError("scripts/bench reads Linux's /proc; run it on Linux")
    skipped = {name: f"{package} is not installed" for name in asked if (package := missing(name))}
    made = _check_places("data", args)
    pipelines = [*_names(args.routes, OURS, "--routes"), *(name for name in asked if name not in skipped)]
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


_FREE = ("work", "json", "overwrite")  # does not alter what is measured


def _check_places(what: str, args: "Data | Stream | Scale | Prepare | Step") -> dict[str, Any]:
    """What the figures' file says of its making. Raises UserError, before anything is measured, when the file or the
    work folder is none of bench's."""
    settings = {name: value for name, value in asdict(args).items() if name not in _FREE}
    made = {"made_by": f"{PROGRAM} {what}", "asked": settings}
    if args.json:

        def ours(content: bytes) -> bool:
            with contextlib.suppress(ValueError, AttributeError):
                return bool(made.items() <= json.loads(content).items())
            return False

        outputs.claim_file(args.json, ours, overwrite=args.overwrite, option="--json")
    if not isinstance(args, Scale | Step) and args.work:
        there = sorted(storage.list_files(args.work).keys() - {storage.PROBE})
        ours_too = any(maker.startswith("bench ") for maker in outputs.recorded(args.work)["makers"])
        if storage.is_s3(args.work) or (there and not ours_too):
            what = f"holds {there[0]} and is not bench's" if there else "is not on this machine"
            raise UserError(f"--work {args.work} {what}; give an empty or new folder")
        outputs.claim(args.work, "bench", {}, option="--work")
    return made


def _names(given: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} {unknown[0]}: not known; there are {', '.join(known)}")
    return names


def _generate(args: "Data | Stream", work: Path) -> Path:
    """The cases, and the store made of them, unless they are there from an earlier time."""
    source, store = _cases(work / "source", args.cases, args.grid, getattr(args, "voxels", "float32")), work / "store"
    if not (store / "index.jsonl").exists():
        manifest = scan.open_manifest(str(source))
        preprocessing = {"spacing_mm": 240 / args.grid}
        raw = Source(manifest.root, manifest.convention, preprocessing["spacing_mm"])
        cases = tuple(stores.put(str(store), raw, case, preprocessing) for case in manifest.cases)
        stores.write_index(str(store), replace(manifest, cases=cases), preprocessing)
    return source


def _cases(folder: Path, number: int, grid: int, voxels: str = "float32") -> Path:
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
        "machine": _machine(before),
        "versions": {name: version for name in packages if (version := _version(name))},
        "settings": {name: value for name, value in asdict(args).items() if name not in _FREE}
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


def _machine(before: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "load_before": before,
        "load_after": os.getloadavg(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """The processor's name; some virtual machines do not tell it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.partition(":")[::2] for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{told.get('vendor_id', '')} {told.get('model name', platform.machine())}".strip()


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

    routes, numbers = _names(args.routes, OURS, "--routes"), args.workers.split(",")
    if wrong := [number for number in numbers if not (number.isdigit() and int(number))]:
        raise UserError(f"--workers {wrong[0]!r}: write numbers of ranks from 1, such as 1,8,64")
    made = _check_places("stream", args)
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
    table = Table(*columns, title=f"{_machine(before)['cpu']}, load {before[0]:.1f}")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    show(table)
    print("the coordinators' time: with stand-ins for the voxels, since this machine cannot load cases for many GPUs")
    if args.json:
        found = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(before), "rows": rows}
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
    made, before = _check_places("scale", args), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        found = asdict(scale.measure(Path(folder), args.cases, args.seconds))
    found = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(before)} | found
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.json:
        storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())


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
    made = _check_places("prepare", args)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        work = Path(args.work or folder).absolute()
        once = _cases(work / "source", args.cases, args.grid)
        few, _, _ = _prepared(_copies(once, work, args.copies // 4), Path(folder, "few"), args.grid)
        many, stored, files = _prepared(_copies(once, work, args.copies), Path(folder, "many"), args.grid)
    further = args.cases * (args.copies - args.copies // 4)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(before),
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


@dataclass(frozen=True)
class Step:
    """Images a second of a training step on this machine's card, fed and with the batch on the device already, beside
    MONAI's tutorial loop and nnU-Net's train_step: same network, patch and batch, in turn. Without a GPU: on the CPU.
    Needs no Ray; nnU-Net's own code needs EXTRAS=bench, else its maths are re-written."""

    recipes: str = "segresnet,dynunet"
    """Comma-separated."""
    batches: str = "1,2,4"
    """Samples of a step, comma-separated."""
    edge: int = 128
    """Voxels along each edge of a patch; below 64 the networks are small."""
    steps: int = 20
    """Steps counted in each round, after 5 to warm up."""
    rounds: int = 2
    """Of each loop, in turn: A B C A B C."""
    peers: bool = True
    """Also other libraries' loops."""
    compiled: bool = True
    """Also ours compiled, and nnU-Net's network, as it is by default; on a GPU only."""
    peak_tflops: float = 0.0
    """The card's dense peak in half precision, if the table of `gpu_parts.steps` does not know it."""
    minutes: float = 9.0
    """No recipe and batch begins after so long; what is left out is named."""
    json: str = ""
    """File for the figures; written anew after each recipe and batch."""
    overwrite: bool = False
    """Also replace a --json file of other settings, or that bench did not write."""


def step(args: Step) -> None:
    import torch  # the other benchmarks' driver does without

    from scripts.gpu_parts import steps
    from scripts.gpu_parts.setting import RECIPES

    recipes, batches = _names(args.recipes, RECIPES, "--recipes"), args.batches.split(",")
    if wrong := [number for number in batches if not (number.isdigit() and int(number))]:
        raise UserError(f"--batches {wrong[0]!r}: write numbers of samples from 1, such as 1,2,4")
    if args.edge < 16 or args.edge % 16 or args.steps < 1 or args.rounds < 1:
        raise UserError("--edge must be a multiple of 16, --steps and --rounds 1 at least")
    made, before, began = _check_places("step", args), os.getloadavg(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = args.peak_tflops or steps.peak_of(card)
    versions = {name: version for name in ("torch", "monai", "nnunetv2") if (version := _version(name))}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "card": card or "none: CPU"}
    found |= {"machine": _machine(before), "versions": versions, "peak_tflops": peak, "rows": rows}
    tflops = {recipe: steps.tflop_of(recipe, args.edge) for recipe in recipes}
    for batch, recipe in ((int(number), recipe) for number in batches for recipe in recipes):
        if time.monotonic() - began > 60 * args.minutes:
            rows.append({"recipe": recipe, "batch": batch, "loop": "all", "failed": "no time left"})
        else:
            loops = steps.makers(device, args.peers, args.compiled)
            measured = steps.measure(recipe, batch, args.edge, device, args.steps, args.rounds, loops)
            rows += [row.figures(tflops[recipe], peak) for row in measured]
        if args.json:
            storage.write_bytes(args.json, (json.dumps(made | found, indent=1) + "\n").encode())
    _show_steps(rows, f"{card or _cpu()}, patches of {args.edge}^3, {found['date']}")


def _show_steps(rows: list[dict[str, Any]], title: str) -> None:
    columns = ["recipe", "batch", "loop", "fed img/s", "null img/s", "fed/null", "data wait", "host waits"]
    table = Table(*columns, "of peak", "GB", title=title)
    for row in rows:
        cells = [row["recipe"], row["batch"], row["loop"]]
        if fed := row.get("fed"):
            share = fed["share_of_peak_flops"]
            cells += [f"{fed['img_per_s']:.2f}", f"{row['null']['img_per_s']:.2f}", f"{row['fed_over_null']:.3f}"]
            cells += [f"{fed['data_wait_share']:.1%}", fed["host_waits_per_step"], share and f"{share:.1%}"]
            cells += [fed["peak_gb"]]
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    show(table)
    for loop, about in {row["loop"]: row for row in rows if "fed_by" in row}.items():
        print(f"{loop}: augmentation: {about['augmentation']}; fed by {about['fed_by']}")
    for row in rows:
        if row.get("failed"):
            print(f"left out: {row['recipe']}, batch {row['batch']}, {row['loop']}: {row['failed']}")


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
    name = choose(PROGRAM, "benchmark", given, WHAT)
    if isinstance(name, int):
        return name
    if name == "data":
        return entry(Data, data, name, given[1:], PROGRAM)
    if name == "stream":
        return entry(Stream, stream, name, given[1:], PROGRAM)
    if name == "step":
        return entry(Step, step, name, given[1:], PROGRAM)
    if name == "augment":
        from scripts import bench_augment  # here: the others' driver does without torch

        return entry(bench_augment.Options, bench_augment.bench, name, given[1:], PROGRAM)
    if name == "scale":
        return entry(Scale, watch, name, given[1:], PROGRAM)
    return entry(Prepare, prepare, name, given[1:], PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
