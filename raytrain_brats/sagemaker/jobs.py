"""How a training or processing job stands, what it prints, its end: `raytrain-brats sagemaker status|logs|stop NAME`.

In: the name of a job; AWS credentials. No SDK: boto3 alone.
Out: lines on standard output.
"""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import boto3
import tyro
from botocore import exceptions as aws

from raytrain_brats.cli import entry
from raytrain_brats.errors import RunFailed, UserError

POLL_S = 5.0
RUNNING = ("InProgress", "Stopping")


@dataclass(frozen=True)
class Args:
    """Status, log or end of a SageMaker job."""

    name: Annotated[str, tyro.conf.Positional]
    """The job's name, as `launch` or `process` printed it."""
    region: str = ""
    """By default the one of your AWS configuration."""


@dataclass(frozen=True)
class LogArgs(Args):
    follow: bool = False
    """Go on until the job ends."""


def _describe(args: Args) -> tuple[str, dict[str, Any]]:
    """(Training or Processing, the service's description)."""
    client = boto3.client("sagemaker", region_name=args.region or None)
    try:
        return "Training", client.describe_training_job(TrainingJobName=args.name)
    except client.exceptions.ResourceNotFound:
        pass
    except aws.ClientError as error:
        if "ot found" not in str(error) and "ot find" not in str(error):
            raise
    try:
        return "Processing", client.describe_processing_job(ProcessingJobName=args.name)
    except aws.ClientError as error:
        region = client.meta.region_name
        raise UserError(f"no training or processing job {args.name} in {region} ({error})") from error


def status(args: Args) -> None:
    kind, job = _describe(args)
    secondary = job.get("SecondaryStatus", "")
    print(f"{kind} job {args.name}: {job[f'{kind}JobStatus']}{f' ({secondary})' if secondary else ''}")
    for cause in ("FailureReason", "ExitMessage"):
        if job.get(cause):
            print(f"cause: {job[cause]}")
    if run_dir := job.get("HyperParameters", {}).get("run_dir"):
        print(f"run folder: {run_dir}")
    if (billed := job.get("BillableTimeInSeconds")) is not None:
        ran = job.get("TrainingTimeInSeconds") or 0
        saved = f", {1 - billed / ran:.0%} saved by spot" if ran > billed else ""
        print(f"billed: {billed:,} s an instance of {ran:,} s running{saved}")
    for metric in job.get("FinalMetricDataList", []):
        print(f"{metric['MetricName']}: {metric['Value']:g}")


def logs(args: LogArgs) -> None:
    client = boto3.client("logs", region_name=args.region or None)
    read: dict[str, str] = {}
    while True:
        kind, job = _describe(args)  # before the lines: what it said until it ended is read once more
        group = f"/aws/sagemaker/{kind}Jobs"
        try:
            pages = client.get_paginator("describe_log_streams").paginate(
                logGroupName=group, logStreamNamePrefix=f"{args.name}/"
            )
            for stream in (stream["logStreamName"] for page in pages for stream in page["logStreams"]):
                _print_new(client, group, stream, read)
        except client.exceptions.ResourceNotFoundException:
            pass  # no container has said anything yet
        if not args.follow or job[f"{kind}JobStatus"] not in RUNNING:
            break
        time.sleep(POLL_S)
    if not read:
        print(f"nothing yet: {job[f'{kind}JobStatus']} {job.get('SecondaryStatus', '')}".rstrip())


def _print_new(client: Any, group: str, stream: str, read: dict[str, str]) -> None:
    """The lines of one container since the last call, which `read` remembers."""
    host = stream.split("/")[-1].rsplit("-", 1)[0]
    while True:
        since = {"nextToken": read[stream]} if stream in read else {}
        found = client.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **since)
        for event in found["events"]:
            print(f"[{host}] {event['message']}", flush=True)
        if found["nextForwardToken"] == read.get(stream):
            return
        read[stream] = found["nextForwardToken"]


def stop(args: Args) -> None:
    kind, job = _describe(args)
    if job[f"{kind}JobStatus"] not in RUNNING:
        print(f"{args.name} is {job[f'{kind}JobStatus']} already")
        return
    client = boto3.client("sagemaker", region_name=args.region or None)
    if kind == "Training":
        client.stop_training_job(TrainingJobName=args.name)
    else:
        client.stop_processing_job(ProcessingJobName=args.name)
    print(f"{args.name} is asked to stop: it saves a checkpoint first; the same launch goes on from there")


def main(name: str, argv: list[str] | None = None) -> int:
    options, step = {"status": (Args, status), "logs": (LogArgs, logs), "stop": (Args, stop)}[name]

    def work(args: Any) -> None:
        try:
            step(args)
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.NoRegionError) as error:
            raise UserError(f"{error}; run aws configure, or aws sso login") from error
        except aws.ClientError as error:
            raise RunFailed(f"AWS refused: {error}") from error

    return entry(options, work, f"sagemaker {name}", argv)
