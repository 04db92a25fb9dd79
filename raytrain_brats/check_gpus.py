"""The first job on a new cluster: `ray job submit -- python -m raytrain_brats.check_gpus --workers 16`.

In: how many GPUs. Out: a line for each of them, its 3D convolution and the all-reduce's bus bandwidth; exit code 1 when
something is wrong. With NCCL_DEBUG=INFO the log names the network: on p4d "NET/OFI Selected provider is efa".
"""

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import ScalingConfig, TrainingFailedError, get_context, report
from ray.train.torch import TorchTrainer, get_device

from raytrain_brats.ray_ext.internals import core

MEGABYTES = 256
TOLERANCE = 0.05
"""Of half precision against float32, as a share of the largest value."""


def check(settings: dict[str, Any]) -> None:
    rank, world, device = get_context().get_world_rank(), get_context().get_world_size(), get_device()
    milliseconds = convolve(device, settings["edge"])
    line = f"rank {rank}: {socket.gethostname()}: {describe(device)}; 3D convolution {milliseconds:.1f} ms, right"
    core.kv_put(f"{settings['key']}/{rank:04d}", line.encode())
    numbers = torch.ones(MEGABYTES * 2**18, device=device)
    for turn in range(2 * settings["rounds"]):
        if turn == settings["rounds"]:  # the first half warms up
            began = now(device)
        dist.all_reduce(numbers)
        numbers /= world
    seconds = (now(device) - began) / settings["rounds"]
    if not bool((numbers == 1).all()):
        raise RuntimeError(f"rank {rank}: the all-reduce's sums are wrong")
    speed = 2 * (world - 1) / world * MEGABYTES / 1024 / seconds
    if rank == 0:
        line = f"all-reduce of {MEGABYTES} MiB over {world}: {seconds * 1e3:.1f} ms, {speed:.1f} GiB/s on the bus"
        core.kv_put(f"{settings['key']}/all-reduce", line.encode())
    report({"seconds": seconds})


def describe(device: torch.device) -> str:
    """The card and what torch makes of it. Raises RuntimeError when torch was not built for it."""
    if device.type != "cuda":
        return "CPU"
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    name = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, torch {torch.__version__}"
    if not any(f"sm_{major}{older}" in built for older in range(minor + 1)):
        raise RuntimeError(f"{name} was built for {', '.join(built)} only")
    return f"{name}, {'bf16' if precision() == torch.bfloat16 else 'fp16'}"


def precision() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def convolve(device: torch.device, edge: int) -> float:
    """Milliseconds of a 3D convolution of 32 channels, forwards and backwards, in the precision that training uses.

    Raises RuntimeError when a small one's result or gradient is not that of the CPU in float32: cuDNN has kernels of
    its own for each kind of card.
    """
    torch.manual_seed(0)
    layer, image = torch.nn.Conv3d(4, 32, 3, padding=1), torch.randn(1, 4, 24, 24, 24)
    wanted = results(layer, image)
    layer, image = layer.to(device), image.to(device)
    for what, right, found in zip(("result", "gradient"), wanted, results(layer, image), strict=True):
        off = float((found.float().cpu() - right).abs().max() / right.abs().max())
        if not off < TOLERANCE:
            raise RuntimeError(f"{describe(device)}: the {what} of a 3D convolution is off by {off:.1%}")
    layer, image = (
        torch.nn.Conv3d(32, 32, 3, padding=1, device=device),
        torch.randn(1, 32, edge, edge, edge, device=device),
    )
    results(layer, image)
    began = now(device)
    results(layer, image)
    return 1e3 * (now(device) - began)


def results(layer: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, gradient of the weights)."""
    layer.zero_grad()
    on_gpu = image.device.type == "cuda"
    with torch.autocast(image.device.type, precision() if on_gpu else torch.bfloat16, enabled=on_gpu):
        made = layer(image)
    (made.float().square().sum() / 1000).backward()  # gradients that fp16 holds
    gradient = layer.weight.grad
    assert isinstance(gradient, torch.Tensor)
    return made.detach(), gradient.detach()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, required=True, help="GPUs to check, all of them at best")
    parser.add_argument("--rounds", type=int, default=20, help="all-reduces to time")
    parser.add_argument("--edge", type=int, default=0, help="voxels of the convolution to time (128, on CPUs 32)")
    parser.add_argument("--cpu", action="store_true", help="try it without GPUs")
    args = parser.parse_args()
    # NCCL's own log comes from the workers; without it theirs is noise, as this process prints what they found
    ray.init(address="auto", log_to_driver="NCCL_DEBUG" in os.environ)
    scaling = ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu)
    settings: dict[str, Any] = {
        "key": f"check/{uuid.uuid4().hex}",
        "rounds": args.rounds,
        "edge": args.edge or (32 if args.cpu else 128),
    }
    over, shown = threading.Event(), set[str]()

    def show() -> None:
        """Print what workers have found, as it comes: a network that hangs must not hide which ranks are well."""
        with contextlib.suppress(Exception):  # the cluster is going; `fit` says why
            for key in sorted(set(core.kv_list(settings["key"])) - shown):
                print((core.kv_get(key) or b"").decode(), flush=True)
                shown.add(key)

    def follow() -> None:
        while not over.wait(1):
            show()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        TorchTrainer(check, train_loop_config=settings, scaling_config=scaling).fit()
    except TrainingFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        over.set()
        follower.join(10)
        show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
