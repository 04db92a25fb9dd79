"""One rank's share of a global step: forward, backward, one update that is the same on all ranks. Runs in a worker.

In: the batch of this rank in the step.
Out: updated weights; the step's loss over the whole global batch.

The update is that of one worker with the whole batch: each sample's loss is weighted, gradients are summed over ranks
and then divided by the weight of the whole batch. (A mean per rank, averaged over ranks, would count the samples of a
rank with fewer of them more, and padding as if it were data.) Two ways to sum (`train.reduction`): `fast` is DDP, whose
order of summing depends on the ranks; `exact` computes one gradient per sample and sums them along a fixed tree, so the
weights are the same bits at any world size.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain_brats.config import Config
from raytrain_brats.labels import region_table
from raytrain_brats.learn import tree_reduce
from raytrain_brats.learn.batch import Batch, TensorSample, to_device
from raytrain_brats.learn.inference import amp_dtype
from raytrain_brats.learn.model import build_network, build_optimiser, learning_rate, sample_losses


@dataclass(frozen=True)
class StepResult:
    """Of the whole global batch; the same on all ranks."""

    loss: float | None
    """Mean over the batch's weight; None when no sample counted or it was not finite."""
    bad: int
    """Samples whose case is invalid."""
    finite: bool
    """Whether loss and gradient were finite; if not, the step changed nothing."""
    overflow: bool
    """They were not, only because fp16's loss scale was too large: it is lowered, and the next step is normal."""
    samples: int
    """Sum of the fingerprints of the samples that arrived."""
    asked: int
    """What rank 0 asked of all ranks, in bits."""
    learning_rate: float
    forward_s: tuple[float, ...] = field(compare=False)
    """Each rank's own seconds per sample in the step before."""


class TrainStep:
    """Network, optimiser and loss scaler of one rank; everything a checkpoint holds."""

    def __init__(
        self, config: Config, total_samples: int, convention: str, world_size: int, device: torch.device
    ) -> None:
        """`convention` says what label values mean; `total_samples` is the length of the learning rate's schedule."""
        self.config, self.total, self.world_size, self.device = config, total_samples, world_size, device
        self.network = build_network(config).to(device)
        self.optimiser = build_optimiser(self.network, config.train.optimiser)
        self.precision = amp_dtype(device, config.train.amp)
        if self.precision and world_size > 1:  # ranks must agree: one without bf16 takes all to fp16
            bf16 = torch.tensor(int(self.precision is torch.bfloat16), device=device)
            distributed.all_reduce(bf16, distributed.ReduceOp.MIN)
            self.precision = torch.bfloat16 if bf16.item() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.table = torch.from_numpy(region_table(convention)).to(device)
        self.exact = config.train.reduction == "exact"
        if self.exact and device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            torch.use_deterministic_algorithms(True, warn_only=True)  # trilinear upsampling has no such kernel
        self.parallel: nn.Module = self.network
        if world_size > 1 and not self.exact:
            self.parallel = DistributedDataParallel(self.network)
        self._forward_s, self._forward = 0.0, list[tuple[Any, Any]]()

    def step(
        self, batch: Batch, samples_seen: int, asked: int = 0, enter: Callable[[str], None] = lambda phase: None
    ) -> StepResult:
        """Apply one global step. A step without weight or with a non-finite loss or gradient changes nothing.

        `asked` (of rank 0, else 0) is reduced with the sums, so that all ranks learn it in the same step. `enter` is
        called with each phase as it begins.
        """
        enter("forward")
        rate = learning_rate(self.config.train.optimiser, samples_seen, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        # One all-reduce for all numbers: bad samples, fingerprints (32 bits each, so float64 holds the sum of 2^20 of
        # them exactly), asked, seconds by rank (each rank fills its own place).
        rank = distributed.get_rank() if self.world_size > 1 else 0
        sums = torch.zeros(3 + self.world_size, dtype=torch.float64)
        sums[0], sums[1] = batch.bad, batch.fingerprint
        sums[2], sums[3 + rank] = asked, self._forward_s
        weighed = (self._exact if self.exact else self._fast)(batch.samples, enter)
        totals = torch.cat([weighed, sums.to(self.device)])
        enter("reduce")
        if self.world_size > 1:
            distributed.all_reduce(totals[2:] if self.exact else totals)
        weight, loss, bad, samples, asked, *seconds = totals.tolist()
        enter("update")
        spans = [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in self._forward]
        self._forward_s, self._forward = sum(spans) / max(1, len(batch.samples)), []
        finite = math.isfinite(loss)
        overflow = False
        if weight > 0 and finite:
            # Unscale and divide before clipping: the norm must be that of the whole batch's mean gradient. All ranks
            # hold equal sums, so they compute equal norms and take the same decision without another message.
            self.scaler.unscale_(self.optimiser)
            torch._foreach_div_([p.grad for p in self.network.parameters() if p.grad is not None], weight)
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.optimiser.clip_norm)
            finite = bool(torch.isfinite(norm))
            overflow = not finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1
            if finite:
                self.scaler.step(self.optimiser)
            self.scaler.update()
        mean = loss / weight if weight > 0 and math.isfinite(loss) else None
        return StepResult(mean, round(bad), finite, overflow, round(samples), round(asked), rate, tuple(seconds))

    def _fast(self, samples: Sequence[TensorSample], enter: Callable[[str], None]) -> Tensor:
        """DDP sums gradients during the last backward. Returns (this rank's weight, its weighted loss)."""
        weighed = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = self.config.train.micro_batch
        for first in range(0, len(samples), size):
            last = first + size >= len(samples)
            with nullcontext() if last or self.world_size == 1 else self.parallel.no_sync():  # type: ignore[operator]
                total, weighed_here = self._losses(samples[first : first + size], enter)
                enter("backward")
                # DDP divides the sum over ranks by their number. Multiplying the loss by it undoes that, so the result
                # is the plain sum, and dividing by the batch's weight comes last, once, for all ranks alike.
                self.scaler.scale(total * self.world_size).backward()
            weighed += weighed_here
        return weighed

    def _exact(self, samples: Sequence[TensorSample], enter: Callable[[str], None]) -> Tensor:
        """A gradient per sample, summed along the tree. Returns (weight, weighted loss) of the whole global step."""
        parameters, total = list(self.network.parameters()), self.config.train.global_batch
        by_place = {sample.place: sample for sample in samples}

        def vectors() -> Iterator[tuple[tree_reduce.Node, Tensor]]:
            for place in tree_reduce.order(by_place, total):
                loss, weighed = self._losses([by_place[place]], enter)
                enter("backward")
                gradients = torch.autograd.grad(
                    self.scaler.scale(loss), parameters, allow_unused=True, materialize_grads=True
                )
                yield (
                    tree_reduce.leaf(place, total),
                    torch.cat([*(g.flatten() for g in gradients), weighed.float()]),
                )

        mine = tree_reduce.fold(vectors(), total)
        enter("reduce")
        places = [list(by_place)]
        if self.world_size > 1:  # ranks receive samples in turn, so one's own first place determines all others'
            turn = min(by_place) - distributed.get_rank()
            places = [list(range((turn + r) % self.world_size, total, self.world_size)) for r in range(self.world_size)]
        summed = tree_reduce.sum_over_ranks(mine, places, total)
        parts = summed[:-2].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return summed[-2:].double()

    def _losses(self, samples: Sequence[TensorSample], enter: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        """(sum of the weighted losses, to be differentiated; (weight, the same sum))."""
        enter("forward")
        began = self._now()
        image, regions, weights = to_device(samples, self.table, self.device, self.config.train.augment)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits = self.parallel(image)
        total = (sample_losses(logits, regions) * weights).sum()
        weighed = torch.stack([weights.sum(), total.detach()]).double()
        self._forward.append((began, self._now()))
        return total, weighed

    def _now(self) -> Any:
        """A point in the device's own time, recorded without waiting; read after the step's sums have arrived."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) of everything that a checkpoint must hold."""
        optimiser = self.optimiser.state_dict()
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, entries in optimiser["state"].items():
            tensors |= {f"optimiser/{index}/{name}": t for name, t in entries.items() if isinstance(t, Tensor)}
        return tensors, {"param_groups": optimiser["param_groups"], "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Load what `state` returned, at any number of workers."""
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


def weight_hash(network: nn.Module) -> int:
    """64 bits of all weights. One flipped bit always changes it: its word's factor is odd, so the product changes too
    modulo 2^64, where the integer sum wraps around."""
    total = 0
    for number, parameter in enumerate(network.parameters()):
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        words = parameter.detach().flatten().view(kind)
        factors = torch.arange(words.numel(), device=words.device).mul_(2).add_(2 * number + 1)
        total += int((factors * words).sum())
    return total % 2**64


def differing(device: str, network: nn.Module) -> list[int]:
    """The ranks whose weights differ from the majority's, among ranks of the same kind of device; [] when all agree.

    A collective: all ranks must call it. When two ranks differ there is no majority, and both are returned.
    """
    mine, gathered = (device, weight_hash(network)), [("", 0)] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    wrong = []
    for kind in {device for device, _ in gathered}:
        counts = Counter(code for device, code in gathered if device == kind)
        most = max(counts.values())
        right = [code for code, count in counts.items() if count == most]
        good = right[0] if len(right) == 1 else None
        if len(counts) > 1:
            wrong += [rank for rank, (device, code) in enumerate(gathered) if device == kind and code != good]
    return sorted(wrong)
