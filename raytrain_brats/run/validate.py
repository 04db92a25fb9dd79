"""Score whole cases on their native grid.

In: a network, labelled cases and their source.
Out: Dice and HD95 per region and case; a summary over all ranks.

Ranks read their dealt cases themselves: a second Ray Dataset beside the training stream gets no CPU.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import distributed, nn

from raytrain_brats import storage
from raytrain_brats.config import Config
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import Prepared, restore
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.learn.inference import probabilities
from raytrain_brats.learn.metrics import dice, hd95_mm
from raytrain_brats.learn.model import build_network
from raytrain_brats.learn.step import network_weights
from raytrain_brats.run import checkpoint, journal
from raytrain_brats.run.spec import RunSpec

Masks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """One case; the dictionaries go from region to value."""

    case_id: str
    dice: dict[str, float]
    hd95_mm: dict[str, float]


def newest_weights(run_dir: str) -> tuple[str, dict[str, torch.Tensor]]:
    """(name, weights) of the newest valid checkpoint, read once: a run that goes on may remove the files.

    Raises UserError when there is none.
    """
    found, _ = checkpoint.newest_valid(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no valid checkpoint yet; train first")
    return found.name, network_weights(checkpoint.load(run_dir, found.name)[0])


@lru_cache(maxsize=1)
def shared_network(reference: ray.ObjectRef[Any]) -> tuple[nn.Module, Config, torch.device]:
    """The network of a shared (config, weights), on the GPU if this process was given one; kept for the next case."""
    settings, weights = ray.get(reference)
    network = build_network(settings)
    network.load_state_dict(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return network.to(device), settings, device


def predict_masks(prepared: Prepared, network: nn.Module, config: Config, device: torch.device) -> Masks:
    """(3, x, y, z) region masks on the native grid, nested as label values are: ET in TC in WT."""
    found = probabilities(
        network,
        prepared.image_czyx,
        prepared.mean,
        prepared.std,
        config.data.patch_xyz,
        config.validate_.overlap,
        device,
        config.train.amp,
    )
    masks: Masks = restore(found, prepared.geometry) > 0.5
    masks[1] |= masks[2]
    masks[0] |= masks[1]
    return masks


def score(case_id: str, predicted: Masks, prepared: Prepared, convention: str) -> Score:
    """Compare masks with the native label."""
    truth = to_regions(prepared.truth_xyz(), convention)
    spacing_mm = tuple(np.linalg.norm(np.array(prepared.geometry.affine)[:3, :3], axis=0).tolist())
    return Score(case_id, dice(predicted, truth), hd95_mm(predicted, truth, spacing_mm))


def means(scores: list[Score]) -> dict[str, dict[str, float]]:
    """{"dice": {region: mean}, "hd95_mm": {region: mean}} over cases."""
    return {
        what: {r: round(float(np.mean([getattr(s, what)[r] for s in scores])), 4) for r in REGIONS}
        for what in ("dice", "hd95_mm")
    }


def table(scores: list[Score]) -> bytes:
    """CSV, a case a line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["case", *(f"dice_{r}" for r in REGIONS), *(f"hd95_{r}_mm" for r in REGIONS)])
    for s in sorted(scores, key=lambda s: s.case_id):
        values = [*(s.dice[r] for r in REGIONS), *(s.hd95_mm[r] for r in REGIONS)]
        lines.writerow([s.case_id, *(f"{value:.4f}" for value in values)])
    return text.getvalue().encode()


def validate(
    spec: RunSpec,
    network: nn.Module,
    device: torch.device,
    rank: int,
    world_size: int,
    seen: int,
    mark: Callable[..., None] = lambda phase: None,
) -> Any:
    """Score the held-out cases over all ranks; rank 0 writes `validation/<seen>.csv` and gets the means.

    The number of cases is bounded by `validate.max_cases`; unreadable ones are left out. None on other ranks, and
    when nothing could be scored.
    """
    chosen = spec.held_out_cases[: spec.config.validate_.max_cases]
    mine = []
    for case in chosen[rank::world_size]:
        mine.append(_scored(spec.run_dir, spec.source, case, network, spec.config, device))
        mark("validate")
    gathered: list[Any] = [mine]
    if world_size > 1:
        gathered = [None] * world_size
        distributed.all_gather_object(gathered, mine)
    scores = [s for part in gathered for s in part if s is not None]
    if rank != 0 or not scores:
        return None
    storage.write_bytes(storage.join(spec.run_dir, "validation", f"{seen:012d}.csv"), table(scores))
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
