"""Real runs on this machine against `plan`'s closed form and its simulation: the error, run by run.

In: which runs. Out: a table; with --json every figure; exit code 1 when an error is above a tenth.

Rates are measured here first, apart from the runs: loading by `scripts/bench data` (all processes counted), the
package's own step in as many processes as the run will have workers; what Ray's own processes take and what a killed
worker costs, by a run that is not among those compared. Then each run trains by the command, and the pace of its later
steps counts. On these CPUs networks are small; what a GPU does cannot be checked here.
"""

import sys

from raytrain_brats import home, interrupt

if __name__ == "__main__":
    interrupt.install()
    home.provide()

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import distributed

from raytrain_brats import books, storage
from raytrain_brats.cli import entry, show
from raytrain_brats.config import Config
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.planning import closed_form, rates, simulation
from raytrain_brats.planning.demand import Demand
from raytrain_brats.run.feed import batch_of
from scripts.gpu_parts.setting import CPU, patches, train_step
from scripts.gpu_parts.setting import config as small_config

ROOT = Path(__file__).resolve().parent.parent
BATCH, CASES, ALLOWED, LEAST_STEPS = 4, 8, 0.1, 20
KILL_CHECKPOINT_S = 5.0
SETTLED_S, KILLED_AFTER_S, CALIBRATED_S = 25.0, 50.0, 110.0
"""From a run's first step: the processes that are kept ready have imported everything, on the cores that train; in the
run by which the machine is measured a worker is killed; that run ends."""


@dataclass(frozen=True)
class Case:
    """One run. `edge`: of a patch; below 64 the network is small."""

    grid: int
    edge: int
    route: str
    workers: int
    kills: tuple[float, ...] = ()
    """When a worker is killed, as shares of the seconds."""


RUNS = {
    "tiny-step-1": Case(60, 32, "store", 1),
    "tiny-step-2": Case(60, 32, "store", 2),
    "tiny-data-1": Case(60, 16, "raw", 1),
    "full-data-1": Case(240, 16, "raw", 1),
    "full-data-2": Case(240, 16, "raw", 2),
    "full-step-1": Case(240, 48, "store", 1),
    "full-step-2": Case(240, 48, "store", 2),
    "kill": Case(240, 48, "store", 2, kills=(0.3, 0.65)),
}
"""Data-bound where patches are tiny and cases are not; step-bound where it is the other way round."""


@dataclass(frozen=True)
class Machine:
    """What this machine adds to every run."""

    other_cpus: float
    """CPUs that Ray's own processes, the driver and the controller take all the time."""
    recover_s: float
    """Seconds that a killed worker costs, beside steps done again: until the run is back at its pace."""


@dataclass(frozen=True)
class Args:
    """Train for real on this machine, and compare with what `plan` would say: pace, waiting, a kill."""

    runs: str = ",".join(RUNS)
    """Comma-separated."""
    seconds: float = 90.0
    """About how long each run trains, three times that with kills; the first 25 do not count."""
    work: str = ""
    """Folder for cases and what loading them takes, kept for the next time; by default one that is removed."""
    json: str = ""
    """File for the figures; of this script, or new."""


def work(args: Args) -> None:
    names = [name for name in args.runs.split(",") if name]
    if args.seconds < 2 * SETTLED_S:
        raise UserError(f"--seconds {args.seconds:g}: {2 * SETTLED_S:g} at least; the first {SETTLED_S:g} do not count")
    if unknown := [name for name in names if name not in RUNS]:
        raise UserError(f"--runs {unknown[0]}: not known; there are {', '.join(RUNS)}")
    if args.json and Path(args.json).exists() and '"made_by": "scripts/check_plan"' not in Path(args.json).read_text():
        raise UserError(f"--json {args.json}: is there, and is not of this script; give another name")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="plan") as folder:
        kept = Path(args.work or folder).absolute()
        machine = measure(kept, Path(folder) / "measured")
        print(json.dumps(dataclasses.asdict(machine)), file=sys.stderr, flush=True)
        for name in names:
            case = RUNS[name]
            d = demand(case, bench(kept, case), machine, *step_costs(case))
            rows.append({"run": name} | compare(case, d, kept, Path(folder) / name, args.seconds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    table(rows)
    if args.json:
        about = {
            "made_by": "scripts/check_plan",
            "date": time.strftime("%Y-%m-%d"),
            "cpus": os.cpu_count(),
            "machine": dataclasses.asdict(machine),
            "rows": rows,
        }
        storage.write_bytes(args.json, (json.dumps(about, indent=1) + "\n").encode())
    if wrong := [row["run"] for row in rows if abs(row["error"]) > ALLOWED]:
        raise RunFailed(f"the simulation is more than a tenth off: {', '.join(wrong)}")


def bench(kept: Path, case: Case) -> dict[str, Any]:
    """What `scripts/bench data` measures of the case's route; it leaves cases and a store of them in the folder."""
    out = kept / f"bench-{case.grid}-{case.edge}.json"
    if not out.exists():  # else of an earlier run, or time: CPU seconds, which other load changes little
        place = cases_of(kept, case)
        place.mkdir(parents=True, exist_ok=True)
        words = ["data", "--peers", "", "--rounds", "2", "--cases", CASES, "--grid", case.grid, "--patch", case.edge]
        words += ["--patches", "2048", "--warm", "256", "--seconds", "12", "--work", place, "--json", out]
        run([sys.executable, "-P", "-m", "scripts.bench", *map(str, words)])
    return dict(json.loads(out.read_text())["pipelines"][case.route])


def cases_of(kept: Path, case: Case) -> Path:
    return kept / f"grid{case.grid}"


def run(command: list[str]) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"{' '.join(command[2:6])} ended with {done.returncode}: {done.stderr[-600:]}")


def settings(case: Case) -> Config:
    """One thread a worker, as the plan has it: of two that wait for each other, data tasks hold one up."""
    changes = [f"preprocess.spacing_mm={240 / case.grid}", "train.epochs=100000", "validate.every_samples=1000000000"]
    changes += ["run.threads_per_worker=1"]
    changes += [
        f"checkpoint.every_s={KILL_CHECKPOINT_S if case.kills else 60}",
        "train.optimiser.learning_rate=0.0001",
    ]
    return small_config("segresnet", case.edge, BATCH, *changes)


def step_costs(case: Case) -> tuple[float, float]:
    """(seconds of a step, CPU seconds of a sample): the package's own step by all ranks side by side, with a run's
    sums of gradients, without stream and Ray."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(case.workers, get_context("spawn")) as ranks:
        spent = list(ranks.map(_steps, range(case.workers), [case] * case.workers, [folder] * case.workers))
    return max(wall for wall, _ in spent), sum(cpu for _, cpu in spent) / BATCH


def _steps(rank: int, case: Case, folder: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of a step of one rank."""
    torch.set_num_threads(1)
    if case.workers > 1:
        where = f"file://{folder}/ranks"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=case.workers)
    step, share = train_step(settings(case), CPU, case.workers), BATCH // case.workers
    # Each sample draws its own augmentation: many of them, as single ones differ by far
    given = [patches(number * case.workers + rank, case.edge, share, CPU) for number in range(16)]
    warm, counted = (10, 60) if case.edge < 48 else (3, 15)
    for number in range(warm + counted):
        if number == warm:
            began, cpu = time.perf_counter(), time.process_time()
        step.step(batch_of(given[number % len(given)], 0, CPU), number % len(given) * BATCH)
    return (time.perf_counter() - began) / counted, (time.process_time() - cpu) / counted


def cpu_of_patch(loaded: dict[str, Any]) -> dict[str, float]:
    """CPU seconds a patch of data tasks, coordinator, worker (without its step) and all others."""
    found = {"task": 0.0, "deal": 0.0, "worker": 0.0, "other": 0.0}
    of = {"ReadCases": "task", "IDLE": "task", "raylet": "task", "SplitCoordinator": "deal", "RayTrainWorker": "worker"}
    for one in loaded["runs"]:
        for process, seconds in one["cpu_s"].items():
            found[of.get(process, "other")] += seconds / one["patches"] / len(loaded["runs"])
    return found


def demand(case: Case, loaded: dict[str, Any], machine: Machine, step_s: float, sample_cpu_s: float) -> Demand:
    """As `planning.demand`, for a machine that trains on the CPUs on which it reads."""
    ours = rates.load()
    cpus = os.cpu_count() or 1
    # At a time, here and when loading was measured: as ray_ext/cluster.py:measure has it
    tasks, benched = (max(1, int(cpus - 0.5 * w)) if cpus <= 4 else cpus for w in (case.workers, 1))
    per_patch = cpu_of_patch(loaded)
    case_s = 4 * benched * sum(one["wall_s"] / one["patches"] for one in loaded["runs"]) / len(loaded["runs"])
    samples, own_s = 10**9, BATCH / case.workers * sample_cpu_s
    return Demand(
        samples=samples,
        epoch_samples=samples,
        global_batch=BATCH,
        patches_per_case=4,
        ranks=case.workers,
        nodes=1,
        compute_s=own_s,
        reduce_s=max(0.0, step_s - own_s),  # ranks wait for each other
        cpus=float(cpus),
        cpus_per_task=cpus / tasks,
        case_cpu_s=4 * per_patch["task"],
        case_wait_s=max(0.0, case_s - 4 * per_patch["task"]),  # Ray gives a task's place to the next one
        step_cpu_s=sample_cpu_s + per_patch["worker"] + per_patch["deal"] + per_patch["other"],
        other_cpus=machine.other_cpus,
        case_read_mb=1.0,
        case_gets=1,
        case_sent_mb=9 * case.edge**3 / 1e6,
        gets_per_s=1e9,
        task_node_mb_s=1e9,
        on_train=1.0,
        store_mb=80.0 * cpus,
        train_node_mb_s=1e9,
        deal_s=per_patch["deal"],
        coordinators=1,
        pause_s=ours.of("pause.execution"),
        residency="stream",
        alone_case_s=0.0,
        checkpoint_s=settings(case).checkpoint.every_s,
        checkpoint_stall_s=ours.of("checkpoint.stall"),
        validation_s=0.0,
        start_s=0.0,
        prepare_s=0.0,
        recover_s=machine.recover_s,
        join_s=0.0,
        interruptions_per_s=0.0,
        replacement_s=0.0,
    )


def compare(case: Case, d: Demand, kept: Path, run_dir: Path, seconds: float) -> dict[str, Any]:
    limits = closed_form.limits(d)
    closed = min(limits.values())
    simulated, wait = simulation.pace(d, True, 0)
    killed_at, seconds = list[float](), seconds * (3 if case.kills else 1)

    def kill(driver: psutil.Process) -> None:
        killed_at.append(kill_worker(driver))

    rows = train(case, kept, run_dir, seconds, dict.fromkeys((share * seconds for share in case.kills), kill))
    counted = [row for row in rows if row["time"] >= rows[0]["time"] + SETTLED_S]
    first, last = counted[0], counted[-1]
    spent, samples = last["time"] - first["time"], last["samples_seen"] - first["samples_seen"]
    if case.kills:  # the same samples, with these kills; in closed form each costs half an interval beside its recovery
        closed *= 1 - len(killed_at) * (d.recover_s + d.checkpoint_s / 2) / spent
        whole = dataclasses.replace(d, samples=samples, epoch_samples=samples)
        simulated = samples / simulation.run(whole, simulated, simulated, 0, [t - first["time"] for t in killed_at])[0]
    steps = sum(row["step_s"] for row in counted)
    return {
        "limit": min(limits, key=lambda name: limits[name]),
        "closed": round(closed, 2),
        "simulated": round(simulated, 2),
        "real": round(samples / spent, 2),
        "error": round(simulated / (samples / spent) - 1, 4),
        "wait_simulated": round(wait, 3),
        "wait_real": round(sum(row["wait_s"] for row in counted) / max(1e-9, steps), 3),
        "steps": len(counted),
        "load": round(os.getloadavg()[0], 1),  # of this run too; far above its processes, the error is the machine's
        "demand": dataclasses.asdict(d),
    }


def measure(kept: Path, run_dir: Path) -> Machine:
    """By a run of its own, with one kill: what all but workers spend, and what is missing at its end."""
    case, marks = dataclasses.replace(RUNS["full-step-2"], kills=(KILLED_AFTER_S / CALIBRATED_S,)), []
    patch = cpu_of_patch(bench(kept, case))

    def mark(driver: psutil.Process) -> None:
        marks.append((time.time(), spent_beside_workers(driver)))

    def kill(driver: psutil.Process) -> None:
        mark(driver)
        kill_worker(driver)

    rows = train(case, kept, run_dir, CALIBRATED_S, {SETTLED_S: mark, KILLED_AFTER_S: kill})
    (settled, cpu_before), (killed, cpu_after) = marks
    before = [row for row in rows if settled <= row["time"] <= killed]
    samples, last = before[-1]["samples_seen"] - before[0]["samples_seen"], rows[-1]
    pace = samples / (before[-1]["time"] - before[0]["time"])
    others = (cpu_after - cpu_before) / (killed - settled) - pace * (patch["task"] + patch["deal"] + patch["other"])
    # What the kill threw away has no rows: those of before it end at the checkpoint
    lost = last["time"] - killed - (last["samples_seen"] - before[-1]["samples_seen"]) / pace
    return Machine(max(0.0, others), lost)


def spent_beside_workers(driver: psutil.Process) -> float:
    """CPU seconds so far of a run's processes but for its training workers' and its data tasks' of before."""
    total = 0.0
    for process in (driver, *driver.children(recursive=True)):
        try:
            if "RayTrainWorker" not in process.cmdline()[0]:
                total += sum(process.cpu_times()[:2])
        except (psutil.Error, IndexError):
            continue
    return total


def train(
    case: Case, kept: Path, run_dir: Path, seconds: float, at: Mapping[float, Callable[[psutil.Process], None]]
) -> list[dict[str, Any]]:
    """The rows of a real run of so many seconds from its first step; `at`: what is done when, with its driver."""
    recipe = run_dir.with_suffix(".yaml")
    recipe.write_text(settings(case).to_yaml())
    place = cases_of(kept, case)
    cases = ["--store", str(place / "store")] if case.route == "store" else ["--data", str(place / "source")]
    command = [sys.executable, "-P", "-m", "raytrain_brats.train", *cases, "--recipe", str(recipe)]
    command += ["--run-dir", str(run_dir), "--workers", str(case.workers)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with Path(f"{run_dir}.log").open("w") as log:
        env = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": "local"}
        driver = psutil.Popen(command, env=env, stdout=log, stderr=log)
        try:
            began, until, left = 0.0, time.monotonic() + 300, sorted(at)
            while time.monotonic() < until and driver.poll() is None:
                time.sleep(1)
                if not began and run_dir.exists() and books.read_rows(str(run_dir)):
                    began = time.monotonic()
                    until = began + seconds
                if left and began and time.monotonic() > began + left[0]:
                    at[left.pop(0)](driver)
        finally:
            if driver.poll() is None:
                driver.terminate()  # the group saves, so that all rows are there; scripts' children may ignore SIGINT
            try:
                driver.wait(120)
            except psutil.TimeoutExpired:
                driver.kill()
                raise
    rows = [dict(row) for row in books.read_rows(str(run_dir))] if run_dir.exists() else []
    if len(rows) < LEAST_STEPS or left:
        raise RunFailed(f"{run_dir.name}: only {len(rows)} steps in {seconds:g} s; its log ends: {tail(run_dir)}")
    return rows


def tail(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()[-600:]


def kill_worker(driver: psutil.Process) -> float:
    """One training worker of the run that this script started; the time."""
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if any("RayTrainWorker" in word for word in process.cmdline()[:1]):
                process.kill()
                return time.time()
    raise RunFailed("found no training worker to kill")


def table(rows: list[dict[str, Any]]) -> None:
    columns = ("run", "limit", "closed", "simulated", "real", "error", "wait_simulated", "wait_real", "steps", "load")
    shown = Table(*columns, title="samples a second")
    for row in rows:
        shown.add_row(*(f"{row[name]:+.1%}" if name == "error" else str(row[name]) for name in columns))
    show(shown)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "", argv, "scripts/check_plan")


if __name__ == "__main__":
    sys.exit(main())
