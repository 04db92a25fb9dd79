"""Is what the device computes right: against the CPU, against float32, twice, and shared among ranks.

In: the recipes' networks on small patches. Out: findings; those beyond rounding are wrong.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from raytrain_brats.learn import convolution_check
from raytrain_brats.learn.batch import finish, gather, upload
from raytrain_brats.learn.step import weight_hash
from raytrain_brats.run.feed import batch_of
from scripts.gpu_parts.setting import CPU, RECIPES, Setting, apart, config, flat, gradient, patches, train_step

STEPS, STEPS_ON_CPU = 20, 3
FLOAT32 = 0.01
"""Distance from the CPU's gradient, without TF32, as a share: sums in another order, some tens of layers deep."""
HALF = {"fp16": 0.1, "bf16": 0.3}
"""Likewise of a gradient in half precision from float32's. Small networks are 0.02 off in fp16 on a CPU; full ones,
with every layer's result and gradient rounded to bf16, 0.02 and 0.10. What is computed wrongly is off by about 1."""
LOSS = 0.05
"""Between losses after `STEPS` steps on the same few patches, as a share."""
RANKS_EDGE, BIG_SCALE = 8, 2.0**23
"""Of `fp16_ranks`; a loss scale that fp16 cannot bear in some steps."""


def convolution(setting: Setting) -> None:
    """A layer of the network: right, cuDNN's, and its time and memory."""
    card = convolution_check.card_of(setting.device)
    if missing := convolution_check.not_built(card):
        setting.findings.tell("a 3D convolution", missing)
        return
    measured = convolution_check.measure(setting.device, setting.edge, convolution_check.precisions(card))
    for one in measured:
        facts = {"ms": round(one.milliseconds, 2), "peak_gb": round(one.peak_bytes / 1e9, 3)}
        setting.findings.tell(f"a 3D convolution, {one.precision}", "", **facts, off=one.off)
    for wrong in convolution_check.findings(card, measured):
        setting.findings.tell("a 3D convolution", wrong)


@dataclass(frozen=True)
class _Trained:
    """Some steps of a few patches, again and again."""

    losses: list[float]
    """NaN of a step that was left out."""
    gradient: torch.Tensor
    """Of the first step."""
    weights: torch.Tensor


def _train(setting: Setting, recipe: str, kind: str, device: torch.device, count: int) -> _Trained:
    step = train_step(config(recipe, setting.small, 4, "train.amp=false"), device)
    step.precision = {"float32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    step.scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
    losses: list[float] = []
    first = torch.zeros(0)
    for number in range(count):
        again = number % 4
        batch = batch_of(patches(again, setting.small, 4, device), 4 * again, device)
        made = step.step(batch, 4 * number)
        losses.append(float("nan") if made.loss is None or not made.finite else made.loss)
        if number == 0:
            first = gradient(step)
    return _Trained(losses, first, flat(step))


def against_cpu(setting: Setting) -> None:
    """Float32 on the device, without TF32: loss and gradient of the first step, loss and weights after three."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for recipe in RECIPES:
            right, found = (_train(setting, recipe, "float32", device, 3) for device in (CPU, setting.device))
            pairs = zip(found.losses, right.losses, strict=True)
            off = {"losses": max(abs(a - b) / b for a, b in pairs)}
            off |= {"gradient": apart(found.gradient, right.gradient), "weights": apart(found.weights, right.weights)}
            wrong = ", ".join(what for what, share in off.items() if not share < FLOAT32)
            setting.findings.tell(f"{recipe} in float32, 3 steps", wrong and f"not the CPU's: {wrong}", off=off)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def halves(setting: Setting) -> None:
    """Half precision against float32 on the same device: the first gradient, and what the loss comes to."""
    kinds = ["fp16"]  # oneDNN's bf16 convolution gave gradients of 1e33 on CPUs
    if setting.gpu and torch.cuda.is_bf16_supported(False):
        kinds.append("bf16")
    for recipe in RECIPES:
        right = _train(setting, recipe, "float32", setting.device, STEPS if setting.gpu else STEPS_ON_CPU)
        for kind in kinds:
            found = _train(setting, recipe, kind, setting.device, len(right.losses))
            left_out = sum(loss != loss for loss in found.losses)
            # fp16's first steps may find its loss scale too large, and lower it: then there is no first gradient.
            off = apart(found.gradient, right.gradient) if found.losses[0] == found.losses[0] else 0.0
            last, wanted = found.losses[-1], right.losses[-1]
            wrong = "" if abs(last - wanted) < LOSS * wanted else f"float32 comes to {wanted:.4f}"
            wrong = wrong or ("" if off < HALF[kind] else f"the gradient is {off:.1%} off")
            facts = {"gradient_off": off, "loss": last, "loss_of_float32": wanted, "left_out": left_out}
            setting.findings.tell(f"{recipe} in {kind}, {len(right.losses)} steps", wrong, **facts)


def exact(setting: Setting) -> None:
    """`reduction: exact` twice: the same bits, but for SegResNet on GPUs, whose upsampling has no such kernel."""
    try:
        for recipe in RECIPES:
            hashes = []
            for _ in range(2):
                step = train_step(config(recipe, setting.small, 4, "train.reduction=exact"), setting.device)
                for number in range(3):
                    mine = patches(number, setting.small, 4, setting.device)
                    step.step(batch_of(mine, 4 * number, setting.device), 4 * number)
                hashes.append(weight_hash(step.network))
            same = hashes[0] == hashes[1]
            wrong = "" if same or (setting.gpu and recipe == "segresnet") else "other bits"
            setting.findings.tell(f"{recipe}, exact, twice", wrong, the_same_bits=same)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def compiled(setting: Setting) -> None:
    """The batch, made by torch.compile and without it. (Where a product and a sum are fused, the last bit differs.)"""
    if not setting.gpu:
        setting.findings.tell("compiled batch", left_out="on a GPU only")
        return
    settings = config("segresnet", setting.edge, 4, "train.augment.kind=light")  # `full` is not compiled
    table = train_step(settings, setting.device).table
    batch = batch_of(patches(0, setting.edge, 4, setting.device), 0, setting.device)
    _, numbers = upload([], batch.samples, setting.device)
    given = (*gather(batch.samples, settings.train.augment), numbers, table, settings.train.augment)
    quick = torch.compile(finish, dynamic=False)
    eager, other = finish(*given), quick(*given)
    same = all(torch.equal(a, b) for a, b in zip(eager, other, strict=True))
    off = apart(other[0].double(), eager[0].double())
    wrong = "" if off < 1e-6 and torch.equal(eager[1], other[1]) else "another batch"
    facts = {"eager_ms": setting.milliseconds(lambda: finish(*given))}
    facts["compiled_ms"] = setting.milliseconds(lambda: quick(*given))
    setting.findings.tell("compiled batch against eager", wrong, the_same_bits=same, off=off, **facts)


def fp16_ranks(setting: Setting) -> None:
    """Two ranks (gloo, on CPUs) against one, in fp16 with a loss scale that some steps cannot bear: the same steps are
    applied, and the weights agree."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, port), nprocs=2)  # type: ignore[attr-defined]
        alone, weights = _applied(1, slice(None))
        ranks = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(2)]
    off = max(float((found - weights).abs().max()) for _, found in ranks)
    agree = all(counted == alone for counted, _ in ranks) and off < 2e-3
    setting.found["fp16_updates_agree"] = agree
    wrong = "" if agree else "other steps at another world size"
    if all(alone) or not any(alone):
        wrong = "no step overflowed, or all did: nothing was tested"
    setting.findings.tell("fp16, two ranks against one", wrong, applied=alone, ranks=[r[0] for r in ranks], off=off)


def _applied(world_size: int, share: slice) -> tuple[list[bool], torch.Tensor]:
    sgd = ("train.optimiser.name=sgd", "train.optimiser.learning_rate=0.01", "train.optimiser.clip_norm=1000000")
    step = train_step(config("segresnet", RANKS_EDGE, 4, "train.micro_batch=1", *sgd), CPU, world_size)
    step.precision = torch.float16
    step.scaler = torch.amp.GradScaler("cpu", init_scale=BIG_SCALE)
    results = []
    for number in range(6):
        batch = batch_of(patches(number, RANKS_EDGE, 4, CPU)[share], 4 * number, CPU)
        results.append(step.step(batch, 4 * number))
    return [result.finite for result in results], flat(step)


def _rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(_applied(2, slice(rank, None, 2)), Path(folder) / str(rank))
    distributed.destroy_process_group()
