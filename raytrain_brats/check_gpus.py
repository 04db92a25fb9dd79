"""The first job on a new cluster: `ray job submit -- python -m raytrain_brats.check_gpus --workers 16`. Where no Ray
runs, it looks at this machine.

In: how many GPUs. Out: a line for each of them, with its 3D convolutions in each precision, and one with the
all-reduce's bus bandwidth; a line for each thing that is wrong, with what to do, and then exit code 1. With
NCCL_DEBUG=INFO the log names the network: on p4d "NET/OFI Selected provider is efa".
"""

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
import uuid
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import ScalingConfig, TrainingFailedError, get_context, report
from ray.train.torch import TorchTrainer, get_device

from raytrain_brats.errors import UserError
from raytrain_brats.learn import convolution_check
from raytrain_brats.learn.convolution_check import now
from raytrain_brats.ray_ext import start_up
from raytrain_brats.ray_ext.internals import core

MEGABYTES = 256
WRONG = "wrong"
"""Part of the keys of what is wrong."""


def check(settings: dict[str, Any]) -> None:
    rank, world, device = get_context().get_world_rank(), get_context().get_world_size(), get_device()
    convolve(f"rank {rank}: {socket.gethostname()}", f"{settings['key']}/{rank:04d}", device, settings["edge"])
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


def convolve(who: str, key: str, device: torch.device, edge: int) -> None:
    """Put what is found out about a device's 3D convolutions where `main` prints it.

    Raises RuntimeError when torch has no code for the device at all.
    """
    card = convolution_check.card_of(device)
    if problem := convolution_check.not_built(card):
        core.kv_put(f"{key}/{WRONG}", f"{who}: {problem}".encode())
        raise RuntimeError(problem)
    measured = convolution_check.measure(device, edge, convolution_check.precisions(card))
    problems = convolution_check.findings(card, measured)
    for number, problem in enumerate(problems):
        core.kv_put(f"{key}/{WRONG}-{number}", f"{who}: {problem}".encode())
    times = ", ".join(map(str, measured))
    line = f"{who}: {card}; 3D convolution of {edge}^3 voxels: {times}{'' if problems else '; right'}"
    core.kv_put(key, line.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, required=True, help="GPUs to check, all of them at best")
    parser.add_argument("--rounds", type=int, default=20, help="all-reduces to time")
    parser.add_argument("--edge", type=int, default=0, help="voxels of the convolution to time (128, on CPUs 32)")
    parser.add_argument("--cpu", action="store_true", help="try it without GPUs")
    args = parser.parse_args()
    # NCCL's own log comes from the workers; without it theirs is noise, as this process prints what they found
    quiet = "NCCL_DEBUG" not in os.environ
    try:
        address = start_up.address()
        ray.init(
            address=address or "local",
            log_to_driver=not quiet,
            logging_level=logging.WARNING if quiet else logging.INFO,
        )
        if not address and not args.cpu and ray.cluster_resources().get("GPU", 0) < args.workers:
            raise UserError(f"Ray finds fewer than {args.workers} GPUs on this machine; --cpu tries it without")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    return int(any(f"/{WRONG}" in key for key in shown))


if __name__ == "__main__":
    sys.exit(main())
