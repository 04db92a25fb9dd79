"""Whether a network, loss or augmentation of one's own keeps what the run promises. Runs in the driver, at the door.

In: a config that names one.
Out: what to tell of it; UserError that says in one line what is wrong with it.

The patch's own size is tried without memory (torch's meta device). How numbers behave needs real ones: a small patch on
the CPU shows whether samples see each other, buffers change, or chance decides, each of which would make the result
depend on the number of workers and on restarts.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raytrain_brats import parts
from raytrain_brats.config import Config, patch_divisor
from raytrain_brats.errors import UserError
from raytrain_brats.labels import MODALITIES, REGIONS
from raytrain_brats.learn.model import build_network, sample_losses
from raytrain_brats.networks import OwnNetwork
from raytrain_brats.parts import OwnPart

SMALL, LARGEST = 32, 64
"""Edges of the small patch; those of the run's patch up to which it may take the small one's place."""
MOST_NAMED = 3
_ALONE = 1e-4
"""Of the greatest number: a sample that shares its batch may differ by rounding."""

Zyx = tuple[int, int, int]


def check(config: Config) -> list[str]:
    """Lines to print. Raises UserError, with the part's name in front."""
    told = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(config.network, OwnNetwork):
            told += _check_network(config, config.network)
        if isinstance(config.train.loss, OwnPart):
            told += _check_loss(config.train.loss)
        if config.train.augment.own:
            told += _check_augmentation(config.train.augment.own)
    return told


def _check_network(config: Config, part: OwnNetwork) -> list[str]:
    about, network = f"network.name {part.name}", build_network(config)
    if shared := [f"{name} ({type(m).__name__})" for name, m in network.named_modules() if isinstance(m, _BatchNorm)]:
        raise UserError(
            f"{about}: batch norm lets samples see each other, and the number of workers would change the result: "
            f"{_named(shared)}; use instance or group norm"
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in network.parameters()):
        raise UserError(f"{about}: lazy layers have no weights before the first batch; give their sizes")
    if frozen := [name for name, p in network.named_parameters() if not p.requires_grad]:
        raise UserError(f"{about}: parameters that do not learn: {_named(frozen)}; register them as buffers")
    if not (count := sum(p.numel() for p in network.parameters())):
        raise UserError(f"{about} has no parameters to train")
    x, y, z = config.data.patch_xyz
    size: Zyx = (z, y, x)
    told = _shapes_and_gradients(about, network, size, config)
    told += _behaviour(about, network, config, size)
    return [f"{part.name}: {count:,} parameters, {_file(part)}", *told]


def _shapes_and_gradients(about: str, network: nn.Module, size: Zyx, config: Config) -> list[str]:
    """At the patch's own size on the meta device; where an operation has no such version, `_behaviour` alone tells."""
    there = deepcopy(network).to("meta").train()
    image = torch.zeros((2, len(MODALITIES), *size), device="meta")
    try:
        outputs = there(image)
    except NotImplementedError:
        return [f"{about}: not tried at {_edges(size)}, as an operation has no version without memory"]
    except Exception as error:
        if "meta" in str(error).lower():  # it looks at a value: `.item()`, a branch
            return [f"{about}: not tried at {_edges(size)}, as it looks at values of a tensor"]
        raise UserError(
            f"{about} fails on a patch of {_edges(size)} ({_text(error)}); edges must be multiples of its `divisor`, "
            f"now {patch_divisor(config)}"
        ) from error
    _check_outputs(about, outputs, (2, len(REGIONS), *size), training=True)
    _check_gradients(about, there, outputs)
    return []


def _check_outputs(about: str, outputs: Any, wanted: tuple[int, ...], training: bool) -> None:
    """Raises UserError unless it is a tensor of that shape; in training also a list that begins with one."""
    first, *more = outputs if training and isinstance(outputs, list | tuple) and outputs else [outputs]
    if not isinstance(first, Tensor):
        mode = "training" if training else "evaluation"
        kind = type(first).__name__
        raise UserError(f"{about} gives a {kind} in {mode} mode; it must give a tensor of logits (b, 3, z, y, x)")
    if tuple(first.shape) != wanted:
        raise UserError(
            f"{about} gives {_shape(first.shape)} where {_shape(wanted)} is wanted: logits of WT, TC and ET, as "
            "large as the patch"
        )
    if wrong := [o for o in more if not isinstance(o, Tensor) or o.dim() != 5 or tuple(o.shape[:2]) != wanted[:2]]:
        found = _shape(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        raise UserError(f"{about}: a lower head gives {found}; all give {wanted[1]} channels, at a lower resolution")


def _check_gradients(about: str, network: nn.Module, outputs: Any) -> None:
    """Raises UserError when a parameter takes no part: DDP would wait for its gradient on every rank."""
    total = sum(o.float().sum() for o in (outputs if isinstance(outputs, list | tuple) else [outputs]))
    names, parameters = zip(*network.named_parameters(), strict=True)
    try:
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    except RuntimeError as error:
        raise UserError(f"{about} cannot be trained: {_text(error)}") from error
    if unused := [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]:
        raise UserError(
            f"{about}: parameters that get no gradient: {_named(unused)}; remove them, or use them in forward"
        )


def _behaviour(about: str, network: nn.Module, config: Config, size: Zyx) -> list[str]:
    """With real numbers, on a small patch; on the run's own where it is small and the network takes no other."""
    if (one := _accepted(about, network, config, size)) is None:
        return [f"{about}: takes no patch but of {_edges(size)}; whether samples see each other was not tried"]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    outputs = network.train()(one)
    _check_outputs(about, outputs, (2, len(REGIONS), *one.shape[2:]), training=True)
    _check_gradients(about, network, outputs)
    if kept := [name for name, buffer in network.named_buffers() if not torch.equal(before[name], buffer)]:
        raise UserError(
            f"{about}: buffers change while it trains: {_named(kept)}; each rank would have its own (running "
            "statistics: set track_running_stats=False)"
        )
    mixed = torch.cat([one[:1], torch.randn_like(one[1:])])
    with torch.no_grad():
        first, again = (_first(network(one)) for _ in range(2))
        if steady := torch.equal(first, again):
            _check_alone(about, network, one, mixed)
        elif config.train.reduction == "exact":
            raise UserError(f"{about} draws random numbers (dropout?), which `train.reduction: exact` cannot repeat")
        _check_alone(about, network.eval(), one, mixed)
    if steady:
        return []
    return [
        f"{about} draws random numbers (dropout?): after a restart, or with other workers, it gives other weights than "
        "undisturbed"
    ]


def _accepted(about: str, network: nn.Module, config: Config, size: Zyx) -> Tensor | None:
    """A batch of two that the network takes: small, or of the run's own size if that is small enough; else None."""
    divisor = patch_divisor(config)
    edge = max(2 * divisor, -(-SMALL // divisor) * divisor)
    small: Zyx = min(edge, size[0]), min(edge, size[1]), min(edge, size[2])
    for tried in (small, size):
        if max(tried) > max(LARGEST, 2 * divisor):
            break
        image = _noise(tried)
        try:
            with torch.no_grad():
                network.train()(image)
            return image
        except Exception as error:
            if tried == size:
                raise UserError(f"{about} fails on a patch of {_edges(tried)} ({_text(error)})") from error
    return None


def _check_alone(about: str, network: nn.Module, one: Tensor, mixed: Tensor) -> None:
    """Both batches begin with the same sample. Raises UserError when what follows changes what is made of it."""
    first, second = network(one), network(mixed)
    if not network.training:
        _check_outputs(about, first, (len(one), len(REGIONS), *one.shape[2:]), training=False)
    first, second = _first(first)[0], _first(second)[0]
    if not torch.isfinite(first).all():
        raise UserError(f"{about} gives numbers that are not finite for noise of deviation 1")
    if not _close(first, second):
        raise UserError(
            f"{about}: a sample's logits depend on the others of its batch, so the number of workers would change the "
            "result; normalise and pool within each sample"
        )


def _check_loss(part: OwnPart) -> list[str]:
    about = f"train.loss {part.name}"
    function = parts.function(part, "train.loss", 2)
    if isinstance(function, nn.Module) and list(function.parameters()):
        raise UserError(f"{about} has parameters of its own, which nothing trains")
    logits = _noise((8, 8, 8), channels=len(REGIONS))
    regions = (_noise((8, 8, 8), channels=len(REGIONS)) > 0).float()

    def of(logits: Tensor, regions: Tensor) -> Tensor:
        return sample_losses(logits, regions, part)

    losses = _called(about, of, logits.requires_grad_(), regions)
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (2,):
        found = _shape(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"{about} gives {found} for two samples; it must give a number for each, (b,), never a mean over the batch"
        )
    if not losses.requires_grad:
        raise UserError(f"{about} has no gradient with respect to the logits")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    empty = _called(about, of, logits.detach(), torch.zeros_like(regions))
    for what, numbers in (("loss", losses), ("gradient", gradient), ("loss of a patch without tumour", empty)):
        if not torch.isfinite(numbers).all():
            raise UserError(f"{about}: its {what} is not finite")
    mixed = torch.cat([logits[:1], -logits[1:]]).detach(), torch.cat([regions[:1], 1 - regions[1:]])
    if not _close(losses[0].detach(), _called(about, of, *mixed)[0]):
        raise UserError(
            f"{about}: a sample's loss depends on the others of its batch, so the number of workers would change the "
            "result; sum over each sample alone"
        )
    return [f"{part.name}: loss, {_file(part)}"]


def _check_augmentation(part: OwnPart) -> list[str]:
    about = f"train.augment.own {part.name}"
    function = parts.function(part, "train.augment.own", 3)
    image, regions = _noise((8, 10, 12))[0], (_noise((8, 10, 12), channels=len(REGIONS))[0] > 0).float()

    def draws(purpose: str, count: int) -> list[float]:
        generator = torch.Generator().manual_seed(len(purpose))
        return [float(u) for u in torch.rand(count, generator=generator)]

    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # what it takes from elsewhere than `draws` differs
        pair = _called(about, function, image.clone(), regions.clone(), draws)
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair)):
            raise UserError(f"{about} must give (image, regions), two tensors")
        for what, given, found in zip(("image", "regions"), (image, regions), pair, strict=True):
            if found.shape != given.shape or found.dtype != given.dtype:
                raise UserError(
                    f"{about}: {what} was {_shape(given.shape)} of {given.dtype} and became {_shape(found.shape)} of "
                    f"{found.dtype}; both must stay"
                )
        made.append(pair)
    if not all(torch.equal(a, b) for a, b in zip(*made, strict=True)):
        raise UserError(
            f"{about}: the same sample becomes another each time; take all random numbers from `draws`, which are the "
            "sample's own on any worker"
        )
    if not torch.isfinite(made[0][0]).all():
        raise UserError(f"{about} gives an image with numbers that are not finite")
    if not ((made[0][1] == 0) | (made[0][1] == 1)).all():
        raise UserError(f"{about} gives regions that are neither 0 nor 1; cut them at one half")
    return [f"{part.name}: augmentation, {_file(part)}"]


def _called(about: str, function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{about} fails ({_text(error)}); docs/own-parts.md says what it gets and gives") from error


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _ALONE * max(1e-6, float(one.abs().max())))


def _first(outputs: Any) -> Tensor:
    first: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return first


def _noise(size: Zyx, channels: int = len(MODALITIES)) -> Tensor:
    return torch.randn((2, channels, *size))


def _file(part: OwnPart) -> str:
    about = parts.sources([part])[part.name]
    return f"{about['file']} (sha256 {about['sha256']})" if about["file"] else "without a source file"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _edges(size: Zyx) -> str:
    """As a recipe has them: x, y, z."""
    return "x".join(map(str, reversed(size)))


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
