"""The same run as a SageMaker training job: `raytrain-brats sagemaker launch|process|status|logs|stop|host`.

In: the name of a step and its options; on the launching machine AWS credentials, in a container /opt/ml.
Out: the step's exit code.
"""

import difflib
import importlib
import sys

STEPS = {
    "launch": ("launch", "train as a SageMaker training job; --dry-run prints the request"),
    "process": ("process", "prepare as a SageMaker Processing job"),
    "status": ("jobs", "how a job stands, what it has cost"),
    "logs": ("jobs", "what its containers print"),
    "stop": ("jobs", "end it; the run saves first"),
    "host": ("host", "the entry inside every container"),
}


def main(argv: list[str] | None = None) -> int:
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: raytrain-brats sagemaker STEP [--help] ...\n")
        print("\n".join(f"  {step:8} {what}" for step, (_, what) in STEPS.items()))
        return 0
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STEPS)}"
        print(f"error: sagemaker {name!r} is not known; {hint}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"raytrain_brats.sagemaker.{STEPS[name][0]}").main(name, arguments))
