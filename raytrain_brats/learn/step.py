"""One rank's share of a global step: forward, backward, one update that is the same on all ranks. Runs in a worker.

In: the batch of this rank in the step.
Out: updated weights; the step's loss over the whole global batch.

On a GPU the host runs ahead of the device: `launch` only queues work, and nothing in it waits for a value. So whether a
step counts (weight above 0, loss and gradient finite) is decided on the device, by the optimiser's own skip
(`found_inf`), and the host reads the step's numbers later (`Launched.result`).

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
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain_brats.config import Config
from raytrain_brats.labels import region_table
from raytrain_brats.learn import tree_reduce
from raytrain_brats.learn.batch import Batch, DeviceSample, finish, make, to_host, upload
from raytrain_brats.learn.inference import amp_dtype
from raytrain_brats.learn.model import build_network, build_optimiser, ema_share, sample_losses
from raytrain_brats.schedule import learning_rate


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
    """Each rank's own seconds per sample in a step shortly before."""


@dataclass(frozen=True)
class Launched:
    """A step whose numbers are on their way from the device."""

    train_step: "TrainStep"
    told: Tensor
    """(weight, loss, bad, fingerprints, asked, seconds by rank, whether it was applied)."""
    arrived: Callable[[], None]
    learning_rate: float
    spans: list[tuple[Any, Any]]
    samples: int

    def result(self) -> StepResult:
        """Wait for the numbers. In the order of the steps, on all ranks alike."""
        self.arrived()
        weight, loss, bad, samples, asked, *seconds, applied = self.told.tolist()
        self.train_step.forward_took(self.spans, self.samples)
        mean = loss / weight if weight > 0 and math.isfinite(loss) else None
        # A batch without weight has nothing that is not finite.
        finite = bool(applied) or (weight == 0 and loss == 0)
        overflow = not finite and mean is not None and self.train_step.scale() > 1
        return StepResult(
            mean, round(bad), finite, overflow, round(samples), round(asked), self.learning_rate, tuple(seconds)
        )


class TrainStep:
    """Network, optimiser and loss scaler of one rank; everything a checkpoint holds."""

    def __init__(
        self, config: Config, total_samples: int, convention: str, world_size: int, device: torch.device
    ) -> None:
        """`convention` says what label values mean; `total_samples` is the length of the learning rate's schedule."""
        self.config, self.total, self.world_size, self.device = config, total_samples, world_size, device
        self.network = build_network(config).to(device)
        self.averaged = self.network
        """What is scored. With `train.ema_samples` another network: its weights are the running mean of this one's."""
        if config.train.ema_samples:
            self.averaged = deepcopy(self.network).requires_grad_(False)
        self.optimiser = build_optimiser(self.network, config.train.optimiser)
        self.precision = amp_dtype(device, config.train.amp)
        if self.precision and world_size > 1:  # ranks must agree: one without bf16 takes all to fp16
            bf16 = torch.tensor(int(self.precision is torch.bfloat16), device=device)
            distributed.all_reduce(bf16, distributed.ReduceOp.MIN)
            self.precision = torch.bfloat16 if bf16.item() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.table = torch.from_numpy(region_table(convention)).to(device)
        self.exact = config.train.reduction == "exact"
        asked = config.train.micro_batch
        self.micro_batch = asked if isinstance(asked, int) else 1
        """Samples of one forward pass; `auto` is decided by `learn.micro_batch`, once all is on the device."""
        torch.backends.cudnn.benchmark = not self.exact  # all patches have one size
        if self.exact and device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            torch.use_deterministic_algorithms(True, warn_only=True)  # trilinear upsampling has no such kernel
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.parallel: nn.Module = self.network
        if world_size > 1 and not self.exact:
            self.parallel = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
            self.parallel.register_comm_hook(None, self._sum)
        self._finish = finish
        if config.train.compile:
            self._finish = torch.compile(finish, dynamic=False)
            self.parallel.compile()  # in place: names of the weights stay
        # A power of two changes no float but its exponent.
        self._divisor = float(1 << (config.train.global_batch - 1).bit_length())
        self.own_work_until: Callable[[torch.cuda.Event], None] = lambda event: None
        """Called with the point in the device's work of a step from which it waits for other ranks."""
        self.before_update: Callable[[], None] = lambda: None
        """Called when the next step is about to change weights and optimiser: whoever still reads them waits there."""
        self._forward_s = 0.0

    def launch(
        self, batch: Batch, samples_seen: int, asked: int = 0, enter: Callable[[str], None] = lambda phase: None
    ) -> "Launched":
        """Queue one global step. One without weight or with a non-finite loss or gradient changes nothing.

        `asked` (of rank 0, else 0) is reduced with the sums, so that all ranks learn it from the same step. `enter` is
        called with each phase as it begins.
        """
        enter("forward")
        rate = learning_rate(self.config.train.optimiser, samples_seen, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        # One all-reduce for all numbers: bad samples, fingerprints (32 bits each, so float64 holds the sum of 2^20 of
        # them exactly), asked, seconds by rank (each rank fills its own place). One copy to the device for these and
        # what the batch needs.
        rank = distributed.get_rank() if self.world_size > 1 else 0
        seconds = [0.0] * self.world_size
        seconds[rank] = self._forward_s
        sums, numbers = upload([batch.bad, batch.fingerprint, asked, *seconds], batch.samples, self.device)
        spans: list[tuple[Any, Any]] = []
        weighed = (self._exact if self.exact else self._fast)(batch.samples, numbers, spans, enter)
        totals = torch.cat([weighed, sums])
        enter("reduce")
        if self.world_size > 1:
            distributed.all_reduce(totals[2:] if self.exact else totals)
        enter("update")
        self.before_update()
        applied = self._update(totals)
        self._average(applied, samples_seen)
        return Launched(self, *to_host(torch.cat([totals, applied])), rate, spans, len(batch.samples))

    def step(self, batch: Batch, samples_seen: int, asked: int = 0) -> "StepResult":
        """Apply one global step and wait for its numbers."""
        return self.launch(batch, samples_seen, asked).result()

    def _update(self, totals: Tensor) -> Tensor:
        """Divide the summed gradients by the batch's weight, clip, apply. (1,): 1.0 unless the step was skipped.

        Before clipping the scale of the loss is taken out: the norm must be that of the whole batch's mean gradient.
        All ranks hold equal sums, so they compute equal norms and skip alike without another message.
        """
        weight, loss = totals[0].float(), totals[1]
        self.scaler.unscale_(self.optimiser)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, weight / self._divisor)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.optimiser.clip_norm)
        counts = (weight > 0) & torch.isfinite(loss) & torch.isfinite(norm)
        self.optimiser.found_inf = (~counts).float()  # type: ignore[attr-defined]
        self.optimiser.grad_scale = None  # type: ignore[attr-defined]
        self.optimiser.step()
        self.scaler.update()
        return counts.double()[None]

    @torch.no_grad()
    def _average(self, applied: Tensor, samples_seen: int) -> None:
        """Move the running mean towards the weights, unless the step was skipped: the device knows, the host need not.

        (torch's AveragedModel asks the device whether it is the first step, and cannot leave one out.)
        """
        if not (horizon := self.config.train.ema_samples):
            return
        batch = self.config.train.global_batch
        share = (applied[0] * ema_share(horizon, batch, samples_seen + batch)).float()
        mean: list[Tensor] = list(self.averaged.parameters())
        now: list[Tensor] = list(self.network.parameters())
        apart = list(torch._foreach_sub(now, mean))
        torch._foreach_mul_(apart, share)
        torch._foreach_add_(mean, apart)

    def _fast(
        self, samples: Sequence[DeviceSample], numbers: Tensor, spans: list[Any], enter: Callable[[str], None]
    ) -> Tensor:
        """DDP sums gradients during the last backward. Returns (this rank's weight, its weighted loss)."""
        weighed = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = self.micro_batch
        for first in range(0, len(samples), size):
            last, part = first + size >= len(samples), slice(first, first + size)
            with nullcontext() if last or self.world_size == 1 else self.parallel.no_sync():  # type: ignore[operator]
                total, weighed_here = self._losses(samples[part], numbers[part], spans, enter)
                enter("backward")
                # The same numbers at any world size, or fp16's loss scale would overflow at another step: no factor of
                # DDP's mean (`_sum` replaces it), and the batch's size divided out before, not after, the backward.
                self.scaler.scale(total / self._divisor).backward()
            weighed += weighed_here
        return weighed

    def _sum(self, _: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        """Sum a bucket of gradients over the ranks. DDP's own hook divides by their number before it sums."""
        if bucket.is_last():
            self._own_work_ends()
        summed: torch.futures.Future[list[Tensor]] = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda future: future.value()[0])

    def _own_work_ends(self) -> None:
        """Before the device waits for other ranks: afterwards nobody could tell which of them the others wait for."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.own_work_until(event)

    def _exact(
        self, samples: Sequence[DeviceSample], numbers: Tensor, spans: list[Any], enter: Callable[[str], None]
    ) -> Tensor:
        """A gradient per sample, summed along the tree. Returns (weight, weighted loss) of the whole global step."""
        parameters, total = list(self.network.parameters()), self.config.train.global_batch
        index = {sample.place: number for number, sample in enumerate(samples)}

        def vectors() -> Iterator[tuple[tree_reduce.Node, Tensor]]:
            for place in tree_reduce.order(index, total):
                part = slice(index[place], index[place] + 1)
                loss, weighed = self._losses(samples[part], numbers[part], spans, enter)
                enter("backward")
                gradients = torch.autograd.grad(
                    self.scaler.scale(loss / self._divisor), parameters, allow_unused=True, materialize_grads=True
                )
                yield (
                    tree_reduce.leaf(place, total),
                    torch.cat([*(g.flatten() for g in gradients), weighed.float()]),
                )

        mine = tree_reduce.fold(vectors(), total)
        self._own_work_ends()
        enter("reduce")
        places = [list(index)]
        if self.world_size > 1:  # ranks receive samples in turn, so one's own first place determines all others'
            turn = min(index) - distributed.get_rank()
            places = [list(range((turn + r) % self.world_size, total, self.world_size)) for r in range(self.world_size)]
        summed = tree_reduce.sum_over_ranks(mine, places, total)
        parts = summed[:-2].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return summed[-2:].double()

    def _losses(
        self, samples: Sequence[DeviceSample], numbers: Tensor, spans: list[Any], enter: Callable[[str], None]
    ) -> tuple[Tensor, Tensor]:
        """(sum of the weighted losses, to be differentiated; (weight, the same sum))."""
        enter("forward")
        began = self._now()
        x, y, z = self.config.data.patch_xyz
        augment = self.config.train.augment
        image, regions, weights = make(samples, numbers, self.table, augment, (z, y, x), self._finish)
        with torch.autocast(self.device.type, self.precision) if self.precision else nullcontext():
            logits = self.parallel(image)
        total = (sample_losses(logits, regions, self.config.train.loss) * weights).sum()
        weighed = torch.stack([weights.sum(), total.detach()]).double()
        spans.append((began, self._now()))
        return total, weighed

    def forward_took(self, spans: list[tuple[Any, Any]], samples: int) -> None:
        """Seconds a sample of a step whose numbers have arrived, told to all ranks by the next one."""
        on_gpu = self.device.type == "cuda"
        times_s = [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in spans]
        self._forward_s = sum(times_s) / max(1, samples)

    def scale(self) -> float:
        """By which fp16's loss is multiplied; 1 in other precisions. Waits for the device."""
        return float(self.scaler.get_scale())

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
        if self.averaged is not self.network:
            tensors |= {f"ema/{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        return tensors, {"param_groups": optimiser["param_groups"], "scaler": self.scaler.state_dict()}

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Take weights of another run, as far as it has them; all else begins as it does without."""
        self.network.load_state_dict(weights, strict=False)
        if self.averaged is not self.network:
            self.averaged.load_state_dict(self.network.state_dict())

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Load what `state` returned, at any number of workers. A running mean that was not kept yet begins anew."""
        self.network.load_state_dict(_entries(tensors, "network"))
        if self.averaged is not self.network:
            self.averaged.load_state_dict(network_weights(tensors))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimiser/"):
                _, index, name = key.split("/")
                entries.setdefault(int(index), {})[name] = tensor
        # `fused` is this version's choice, not the checkpoint's: without it nothing could be skipped on the device.
        groups = [old | {"fused": True, "foreach": None} for old in state["param_groups"]]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})
        if self.scaler.is_enabled() and state["scaler"]:  # empty when it was written without loss scaling
            self.scaler.load_state_dict(state["scaler"])


def network_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a checkpoint's tensors with which to predict: their running mean where there is one."""
    return _entries(tensors, "ema") or _entries(tensors, "network")


def _entries(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}


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
