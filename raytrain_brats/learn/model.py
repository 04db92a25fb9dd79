"""Network, loss, optimiser and learning rate of a run. Runs in workers and predict tasks.

In: the config.
Out: a MONAI network from 4 modalities to 3 region logits, a per-sample loss, a torch optimiser.

Samples must not influence each other, or the number of workers would change the result: networks use group or
instance norm, and the loss is one number per sample.
"""

import math
from contextlib import nullcontext

import torch
import torch.utils.deterministic
from monai.losses.dice import DiceLoss
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn
from torch.nn import functional

from raytrain_brats.config import Config, DynUNetOptions, Optimiser
from raytrain_brats.labels import MODALITIES, REGIONS

torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
"""Else every buffer that is about to be written is filled first in `exact` mode; nothing here reads one before that."""


def build_network(config: Config) -> nn.Module:
    """(b, 4, z, y, x) -> (b, 3, z, y, x) logits of WT, TC, ET; the same initial weights for the same seed."""
    options = config.network
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU; the GPUs' states are not ours to read
        torch.default_generator.manual_seed(config.train.seed)
        if isinstance(options, DynUNetOptions):
            depth = len(options.filters)
            network: nn.Module = DynUNet(
                spatial_dims=3,
                in_channels=len(MODALITIES),
                out_channels=len(REGIONS),
                kernel_size=[3] * depth,
                strides=[1] + [2] * (depth - 1),
                upsample_kernel_size=[2] * (depth - 1),
                filters=options.filters,
                norm_name=("INSTANCE", {"affine": True}),
                # In place it would change a view that instance norm made, and autograd then copies each activation.
                act_name=("leakyrelu", {"inplace": False, "negative_slope": 0.01}),
                res_block=False,
            )
        else:
            network = SegResNet(
                in_channels=len(MODALITIES),
                out_channels=len(REGIONS),
                init_filters=options.init_filters,
                blocks_down=options.blocks_down,
                blocks_up=options.blocks_up,
            )
            _keep_precision(network)
    return network


class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its input. (autocast takes it to float32, and with it all that follows up to the
    next convolution: twice the bytes to move and to keep for backward.) Its sums are float32 all the same."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name of it
        half = input.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(input.device.type, enabled=False) if half else nullcontext():
            # GPUs want weights of the input's type; the cast is differentiable, so gradients arrive in float32
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return functional.group_norm(input, self.num_groups, weight, bias, self.eps)


class Upsample(nn.Upsample):
    """Interpolation whose result has the precision of its input. Autocast computes it in float32, and that stays: its
    backward adds 64 values by atomic additions in the result's own type, of which bfloat16 is slow on A100."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).to(input.dtype)


def _keep_precision(network: nn.Module) -> None:
    """Put our classes in the place of torch's; names and parameters stay, and so do checkpoints."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                norm = GroupNorm(child.num_groups, child.num_channels, child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)
            elif type(child) is nn.Upsample:
                factor, corners = child.scale_factor, child.align_corners
                setattr(parent, name, Upsample(None, factor, child.mode, corners))


_dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=1e-5, smooth_dr=1e-5, reduction="none", batch=False)


def sample_losses(logits: Tensor, regions: Tensor) -> Tensor:
    """(b,) soft Dice + binary cross-entropy, each averaged over the three regions, in float32."""
    logits, regions = logits.float(), regions.float()
    dice: Tensor = _dice(logits, regions)
    entropy = functional.binary_cross_entropy_with_logits(logits, regions, reduction="none")
    return dice.flatten(1).mean(1) + entropy.flatten(1).mean(1)


def build_optimiser(network: nn.Module, options: Optimiser) -> torch.optim.Optimizer:
    if options.name == "sgd":
        return torch.optim.SGD(
            network.parameters(), options.learning_rate, momentum=0.99, nesterov=True, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay)


def learning_rate(options: Optimiser, samples_seen: int, total: int) -> float:
    """A function of samples, so that it is the same at any number of workers: linear warm-up, then a cosine."""
    warmup = options.warmup_share * total
    if samples_seen < warmup:
        return options.learning_rate * (samples_seen + 1) / (warmup + 1)
    done = (samples_seen - warmup) / max(1.0, total - warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
