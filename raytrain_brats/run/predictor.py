"""Segment and score whole cases on their native grid. Runs in a task (evaluate, predict) or in a worker (validation).

In: a network's weights, prepared cases.
Out: region masks; Dice and HD95 per region and case; their means and table.
"""

import csv
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from raytrain_brats.config import Config
from raytrain_brats.data.preprocess import Prepared, restore
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.learn.inference import probabilities, to_masks
from raytrain_brats.learn.metrics import Masks, dice, hd95_mm
from raytrain_brats.learn.model import build_network
from raytrain_brats.learn.step import network_weights
from raytrain_brats.run import checkpoint


@dataclass(frozen=True)
class Score:
    """Of one case, by region."""

    case_id: str
    dice: dict[str, float]
    hd95_mm: dict[str, float]


def newest_weights(run_dir: str) -> tuple[str, dict[str, torch.Tensor]]:
    """(name, weights) of the newest valid checkpoint, read once: a run that is training may remove the files.

    Raises UserError when there is none.
    """
    found, _ = checkpoint.newest_valid(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no valid checkpoint yet; train first")
    return found.name, network_weights(checkpoint.load(run_dir, found.name)[0])


@lru_cache(maxsize=1)
def shared_network(reference: ray.ObjectRef[Any]) -> tuple[nn.Module, Config, torch.device]:
    """The network of a (config, weights) in the object store, on this process's GPU if any; kept for the next case."""
    settings, weights = ray.get(reference)
    network = build_network(settings)
    network.load_state_dict(weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return network.to(device), settings, device


def predict_masks(
    prepared: Prepared, network: nn.Module, config: Config, device: torch.device, *, mirror: bool | None = None
) -> Masks:
    """(3, x, y, z) region masks on the native grid, nested as label values are: ET in TC in WT.

    `mirror`: average over mirror images; None as `validate.mirror` says.
    """
    mirror = config.validate_.mirror if mirror is None else mirror
    case = prepared.image_czyx, prepared.mean, prepared.std
    patch_xyz, overlap = config.data.patch_xyz, config.validate_.overlap
    found = probabilities(network, *case, patch_xyz, overlap, device, config.train.amp, mirror=mirror)
    return to_masks(restore(found, prepared.geometry))


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
    """CSV, one case a line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["case", *(f"dice_{r}" for r in REGIONS), *(f"hd95_{r}_mm" for r in REGIONS)])
    for s in sorted(scores, key=lambda s: s.case_id):
        values = [*(s.dice[r] for r in REGIONS), *(s.hd95_mm[r] for r in REGIONS)]
        lines.writerow([s.case_id, *(f"{value:.4f}" for value in values)])
    return text.getvalue().encode()
