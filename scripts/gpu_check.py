"""Is the training right on one GPU, and what does it cost: `scripts/gpu_check`, without Ray or network.

In: nothing but the options; patches and cases are made. `--cpu`: what a CPU can show, at a small edge.
Out: a JSON line a finding; with `--json` all of them in one file; exit code 1 when one is wrong or a part failed.

Every part stands alone: one that fails says so, and the next goes on.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_parts import augmenting, counts, feeding, precision, saving
from scripts.gpu_parts.setting import CPU, Findings, Setting, stamp

PARTS: dict[str, Callable[[Setting], None]] = {
    "convolution": precision.convolution,
    "against_cpu": precision.against_cpu,
    "halves": precision.halves,
    "exact": precision.exact,
    "copies": counts.copies,
    "host_waits": feeding.host_waits,
    "uploads": feeding.uploads,
    "resident": feeding.resident,
    "micro_batch": feeding.micro_batch,
    "saving": saving.cpu_memory,
    "saving_beside_steps": saving.beside_steps,
    "whole_case": feeding.whole_case,
    "kept_for_backward": counts.kept_for_backward,
    "fp16_ranks": precision.fp16_ranks,
    "compiled": precision.compiled,
    "augmentation": augmenting.augmentation,
}
"""What most depends on the card comes first: time may run out."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all: {', '.join(PARTS)}")
    parser.add_argument("--cpu", action="store_true", help="what a CPU can show, at a small edge")
    parser.add_argument("--edge", type=int, help="voxels along a patch; by default 128, with --cpu 16")
    parser.add_argument("--minutes", type=float, default=18.0, help="no part begins after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all findings; written anew after each part")
    options = parser.parse_args(argv)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"part {unknown[0]} is not known; there are {', '.join(PARTS)}")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --cpu checks what a CPU can show")
    edge = options.edge or (16 if options.cpu else 128)
    if edge < 16 or edge % 16:
        parser.error(f"--edge {edge}: the networks need multiples of 16")
    device = CPU if options.cpu else torch.device("cuda:0")
    findings = Findings()
    setting = Setting(device, edge, findings)
    made: dict[str, Any] = {"date": stamp(), "machine": machine(device), "edge": edge}
    began = time.monotonic()
    for name in options.parts or PARTS:
        findings.part = name
        if time.monotonic() - began > 60 * options.minutes:
            findings.tell("left out", f"no time: {options.minutes:g} minutes have passed")
        else:
            run(setting, PARTS[name])
        if options.json:
            content = setting.found | made | {"wrong": findings.wrong, "findings": findings.rows}
            options.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    for wrong in findings.wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
    sys.stderr.flush()
    print(f"{len(findings.rows)} findings, {len(findings.wrong)} of them wrong; {time.monotonic() - began:.0f} s")
    return 1 if findings.wrong else 0


def run(setting: Setting, part: Callable[[Setting], None]) -> None:
    began = time.monotonic()
    try:
        part(setting)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next part goes on
        where = traceback.format_exc().strip().splitlines()
        setting.findings.tell("failed", f"{type(error).__name__}: {error}", where=where[-8:])
    if setting.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    setting.findings.tell("seconds", value=round(time.monotonic() - began, 1))


def machine(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    facts: dict[str, Any] = {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "ray": find_spec("ray") is not None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_gb": round(properties.total_memory / 1e9, 1)}
        facts |= {"capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version()}
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        facts["driver"] = done.stdout.strip()
    return facts


if __name__ == "__main__":
    sys.exit(main())
