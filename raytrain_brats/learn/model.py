"""Network, loss, optimiser and learning rate of a run. Runs in workers and predict tasks.

In: the config.
Out: a MONAI network from 4 modalities to 3 region logits, a per-sample loss, a torch optimiser.

Samples must not influence each other, or the number of workers would change the result: networks use group or
instance norm, and the loss is one number per sample.
"""

import math

import torch
from monai.losses.dice import DiceLoss
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn
from torch.nn import functional

from raytrain_brats.config import Config, DynUNetOptions, Optimiser
from raytrain_brats.labels import MODALITIES, REGIONS


def build_network(config: Config) -> nn.Module:
    """(b, 4, z, y, x) -> (b, 3, z, y, x) logits of WT, TC, ET; the same initial weights for the same seed."""
    options = config.network
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
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
    return network


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
