"""List what is left in the account that costs money: `raytrain-brats ec2 left`.

In: AWS credentials and a region.
Out: a line for each thing: instances and spot requests of our clusters; of the region, whoever made them, volumes that
nothing uses, NAT gateways, addresses, file systems. What the credentials may not list is named.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from raytrain_brats.cli import entry
from raytrain_brats.ec2 import account

CLUSTERS = "raytrain-brats-*"


@dataclass(frozen=True)
class Args:
    """List what is left in a region that costs money."""

    region: str = ""
    """By default that of the AWS configuration."""


def instances(session: Any) -> Iterator[str]:
    states = ["pending", "running", "stopping", "stopped"]
    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [CLUSTERS]},
        {"Name": "instance-state-name", "Values": states},
    ]
    for page in session.client("ec2").get_paginator("describe_instances").paginate(Filters=filters):
        for row in (i for r in page["Reservations"] for i in r["Instances"]):
            tags = {tag["Key"]: tag["Value"] for tag in row["Tags"]}
            market = row.get("InstanceLifecycle", "on demand")
            facts = f"{row['InstanceType']}, {market}, {row['State']['Name']} since {row['LaunchTime']:%F %H:%M} UTC"
            cure = f"ray down, or: aws ec2 terminate-instances --instance-ids {row['InstanceId']}"
            yield f"instance {row['InstanceId']}: {tags['ray-cluster-name']}, {facts}; {cure}"


def spot_requests(session: Any) -> Iterator[str]:
    wanted = [{"Name": "state", "Values": ["open"]}]
    for row in session.client("ec2").describe_spot_instance_requests(Filters=wanted)["SpotInstanceRequests"]:
        yield f"open spot request {row['SpotInstanceRequestId']}"


def volumes(session: Any) -> Iterator[str]:
    wanted = [{"Name": "status", "Values": ["available"]}]
    for row in session.client("ec2").describe_volumes(Filters=wanted)["Volumes"]:
        yield f"volume {row['VolumeId']}: {row['Size']} GB that nothing uses"


def gateways(session: Any) -> Iterator[str]:
    wanted = [{"Name": "state", "Values": ["pending", "available"]}]
    for row in session.client("ec2").describe_nat_gateways(Filters=wanted)["NatGateways"]:
        yield f"NAT gateway {row['NatGatewayId']} in {row['SubnetId']}"


def addresses(session: Any) -> Iterator[str]:
    for row in session.client("ec2").describe_addresses()["Addresses"]:
        yield f"address {row['PublicIp']}{'' if row.get('AssociationId') else ' that nothing uses'}"


def file_systems(session: Any) -> Iterator[str]:
    for row in session.client("fsx").describe_file_systems()["FileSystems"]:
        yield f"FSx {row['FileSystemId']}: {row['StorageCapacity']} GB"


KINDS: tuple[Callable[[Any], Iterator[str]], ...] = (
    instances, spot_requests, volumes, gateways, addresses, file_systems,
)  # fmt: skip


def work(args: Args) -> None:
    region = args.region or account.region_of({})
    session, found = boto3.Session(region_name=region), 0
    for kind in KINDS:
        try:
            for line in kind(session):
                print(line)
                found += 1
        except (ClientError, BotoCoreError) as error:
            print(f"{kind.__name__.replace('_', ' ')}: cannot be listed: {error}", file=sys.stderr)
    print(f"{found or 'nothing'} found in {region}; buckets cost by what lies in them: aws s3 ls")


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "ec2 left", argv)
