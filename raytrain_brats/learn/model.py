"""Network, loss and optimiser of a run. Runs in workers and predict tasks.

In: the config.
Out: a MONAI network from 4 modalities to 3 region logits, a per-sample loss, a torch optimiser.

Samples must not influence each other, or the number of workers would change the result: networks use group or
instance norm, and the loss is one number per sample.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.deterministic
from monai.losses.dice import DiceLoss
from monai.networks.blocks.mednext_block import MedNeXtOutBlock
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.mednext import MedNeXt
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.nn import functional

from raytrain_brats import parts
from raytrain_brats.config import Config, Optimiser
from raytrain_brats.errors import UserError
from raytrain_brats.labels import MODALITIES, REGIONS
from raytrain_brats.networks import DynUNetOptions, MedNeXtOptions, Network, OwnNetwork, SegResNetOptions
from raytrain_brats.parts import OwnPart

torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
"""Else every buffer that is about to be written is filled first in `exact` mode; nothing here reads one before that."""

_IN, _OUT = len(MODALITIES), len(REGIONS)


def build_network(config: Config) -> nn.Module:
    """(b, 4, z, y, x) -> (b, 3, z, y, x) logits of WT, TC, ET; the same initial weights for the same seed.

    In training a network with heads gives a list: these logits, then those at 1/2, 1/4, ... of the resolution. Raises
    UserError for a network of one's own that is not there or cannot be made.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU; the GPUs' states are not ours to read
        torch.default_generator.manual_seed(config.train.seed)
        network = _network(config.network)
    if not isinstance(config.network, OwnNetwork):  # one's own may use its layers otherwise
        _keep_precision(network)
    return network


def _network(options: Network) -> nn.Module:
    if isinstance(options, OwnNetwork):
        return _own_network(options)
    if isinstance(options, DynUNetOptions):
        return _DynUNet(options)
    if isinstance(options, MedNeXtOptions):
        return _MedNeXt(options)
    if isinstance(options, SegResNetOptions):
        return SegResNet(
            in_channels=_IN,
            out_channels=_OUT,
            init_filters=options.init_filters,
            blocks_down=options.blocks_down,
            blocks_up=options.blocks_up,
        )
    strides = [2] * (options.levels - 1)
    return UNet(3, _IN, _OUT, options.channels, strides, num_res_units=options.res_units)


def _own_network(part: OwnNetwork) -> nn.Module:
    found, given, named = parts.arguments(part, "network.name")
    made = parts.construct(found, part, "network.name", *given, **named)
    if not isinstance(made, nn.Module):
        raise UserError(f"network.name {part.name} makes a {type(made).__name__}; it must be a torch.nn.Module")
    return made


class _DynUNet(DynUNet):
    """Its lower heads stay at their own resolution (MONAI enlarges and stacks them: gigabytes at 128^3), and the way
    through its layers is a plain loop (MONAI's is recursive, and leaves each head's output in a list that lives on)."""

    def __init__(self, options: DynUNetOptions) -> None:
        super().__init__(
            spatial_dims=3,
            in_channels=_IN,
            out_channels=_OUT,
            kernel_size=[3] * options.levels,
            strides=[1] + [2] * (options.levels - 1),
            upsample_kernel_size=[2] * (options.levels - 1),
            filters=options.filters,
            norm_name=("INSTANCE", {"affine": True}),
            # In place it would change a view that instance norm made, and autograd then copies each activation.
            act_name=("leakyrelu", {"inplace": False, "negative_slope": 0.01}),
            res_block=False,
            deep_supervision=options.heads > 0,
            deep_supr_num=max(1, options.heads),
        )
        del self.skip_layers  # the same layers by other names: a checkpoint would hold each weight twice
        self.register_load_state_dict_pre_hook(_without_skip_layers)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = [self.input_block(x)]
        for down in self.downsamples:
            skips.append(down(skips[-1]))
        levels = [self.bottleneck(skips[-1])]
        for up in self.upsamples:
            levels.append(up(levels[-1], skips.pop()))
        out: Tensor = self.output_block(levels[-1])
        if not (self.training and self.deep_supervision):
            return out
        # No `strict`: the deepest levels have no head.
        return [out, *(head(level) for head, level in zip(self.deep_supervision_heads, levels[-2::-1], strict=False))]


def _without_skip_layers(_: nn.Module, weights: dict[str, Any], prefix: str, *__: Any) -> None:
    """Checkpoints of earlier versions, and MONAI's own, name each layer of DynUNet twice."""
    for name in [name for name in weights if name.startswith(f"{prefix}skip_layers.")]:
        del weights[name]


class _MedNeXt(MedNeXt):
    """With as many heads as wanted, and none computed outside training (MONAI computes all four, always)."""

    def __init__(self, options: MedNeXtOptions) -> None:
        *blocks, blocks_bottleneck = options.blocks
        *expansion, bottleneck_expansion = options.expansion
        super().__init__(
            spatial_dims=3,
            init_filters=options.init_filters,
            in_channels=_IN,
            out_channels=_OUT,
            encoder_expansion_ratio=expansion,
            decoder_expansion_ratio=expansion[::-1],
            bottleneck_expansion_ratio=bottleneck_expansion,
            kernel_size=options.kernel_size,
            use_residual_connection=True,
            blocks_down=blocks,
            blocks_bottleneck=blocks_bottleneck,
            blocks_up=blocks[::-1],
        )
        widths = [options.init_filters << level for level in range(1, options.heads + 1)]
        self.heads = nn.ModuleList(MedNeXtOutBlock(width, _OUT, "3d") for width in widths)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, skips = self.stem(x), []
        for stage, down in zip(self.enc_stages, self.down_blocks, strict=True):
            skips.append(stage(x))
            x = down(skips[-1])
        levels = [self.bottleneck(x)]
        for up, stage in zip(self.up_blocks, self.dec_stages, strict=True):
            levels.append(stage(up(levels[-1]) + skips.pop()))
        out: Tensor = self.out_0(levels[-1])
        if not (self.training and self.heads):
            return out
        return [out, *(head(level) for head, level in zip(self.heads, levels[-2::-1], strict=False))]


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


def sample_losses(outputs: Tensor | Sequence[Tensor], regions: Tensor, loss: str | OwnPart = "dice_bce") -> Tensor:
    """(b,) soft Dice, and binary cross-entropy beside it unless `loss` is "dice", each averaged over the three regions,
    in float32; or what a loss of one's own makes of float32 logits and regions, averaged over all but the first axis.

    Of a network with heads the weighted sum over its outputs, by 8/15, 4/15, 2/15, 1/15 with three heads, each against
    the regions at its own resolution (nnU-Net's deep supervision). Never MONAI's DiceCELoss: of three channels it takes
    softmax cross-entropy, which is wrong for regions that overlap.
    """
    if isinstance(outputs, Tensor):
        return _losses(outputs, regions, loss)
    weights = [2.0**-number for number in range(len(outputs))]
    shares = [weight / sum(weights) for weight in weights]
    at_each = (functional.interpolate(regions.float(), o.shape[2:], mode="nearest-exact") for o in outputs)
    losses = [share * _losses(o, r, loss) for share, o, r in zip(shares, outputs, at_each, strict=True)]
    return torch.stack(losses).sum(0)


def _losses(logits: Tensor, regions: Tensor, loss: str | OwnPart) -> Tensor:
    logits, regions = logits.float(), regions.float()
    if isinstance(loss, OwnPart):
        function = parts.function(loss, "train.loss", 2)
        if isinstance(function, nn.Module):
            function.to(logits.device)
        own: Tensor = function(logits, regions)
        return own.flatten(1).mean(1) if own.dim() > 1 else own
    dice: Tensor = _dice(logits, regions).flatten(1).mean(1)
    if loss == "dice":
        return dice
    entropy = functional.binary_cross_entropy_with_logits(logits, regions, reduction="none")
    return dice + entropy.flatten(1).mean(1)


def build_optimiser(network: nn.Module, options: Optimiser) -> torch.optim.Optimizer:
    """Fused, since only these skip a step on the device (`found_inf`), without a word to the host."""
    parameters, settings = list(network.parameters()), {"weight_decay": options.weight_decay, "fused": True}
    if options.name != "sgd":
        return torch.optim.AdamW(parameters, options.learning_rate, **settings)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(parameters, options.learning_rate, momentum=0.99, nesterov=True, **settings)  # type: ignore[arg-type]
    for parameter in parameters:  # a first step that is skipped would leave them uninitialised
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def ema_share(ema_samples: int, global_batch: int, samples_seen: int) -> float:
    """The share of the newest weights in their running mean after `samples_seen` samples, this step's among them: the
    mean forgets as exp(-samples / ema_samples), whatever the batch.

    Over the last tenth of the samples at first: else the initial weights would stay in it for ten times `ema_samples`.
    """
    return 1 - math.exp(-global_batch / min(ema_samples, samples_seen / 10))
