"""nnU-Net's augmentation on the device: the CPU's patches but for rounding, and its time beside `light` and a step.

In: patches made by hand. Out: findings.
"""

import torch

from raytrain_brats.learn.augment import normal
from raytrain_brats.learn.batch import make, upload
from raytrain_brats.run.feed import batch_of
from scripts.gpu_parts.setting import CPU, Setting, config, patches, train_step

SAMPLES = 16
OFF = 1e-3
"""Of a voxel, in standard deviations: products and sums are fused on the one device and not on the other. Where the
brain's mask is interpolated to just one half, a voxel is background on one of them alone: one of ten thousand may."""


def augmentation(setting: Setting) -> None:
    """Noise bit for bit, patches but for rounding and masks but for voxels at one half; ms a sample."""
    here, there = (normal(123456789012345, 0, 100_000, device).cpu() for device in (CPU, setting.device))
    setting.findings.tell("noise", "" if torch.equal(here, there) else "other bits than on the CPU")
    made, ms = {}, {}
    for kind in ("full", "light"):
        settings = config("dynunet", setting.edge, SAMPLES, f"train.augment.kind={kind}")
        for device in (CPU, setting.device):
            step = train_step(settings, device)
            samples = batch_of(patches(0, setting.edge, SAMPLES, device), 0, device).samples
            _, numbers = upload([], samples, device)
            size = (setting.edge,) * 3
            given = (samples, numbers, step.table, settings.train.augment, size)
            made[device] = [part.cpu() for part in make(*given)[:2]]
        off = float(((made[CPU][0] - made[setting.device][0]).abs() > OFF).float().mean())
        agree = float((made[CPU][1] == made[setting.device][1]).float().mean())
        wrong = "" if off < 1e-4 and agree > 0.9999 else "another patch than the CPU's"
        ms[kind] = round(setting.milliseconds(lambda given=given: make(*given), 4) / SAMPLES, 3)  # type: ignore[misc]
        setting.findings.tell(
            f"{kind}, {SAMPLES} samples", wrong, voxels_off=off, masks_agree=agree, ms_a_sample=ms[kind]
        )
    setting.found["augmentation_ms"] = ms
