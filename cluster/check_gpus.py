"""The first job on a new cluster: `ray job submit ... -- python cluster/check_gpus.py --workers 16`.

In: how many GPUs. Out: a line for each of them and the all-reduce's bus bandwidth; exit code 1 when something is wrong.
With NCCL_DEBUG=INFO the log names the network: on p4d "NET/OFI Selected provider is efa".
"""

import argparse
import socket
import sys
import time
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import ScalingConfig, TrainingFailedError, get_context, report
from ray.train.torch import TorchTrainer, get_device

MEGABYTES = 256


def check(settings: dict[str, Any]) -> None:
    rank, world, device = get_context().get_world_rank(), get_context().get_world_size(), get_device()
    print(f"rank {rank}: {socket.gethostname()}: {describe(device)}", flush=True)
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
        print(f"all-reduce of {MEGABYTES} MiB over {world}: {seconds * 1e3:.1f} ms, {speed:.1f} GiB/s on the bus")
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
    return f"{name}, {'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'}"


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, required=True, help="GPUs to check, all of them at best")
    parser.add_argument("--rounds", type=int, default=20, help="all-reduces to time")
    parser.add_argument("--cpu", action="store_true", help="try it without GPUs")
    args = parser.parse_args()
    ray.init(address="auto")
    scaling = ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu)
    try:
        TorchTrainer(check, train_loop_config={"rounds": args.rounds}, scaling_config=scaling).fit()
    except TrainingFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
