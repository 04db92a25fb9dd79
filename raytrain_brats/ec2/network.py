"""Find or make where a cluster's nodes go: zone, subnets, security group, placement group.

In: EC2, the cluster's node types; a zone, if one is wanted.
Out: a `Place`; then, with nothing else missing, groups made and every node type told its place. Or UserError.
"""

import ipaddress
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from raytrain_brats.errors import UserError

GROUP = "raytrain-brats"
WHO_AM_I = "https://checkip.amazonaws.com"


@dataclass(frozen=True)
class Place:
    zone: str
    vpc: str
    public: str
    """Subnet whose instances have public addresses."""
    private: str
    """Subnet that leads out through a NAT gateway, for nodes with several network cards; "" where there are none."""
    head: dict[str, Any] | None
    """The head that is up."""


def ssh_range(given: str) -> str:
    """Who may reach port 22: what was given, else the address this machine comes from. Raises UserError."""
    if not given:
        try:
            with urllib.request.urlopen(WHO_AM_I, timeout=10) as answer:
                given = f"{answer.read().decode().strip()}/32"
        except OSError as error:
            raise UserError(
                f"{WHO_AM_I} does not tell your address ({error}): export RAYTRAIN_BRATS_SSH_FROM=A.B.C.D/32"
            ) from error
    try:
        wide = _too_wide(given)
        ipaddress.IPv4Network(given)
    except ValueError as error:
        raise UserError(f"SSH from {given!r}: {error}; export RAYTRAIN_BRATS_SSH_FROM=A.B.C.D/32") from error
    if wide:
        raise UserError(
            f"SSH from {given} lets more than 65,536 addresses in: export RAYTRAIN_BRATS_SSH_FROM=A.B.C.D/32"
        )
    return given


def _too_wide(cidr: str) -> bool:
    network = ipaddress.ip_network(cidr)
    return network.max_prefixlen - network.prefixlen > 16


def find(ec2: Any, config: dict[str, Any], wanted: str) -> Place:
    """The zone that was wanted, that of a head which is up, or the first that has all instance types and subnets.

    Raises UserError, which says what the best zone lacks.
    """
    types = [kind["node_config"] for kind in config["available_node_types"].values()]
    head = _head(ec2, config["cluster_name"])
    wanted = wanted or (head["Placement"]["AvailabilityZone"] if head else "")
    kinds = sorted({node["InstanceType"] for node in types})
    found = _offered(ec2, kinds)
    zones = sorted(set.intersection(*found.values()))
    if (wanted and wanted not in zones) or not zones:
        lacking = ", ".join(kind for kind in kinds if wanted not in found[kind]) if wanted else ", ".join(kinds)
        where = f"in {wanted}" if wanted else f"together in a zone of {ec2.meta.region_name}"
        instead = (
            f"export RAYTRAIN_BRATS_ZONE={zones[0]} (or {', '.join(zones[1:])})" if zones else "take another region"
        )
        raise UserError(f"not offered {where}: {lacking}; {instead}")
    cards = any(node.get("NetworkInterfaces") for node in types)
    first: UserError | None = None
    for zone in [wanted] if wanted else zones:
        try:
            public = _public(ec2, zone, head)
            private = _private(ec2, zone, public["VpcId"]) if cards else ""
            _not_open(ec2, public["VpcId"])
            return Place(zone, public["VpcId"], public["SubnetId"], private, head)
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def _head(ec2: Any, cluster: str) -> dict[str, Any] | None:
    tags = {"tag:ray-cluster-name": cluster, "tag:ray-node-type": "head"}
    filters = [{"Name": name, "Values": [value]} for name, value in tags.items()]
    filters.append({"Name": "instance-state-name", "Values": ["pending", "running"]})
    found = [i for r in ec2.describe_instances(Filters=filters)["Reservations"] for i in r["Instances"]]
    return found[0] if found else None


def _offered(ec2: Any, kinds: list[str]) -> dict[str, set[str]]:
    asked = {"LocationType": "availability-zone", "Filters": [{"Name": "instance-type", "Values": kinds}]}
    pages = ec2.get_paginator("describe_instance_type_offerings").paginate(**asked)
    rows = [row for page in pages for row in page["InstanceTypeOfferings"]]
    return {kind: {row["Location"] for row in rows if row["InstanceType"] == kind} for kind in kinds}


def _subnets(ec2: Any, zone: str, vpc: str = "") -> list[dict[str, Any]]:
    filters = [{"Name": "availability-zone", "Values": [zone]}] + ([{"Name": "vpc-id", "Values": [vpc]}] if vpc else [])
    return list(ec2.describe_subnets(Filters=filters)["Subnets"])


def _public(ec2: Any, zone: str, head: dict[str, Any] | None) -> dict[str, Any]:
    """A subnet whose instances get public addresses and are reached there, the zone's default one at best."""
    public = [s for s in _subnets(ec2, zone) if s["MapPublicIpOnLaunch"] and not _behind_nat(ec2, s)]
    if not public:
        raise UserError(
            f"no subnet in {zone} gives public addresses: aws ec2 create-default-subnet --availability-zone {zone}"
        )
    at = (head or {}).get("SubnetId")
    return min(public, key=lambda s: (s["SubnetId"] != at, not s.get("DefaultForAz"), s["SubnetId"]))


def _private(ec2: Any, zone: str, vpc: str) -> str:
    found = sorted(s["SubnetId"] for s in _subnets(ec2, zone, vpc) if _behind_nat(ec2, s))
    if not found:
        raise UserError(
            f"no subnet of {vpc} in {zone} leads out through a NAT gateway; nodes with four network cards have no "
            "public address and need one: docs/ec2.md, Network, has the commands"
        )
    return str(found[0])


def _behind_nat(ec2: Any, subnet: Any) -> bool:
    own = [{"Name": "association.subnet-id", "Values": [subnet["SubnetId"]]}]
    main = [{"Name": "vpc-id", "Values": [subnet["VpcId"]]}, {"Name": "association.main", "Values": ["true"]}]
    for filters in (own, main):
        if tables := ec2.describe_route_tables(Filters=filters)["RouteTables"]:
            break
    routes = [route for table in tables for route in table["Routes"]]
    return any(r.get("DestinationCidrBlock") == "0.0.0.0/0" and r.get("NatGatewayId") for r in routes)


def _groups(ec2: Any, vpc: str) -> list[dict[str, Any]]:
    named = [{"Name": "group-name", "Values": [GROUP]}, {"Name": "vpc-id", "Values": [vpc]}]
    return list(ec2.describe_security_groups(Filters=named)["SecurityGroups"])


def _not_open(ec2: Any, vpc: str) -> None:
    """Raises UserError when somebody opened the group; addresses of yours and your colleagues' may add up."""
    for group in _groups(ec2, vpc):
        ranges = {r["CidrIp"] for rule in group["IpPermissions"] for r in rule["IpRanges"]}
        ranges |= {r["CidrIpv6"] for rule in group["IpPermissions"] for r in rule.get("Ipv6Ranges", [])}
        if wide := sorted(r for r in ranges if _too_wide(r)):
            name = group["GroupId"]
            raise UserError(
                f"security group {name} lets {', '.join(wide)} in: take that rule away (aws ec2 "
                f"describe-security-groups --group-ids {name}; aws ec2 revoke-security-group-ingress ...)"
            )


def fill(ec2: Any, config: dict[str, Any], place: Place, ssh_from: str) -> None:
    """Make the missing groups, and set the place of every node type; what the YAML gives is kept."""
    group = _security_group(ec2, place.vpc, ssh_from)
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        if name := node.get("Placement", {}).get("GroupName"):
            node["Placement"]["GroupName"] = _placement_group(ec2, name)
        for card in node.get("NetworkInterfaces", []):
            card.setdefault("SubnetId", place.private)
            card.setdefault("Groups", [group])
        if node.get("NetworkInterfaces"):  # EC2 takes no others beside them; Ray wants to see some all the same
            node["SubnetIds"] = [node["NetworkInterfaces"][0]["SubnetId"]]
        else:
            node.setdefault("SubnetIds", [place.public])
            node.setdefault("SecurityGroupIds", [group])


def _placement_group(ec2: Any, name: str) -> str:
    """For our own name the account stack's, which CloudFormation called otherwise; else `name`, made if missing."""
    if name == GROUP:
        ours = [{"Name": "tag:project", "Values": [GROUP]}, {"Name": "state", "Values": ["available"]}]
        ours.append({"Name": "strategy", "Values": ["cluster"]})
        if found := sorted(g["GroupName"] for g in ec2.describe_placement_groups(Filters=ours)["PlacementGroups"]):
            return str(found[0])
    with _allowed("InvalidPlacementGroup.Duplicate"):
        ec2.create_placement_group(GroupName=name, Strategy="cluster")
    return name


def _security_group(ec2: Any, vpc: str, ssh_from: str) -> str:
    """The clusters' group: SSH from one range, everything among its own, the web outwards. Made where it is missing."""
    tags = [
        {"ResourceType": "security-group", "Tags": [{"Key": "project", "Value": GROUP}]}
    ]  # as launchers' policy asks
    new = {"GroupName": GROUP, "Description": "Ray clusters of raytrain_brats", "VpcId": vpc, "TagSpecifications": tags}
    group = str(found[0]["GroupId"] if (found := _groups(ec2, vpc)) else ec2.create_security_group(**new)["GroupId"])
    world = [{"CidrIp": "0.0.0.0/0"}]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}  # EFA needs both ways to name the group
    inwards = [among, {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]}]
    web = [{"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": world} for port in (80, 443)]
    for rule in inwards:
        with _allowed("InvalidPermission.Duplicate"):
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    for rule in (among, *web):
        with _allowed("InvalidPermission.Duplicate"):
            ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[rule])
    with _allowed("InvalidPermission.NotFound"):  # what a new group comes with
        ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[{"IpProtocol": "-1", "IpRanges": world}])
    return group


@contextmanager
def _allowed(*codes: str) -> Iterator[None]:
    """Let errors of AWS with one of these codes pass: what is asked for is so already."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] not in codes:
            raise
