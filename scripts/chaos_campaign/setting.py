"""What is trained while things are broken: a tiny run, its stream without Ray, and how it ends when nothing happens.

In: a folder, a seed.
Out: a `RunSpec`; a rank's stream; the end of the undisturbed run; what is wrong with the end of another run.
"""

import dataclasses
import gc
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raytrain_brats import books, verify
from raytrain_brats.config import Config, parse
from raytrain_brats.data import store as stores
from raytrain_brats.data.patch import Patch, decode
from raytrain_brats.data.turns import StreamSpec, rank_steps, tables
from raytrain_brats.run import checkpoint, control, journal, spec, worker
from raytrain_brats.run.control import Generation
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.synthetic.phantom import write_set

CPU = torch.device("cpu")


class Setting:
    """The cases of a campaign, drawn once, and the jobs on them."""

    def __init__(self, folder: Path, steps: int = 80, global_batch: int = 4, reduction: str = "exact") -> None:
        torch.set_num_threads(1)  # ranks are forked from here: no pool of threads may be alive
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self.folder, self._data, self._store = folder, folder / "data", folder / "store"
        self._steps, self._global_batch, self._reduction = steps, global_batch, reduction
        self._ends: dict[int, End] = {}
        if not self._data.exists():
            write_set(str(self._data), cases=7, seed=3, grid=32, anatomy="procedural")

    def spec(self, name: str, seed: int) -> RunSpec:
        """Five cases of three patches: 15 samples an epoch, so no epoch ends with a step of 4."""
        epoch = -(-15 // self._global_batch)
        config = {
            "network": {"name": "segresnet", "init_filters": 8, "blocks_down": [1], "blocks_up": []},
            "preprocess": {"spacing_mm": 10.0},
            "data": {"patch_xyz": [4, 4, 4], "patches_per_case": 3},
            "train": {
                "seed": seed,
                "epochs": -(-self._steps // epoch),
                "global_batch": self._global_batch,
                "reduction": self._reduction,
                "augment": {"kind": ("light", "full")[seed % 2]},
            },
            "checkpoint": {"every_samples": 2 * self._global_batch},
            "run": {"compare_weights_steps": 8},
        }
        parsed, run_dir = parse(config, "chaos"), str(self.folder / name)
        self._prepare(parsed)
        if seed % 4:
            made = spec.build(parsed, run_dir, "", str(self._store))
        else:  # now and then straight from .nii.gz, which costs more
            made = spec.build(parsed, run_dir, str(self._data), "")
        assert len(made.train_cases) == 5, "the fold of the seven cases"
        return dataclasses.replace(made, held_out_cases=())  # nothing to validate

    def _prepare(self, config: Config) -> None:
        if (self._store / "index.jsonl").exists():
            return
        options = spec.preprocessing(config)
        manifest, source = spec.open_cases(config, str(self._data))
        cases = tuple(stores.put(str(self._store), source, case, options) for case in manifest.cases)
        stores.write_index(str(self._store), dataclasses.replace(manifest, cases=cases), options)

    def warm(self) -> None:
        """Train a few steps here: everything that is imported late is there before ranks are forked."""
        steps, self._steps = self._steps, 4
        for seed in (0, 1):  # both routes
            train_alone(self.spec(f"warm-{seed}", seed))
        self._steps = steps
        gc.collect()
        gc.freeze()  # a forked child that collects would copy every page

    def end(self, seed: int) -> "End":
        """How the run of this seed ends with one worker, undisturbed."""
        if seed not in self._ends:
            calm = self.spec(f"calm-{seed}", seed)
            train_alone(calm)
            self._ends[seed] = End(calm)
        return self._ends[seed]


def train_alone(run_spec: RunSpec) -> None:
    """The whole run in this process."""
    generation = journal.begin_generation(run_spec.run_dir)
    worker.train_rank(run_spec, generation, Rank(0, 1, CPU), PhaseTimer(), stream(run_spec, generation, 0, 1))


def stream(run_spec: RunSpec, generation: Generation, rank: int, world_size: int) -> Iterator[list[Patch]]:
    """This rank's patches of each step, as Ray Data gives them."""
    sampler, size_zyx = run_spec.sampler, run_spec.patch_spec.size_zyx
    step = generation.samples_seen // sampler.global_batch
    streamed = StreamSpec(sampler, run_spec.train_cases, run_spec.source, run_spec.patch_spec, step, 1 << 30)
    rows = (decode(table) for table in tables(streamed, rank, world_size))
    return rank_steps(rows, sampler, size_zyx, step, rank, world_size)


class End:
    """The newest checkpoint of a run that is finished."""

    def __init__(self, run_spec: RunSpec) -> None:
        self.spec = run_spec

    @cached_property
    def _loaded(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        found, damaged = checkpoint.newest_valid(self.spec.run_dir)
        assert found is not None
        assert not damaged
        assert found.samples_seen == self.spec.sampler.total
        return checkpoint.load(self.spec.run_dir, found.name)

    def differs_from(self, other: "End") -> str:
        """What is not bit-equal in weights and optimiser; an empty string when nothing is."""
        (mine, my_state), (theirs, their_state) = self._loaded, other._loaded
        if mine.keys() != theirs.keys():
            return f"other tensors: {sorted(mine.keys() ^ theirs.keys())}"
        names = [name for name in mine if not _same_bits(mine[name], theirs[name])]
        if names:
            return f"{len(names)} of {len(mine)} tensors differ, the first is {names[0]}"
        return "" if my_state["learner"] == their_state["learner"] else "the optimiser's settings differ"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def faults_at_end(run_spec: RunSpec, calm: End) -> list[str]:
    """What is wrong with a finished run: its rows, weights, optimiser, events, leftovers."""
    wrong = []
    rows = books.read_rows(run_spec.run_dir)
    if len(rows) != run_spec.sampler.total // run_spec.sampler.global_batch:
        wrong.append(f"{len(rows)} rows instead of {run_spec.sampler.total // run_spec.sampler.global_batch}")
    for number, row in enumerate(rows):
        if why := verify.difference(row, number, run_spec.sampler, run_spec.train_cases):
            wrong.append(f"row {number + 1}: {why}")
            break
    try:
        if why := End(run_spec).differs_from(calm):
            wrong.append(f"not the undisturbed run's end: {why}")
    except (AssertionError, ValueError) as error:
        wrong.append(f"no valid last checkpoint: {error}")
    damaged = [e for e in books.read_events(run_spec.run_dir) if e["event"] == "damaged_checkpoint"]
    wrong += [f"checkpoint {e['name']} was damaged: {e['why']}" for e in damaged]
    generation = control.current(run_spec.run_dir)
    assert generation is not None
    checkpoint.prune(run_spec.run_dir, run_spec.config.checkpoint.keep, generation.number)
    kept = checkpoint.committed(run_spec.run_dir)
    files = sorted(p for p in Path(run_spec.run_dir, "checkpoints").rglob("*") if p.is_file())
    if len(kept) > run_spec.config.checkpoint.keep or len(files) != 3 * len(kept):
        wrong.append(f"left in checkpoints/: {[p.name for p in files]}")
    hidden = [p.name for p in Path(run_spec.run_dir).iterdir() if p.name.startswith(".")]
    if left := [name for name in hidden if not name.endswith(".lock")]:  # the locks of `storage.swap` are to stay
        wrong.append(f"temporary files left beside the books: {left}")
    return wrong
