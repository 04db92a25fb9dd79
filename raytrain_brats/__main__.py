"""The command line: `raytrain-brats NAME ...` is `python -m raytrain_brats.NAME ...`.

In: the name of a command and its arguments.
Out: the command's exit code.
"""

import sys

from raytrain_brats import home, interrupt

if __name__ == "__main__" or sys.argv[0].endswith("raytrain-brats"):  # the command; not who imports this module
    interrupt.install()
    home.provide()

import importlib

from raytrain_brats import __version__
from raytrain_brats.cli import choose, piped

COMMANDS = {
    "phantom": "write labelled BraTS-like cases",
    "download": "fetch MSD Task01 from its public bucket",
    "recipes": "list the settings of whole runs that ship, or show one",
    "index": "find and checksum the cases of a folder",
    "prepare": "preprocess all cases once, into a store",
    "expand": "make many distinct volumes from each case",
    "plan": "what a run will take and cost, and what limits it",
    "doctor": "check this machine, or the cluster, before a run",
    "train": "train; the same command again goes on",
    "evaluate": "Dice and HD95 of held-out cases",
    "postprocess": "learn on held-out cases what to make of probabilities",
    "predict": "segment NIfTI cases",
    "verify": "prove that every sample was applied once, in order",
    "report": "one page: curves, overlays, time split",
    "compare": "runs side by side: scores, curves, differing settings",
    "share": "the networks of a run in one file that predicts elsewhere",
    "export": "the network as ONNX and MONAI Bundle, with a model card",
    "ec2": "clusters on EC2: list what is left that costs money",
    "spot": "on a spot machine: drain its Ray node when EC2 gives notice",
    "sagemaker": "the same run as a SageMaker job: launch, process, host",
}


def main() -> int:
    return piped(_main)


def _main() -> int:
    if sys.argv[1:2] in (["--version"], ["-V"], ["version"]):
        print(f"raytrain-brats {__version__}")
        return 0
    name = choose("raytrain-brats", "command", sys.argv[1:], COMMANDS)
    if isinstance(name, int):
        return name
    return int(importlib.import_module(f"raytrain_brats.{name}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
