"""The whole story in minutes: `scripts/demo [--chaos] [--fresh] [--data DIR] [--out DIR]`.

In: nothing (phantoms are drawn), or a folder of real cases.
Out: `data/`, `store/`, `run/`, `predictions/`, `summary.json` under --out. Every stage is the command a person would
type, and is printed before it runs. The same command again goes on with what is there; `.made-by-demo` tells what that
was made from.
"""

import sys

from raytrain_brats import books, home, interrupt

if __name__ == "__main__":  # before Ray is imported, which takes seconds
    interrupt.install()
    home.provide()

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.table import Table

from raytrain_brats import config, outputs, storage
from raytrain_brats.cases import scan
from raytrain_brats.cli import Changes, Uri, entry, show
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import journal

RECORD = ".made-by-demo"
MADE = {RECORD, "data", "store", "run", "predictions", "manifest.jsonl", "summary.json"}
_MADE_FILES = re.compile(
    r"data/(dataset\.json|write-probe|(imagesTr|labelsTr)/BRATS_\d{3,}\.nii\.gz)"
    r"|(store|run)/(.*/)?[^/]+\.(json|jsonl|parquet|yaml|safetensors|csv|png|html|log|txt|snapshot)|(store|run)/write-probe"
    r"|run/(ray|tensorboard)/.*|predictions/([^/]+\.nii\.gz|write-probe|made-by\.json)|manifest\.jsonl|summary\.json|write-probe"
)
"""What a demo makes: nothing else is deleted by --fresh."""


@dataclass(frozen=True)
class Args:
    """Phantoms, index, prepare, train, verify, evaluate, predict, report, on a Ray of its own in this process."""

    out: str = "demo"
    """Folder for everything the demo makes."""
    data: Uri = ""
    """A folder of real cases in MSD or BraTS layout, instead of phantoms."""
    cases: int = 30
    """Phantoms to draw."""
    chaos: bool = False
    """Kill a training worker in the middle, and see the run go on."""
    fresh: bool = False
    """Delete what an earlier demo made in --out and begin anew, instead of going on with it."""
    recipe: str = "demo"
    """Name of a recipe, or a YAML file."""
    set: Changes = ()
    """Change a setting of the recipe: key=value; may be given several times."""


def work(args: Args) -> None:
    out = Path(storage.normal(args.out))
    _check(args, out)
    _begin(out, args)
    data = storage.normal(args.data) if args.data else str(out / "data")
    manifest, store, run_dir = (str(out / name) for name in ("manifest.jsonl", "store", "run"))
    recipe = ("--recipe", args.recipe, *(f"--set={s}" for s in args.set))
    stages: list[tuple[str, ...]] = [
        ("index", "--data", data, "--out", manifest),
        ("prepare", "--data", manifest, "--store", store, *recipe),
        ("train", "--store", store, "--run-dir", run_dir, *recipe),
        ("verify", "--run-dir", run_dir),
        ("evaluate", "--store", store, "--run-dir", run_dir),
        ("predict", "--run-dir", run_dir, "--out", str(out / "predictions"), "--images", data),
        ("report", "--run-dir", run_dir),
    ]
    if not args.data:
        stages.insert(0, ("phantom", "--out", data, "--cases", str(args.cases)))
    began, over = time.perf_counter(), threading.Event()
    os.environ["RAY_ADDRESS"] = "local"  # a demo must not land on somebody's cluster
    cluster.connect()  # one Ray for all commands, in this process
    seconds = {"ray": round(time.perf_counter() - began, 1)}
    for command, *arguments in stages:
        if args.chaos and command == "train":
            threading.Thread(target=_kill_a_worker, args=(run_dir, time.time(), over), daemon=True).start()
        try:
            seconds[command] = stage(command, *arguments)
        finally:
            if command == "train":
                over.set()
    ray.shutdown()
    seconds["total"] = round(time.perf_counter() - began, 1)
    _summarise(out, run_dir, seconds)


def stage(command: str, *arguments: str) -> float:
    """Run a command in this process; its seconds. Raises RunFailed, naming it, unless it exits with 0."""
    print(f"\n$ raytrain-brats {command} {shlex.join(arguments)}", flush=True)
    began = time.perf_counter()
    code = importlib.import_module(f"raytrain_brats.{command}").main(list(arguments))
    if code == interrupt.EXIT_CODE:
        raise KeyboardInterrupt
    if code:
        raise RunFailed(f"stage {command} ended with exit code {code}")
    return round(time.perf_counter() - began, 1)


def _check(args: Args, out: Path) -> None:
    """Raises UserError for what would fail later, before anything is cleared or made."""
    config.load(args.recipe, args.set)
    if storage.is_s3(args.out):
        raise UserError(f"--out {args.out}: a demo is made in a local folder; give one")
    if args.data:
        scan.scan(args.data)
        if outputs.within(args.data, str(out)) or outputs.within(str(out), args.data):
            raise UserError(f"--data {args.data} and --out {args.out} lie within each other; give another --out")
    elif args.cases < 5:
        raise UserError(f"--cases {args.cases}: one of five folds is held out, so at least 5 are needed")


def _begin(out: Path, args: Args) -> None:
    """Go on in a folder that is empty or that a demo of the same arguments made; with --fresh, begin anew in it.

    Raises UserError, before anything is changed, when it holds other files or another demo.
    """
    asked = {
        "data": outputs.place(args.data) if args.data else f"{args.cases} phantoms",
        "recipe": args.recipe,
        "set": " ".join(sorted({s.partition("=")[0]: s for s in args.set}.values())),  # the last one counts
    }
    here = {path.name for path in out.iterdir()} if out.is_dir() else set()
    here = {name for name in here if not any(name.startswith(f".{ours}.") for ours in MADE)} - {storage.PROBE}
    if here:  # but what a process leaves that is killed amid a write
        others = sorted(here - MADE)
        if others or not (out / RECORD).exists():
            raise UserError(f"--out {out} holds other files ({', '.join(others[:3])}); give an empty or new folder")
        try:
            before = dict(json.loads((out / RECORD).read_bytes()))
        except (ValueError, TypeError):
            before = {}  # of an earlier version, which did not write it down
        if not args.fresh and before != asked:
            then, now = (", ".join(f"{k} {v or 'none'}" for k, v in a.items()) or "not known" for a in (before, asked))
            raise UserError(
                f"--out {out} holds a demo of other arguments ({then}; now {now}); "
                "give those, another --out, or --fresh to delete it and begin anew"
            )
        if args.fresh:
            _delete(out)
    storage.check_writable(str(out))
    storage.write_bytes(str(out / RECORD), json.dumps(asked).encode())


def _delete(out: Path) -> None:
    """All that a demo made. Raises UserError, with everything still there, when something else lies among it."""
    files = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in sorted(files):
        name = path.relative_to(out).as_posix()
        if path.is_symlink() or not (path.name.startswith(".") or _MADE_FILES.fullmatch(name)):
            raise UserError(f"{path} was not made by a demo; move it elsewhere before --fresh, or give another --out")
    about = out / "data" / "dataset.json"
    if any(path.is_relative_to(about.parent) for path in files):
        try:
            drawn = isinstance(json.loads(about.read_bytes())["synthetic"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            drawn = False
        if not drawn:
            raise UserError(f"{about} is none of phantoms: real data lie there; move them elsewhere before --fresh")
    for name in sorted(MADE - {RECORD}):  # the record last: stopped in between, it is still a demo's folder
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _kill_a_worker(run_dir: str, since: float, over: threading.Event) -> None:
    """SIGKILL the last rank of this launch once a third of the samples is applied; nothing when training is over."""
    while not over.wait(0.5):
        rows, events = books.recent(run_dir)
        launches = [e for e in events if e["event"] == "launch" and e["time"] >= since]
        workers = [e for e in events if e["event"] == "worker" and e["time"] >= since]
        if rows and launches and workers and rows[-1]["samples_seen"] > launches[-1]["total_samples"] / 3:
            victim = workers[-1]
            print(f"chaos: killing the worker of rank {victim['rank']} (process {victim['pid']})", flush=True)
            with contextlib.suppress(ProcessLookupError):  # it has ended in this very moment
                os.kill(victim["pid"], signal.SIGKILL)
            journal.event(run_dir, "chaos", killed_pid=victim["pid"], rank=victim["rank"])
            return


def _summarise(out: Path, run_dir: str, seconds: dict[str, float]) -> None:
    rows, events = books.read_rows(run_dir), books.read_events(run_dir)
    scores = json.loads((out / "run" / "evaluation" / "summary.json").read_bytes())
    launch = max(i for i, e in enumerate(events) if e["event"] == "launch")
    summary = {
        "dice": scores["dice"],
        "hd95_mm": scores["hd95_mm"],
        "data": scores["data"],
        "steps": len(rows),
        "samples_seen": rows[-1]["samples_seen"],
        "seconds": seconds,
        "restarts": sum(e["event"] == "group" for e in events[launch:]) - 1,
        "report": str(out / "run" / "report.html"),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    made = Table(title=f"made in {seconds['total']:.0f} s", show_header=False)
    dice = ", ".join(f"{region} {scores['dice'][region]:.3f}" for region in REGIONS)
    kind = " (phantoms: no clinical meaning)" if scores["data"] == "phantom" else ""
    made.add_row("Dice, held-out cases", f"{dice}{kind}")
    made.add_row("samples, steps", f"{summary['samples_seen']:,}, {summary['steps']:,}")
    made.add_row("restarts", f"{summary['restarts']}")
    made.add_row("seconds", ", ".join(f"{stage} {s:g}" for stage, s in seconds.items() if stage != "total"))
    for name, what in (("report", "run/report.html"), ("predictions", "predictions/"), ("summary", "summary.json")):
        made.add_row(name, str(out / what))
    show(made)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "", argv, "scripts/demo")


if __name__ == "__main__":
    sys.exit(main())
