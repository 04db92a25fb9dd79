"""Check before a request is sent what AWS would refuse or waste.

In: the request as botocore would send it, and botocore's own model of the service; instance types; the run's settings.
Out: nothing where all is well; else a UserError that names the option, or a line about GPUs that nobody would use.
"""

import re
from collections.abc import Iterator
from typing import Any

import botocore.session

from raytrain_brats.config import Config
from raytrain_brats.errors import UserError

Instances = list[tuple[str, int]]

LOCAL_DISKS = {
    *("g4dn", "g5", "g6", "g6e", "g7", "g7e", "m5d", "c5d", "r5d", "p3dn", "p4d", "p4de", "p5", "p5e", "p5en"),
    *("p6-b200", "p6-b300", "p6e-gb200", "trn1", "trn1n", "trn2"),
}
"""Families with disks in the machine, by EC2's DescribeInstanceTypes."""
_FOUR, _TWO = ({"12xlarge": n, "24xlarge": 4, "48xlarge": 8} for n in (4, 2))
_WHOLE = {"24xlarge": 8, "48xlarge": 8}
GPUS: dict[str, dict[str, int]] = {
    "g4dn": {"12xlarge": 4},
    "p2": {"8xlarge": 8, "16xlarge": 16},
    "p3": {"8xlarge": 4, "16xlarge": 8},
    "p6e-gb200": {"36xlarge": 4},
    **dict.fromkeys(("g5", "g6", "g6e"), _FOUR),
    **dict.fromkeys(("g7", "g7e"), _TWO),
    **dict.fromkeys(("p3dn", "p4d", "p4de", "p5", "p5e", "p5en", "p6-b200", "p6-b300"), _WHOLE),
}
"""Families with NVIDIA GPUs: the sizes that have more than one."""
OPTIONS = {
    "RoleArn": "role",
    "TrainingImage": "image",
    "ImageUri": "image",
    "TrainingJobName": "name",
    "ProcessingJobName": "name",
    "VolumeSizeInGB": "volume-gb",
    "InstanceCount": "train-instances, --data-instances or --instances",
    "MaxRuntimeInSeconds": "max-hours",
    "MaxWaitTimeInSeconds": "max-wait-hours",
    "KeepAlivePeriodInSeconds": "keep-alive-minutes",
    "VolumeKmsKeyId": "kms-key",
    "KmsKeyId": "kms-key or --output-kms-key",
    "Subnets": "subnets",
    "SecurityGroupIds": "security-groups",
    "FileSystemId": "fsx",
    "Environment": "env",
    "Tags": "tag",
    "HyperParameters": "recipe or --set",
}
"""Option behind each member of a request that a user's words go into."""
MAX_HOURS = 28 * 24
"""Of a training job, by the API's guide; the service model has no such limit."""


def gpus(kind: str) -> int:
    """GPUs of one instance of a type such as ml.g5.xlarge."""
    family, _, size = kind.removeprefix("ml.").partition(".")
    return GPUS[family].get(size, 1) if family in GPUS else 0


def has_local_disks(kind: str) -> bool:
    return kind.removeprefix("ml.").partition(".")[0] in LOCAL_DISKS


def about(kind: str) -> str:
    """What to know of a type before paying for it; mostly nothing."""
    if kind.startswith("ml.p3"):
        return f"{kind}: V100 needs an image with torch 2.8.0 for CUDA 12.6 (docs/sagemaker.md, images)"
    return ""


def check_volume_key(groups: Instances, key: str, otherwise: str) -> None:
    """Raises UserError for a key for the disks of instances that encrypt theirs themselves."""
    if key and (local := [kind for kind, _ in groups if has_local_disks(kind)]):
        raise UserError(
            f"--kms-key: {local[0]} has local disks, which its own hardware encrypts, and AWS takes no key for them; "
            f"{otherwise}"
        )


def check_warm_pool(minutes: int, spot: bool, groups: Instances) -> None:
    """Raises UserError where AWS keeps no warm pool."""
    if minutes and spot:
        raise UserError("--keep-alive-minutes: AWS keeps no warm pool of spot instances; leave out one of the two")
    if minutes and len(groups) > 1:
        raise UserError(
            "--keep-alive-minutes: AWS keeps no warm pool of a job with --data-instances; leave out one of the two"
        )


def check_workers(config: Config, kind: str, number: int) -> str:
    """A line for the user about GPUs that would idle; empty when there are none, or the type has no GPUs.

    Raises UserError for workers that the run would refuse in its container.
    """
    batch, there = config.train.global_batch, gpus(kind) * number
    if config.run.workers == "auto":
        low, high = 1, min(batch, there)
    else:
        first, _, last = config.run.workers.partition(":")
        low, high = int(first), int(last or first)
    if high > batch:
        raise UserError(
            f"--workers {config.run.workers}: more workers than train.global_batch = {batch}; every worker needs a "
            f"sample of each step: --set train.global_batch={high}, or fewer workers"
        )
    a_worker = config.run.gpus_per_worker if config.run.gpus_per_worker is not None else 1
    if there and low * a_worker > there:
        raise UserError(f"--workers {config.run.workers}: {number} x {kind} have {there} GPUs; give fewer or more")
    if (idle := there - high * max(1, a_worker)) <= 0:
        return ""
    cure = f"--set train.global_batch={there}" if high == batch else f"--workers {there}"
    return f"{idle} of {there} GPUs would idle and cost: {high} workers, global batch {batch}; give {cure}"


def check_request(operation: str, request: dict[str, Any]) -> None:
    """Check a request against botocore's model of SageMaker. Raises UserError naming the option and what is allowed.

    botocore itself has checked names, types and lower bounds before; not patterns, choices and upper bounds.
    """
    shape = botocore.session.get_session().get_service_model("sagemaker").operation_model(operation).input_shape
    for path, reason in _faults(shape, request, ()):
        names = [name for name in path if name in OPTIONS]
        option = f"--{OPTIONS[names[-1]]}" if names else ".".join(path)
        raise UserError(f"{option}: AWS would refuse {'.'.join(path)}: {reason}")


def _faults(shape: Any, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, what is wrong) of all that the model does not allow."""
    kind = shape.type_name
    if kind == "structure":
        for name, part in value.items():
            yield from _faults(shape.members[name], part, (*path, name))
        return
    size = value if kind in ("integer", "long", "float", "double") else len(value) if kind != "boolean" else None
    bounds, unit = shape.metadata, {"string": " characters", "list": " entries", "map": " entries"}.get(kind, "")
    if size is not None and not bounds.get("min", size) <= size <= bounds.get("max", size):
        yield path, f"{size:,}{unit}; it takes {bounds.get('min', 0):,} to {bounds.get('max', 'any'):,}{unit}"
    elif kind == "list":
        for number, part in enumerate(value):
            yield from _faults(shape.member, part, (*path, str(number)))
    elif kind == "map":
        for key, part in value.items():
            yield from _faults(shape.key, key, (*path, key))
            yield from _faults(shape.value, part, (*path, key))
    elif kind == "string":
        if "enum" in bounds and value not in bounds["enum"]:
            yield path, f"{value!r} is none of its choices"
        if "pattern" in bounds and not re.fullmatch(_python(bounds["pattern"]), value):
            yield path, f"{value!r} is not of the form {bounds['pattern']}"


def _python(pattern: str) -> str:
    """AWS's patterns are Java's; one that Python cannot read (halves of UTF-16 pairs) lets all pass."""
    for java, ours in ((r"\p{L}", r"\w"), (r"\p{N}", r"\d"), (r"\p{Z}", r"\s"), (r"\p{Alnum}", "a-zA-Z0-9")):
        pattern = pattern.replace(java, ours)
    try:
        re.compile(pattern)
    except re.error:
        return r"(?s).*"
    return pattern
