"""Kills under Ray: a real cluster whose nodes come and go, a real run on it, and whatever can be struck is struck.

In: a folder, a seed, how many kills.
Out: the kills by kind, how long each kept the run from its next step, and whether the run is that of one worker
undisturbed: each position once, weights and optimiser bit-equal.

The head has one CPU for data tasks, so that every worker, rank 0 too, sits on a node that may go.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raytrain_brats import books, verify
from raytrain_brats.reporting.goodput import time_breakdown
from raytrain_brats.run import checkpoint, spec
from raytrain_brats.run.control import Generation
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.worker import train_step_of
from scripts.chaos_campaign.core import Progress
from scripts.chaos_campaign.ray_cluster import Cluster, ElasticRun, kill, ours
from scripts.chaos_campaign.setting import CPU, stream

MIX = {"worker": 19, "driver": 9, "controller": 8, "node": 6, "raylet": 5, "head": 3}
"""Kills of each kind, of fifty: SIGKILL of a rank, of `train`, of Ray Train's controller, of a whole node, of a node's
raylet, of all nodes with the driver."""
OTHERS = ("drain", "pause", "late notice", "stop")
"""In turn, one after every fifth kill: a preemption notice in good time, a rank that is stopped (SIGSTOP), a notice two
seconds before the node is killed, SIGTERM to the driver. Nodes join in between."""
NODES = 3
CALM_S = (2.0, 30.0)
SOON_S = 20.0
"""After a recovery the processes that stand ready are made anew; whatever is struck sooner is told apart."""
HANG_S = 30.0
GOODPUT = 0.95
BARS_S = {"worker": 15.0, "node": 30.0, "raylet": 30.0, "join": 20.0}
"""What 95 % of the recoveries must not exceed, on an idle machine of two cores."""
NOTHING_REDONE = ("join", "drain", "stop")
PARTS = ("detect_s", "reschedule_s", "import_s", "first_batch_s", "first_step_s")
SETTINGS = (
    "train.reduction=exact", "network.blocks_down=[1, 1]", "network.blocks_up=[1]", "checkpoint.every_samples=100",
)  # fmt: skip


@dataclass
class Strikes:
    """A run and what was done to it."""

    cluster: Cluster
    run: ElasticRun
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    amid: int = 0
    """Kills before the group after the last kill had come to a step."""
    seconds: defaultdict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    redone: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    hangs_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    back: float = 0.0
    """When the run had last come back."""

    def once(self, kind: str, more: bool = True) -> None:
        """Strike and wait until it trains again; with `more` perhaps strike amid that, perhaps let a node join then."""
        if kind in ("node", "raylet", "drain", "late notice") and len(self.cluster.nodes) < 2:
            self.once("join")
        before, soon = self.run.generation(), time.time() - self.back < SOON_S
        began = self._strike(kind)
        if more and kind in ("worker", "node", "raylet") and self.rng.random() < 0.2:
            time.sleep(self.rng.uniform(0, 8))
            second, counted, now = self.rng.choice(("worker", "controller")), self.kills.total(), self.run.generation()
            struck = self._strike(second)
            if self.kills.total() > counted:
                self.amid += 1
                kind, began, before = f"{second} amid a recovery", struck, now
        self._back(kind + ", soon" * (soon and kind in BARS_S), began, before)
        if kind == "drain":
            self.cluster.kill_node(self.leaving)
        if more and self.rng.random() < 0.25 and len(self.cluster.nodes) < NODES and kind != "join":
            self.once("join")

    def _strike(self, kind: str) -> float:
        """Do it; when it was done, or when the command that follows it was given."""
        run, cluster, began = self.run, self.cluster, time.time()
        if kind == "worker":
            alive = [pid for pid in run.workers() if os.path.exists(f"/proc/{pid}")]
            kill([self.rng.choice(alive)] if alive else [])
            self.kills[kind] += bool(alive)
        elif kind == "controller":
            found = [pid for pid, name in ours(cluster.place) if "ray::TrainController" in name]
            kill(found)
            self.kills[kind] += bool(found)
        elif kind in ("node", "raylet"):
            cluster.kill_node(self.rng.choice(list(cluster.nodes)), kind == "raylet")
            self.kills[kind] += 1
        elif kind == "driver":
            run.driver.kill()
            self.kills[kind] += 1
        elif kind == "head":
            cluster.close()
            run.driver.wait()
            self.kills[kind] += 1
            cluster.start_head()
            cluster.add()
            cluster.add()
        elif kind == "pause":
            os.kill(self.rng.choice(run.workers()), signal.SIGSTOP)
        elif kind == "stop":
            run.interrupt(signal.SIGTERM)
        elif kind == "join":
            told = len(run.events("resize"))
            cluster.add()
            until = time.monotonic() + 180
            while len(found_ := run.events("resize")) == told:
                if time.monotonic() > until:
                    raise RuntimeError("a node that joined was not used within 180 s")
                time.sleep(0.1)
            began = float(found_[-1]["time"] - found_[-1]["seconds"])
        else:
            self.leaving = self.rng.choice(list(cluster.nodes))
            cluster.drain(self.leaving, within_s=2 if kind == "late notice" else 120)
            if kind == "late notice":
                time.sleep(2)
                cluster.kill_node(self.leaving)
        if kind in ("driver", "head", "stop"):
            run.driver.wait()
            began = time.time()
            run.start()
        return began

    def _back(self, kind: str, began: float, before: int) -> None:
        """Wait for the first step of a later group; note what it took."""
        until, first, restarts = time.monotonic() + 240, None, 0
        while first is None:
            rows = [r for r in books.recent(self.run.folder)[0] if r["generation"] > before]
            first = rows[0] if rows and rows[-1]["time"] > began else None
            if self.run.driver.poll() is not None:
                restarts += 1
                if restarts > kind.startswith("controller"):  # the driver of a killed controller may end, once
                    self.failures.append(f"{kind}: the driver gave up: {self.run.said.read_text()[-300:]}")
                began = time.time()
                self.run.start()
            if time.monotonic() > until:
                raise RuntimeError(f"{kind}: no step within 240 s; {self.run.events()[-3:]}")
            time.sleep(0.05)
        took = {"outside_s": first["time"] - began}
        self.run.rows_until(None, first["generation"] - 1, rows=2)  # its event is written by then
        told = [e for e in self.run.events("recovered") if e["generation"] == first["generation"]]
        took |= {part: told[0][part] for part in PARTS} if told else {}
        self.seconds[kind].append(took)
        self.back = first["time"]
        groups = [e for e in self.run.events("group") if e["generation"] > before]
        self.redone[kind].append(sum(e["redone_steps"] for e in groups))
        if kind.removesuffix(", soon") in NOTHING_REDONE and self.redone[kind][-1]:
            self.failures.append(f"{kind}: {self.redone[kind][-1]} steps were done again")
        if kind == "pause":
            found = [e["time"] - began for e in self.run.events("hang") if e["time"] > began]
            self.hangs_s += found[:1]
            if not found or found[0] > HANG_S:
                self.failures.append(
                    f"a stopped rank was found after {found[0]:.0f} s" if found else "a stopped rank was not found"
                )


def deck(rng: random.Random, kills: int) -> list[str]:
    """So many kills in the shares of MIX, in an order drawn."""
    cards = [kind for kind, number in MIX.items() for _ in range(number)]
    rng.shuffle(cards)
    return (cards * (kills // len(cards) + 1))[:kills]


def section(
    folder: Path,
    seed: int,
    kills: int,
    progress: Progress,
    kinds: tuple[str, ...] = (),
    calm_s: tuple[float, float] = CALM_S,
) -> dict[str, Any]:
    """The report's entry. `kinds` instead of a drawn order; between two strikes the run trains for `calm_s`."""
    rng = random.Random(seed)
    with cluster_in(folder, "--num-cpus=1") as cluster:
        cluster.add()
        cluster.add()
        found = Strikes(cluster, ElasticRun(cluster, f"1:{NODES}", *SETTINGS), rng)
        found.run.rows_until(2, 0)
        for number, kind in enumerate(kinds or deck(rng, kills)):
            if kills and found.kills.total() >= kills:
                break  # some cards strike twice
            time.sleep(rng.uniform(*calm_s))
            found.once(kind)
            progress(found.kills.total(), kills or len(kinds), f"{kind}, {len(found.failures)} violations")
            if not kinds and number % 5 == 4:
                time.sleep(rng.uniform(*calm_s))
                found.once(OTHERS[number // 5 % len(OTHERS)])
        time.sleep(2)
        found.run.interrupt()
        cluster.close()
        if found.kills.total() < kills:
            found.failures.append(f"{found.kills.total()} kills of {kills} hit something")
        return _judged(found)


def goodput(folder: Path, seed: int, minutes: float, progress: Progress) -> dict[str, Any]:
    """Two workers on one node, one of them killed every ten minutes, at minutes 5, 15, ...: what share was not lost?"""
    rng = random.Random(seed)
    steps = ("data.patch_xyz=[32, 32, 32]", "preprocess.spacing_mm=4.0", "checkpoint.every_samples=40")
    with cluster_in(folder, "--num-cpus=2") as cluster:
        run = ElasticRun(cluster, "2", "run.cpus_per_worker=0.5", *steps)
        found, began = Strikes(cluster, run, rng), time.monotonic()
        for minute in range(5, int(minutes), 10):
            time.sleep(max(0.0, began + 60 * minute - time.monotonic()))
            found.once("worker", more=False)
            progress(minute, int(minutes), f"{len(found.failures)} violations")
        time.sleep(max(0.0, began + 60 * minutes - time.monotonic()))
        run.interrupt()
        cluster.close()
        rows, events = books.read_rows(run.folder), run.events()
    spent = time_breakdown(events, rows)
    saves = [e for e in events if e["event"] == "checkpoint"]
    figures = {
        "kills": found.kills.total(),
        "minutes": minutes,
        "goodput (time in steps that were kept / time the run was up)": f"{spent.goodput:.1%}",
        "wall time": ", ".join(f"{what} {s / spent.wall_s:.2%}" for what, s in spent.parts().items() if s),
        "checkpoints": len(saves),
        "mean time between checkpoints (s)": round(spent.wall_s / max(1, len(saves)), 1),
        "training stood still for them": f"{sum(e['stall_s'] for e in saves) / spent.wall_s:.3%}",
        "steps": len(rows),
    }
    low = [f"goodput {spent.goodput:.1%}, {GOODPUT:.0%} wanted"] if spent.goodput < GOODPUT else []
    return {"figures": figures, "tables": {TABLE: [_row(found, "worker")]}, "failures": found.failures + low}


@contextmanager
def cluster_in(folder: Path, head: str) -> Iterator[Cluster]:
    """A cluster whose run is left in `folder` when something goes wrong."""
    place = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))  # short: Ray's sockets do not fit below a long path
    cluster = Cluster(place, head)
    try:
        yield cluster
    except BaseException:
        shutil.copytree(place / "run", folder / "run", dirs_exist_ok=True)
        shutil.copy(place / "train.log", folder)
        raise
    finally:
        cluster.close()
        shutil.rmtree(place, ignore_errors=True)


def _judged(found: Strikes) -> dict[str, Any]:
    """Hold the run against the seed and against one worker undisturbed."""
    run_dir, failures = found.run.folder, found.failures
    if verify.main(["--run-dir", run_dir]):
        failures.append("verify: the rows are not each position once")
    rows, events = books.read_rows(run_dir), books.read_events(run_dir)
    newest, damaged = checkpoint.newest_valid(run_dir)
    assert newest is not None
    failures += [f"checkpoint {name} is damaged: {why}" for name, why in damaged]
    calm = undisturbed(run_dir, str(found.run.data), newest.samples_seen)
    mine = checkpoint.load(run_dir, newest.name)[0]
    apart = [name for name in calm if mine[name].numpy().tobytes() != calm[name].numpy().tobytes()]
    if apart or mine.keys() != calm.keys():
        failures.append(f"not the undisturbed run's state: {len(apart)} of {len(calm)} tensors differ")
    for kind, bar_s in BARS_S.items():
        took = [one["outside_s"] for one in found.seconds[kind]] if kind in found.seconds else []
        if took and quantile(took, 0.95) > bar_s:
            failures.append(f"{kind}: back after {quantile(took, 0.95):.1f} s (p95), {bar_s:.0f} s wanted")
    spent = time_breakdown(events, rows)
    figures = {
        "kills": found.kills.total(),
        "kills by kind": ", ".join(f"{kind} ({number})" for kind, number in found.kills.most_common()),
        "of these before the run had come back from the one before": found.amid,
        "worker groups": len([e for e in events if e["event"] == "group"]),
        "world sizes (steps)": ", ".join(
            f"{w} ({n})" for w, n in sorted(Counter(r["world_size"] for r in rows).items())
        ),
        "steps applied, each position once": len(rows),
        "steps done again, all": sum(e["redone_steps"] for e in events if e["event"] == "group"),
        "weights and optimiser against one worker undisturbed": f"{len(apart)} of {len(calm)} tensors differ",
        "violations": len(failures),
        "a stopped rank was found after, most (s)": round(max(found.hangs_s, default=0.0), 1),
        "goodput of this run": f"{spent.goodput:.1%}",
    }
    return {"figures": figures, "tables": {TABLE: [_row(found, kind) for kind in found.seconds]}, "failures": failures}


TABLE = (
    "Seconds from the strike (from the new command, where one is needed: driver, controller, head, stop; from the "
    f"decision to resize for join) to the next applied step; 'soon' is within {SOON_S:.0f} s of the recovery before, "
    "'amid' before its first step; beside them the medians of the parts as the run's own events tell them:"
)


def _row(found: Strikes, kind: str) -> dict[str, Any]:
    took, redone = found.seconds[kind], found.redone[kind]
    outside = [one["outside_s"] for one in took]
    about: dict[str, Any] = {"strike": kind, "n": len(took)}
    about |= {f"p{p}": f"{quantile(outside, p / 100):.1f}" for p in (50, 95)} | {"most": f"{max(outside):.1f}"}
    for part in PARTS:
        values = [one[part] for one in took if part in one]
        about[part.removesuffix("_s").replace("_", " ")] = f"{quantile(values, 0.5):.1f}" if values else ""
    return about | {"steps done again, mean": round(sum(redone) / len(redone), 1)}


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def undisturbed(run_dir: str, data: str, until: int) -> dict[str, torch.Tensor]:
    """What one worker, without Ray and without a break, has after so many samples of the same run."""
    torch.set_num_threads(1)
    run_spec = spec.build(spec.read_config(run_dir).config, f"{run_dir}-calm", data, "")
    train_step, steps, seen = train_step_of(run_spec, 1, CPU), stream(run_spec, Generation(0), 0, 1), 0
    while seen < until:
        train_step.step(batch_of(next(steps), seen, CPU), seen)
        seen += run_spec.sampler.global_batch
    return train_step.state()[0]
