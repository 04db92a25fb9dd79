"""Fill p3.yaml, p4d.yaml or the IAM documents in from your account: `python cluster/render.py p4d --out FILE ...`.

In: AWS credentials as boto3 finds them, a zone, your address, where data and runs live.
Out: a YAML for `ray up`; made on the way, where missing: the security group and the placement group. Or, with `iam`, a
folder of IAM documents. Nothing is written when something is amiss: one line, exit code 2.
"""

import argparse
import ipaddress
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler._private.util import prepare_config, validate_config

from raytrain_brats.errors import UserError

HERE = Path(__file__).parent
NAME = "raytrain-brats"
PROFILES = ("raytrain-brats-head", "raytrain-brats-node")
UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
DEEP_LEARNING = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
KINDS = {"p3": "p3dn.24xlarge", "p4d": "p4d.24xlarge"}


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with every FILL_NAME replaced by values["NAME"]."""
    return re.sub(r"FILL_([A-Z_]*[A-Z])", lambda found: values[found[1]], text)


def bucket(uri: str, option: str) -> str:
    if not (found := re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)(/.*)?", uri)):
        raise UserError(f"{option} {uri!r} is not s3://BUCKET/FOLDER")
    return found[1]


@contextmanager
def allowed(*codes: str) -> Any:
    """Let errors of AWS with one of these codes pass: what is asked for is so already."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] not in codes:
            raise


def check_address(cidr: str) -> str:
    try:
        wide = too_wide(cidr)
        ipaddress.IPv4Network(cidr)
    except ValueError as error:
        raise UserError(f"--ssh-from {cidr!r}: {error}; your own address alone is A.B.C.D/32") from error
    if wide:
        raise UserError(f"--ssh-from {cidr} lets more than 65,536 addresses in; give your own, A.B.C.D/32")
    return cidr


def too_wide(cidr: str) -> bool:
    network = ipaddress.ip_network(cidr)
    return network.max_prefixlen - network.prefixlen > 16


def check_offered(ec2: Any, kind: str, zone: str) -> None:
    asked = {"LocationType": "availability-zone", "Filters": [{"Name": "instance-type", "Values": [kind]}]}
    zones = sorted(o["Location"] for o in ec2.describe_instance_type_offerings(**asked)["InstanceTypeOfferings"])
    if zone not in zones:
        elsewhere = f"; in this region take {' or '.join(zones)}" if zones else "; this region has none, take another"
        raise UserError(f"{kind} is not offered in {zone}{elsewhere}")


def check_bucket(s3: Any, name: str) -> None:
    try:
        s3.head_bucket(Bucket=name)
    except ClientError as error:
        raise UserError(f"bucket {name}: S3 says {error.response['Error']['Code']}; make it, or correct it") from error


def check_profiles(iam: Any) -> None:
    for name in PROFILES:
        try:
            iam.get_instance_profile(InstanceProfileName=name)
        except iam.exceptions.NoSuchEntityException as error:
            raise UserError(f"there is no instance profile {name}; make it as in docs/ec2.md, IAM") from error


def image(ssm: Any, name: str) -> str:
    try:
        return str(ssm.get_parameter(Name=name)["Parameter"]["Value"])
    except ssm.exceptions.ParameterNotFound as error:
        raise UserError(f"SSM has no parameter {name} in this region; put an image of yours into the YAML") from error


def public_subnet(ec2: Any, zone: str, given: str) -> Any:
    """A subnet of the zone that gives its instances public addresses, the one that was named if there was one."""
    filters = [{"Name": "availability-zone", "Values": [zone]}]
    filters += [{"Name": "subnet-id", "Values": [given]}] if given else []
    found = ec2.describe_subnets(Filters=filters)["Subnets"]
    public = [s for s in found if s["MapPublicIpOnLaunch"] and not behind_nat(ec2, s)]
    if not public:
        raise UserError(f"{given or 'no subnet'} in {zone} gives public addresses; name one that does with --subnet")
    return min(public, key=lambda s: (not s.get("DefaultForAz"), s["SubnetId"]))


def train_subnet(ec2: Any, zone: str, vpc: str, given: str) -> str:
    """A subnet of the zone and VPC whose way out is a NAT gateway."""
    filters = [{"Name": "availability-zone", "Values": [zone]}, {"Name": "vpc-id", "Values": [vpc]}]
    filters += [{"Name": "subnet-id", "Values": [given]}] if given else []
    found = [s for s in ec2.describe_subnets(Filters=filters)["Subnets"] if behind_nat(ec2, s)]
    if not found:
        raise UserError(
            f"no subnet of {vpc} in {zone} leads out through a NAT gateway; p4d nodes, which have four network cards "
            "and so no public address, need one: see docs/ec2.md, network"
        )
    chosen = min(found, key=lambda s: (not s["MapPublicIpOnLaunch"], s["SubnetId"]))
    if not chosen["MapPublicIpOnLaunch"]:
        name = chosen["SubnetId"]
        raise UserError(
            f"Ray refuses subnet {name} unless it is set to map public addresses (nodes with four cards get none "
            f"all the same): aws ec2 modify-subnet-attribute --subnet-id {name} --map-public-ip-on-launch"
        )
    return str(chosen["SubnetId"])


def behind_nat(ec2: Any, subnet: Any) -> bool:
    own = [{"Name": "association.subnet-id", "Values": [subnet["SubnetId"]]}]
    main = [{"Name": "vpc-id", "Values": [subnet["VpcId"]]}, {"Name": "association.main", "Values": ["true"]}]
    for filters in (own, main):
        if tables := ec2.describe_route_tables(Filters=filters)["RouteTables"]:
            break
    routes = [route for table in tables for route in table["Routes"]]
    return any(r.get("DestinationCidrBlock") == "0.0.0.0/0" and r.get("NatGatewayId") for r in routes)


def security_group(ec2: Any, vpc: str, ssh_from: str) -> str:
    """The clusters' group: SSH from one range, everything among its own, the web outwards. Made where it is missing."""
    named = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    new = {"GroupName": NAME, "Description": "Ray clusters of raytrain_brats", "VpcId": vpc}
    group = found[0]["GroupId"] if found else ec2.create_security_group(**new)["GroupId"]
    world = [{"CidrIp": "0.0.0.0/0"}]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}  # EFA needs both ways to name the group
    inwards = [among, {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]}]
    web = [{"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": world} for port in (80, 443)]
    for rule in inwards:
        with allowed("InvalidPermission.Duplicate"):
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    for rule in (among, *web):
        with allowed("InvalidPermission.Duplicate"):
            ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[rule])
    with allowed("InvalidPermission.NotFound"):  # what a new group comes with
        ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[{"IpProtocol": "-1", "IpRanges": world}])
    rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    ranges = {r["CidrIp"] for rule in rules for r in rule["IpRanges"]}
    ranges |= {r["CidrIpv6"] for rule in rules for r in rule.get("Ipv6Ranges", [])}
    if wide := sorted(r for r in ranges if too_wide(r)):  # addresses of yours and your colleagues' may add up
        raise UserError(f"security group {group} lets {', '.join(wide)} in; take that away, or the group")
    return str(group)


def placement_group(ec2: Any) -> str:
    with allowed("InvalidPlacementGroup.Duplicate"):
        ec2.create_placement_group(GroupName=NAME, Strategy="cluster")
    return NAME


def cluster_yaml(args: argparse.Namespace) -> str:
    """The template of that name, filled in and valid for Ray."""
    region, kind = args.zone[:-1], KINDS[args.what]
    ssh_from = check_address(args.ssh_from)
    session = boto3.Session(region_name=region)
    ec2, ssm = session.client("ec2"), session.client("ssm")
    check_offered(ec2, kind, args.zone)
    for uri, option in ((args.data, "--data"), (args.runs, "--runs")):
        check_bucket(session.client("s3"), bucket(uri, option))
    check_profiles(session.client("iam"))
    subnet = public_subnet(ec2, args.zone, args.subnet)
    text = (HERE / f"{args.what}.yaml").read_text()
    runs = args.runs.rstrip("/")
    values = {
        "REGION": region,
        "ZONE": args.zone,
        "SUBNET": subnet["SubnetId"],
        "IMAGE": image(ssm, UBUNTU),
        "FSX": args.fsx,
        "DATA": args.data,
        "STORE": f"{runs}/store",
        "RUN": f"{runs}/first",
    }
    if "FILL_TRAIN_SUBNET" in text:
        values["TRAIN_SUBNET"] = train_subnet(ec2, args.zone, subnet["VpcId"], args.train_subnet)
        values["GPU_IMAGE"] = image(ssm, DEEP_LEARNING)
        values["PLACEMENT"] = placement_group(ec2)
    values["GROUP"] = security_group(ec2, subnet["VpcId"], ssh_from)
    filled = fill(text, values)
    validate_config(prepare_config(yaml.safe_load(filled)))
    return filled


def iam_documents(args: argparse.Namespace) -> dict[str, str]:
    """{file: document} of cluster/iam with account, region and buckets filled in; one bucket.json for each bucket."""
    region = args.zone[:-1]
    values = {
        "REGION": region,
        "ACCOUNT": boto3.Session(region_name=region).client("sts").get_caller_identity()["Account"],
        "DATA_BUCKET": bucket(args.data, "--data"),
        "RUNS_BUCKET": bucket(args.runs, "--runs"),
    }
    templates = {path.name: path.read_text() for path in sorted((HERE / "iam").glob("*.json"))}
    policy = templates.pop("bucket.json")
    buckets = {f"bucket-{name}.json": fill(policy, {"BUCKET": name}) for key, name in values.items() if "BUCKET" in key}
    return {name: fill(text, values) for name, text in templates.items()} | buckets


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cluster/render.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*KINDS, "iam"])
    parser.add_argument("--out", required=True, type=Path, help="file to write; for iam a folder")
    parser.add_argument("--zone", required=True, help="availability zone, such as us-west-2b")
    parser.add_argument("--data", required=True, help="s3://BUCKET/FOLDER of the cases; nodes may only read it")
    parser.add_argument("--runs", required=True, help="s3://BUCKET/FOLDER of prepared cases and runs")
    parser.add_argument("--ssh-from", default="", help="who may reach port 22: your address as A.B.C.D/32")
    parser.add_argument("--subnet", default="", help="public subnet, if not the zone's default one")
    parser.add_argument("--train-subnet", default="", help="p4d: subnet behind a NAT gateway, if there are several")
    parser.add_argument("--fsx", default="", help="FSx for Lustre to mount as /fsx: DNS-NAME@tcp:/MOUNT-NAME")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d[a-z]", args.zone):
        parser.error(f"--zone {args.zone!r} is not an availability zone, such as us-west-2b")
    if args.what != "iam" and not args.ssh_from:
        parser.error("--ssh-from is needed: your own address, as A.B.C.D/32")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.what == "iam":
            documents = iam_documents(args)
            args.out.mkdir(parents=True, exist_ok=True)
            for name, text in documents.items():
                (args.out / name).write_text(text)
            print(f"{len(documents)} documents in {args.out}; docs/ec2.md, IAM, says what to do with them")
        else:
            args.out.write_text(cluster_yaml(args))
            print(f"{args.out} is ready: ray up -y {args.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (BotoCoreError, ClientError) as error:
        print(f"failed: AWS: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
