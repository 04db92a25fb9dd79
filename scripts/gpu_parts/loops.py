"""Training loops on one card: ours, MONAI's tutorial, nnU-Net's. The same recipe's network, patch and batch for all.

In: a recipe, the edge of a patch, a batch, a device.
Out: loops that take batches, from the host's memory as each library hands them over, or ready on the device.

A peer has the network as MONAI makes it, without our norms, activations and heads; ours has those of its recipe.
nnU-Net's deep supervision is left out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from monai.losses.dice import DiceLoss
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn

from raytrain_brats.config import Config
from raytrain_brats.data.patch import decode
from raytrain_brats.data.turns import read_ahead
from raytrain_brats.learn.step import Launched
from raytrain_brats.networks import DynUNetOptions, SegResNetOptions
from raytrain_brats.run.feed import Uploader, batch_of
from scripts.gpu_parts.setting import config, patches, row, train_step

AHEAD = 2
"""Rows that our reading thread is before the step, as in a run."""


class Loop(ABC):
    name: str
    augmentation: str
    fed: str
    """What lies ready in the host's memory, and how it comes to the device."""

    @abstractmethod
    def ready(self) -> Any:
        """A batch on the device."""

    @abstractmethod
    def feed(self) -> Iterator[Any]:
        """Batches without end, from the host's memory."""

    @abstractmethod
    def step(self, batch: Any) -> None: ...

    def finish(self) -> None:
        """Wait for what `step` left for later."""
        return


class Ours(Loop):
    """`TrainStep` as a worker drives it: numbers are read one step late."""

    augmentation = "nnU-Net's list (kind full), on the device, in every step"
    fed = "int16 rows with labels, as Ray Data brings them; a thread places each by one copy"

    def __init__(self, recipe: str, edge: int, batch: int, device: torch.device, compiled: bool = False) -> None:
        self.name = "ours, compiled" if compiled else "ours"
        self._shape, self._device, self._seen = (0, edge, batch), device, 0
        changes = ("train.compile=true",) if compiled else ()
        self._train_step = train_step(config(recipe, edge, batch, *changes), device)
        self._before: Launched | None = None

    def ready(self) -> Any:
        return patches(*self._shape, self._device)

    def feed(self) -> Iterator[Any]:
        table, uploader = row(*self._shape), Uploader(self._device)

        def rows() -> Iterator[Any]:
            while True:
                yield decode(table, uploader)[1]

        return read_ahead(rows, AHEAD)

    def step(self, batch: Any) -> None:
        launched = self._train_step.launch(batch_of(batch, 0, self._device), self._seen)
        self._seen = (self._seen + len(batch)) % 900  # the schedule of the learning rate ends at 1000
        self.finish()
        self._before = launched

    def finish(self) -> None:
        if self._before:
            self._before.result()
        self._before = None


class _Peer(Loop):
    augmentation = "none: in the peer's own loader, which is not measured here"

    def __init__(self, recipe: str, edge: int, batch: int, device: torch.device) -> None:
        self._device, self._half = device, device.type == "cuda"
        self.network = plain(config(recipe, edge, batch)).to(device)
        self.network.train()
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._half)
        torch.backends.cudnn.benchmark = True  # as both peers do
        draws = torch.Generator().manual_seed(0)
        self._image = torch.randn(batch, 4, edge, edge, edge, generator=draws)
        self._regions = (torch.rand(batch, 3, edge, edge, edge, generator=draws) < 0.2).float()

    def ready(self) -> Any:
        return self._image.to(self._device), self._regions.to(self._device)

    def feed(self) -> Iterator[Any]:
        while True:
            yield self._image, self._regions


class MonaiTutorial(_Peer):
    """The loop of MONAI's brats_segmentation_3d: Adam, Dice, mixed precision, the loss read in every step."""

    name = "MONAI tutorial's loop"
    fed = "float32 image and regions, pageable, copied in the step"

    def __init__(self, recipe: str, edge: int, batch: int, device: torch.device) -> None:
        super().__init__(recipe, edge, batch, device)
        self._optimiser = torch.optim.Adam(self.network.parameters(), 1e-4, weight_decay=1e-5)
        self._loss = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True)

    def step(self, batch: Any) -> None:
        image, regions = (given.to(self._device) for given in batch)
        self._optimiser.zero_grad()
        with torch.autocast(self._device.type, torch.float16, enabled=self._half):
            loss = self._loss(self.network(image), regions)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimiser)
        self._scaler.update()
        loss.item()


class NnUNet(_Peer):
    """nnU-Net's `train_step`: SGD, Dice and cross-entropy of regions, clipped; its network compiled on GPUs. By its own
    code where nnunetv2 is installed, else its maths written anew."""

    fed = "float32 image and regions, pinned, copied in the step without waiting"

    def __init__(self, recipe: str, edge: int, batch: int, device: torch.device, compiled: bool = True) -> None:
        super().__init__(recipe, edge, batch, device)
        compiled = compiled and self._half
        if compiled:
            self.network.compile()
        if self._half:
            self._image, self._regions = self._image.pin_memory(), self._regions.pin_memory()
        self._optimiser = torch.optim.SGD(
            self.network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5
        )
        self._theirs = _train_step_of_nnunet(self)
        code = "its own code" if self._theirs else "re-written"
        self.name = f"nnU-Net's train_step ({code}{', compiled' if compiled else ''})"

    def step(self, batch: Any) -> None:
        if self._theirs:
            self._theirs(batch)
            return
        image, regions = (given.to(self._device, non_blocking=True) for given in batch)
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.float16, enabled=self._half):
            loss = _dice_and_entropy(self.network(image), regions)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimiser)
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        loss.detach().cpu().numpy()


def _dice_and_entropy(logits: Tensor, regions: Tensor) -> Tensor:
    """nnU-Net's DC_and_BCE_loss without batch_dice."""
    probabilities, axes = torch.sigmoid(logits), (2, 3, 4)
    common, total = (probabilities * regions).sum(axes), probabilities.sum(axes) + regions.sum(axes)
    dice = (2 * common + 1e-5) / (total + 1e-5).clamp_min(1e-8)
    return nn.functional.binary_cross_entropy_with_logits(logits, regions) - dice.mean()


def _train_step_of_nnunet(peer: NnUNet) -> Any:
    """nnunetv2's own function and loss, with our network and its optimiser in the place of a trainer's; None where it
    is not installed, or not all that it imports."""
    try:
        from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    except ImportError:
        return None
    dice = {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}
    loss = DC_and_BCE_loss({}, dice, use_ignore_label=False, dice_class=MemoryEfficientSoftDiceLoss)
    scaler = peer._scaler if peer._half else None
    trainer = SimpleNamespace(
        device=peer._device, network=peer.network, optimizer=peer._optimiser, loss=loss, grad_scaler=scaler
    )
    return lambda batch: nnUNetTrainer.train_step(trainer, {"data": batch[0], "target": batch[1]})


def plain(settings: Config) -> nn.Module:
    """The recipe's network as MONAI makes it by itself."""
    options = settings.network
    if isinstance(options, DynUNetOptions):
        depth = len(options.filters)
        return DynUNet(
            spatial_dims=3,
            in_channels=4,
            out_channels=3,
            kernel_size=[3] * depth,
            strides=[1] + [2] * (depth - 1),
            upsample_kernel_size=[2] * (depth - 1),
            filters=options.filters,
            norm_name=("INSTANCE", {"affine": True}),
        )
    assert isinstance(options, SegResNetOptions)
    return SegResNet(
        in_channels=4,
        out_channels=3,
        init_filters=options.init_filters,
        blocks_down=options.blocks_down,
        blocks_up=options.blocks_up,
    )
