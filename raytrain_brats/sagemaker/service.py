"""What a training job and a processing job share: options, checks, the price, and the SDK that sends the request.

In: options of the command line; the SageMaker Python SDK v3, which is imported here and in the callers' functions only.
Out: a job that was sent; or, dry, the request as botocore would send it, without credentials, network or job.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.session
from botocore import exceptions as aws

from raytrain_brats import storage
from raytrain_brats.cli import Changes
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.planning import prices
from raytrain_brats.sagemaker import rules
from raytrain_brats.sagemaker.rules import Instances

LOCAL = "/opt/ml"
CHECKPOINTS = f"{LOCAL}/checkpoints"


@dataclass(frozen=True)
class JobOptions:
    """Options of any job."""

    role: str = ""
    """ARN of the execution role: what the containers may do."""
    image: str = ""
    """URI of the container image (cluster/sagemaker/Dockerfile), in the job's region."""
    region: str = ""
    """By default the one of your AWS configuration."""
    name: str = "raytrain-brats"
    """What the job's name begins with."""
    volume_gb: int = 100
    """Disk of each instance; types with NVMe have what they have."""
    max_hours: float = 24.0
    """The job is ended after this many hours of running."""
    subnets: tuple[str, ...] = ()
    """Run inside your VPC, in these subnets."""
    security_groups: tuple[str, ...] = ()
    kms_key: str = ""
    """Encrypts the instances' disks and the job's output; not for types with local disks, such as g5 or p4d."""
    encrypt_traffic: bool = False
    """Encrypt the traffic between containers; slower all-reduce."""
    network_isolation: bool = False
    """No network but between the job's own containers."""
    tag: Changes = ()
    """Tag the job: KEY=VALUE; may be given several times."""
    env: Changes = ()
    """Set a variable in the containers: NAME=VALUE; may be given several times."""
    join_minutes: float = 15.0
    """How long the containers wait for each other before the job fails."""
    dry_run: bool = False
    """Print the request as JSON and what it costs; needs no credentials and no network, starts nothing."""
    wait: bool = False
    """Stay, and print the job's log, until it ends."""


def check(options: JobOptions) -> None:
    """Raises UserError for what the service would refuse, or the user would regret."""
    missing = [f"--{name}" for name in ("role", "image") if not getattr(options, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; docs/sagemaker.md says where they come from")
    if not options.role.startswith("arn:"):
        raise UserError(
            f"--role {options.role}: give the role's whole ARN, such as arn:aws:iam::123456789012:role/NAME"
        )
    if bool(options.subnets) != bool(options.security_groups):
        raise UserError("--subnets and --security-groups go together")


def pairs(given: tuple[str, ...], option: str) -> dict[str, str]:
    """{key: value} of KEY=VALUE options."""
    for pair in given:
        if "=" not in pair:
            raise UserError(f"--{option} {pair}: write it as KEY=VALUE")
    return dict(pair.split("=", 1) for pair in given)


def tags(options: JobOptions) -> dict[str, str]:
    """The user's, and ours: who may launch may send and stop jobs that carry it, and bills can be split by it."""
    return {"project": "raytrain-brats"} | pairs(options.tag, "tag")


def environment(options: JobOptions) -> dict[str, str]:
    return {"RAYTRAIN_BRATS_JOIN_S": f"{60 * options.join_minutes:g}"} | pairs(options.env, "env")


def instances(given: str, option: str, kind: str = "TrainingInstanceType") -> tuple[str, int]:
    """(type, number) of TYPE:N. Raises UserError for a type that the service does not have."""
    name, _, number = given.partition(":")
    known = _known_types(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--{option} {given}: {name} is no SageMaker instance type that this boto3 knows{hint}")
    if not (number or "1").isdigit() or int(number or 1) < 1:
        raise UserError(f"--{option} {given}: write it as TYPE:NUMBER, such as {name}:2")
    return name, int(number or 1)


@lru_cache
def _known_types(kind: str) -> list[str]:
    shapes = botocore.session.get_session().get_service_model("sagemaker")
    return list(shapes.shape_for(kind).enum)


def cost(groups: Instances, spot: bool = False) -> str:
    """One line: USD an hour, and as of when."""
    table = prices.table("sagemaker")
    unknown = sorted({kind for kind, _ in groups if kind not in table["instances"]})
    total = sum(table["instances"].get(kind, 0) * number for kind, number in groups)
    parts = " + ".join(f"{number} x {kind}" for kind, number in groups)
    priced = f"about {total:,.2f} USD an hour" if len(unknown) < len(groups) else "price not known"
    without = f", without {', '.join(unknown)}, whose price is not in the file" if unknown else ""
    less = "; on spot at most that" if spot else ""
    return f"{parts}: {priced}{without} (on demand, {table['region']}, as of {table['date']}{less})"


def send(options: JobOptions, bucket: str, operation: str, start: Callable[[Any], None]) -> None:
    """`start(session)` with a session of the SDK; dry, print the request of `operation` instead of sending it.

    Either way the request is first made without sending anything, and checked against AWS's model of it.
    """
    try:
        from sagemaker.core.helper.session_helper import Session
    except ImportError as error:
        raise UserError(
            f"the SageMaker SDK is not installed ({error}); run scripts/venv sagemaker, or pip install "
            "'raytrain_brats[sagemaker]'"
        ) from error
    # The SDK would report its calls to AWS without asking the user, and a dry run has no network.
    quiet = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
    place: dict[str, Any] = {"default_bucket": bucket, "sagemaker_config": quiet}
    try:
        request = captured(
            options.region, bucket, operation, lambda session: start(Session(boto_session=session, **place))
        )
        rules.check_request(operation, request)
        if not options.dry_run:
            start(Session(boto_session=boto3.Session(region_name=options.region or None), **place))
            return
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.NoRegionError) as error:
        raise UserError(f"{error}; run aws configure (or aws sso login); --dry-run needs no credentials") from error
    except aws.ParamValidationError as error:
        raise UserError(f"the service would refuse the request: {error}") from error
    except aws.ClientError as error:
        raise RunFailed(f"AWS refused: {error}") from error
    print(json.dumps(request, indent=1))


class _RequestSeen(Exception):  # noqa: N818 - not an error
    """The request is complete; carries its body. An Exception: the SDK swallows what is only a BaseException."""


def captured(region: str, bucket: str, operation: str, start: Callable[[boto3.Session], None]) -> Any:
    """The body of the first `operation` that `start` sends, checked by botocore; nothing leaves this process."""
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    session = boto3.Session("none", "none", region_name=region)

    def answer(model: Any, params: Any, **_: Any) -> Any:
        if model.name == operation:
            raise _RequestSeen(params["body"])
        there = {"Buckets": [{"Name": bucket, "CreationDate": datetime.now(UTC)}]}
        return SimpleNamespace(status_code=200), there if model.name == "ListBuckets" else {}  # as if all was well

    session.events.register("before-call", answer)
    before = os.environ.get("SAGEMAKER_VALIDATE_ROLE")
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"  # the SDK would ask IAM
    try:
        start(session)
    except _RequestSeen as seen:
        return json.loads(seen.args[0])
    finally:
        os.environ.pop("SAGEMAKER_VALIDATE_ROLE")
        if before is not None:
            os.environ["SAGEMAKER_VALIDATE_ROLE"] = before
    raise RunFailed(f"the SDK sent no {operation}")


def bucket_of(uri: str) -> str:
    return uri[len("s3://") :].partition("/")[0]


def s3_place(uri: str, option: str) -> str:
    """The URI in its one spelling. Raises UserError unless it is on S3."""
    if not storage.is_s3(uri) or not bucket_of(uri):
        raise UserError(f"--{option} {uri or '(nothing)'}: a SageMaker job reads and writes s3://; give such a place")
    return storage.normal(uri)


def show(text: str) -> None:
    """To the user, beside the JSON on standard output."""
    print(text, file=sys.stderr, flush=True)
