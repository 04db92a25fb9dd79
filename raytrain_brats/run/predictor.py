"""Segment and score whole cases on their native grid. Runs in a task (evaluate, predict) or in a worker (validation).

In: weights of one network, or of several whose probabilities are averaged; prepared cases.
Out: region probabilities and masks; Dice and HD95 per region and case; their means and table.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raytrain_brats.config import Config
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import Prepared, restore
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.learn.inference import probabilities, to_masks
from raytrain_brats.learn.model import build_network
from raytrain_brats.learn.step import network_weights
from raytrain_brats.run import checkpoint, gains
from raytrain_brats.scoring.metrics import Masks, dice, hd95_mm

Network = tuple[nn.Module, Config]
KEPT_BYTES = 1 << 30
"""Weights that a process keeps from case to case: eight networks of nnU-Net's size. Others are loaded for each case."""


@dataclass(frozen=True)
class Score:
    """Of one case, by region."""

    case_id: str
    dice: dict[str, float]
    hd95_mm: dict[str, float]


def left_out(case: str, error: Exception) -> str:
    """Why a case has no result, in words; raises what concerns all cases."""
    if isinstance(error, InvalidCase):
        return f"case {case}: {error.reason}, {error.detail}"
    if isinstance(error, RunFailed | UserError):
        raise error
    text = " ".join(str(error).split())[:300]
    advice = "; a GPU with more memory, or --no-mirror, may do it" if "out of memory" in text.lower() else ""
    return f"case {case}: {type(error).__name__}: {text}{advice}"


def newest_weights(run_dir: str, best: bool = False) -> tuple[str, dict[str, torch.Tensor]]:
    """(name, weights) of the newest valid checkpoint, or of the best, read once: a run that is training may remove the
    files.

    Raises UserError when there is none.
    """
    found = gains.best_valid(run_dir) if best else checkpoint.newest_valid(run_dir)[0]
    if found is None:
        raise UserError(f"{run_dir} has no valid checkpoint yet; train first")
    return weights_of(run_dir, found)


def weights_of(run_dir: str, found: checkpoint.Checkpoint) -> tuple[str, dict[str, torch.Tensor]]:
    """(name, weights with which it predicts) of a valid checkpoint."""
    return found.name, network_weights(checkpoint.load(run_dir, found.name)[0])


class Networks:
    """Several networks, one after the other, on one device: memory does not grow with their number."""

    def __init__(self, references: tuple[Any, ...], device: torch.device) -> None:
        """`references` to each network's (config, weights) in the object store."""
        self._references, self.device = references, device
        self._kept: dict[int, Network] = {}
        self._room = KEPT_BYTES

    def __iter__(self) -> Iterator[Network]:
        """Each is valid until the next is asked for."""
        for number, reference in enumerate(self._references):
            network, config = self._kept.get(number) or _loaded(reference, self.device)
            size = sum(tensor.nbytes for tensor in network.state_dict().values())
            if number not in self._kept and size <= self._room:
                self._kept[number], self._room = (network, config), self._room - size
            yield network, config
            del network  # before the next one is loaded


def _loaded(reference: Any, device: torch.device) -> Network:
    import ray  # here: the process that scores beside the training does without

    config, weights = ray.get(reference)
    network = build_network(config)
    network.load_state_dict(weights)
    return network.to(device), config


@lru_cache(maxsize=1)
def shared_networks(references: tuple[Any, ...]) -> Networks:
    """Networks in the object store, on this process's GPU if any; kept for the next case."""
    return Networks(references, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def predict_on_box(
    prepared: Prepared, network: nn.Module, config: Config, device: torch.device, *, mirror: bool | None = None
) -> Tensor:
    """(3, z, y, x) probabilities on the prepared box, on the device. `mirror`: average over mirror images; None as
    `validate.mirror` says."""
    case, settings = (prepared.image_czyx, prepared.mean, prepared.std), config.validate_
    mirrored, window = settings.mirror if mirror is None else mirror, (config.data.patch_xyz, settings.overlap)
    return probabilities(network, *case, *window, device, config.train.amp, mirror=mirrored)


@torch.inference_mode()
def native_probabilities(
    prepared: Prepared, networks: Iterable[Network], device: torch.device, *, mirror: bool | None = None
) -> npt.NDArray[np.float32]:
    """(3, x, y, z) probabilities of WT, TC, ET on the native grid, 0 outside the prepared box: the mean over networks.

    They are summed on the prepared box, so all must be of one spacing (`members.opened` sees to it).
    """
    count, total = 0, None
    for network, config in networks:
        found = predict_on_box(prepared, network, config, device, mirror=mirror)
        total, count = found if total is None else total.add_(found), count + 1
        del network, found  # before the next one is loaded
    assert total is not None, "no network"
    if count > 1:
        total /= count
    native: npt.NDArray[np.float32] = restore(total.cpu().numpy(), prepared.geometry)
    return native


def voxel_mm3(prepared: Prepared) -> float:
    """The volume of a voxel of the native grid."""
    return float(abs(np.linalg.det(np.array(prepared.geometry.affine)[:3, :3])))


def predict_masks(
    prepared: Prepared, network: nn.Module, config: Config, device: torch.device, *, mirror: bool | None = None
) -> Masks:
    """(3, x, y, z) region masks on the native grid by one network, nested as label values are: ET in TC in WT."""
    return to_masks(native_probabilities(prepared, [(network, config)], device, mirror=mirror))


def score(
    case_id: str, predicted: Masks, prepared: Prepared, convention: str, known_dice: dict[str, float] | None = None
) -> Score:
    """Compare masks with the native label."""
    truth = to_regions(prepared.truth_xyz(), convention)
    spacing_mm = tuple(np.linalg.norm(np.array(prepared.geometry.affine)[:3, :3], axis=0).tolist())
    return Score(case_id, known_dice or dice(predicted, truth), hd95_mm(predicted, truth, spacing_mm))


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
