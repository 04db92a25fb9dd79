"""Score the held-out cases while a run trains. Runs in a worker.

In: the network as it is, the run's held-out cases.
Out: `validation/<samples seen>.csv` by rank 0, with Dice and HD95 per region and case; their means.

Ranks read and predict every W-th case themselves: a second Ray Dataset beside the training stream would get no CPU.
Dice is counted where the network's answer lies. On a GPU the rest is scored by another process while the next case is
predicted, then while training goes on, so the scores arrive some steps later.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed

from raytrain_brats import storage
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import Prepared
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run import journal
from raytrain_brats.run.predictor import Score, means, predict_masks, predict_on_box, table
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.scorer import Predicted, Scorer
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.scoring.metrics import dice_by_counts, overlap


class Validation:
    """Of one rank in one worker group: cases are predicted, then gathered over all ranks. Both are collectives.

    `enter` is called with the phase after each case, and before ranks wait for each other, so that the hang detector
    sees progress.
    """

    def __init__(self, spec: RunSpec, rank: Rank, enter: Callable[[str], None], aside: bool | None = None) -> None:
        """`aside`: whether a process of its own scores; by default where a GPU predicts."""
        self._spec, self._rank, self._enter = spec, rank, enter
        self.aside = rank.device.type == "cuda" if aside is None else aside
        self._scorer = Scorer(self.aside)
        self._scores: list[Future[Score]] = []
        self._seen: int | None = None

    @property
    def pending(self) -> bool:
        """Whether there is a validation that is not gathered; the same on all ranks."""
        return self._seen is not None

    @property
    def scored(self) -> bool:
        """Whether nothing of it remains to be done on this rank but to gather."""
        return self.pending and all(score.done() for score in self._scores)

    def predict(self, train_step: TrainStep, seen: int) -> None:
        """At most `validate.max_cases` cases; invalid ones are left out."""
        chosen = self._spec.held_out_cases[: self._spec.config.validate_.max_cases]
        self._seen = seen
        for case in chosen[self._rank.number :: self._rank.world_size]:
            if predicted := self._predicted(case, train_step):
                self._scores.append(self._scorer.submit(predicted))
            self._enter("validate")
        self._enter("gather")
        if self._rank.world_size > 1:
            distributed.barrier()

    def gather(self) -> Any:
        """Wait for the scores; rank 0 writes `validation/<seen>.csv` and gets the means. None on other ranks, and when
        no case could be scored."""
        scores, seen = [self._wait(score) for score in self._scores], self._seen
        self._scores, self._seen = [], None
        self._enter("gather")
        gathered: list[Any] = [scores]
        if self._rank.world_size > 1:
            gathered = [None] * self._rank.world_size
            distributed.all_gather_object(gathered, scores)
        scores = [score for part in gathered for score in part]
        if self._rank.number != 0 or not scores:
            return None
        try:
            storage.write_bytes(RunDir(self._spec.run_dir).validation(seen or 0), table(scores))
        except OSError as error:  # a full disk costs the table, not the run
            journal.warn(self._spec.run_dir, f"the table of the validation at sample {seen:,} is not written: {error}")
        return means(scores) | {"cases": len(scores)}

    def _wait(self, score: "Future[Score]") -> Score:
        """A process that scores may have to start first: for a minute no rank that waits for it is taken for hung."""
        for _ in range(12):
            self._enter("validate")
            with contextlib.suppress(TimeoutError):
                return score.result(timeout=5)
        return score.result()

    def _predicted(self, case: Case, train_step: TrainStep) -> Predicted | None:
        try:
            prepared = self._spec.source.load(case)
        except InvalidCase as error:
            reason = {"reason": error.reason, "detail": error.detail}
            journal.event(self._spec.run_dir, "quarantine", case=case.id, **reason, position=None)
            return None
        return predicted(case.id, prepared, train_step, self._spec.source.convention)

    def close(self) -> None:
        self._scorer.close()


def predicted(case_id: str, prepared: Prepared, train_step: TrainStep, convention: str) -> Predicted:
    """A case's regions; its Dice, too, where its voxels were not resampled. Else its masks are only known after the
    probabilities were interpolated, by SciPy: on a CPU."""
    light = replace(prepared, image_czyx=prepared.image_czyx[:0])
    model = train_step.averaged, train_step.config, train_step.device
    if prepared.geometry.resampled:
        native = predict_masks(prepared, *model).sum(0, dtype=np.uint8)
        return Predicted(case_id, native, False, light, convention, None)
    masks = predict_on_box(prepared, *model) > 0.5
    nested = torch.stack([masks.any(0), masks[1] | masks[2], masks[2]])
    label, native_label = prepared.label_zyx, prepared.native_label_xyz
    assert label is not None, "held-out cases are labelled; the manifest saw to it"
    on_device, whole = (
        torch.from_numpy(np.array(values)).to(train_step.device)
        for values in (label, label if native_label is None else native_label)
    )
    dice = dice_by_counts(overlap(nested, on_device, whole, train_step.table))
    regions = nested.sum(0, dtype=torch.uint8).cpu().numpy()
    return Predicted(case_id, regions, True, light, convention, dice)
