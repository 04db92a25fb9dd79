"""Score the held-out cases while a run trains. Runs in a worker.

In: the network as it is, the run's held-out cases.
Out: `validation/<samples seen>.csv` by rank 0, with Dice and HD95 per region and case; their means.

Ranks read their dealt cases themselves: a second Ray Dataset beside the training stream gets no CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from raytrain_brats import storage
from raytrain_brats.config import Config
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.store import Source
from raytrain_brats.run import journal
from raytrain_brats.run.predictor import Score, means, predict_masks, score, table
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import RunSpec


def validate(
    spec: RunSpec,
    network: nn.Module,
    device: torch.device,
    rank: int,
    world_size: int,
    seen: int,
    enter: Callable[[], None] = lambda: None,
) -> Any:
    """Score the held-out cases over all ranks; rank 0 writes `validation/<seen>.csv` and gets the means.

    `enter` is called after each case, as a sign of life.
    The number of cases is bounded by `validate.max_cases`; unreadable ones are left out. None on other ranks, and
    when nothing could be scored.
    """
    chosen = spec.held_out_cases[: spec.config.validate_.max_cases]
    mine = []
    for case in chosen[rank::world_size]:
        mine.append(_scored(spec.run_dir, spec.source, case, network, spec.config, device))
        enter()
    gathered: list[Any] = [mine]
    if world_size > 1:
        gathered = [None] * world_size
        distributed.all_gather_object(gathered, mine)
    scores = [s for part in gathered for s in part if s is not None]
    if rank != 0 or not scores:
        return None
    storage.write_bytes(RunDir(spec.run_dir).validation(seen), table(scores))
    return means(scores) | {"cases": len(scores)}


def _scored(
    run_dir: str, source: Source, case: Case, network: nn.Module, config: Config, device: torch.device
) -> Score | None:
    try:
        prepared = source.load(case)
    except InvalidCase as error:
        journal.event(run_dir, "quarantine", case=case.id, reason=error.reason, detail=error.detail, position=None)
        return None
    return score(case.id, predict_masks(prepared, network, config, device), prepared, source.convention)
