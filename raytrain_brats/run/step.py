"""One rank's share of a global step: forward, backward, one update that is the same on all ranks.

In: the patches this rank owns in the step.
Out: updated weights; the step's loss over the whole global batch.

The update is that of one worker with the whole batch: each sample's loss is weighted, gradients are summed over ranks
and divided by the batch's weight, so ranks may hold unequal numbers of samples.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain_brats.data.patch import Patch
from raytrain_brats.data.plan import draw, fingerprint
from raytrain_brats.labels import region_table
from raytrain_brats.learn.augment import DRAWS, augment, normalise, to_regions
from raytrain_brats.learn.inference import amp_dtype, autocast
from raytrain_brats.learn.model import build_network, build_optimiser, learning_rate, sample_losses
from raytrain_brats.run.job import Job


@dataclass(frozen=True)
class StepResult:
    """Of the whole global batch: mean loss (None when no sample counted or it was not finite), samples that could not
    be read, whether loss and gradient were finite (else the step changed nothing), and the sum of the fingerprints of
    the samples that arrived; what rank 0 asked of all ranks. The same on all ranks."""

    loss: float | None
    bad: int
    finite: bool
    samples: int
    asked: int
    learning_rate: float


class Learner:
    """Network, optimiser and loss scaler of one rank; everything a checkpoint holds."""

    def __init__(self, job: Job, world_size: int, device: torch.device) -> None:
        self.config, self.total, self.world_size, self.device = job.config, job.plan.total, world_size, device
        self.network = build_network(job.config).to(device)
        self.optimiser = build_optimiser(self.network, job.config.train.optimiser)
        self.precision = amp_dtype(device, job.config.train.amp)
        if self.precision and world_size > 1:  # ranks must agree: one without bf16 takes all to fp16
            bf16 = torch.tensor(int(self.precision is torch.bfloat16), device=device)
            distributed.all_reduce(bf16, distributed.ReduceOp.MIN)
            self.precision = torch.bfloat16 if bf16.item() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.table = torch.from_numpy(region_table(job.source.convention)).to(device)
        self.parallel: nn.Module = DistributedDataParallel(self.network) if world_size > 1 else self.network

    def step(self, patches: list[Patch], samples_seen: int, asked: int = 0) -> StepResult:
        """Apply one global step. A step without weight or with a non-finite loss or gradient changes nothing.

        `asked` (of rank 0, else 0) travels with the sums, so that all ranks know it after the same step.
        """
        train = self.config.train
        rate = learning_rate(train.optimiser, samples_seen, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        # weight, weighted loss, bad samples, fingerprints (float64 holds the sum of 2^20 of them exactly), asked
        sums = torch.tensor([0.0, 0.0, 0.0, 0.0, asked], dtype=torch.float64, device=self.device)
        for first in range(0, len(patches), train.micro_batch):
            batch = patches[first : first + train.micro_batch]
            last = first + train.micro_batch >= len(patches)
            with nullcontext() if last or self.world_size == 1 else self.parallel.no_sync():  # type: ignore[operator]
                sums[:4] += self._backward(batch)
        if self.world_size > 1:
            distributed.all_reduce(sums)
        weight, loss, bad, samples, asked = sums.tolist()
        finite = math.isfinite(loss)
        if weight > 0 and finite:
            self.scaler.unscale_(self.optimiser)
            # DDP has averaged over ranks what was to be summed
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self.world_size / weight)
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), train.optimiser.clip_norm)
            finite = bool(torch.isfinite(norm))
            if finite:
                self.scaler.step(self.optimiser)
            self.scaler.update()
        mean = loss / weight if weight > 0 and math.isfinite(loss) else None
        return StepResult(mean, round(bad), finite, round(samples), round(asked), rate)

    def _backward(self, batch: list[Patch]) -> Tensor:
        """Add the batch's gradients; (weight, weighted loss, bad samples, fingerprints)."""
        image, regions, weights = self._to_device(batch)
        with autocast(self.device, self.precision):
            logits = self.parallel(image)
        losses = sample_losses(logits, regions)
        self.scaler.scale((losses * weights).sum()).backward()
        counted = [sum(bool(p.reason) for p in batch), sum(fingerprint(p.position, p.case_id, p.seed) for p in batch)]
        losses = losses.detach().double()
        return torch.cat([weights.sum()[None], (losses * weights).sum()[None], losses.new_tensor(counted)])

    def _to_device(self, batch: list[Patch]) -> tuple[Tensor, Tensor, Tensor]:
        def stacked(arrays: list[Any]) -> Tensor:
            # one by one: dtypes may differ between cases; copied, as blocks of the object store are read-only
            return torch.stack([torch.tensor(a).to(self.device) for a in arrays])

        images = torch.stack([torch.tensor(p.image_czyx).to(self.device).float() for p in batch])
        image = normalise(images, stacked([p.mean for p in batch]), stacked([p.std for p in batch]))
        regions = to_regions(stacked([p.label_zyx for p in batch]), self.table)
        draws = [draw(p.seed, "augment", DRAWS) for p in batch]
        image, regions = augment(image, regions, draws, self.config.train.augment)
        return image, regions, torch.tensor([p.weight for p in batch], device=self.device)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) of everything that must survive."""
        optimiser = self.optimiser.state_dict()
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, entries in optimiser["state"].items():
            tensors |= {f"optimiser/{index}/{name}": t for name, t in entries.items() if isinstance(t, Tensor)}
        return tensors, {"param_groups": optimiser["param_groups"], "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` gave, written at any number of workers."""
        self.network.load_state_dict(network_weights(tensors))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimiser/"):
                _, index, name = key.split("/")
                entries.setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
        if self.scaler.is_enabled() and state["scaler"]:  # empty when it was written without loss scaling
            self.scaler.load_state_dict(state["scaler"])


def network_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own entries of a checkpoint's tensors."""
    return {name.removeprefix("network/"): t for name, t in tensors.items() if name.startswith("network/")}
