"""Choose how many samples one forward pass takes (`train.micro_batch: auto`). Runs in a worker, before it trains.

In: a `TrainStep`; on a GPU its free memory, and what one sample takes of it, measured.
Out: a number, the same on all ranks. No update depends on it but by the order in which floats are added.
"""

from typing import Any

import torch
from torch import distributed

from raytrain_brats.learn.model import sample_losses
from raytrain_brats.learn.step import TrainStep

RESERVED = 0.35
"""Of a GPU's memory: a quarter for cases that stay there (`run.feed`), the rest for cuDNN and for what lies between."""
WEIGHTS = 5
"""Times the weights: gradients, DDP's copy of them, AdamW's two moments, the running mean."""
CPU_SAMPLES = 2
"""Without a GPU: 4 to 7 times as fast as one by one, since oneDNN then takes over (measured with the demo's recipes); 4
are faster by another 1 to 7 %, for twice the memory."""


def choose(train_step: TrainStep) -> dict[str, Any]:
    """Set the step's `micro_batch` to the local share, or to what fits; what there is to tell of it. A collective."""
    device, world_size = train_step.device, train_step.world_size
    share = -(-train_step.config.train.global_batch // world_size)
    if train_step.exact or share == 1:
        train_step.micro_batch = 1
    elif device.type != "cuda":
        train_step.micro_batch = min(share, CPU_SAMPLES)
    else:
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        weights = sum(p.numel() * p.element_size() for p in train_step.network.parameters())
        one = _sample_bytes(train_step)
        number = torch.tensor(fitting(share, free, total, weights, one), device=device)
        if world_size > 1:
            distributed.all_reduce(number, distributed.ReduceOp.MIN)
        train_step.micro_batch = int(number)
        facts = {"share": share, "gb_per_sample": round(one / 1e9, 3), "free_gb": round(free / 1e9, 2)}
        return {"samples": train_step.micro_batch} | facts
    return {"samples": train_step.micro_batch, "share": share}


def fitting(share: int, free: int, total: int, weights: int, sample: int) -> int:
    """How many samples of the rank's share fit; all in bytes. At least one: if that is too large, training says so."""
    room = free - RESERVED * total - WEIGHTS * weights
    return max(1, min(share, int(room // sample)))


def _sample_bytes(train_step: TrainStep) -> int:
    """Peak of one sample forth and back. Not compiled, and without the trials by which cuDNN finds the fastest code."""
    device, benchmark = train_step.device, torch.backends.cudnn.benchmark
    size = tuple(reversed(train_step.config.data.patch_xyz))
    torch.backends.cudnn.benchmark = False
    try:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train_step.network.train()
        image = torch.zeros((1, 4, *size), device=device)
        with torch.autocast(device.type, train_step.precision, enabled=train_step.precision is not None):
            logits = train_step.network.forward(image)
        loss = sample_losses(logits, torch.zeros((1, 3, *size), device=device)).sum()
        torch.autograd.grad(loss, list(train_step.network.parameters()), allow_unused=True)
        return max(1, torch.cuda.max_memory_allocated(device) - before)
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.cuda.empty_cache()
