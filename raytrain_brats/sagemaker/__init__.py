"""The same run as a SageMaker training job: `raytrain-brats sagemaker launch|process|status|logs|stop|host`.

In: the name of a step and its options; on the launching machine AWS credentials, in a container /opt/ml.
Out: the step's exit code.
"""

import importlib
import sys

from raytrain_brats.cli import choose

STEPS = {
    "launch": ("launch", "train as a SageMaker training job; --dry-run prints the request"),
    "process": ("process", "prepare as a SageMaker Processing job"),
    "status": ("jobs", "how a job stands, what it has cost"),
    "logs": ("jobs", "what its containers print"),
    "stop": ("jobs", "end it; the run saves first"),
    "host": ("host", "the entry inside every container"),
}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    name = choose("raytrain-brats sagemaker", "step", given, {step: what for step, (_, what) in STEPS.items()})
    if isinstance(name, int):
        return name
    return int(importlib.import_module(f"raytrain_brats.sagemaker.{STEPS[name][0]}").main(name, given[1:]))
