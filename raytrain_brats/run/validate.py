"""Score the held-out cases while a run trains. Runs in a worker.

In: the network as it is, the run's held-out cases.
Out: `validation/<samples seen>.csv` by rank 0, with Dice and HD95 per region and case; their means.

Ranks read every W-th case themselves: a second Ray Dataset beside the training stream would get no CPU.
"""

from collections.abc import Callable
from typing import Any

from torch import distributed

from raytrain_brats import storage
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import journal
from raytrain_brats.run.predictor import Score, means, predict_masks, score, table
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import RunSpec


def validate(spec: RunSpec, train_step: TrainStep, rank: int, seen: int, enter: Callable[[str], None]) -> Any:
    """Score the held-out cases over all ranks; rank 0 writes `validation/<seen>.csv` and gets the means.

    At most `validate.max_cases` cases; invalid ones are left out. `enter` is called with the phase after each case, and
    before ranks wait for each other, so that the hang detector sees progress. None on other ranks, and when no case
    could be scored.
    """
    chosen, world_size = spec.held_out_cases[: spec.config.validate_.max_cases], train_step.world_size
    mine = []
    for case in chosen[rank::world_size]:
        mine.append(_scored(spec, case, train_step))
        enter("validate")
    enter("gather")
    gathered: list[Any] = [mine]
    if world_size > 1:
        gathered = [None] * world_size
        distributed.all_gather_object(gathered, mine)
    scores = [s for part in gathered for s in part if s is not None]
    if rank != 0 or not scores:
        return None
    try:
        storage.write_bytes(RunDir(spec.run_dir).validation(seen), table(scores))
    except OSError as error:  # a full disk costs the table, not the run
        journal.warn(spec.run_dir, f"the table of the validation at sample {seen:,} is not written: {error}")
    return means(scores) | {"cases": len(scores)}


def _scored(spec: RunSpec, case: Case, train_step: TrainStep) -> Score | None:
    try:
        prepared = spec.source.load(case)
    except InvalidCase as error:
        reason = {"reason": error.reason, "detail": error.detail}
        journal.event(spec.run_dir, "quarantine", case=case.id, **reason, position=None)
        return None
    masks = predict_masks(prepared, train_step.averaged, spec.config, train_step.device)
    return score(case.id, masks, prepared, spec.source.convention)
