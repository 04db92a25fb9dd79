"""Tiny runs that are trained in this process, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raytrain_brats.config import parse
from raytrain_brats.data.patch import Patch, decode
from raytrain_brats.data.turns import StreamSpec, rank_steps, tables
from raytrain_brats.run import journal, spec, worker
from raytrain_brats.run.control import Generation
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.spec import RunSpec

CPU = torch.device("cpu")


def run_spec(run: Path, data: Path, fold: int = 0, **sections: Any) -> RunSpec:
    """A run with a tiny network on tiny cases; a section's settings win over those here."""
    settings: dict[str, Any] = {
        "network": {"name": "dynunet", "filters": [4, 4, 4], "heads": 1},
        "data": {"patch_xyz": [8, 8, 8], "patches_per_case": 2, "fold": fold},
        "train": {"epochs": 2, "global_batch": 4, "ema_samples": 8, "reduction": "exact"},
        "validate": {"every_samples": 8, "max_cases": 1, "overlap": 0},
        "checkpoint": {"every_samples": 1000, "best": True},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values if "name" not in values else values
    return spec.build(parse(settings, "test"), str(run), str(data), "")


def begin(made: RunSpec) -> Generation:
    """As the driver does: what the run is, then where it goes on."""
    journal.take_over(made.run_dir)
    spec.write_config(made)
    return journal.begin_generation(made.run_dir)


def train(made: RunSpec, stop: int = 0) -> Generation:
    """To its end, or until the step from sample `stop` on would be trained."""
    generation = begin(made)
    patches = steps(made, generation)
    try:
        worker.train_rank(made, generation, Rank(0, 1, CPU), PhaseTimer(), _until(patches, made, generation, stop))
    except KilledError:
        assert stop
    return generation


class KilledError(Exception):
    """The group ends as by a kill: nothing is saved after the last checkpoint."""


def _until(patches: Iterator[list[Patch]], made: RunSpec, generation: Generation, stop: int) -> Iterator[list[Patch]]:
    for number, mine in enumerate(patches):
        if stop and generation.samples_seen + number * made.sampler.global_batch >= stop:
            raise KilledError
        yield mine


def steps(made: RunSpec, generation: Generation) -> Iterator[list[Patch]]:
    """All patches of each step, as the stream brings them."""
    step = generation.samples_seen // made.sampler.global_batch
    streamed = StreamSpec(made.sampler, made.train_cases, made.source, made.patch_spec, step, 1 << 30)
    rows = (decode(table) for table in tables(streamed, 0, 1))
    return rank_steps(rows, made.sampler, made.patch_spec.size_zyx, step, 0, 1)
