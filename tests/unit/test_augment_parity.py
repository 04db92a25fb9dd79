"""Our operations against nnU-Net's own classes (batchgeneratorsv2, of the extra `bench`), with the same parameters."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("batchgeneratorsv2")

from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial import spatial
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform

from raytrain_brats.augmentation import Drawn, drawn
from raytrain_brats.learn.augment import augment, change_intensity

FIRST = torch.tensor([0])
GAMMA = {"synchronize_channels": False, "p_per_channel": 1, "p_retain_stats": 1}


@pytest.fixture(scope="module")
def head() -> tuple[torch.Tensor, torch.Tensor]:
    """A ball with nested regions, and noise on them; zero outside."""
    at = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 44)] * 3, indexing="ij"))
    regions = torch.stack([((at - 0.1) ** 2).sum(0) < r for r in (0.3, 0.15, 0.05)]).float()
    noise = torch.randn((4, 44, 44, 44), generator=torch.Generator().manual_seed(0)) * 0.3
    return (noise + regions.sum(0) * 0.7 + 0.5) * ((at**2).sum(0) < 0.8), regions


def gamma_of_nnunet(image: torch.Tensor, power: float, inverted: bool) -> Any:
    transform = GammaTransform((0.7, 1.5), float(inverted), **GAMMA)
    stats, invert = torch.tensor([True]), torch.tensor([inverted])
    return transform._apply_to_image(
        image, apply_to_channel=FIRST, retain_stats=stats, invert_image=invert, gamma=torch.tensor([power])
    )


THEIRS: dict[str, tuple[Drawn, Any]] = {
    "blur": (
        Drawn(blur=((0.6, 0.8, 1.0),)),
        lambda x: GaussianBlurTransform((0.5, 1.0), False, False, 1.0)._apply_to_image(
            x, apply_to_channel=torch.tensor([True]), sigmas=[[0.6, 0.8, 1.0]]
        ),
    ),
    "brightness": (
        Drawn(brightness=(1.2,)),
        lambda x: MultiplicativeBrightnessTransform((0.75, 1.25), False)._apply_to_image(
            x, apply_to_channel=FIRST, multipliers=torch.tensor([1.2])
        ),
    ),
    "contrast": (
        Drawn(contrast=(1.2,)),
        lambda x: ContrastTransform((0.75, 1.25), True, False)._apply_to_image(
            x, apply_to_channel=FIRST, multipliers=torch.tensor([1.2])
        ),
    ),
    "low resolution": (
        Drawn(low_resolution=(0.7,)),
        lambda x: SimulateLowResolutionTransform((0.5, 1), False, True, None)._apply_to_image(
            x, apply_to_channel=FIRST, scales=torch.tensor([[0.7] * 3])
        ),
    ),
    "gamma": (Drawn(gamma=(1.3,)), lambda x: gamma_of_nnunet(x, 1.3, False)),
    "gamma of the negated image": (Drawn(inverted_gamma=(0.8,)), lambda x: gamma_of_nnunet(x, 0.8, True)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_an_operation_is_nnunets(head: Any, name: str) -> None:
    """Within float32's rounding, on a whole channel."""
    parameters, theirs = THEIRS[name]
    ours = head[0][:1].clone()
    change_intensity(ours, parameters)
    wanted = theirs(head[0][:1].clone())
    assert not torch.equal(wanted, head[0][:1])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rotation_scale_and_the_mask_are_nnunets(head: Any, seed: int) -> None:
    """Matrix from the same angles; image by SpatialTransform; regions on all but one voxel of ten thousand; the outside
    as MaskImageTransform leaves it, then mirrored."""
    image, regions = head
    size, numbers = (26, 30, 28), np.random.RandomState(seed).rand(6)
    angles, scale, flips = (2 * numbers[:3] - 1) * np.pi / 6, 0.7 + 0.7 * numbers[3], (True, False, seed == 1)
    given = {
        "augment/mirror": [0.2 if flip else 0.8 for flip in flips],
        "augment/rotation": [0.0, *numbers[:3]],
        "augment/scale": [0.0, numbers[3]],
    }
    moves = drawn(lambda purpose, count: [float(u) for u in given.get(purpose, [0.99] * count)])
    matrix = spatial.create_affine_matrix_3d(angles, [scale] * 3)
    plain = np.array(moves.matrix) @ np.diag([-1.0 if flip else 1.0 for flip in flips])
    np.testing.assert_allclose(plain, matrix, atol=1e-12)

    grid = spatial._create_centered_identity_grid2(size) @ torch.from_numpy(matrix.T).float()
    grid = spatial._convert_my_grid_to_grid_sample_grid(grid, image.shape[1:])
    transform = spatial.SpatialTransform(size, 0, False, p_rotation=1, border_mode_seg="constant", padding_value_seg=-1)
    where = {"grid": grid, "center_location_in_pixels": [22] * 3}
    labels = regions.sum(0, keepdim=True).to(torch.int16)
    labels[~image.any(0, keepdim=True)] = -1
    theirs = {
        "image": transform._apply_to_image(image.clone(), **where),
        "segmentation": transform._apply_to_segmentation(labels, **where),
    }
    mirror = MirrorTransform((0, 1, 2))
    axes = [axis for axis, flip in enumerate(flips) if flip]
    theirs = MaskImageTransform([0, 1, 2, 3]).apply(mirror.apply(theirs, axes=axes))
    wanted = torch.cat([theirs["segmentation"] >= value for value in (1, 2, 3)])

    ours, masks = augment(image, regions, moves, size, (9, 7, 8))
    inside = (theirs["segmentation"][0] >= 0) == ours.any(0)
    assert inside.float().mean() > 0.999
    torch.testing.assert_close(ours[:, inside], theirs["image"][:, inside], rtol=0, atol=2e-5)
    assert (wanted == (masks > 0)).float().mean() > 0.9999
