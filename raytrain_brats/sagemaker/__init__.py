"""The same run as a SageMaker training job: `raytrain-brats sagemaker launch|process|host`.

In: the name of a step and its options; on the launching machine AWS credentials, in a container /opt/ml.
Out: the step's exit code.
"""

import importlib
import sys

from raytrain_brats.cli import choose

STEPS = {
    "launch": "train as a SageMaker training job; --dry-run prints the request",
    "process": "prepare as a SageMaker Processing job",
    "host": "the entry inside every container",
}
"""A module each. Status, log and stopping of a job are done by the AWS CLI: docs/sagemaker.md."""


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    name = choose("raytrain-brats sagemaker", "step", given, STEPS)
    if isinstance(name, int):
        return name
    return int(importlib.import_module(f"raytrain_brats.sagemaker.{name}").main(name, given[1:]))
