"""The files of cluster/: valid for Ray, closed to the world, and what they make EC2 do, with moto in its place."""

import configparser
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
import yaml
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto import mock_aws
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

from raytrain_brats.config import load as config_of
from raytrain_brats.ec2 import Provider, left, network, provider
from raytrain_brats.ec2.provider import NotReadyError
from tests.support import ROOT, moto_aws
from tests.support import account_template as template

CLUSTER = ROOT / "cluster"
FILES = sorted(path.name for path in CLUSTER.glob("*.yaml"))
EC2_FILES = ["p3.yaml", "p4d.yaml"]

ZONE = "us-west-2b"
PROFILES = ("raytrain-brats-head", "raytrain-brats-node")
PLACES = {"DATA": "s3://the-data/Task01", "RUNS": "s3://the-runs/brats"}
HOME = "203.0.113.7/32"


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def problems(config: dict[str, Any]) -> list[str]:
    """What is not safe in a cluster's YAML: the rules that all of ours keep."""
    found = [f"open to the world: {word}" for word in ("0.0.0.0", "::/0") if word in json.dumps(config)]
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    found += [f"no token: {c}" for c in starts if not re.search(r"export [^;]*RAY_AUTH_MODE=token[^;]*;.*ray start", c)]
    found += [
        f"dashboard not on loopback: {c}" for c in starts if "--head" in c and "--dashboard-host=127.0.0.1" not in c
    ]
    if "~/.ray/auth_token" not in config["file_mounts"]:
        found.append("nodes get no token")
    if config["provider"]["type"] == "local":
        return found
    if "security_group" in config["provider"]:
        found.append("Ray adds SSH from everywhere to a group it makes")
    for name, node in config["available_node_types"].items():
        launch = node["node_config"]
        metadata = launch.get("MetadataOptions", {})
        if metadata.get("HttpTokens") != "required" or metadata.get("HttpPutResponseHopLimit") != 1:
            found.append(f"{name}: IMDSv2 with one hop is not required")
        volumes = [m.get("Ebs", {}) for m in launch.get("BlockDeviceMappings", [])]
        if not volumes or not all(v.get("Encrypted") for v in volumes):
            found.append(f"{name}: volumes are not encrypted")
        if "IamInstanceProfile" not in launch:
            found.append(f"{name}: no profile of its own")
        cards = launch.get("NetworkInterfaces", [])
        if not (launch.get("SecurityGroupIds") or (cards and all(card.get("Groups") for card in cards))):
            found.append(f"{name}: no security group, so Ray makes one with SSH from everywhere")
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_yaml_is_valid_for_ray_and_closed(name: str, account: "Account") -> None:
    """All YAMLs in cluster/ pass Ray's schema and our rules as the nodes get them, new ones too."""
    assert FILES == ["local.yaml", "p3.yaml", "p4d.yaml"]
    config = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))

    assert problems(filled(name) if name in EC2_FILES else config) == []


def edit(path: str, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """A change: the value at a dotted path is replaced, or taken out."""

    def change(config: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = config
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return change


def without(text: str, key: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        before = config[key]
        config[key] = [re.sub(text, "", command) for command in before]
        assert config[key] != before

    return change


TRAIN = "available_node_types.train.node_config"
OPENINGS = {
    "SSH from everywhere": edit(
        "provider.security_group",
        {"IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
    ),
    "a group of Ray's making": edit("available_node_types.data.node_config.SecurityGroupIds"),
    "cards without a group": edit(f"{TRAIN}.NetworkInterfaces.2.Groups"),
    "no token on the head": without("RAY_AUTH_MODE=token", "head_start_ray_commands"),
    "no token on workers": without("export RAY_AUTH_MODE=token;", "worker_start_ray_commands"),
    "token not on the nodes": edit("file_mounts", {}),
    "dashboard on all addresses": without("--dashboard-host=127.0.0.1", "head_start_ray_commands"),
    "IMDSv1": edit(f"{TRAIN}.MetadataOptions.HttpTokens", "optional"),
    "two hops": edit(f"{TRAIN}.MetadataOptions.HttpPutResponseHopLimit", 2),
    "IMDS left alone": edit("available_node_types.head.node_config.MetadataOptions"),
    "plain volumes": edit(f"{TRAIN}.BlockDeviceMappings.0.Ebs.Encrypted"),
    "the image's own volume": edit(f"{TRAIN}.BlockDeviceMappings"),
    "a node without a profile": edit("available_node_types.data.node_config.IamInstanceProfile"),
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_yaml_that_opens_something_is_refused(opening: str, account: "Account") -> None:
    """The rules see what they are for: each opening of p4d.yaml is found."""
    config = filled("p4d.yaml")
    OPENINGS[opening](config)

    assert problems(config)


@pytest.mark.parametrize("name", EC2_FILES)
def test_the_numbers_fit_the_trainer(name: str) -> None:
    """--workers in the head comment is 1 to the GPUs of all training nodes; roles are labelled; the head idles."""
    config, types = load(name), load(name)["available_node_types"]
    low, high = map(int, re.findall(r"--workers (\d+):(\d+)", (CLUSTER / name).read_text())[0])
    gpus, train = types["train"]["resources"]["GPU"], types["train"]

    assert (low, high) == (1, gpus * train["max_workers"])
    assert config_of("segresnet").train.global_batch >= high  # the recipe that is taken where none is named
    assert {kind: node["labels"] for kind, node in types.items()} == {k: {"role": k} for k in ("head", "data", "train")}
    assert types["head"]["resources"] == {"CPU": 0}
    assert config["max_workers"] == sum(node.get("max_workers", 0) for node in types.values())


def test_p3_and_p4d_differ_in_what_they_must() -> None:
    """The two files are twins but for the training nodes, the driver and what on demand costs."""
    p3, p4d = load("p3.yaml"), load("p4d.yaml")
    assert (p3["provider"]["on_demand_fallback"], p4d["provider"]["on_demand_fallback"]) == (False, "ask")
    assert p3["setup_commands"][0].startswith("NVIDIA_DRIVER=580 TORCH=2.8.0 TORCH_INDEX=cu126 ")
    p3["setup_commands"][0] = p3["setup_commands"][0].replace("NVIDIA_DRIVER=580 TORCH=2.8.0 TORCH_INDEX=cu126 ", "")
    for config in (p3, p4d):
        del config["metadata"], config["cluster_name"], config["available_node_types"]["train"]
        del config["provider"]["on_demand_fallback"], config["provider"]["dollars_per_hour"]

    assert p3 == p4d


# Of each instance type: the GPU's generation. Of a generation: what node_setup.sh must be given of torch (docs/ec2.md).
GENERATIONS = {"p3dn.24xlarge": "sm_70", "p4d.24xlarge": "sm_80"}
PINS = {"sm_70": {"TORCH": "2.8.0", "TORCH_INDEX": "cu126"}, "sm_80": {}}


def given(command: str) -> dict[str, str]:
    """The variables in front of a command that concern torch."""
    return dict(re.findall(r"\b(TORCH\w*)=(\S+)", command.partition(" bash ")[0]))


@pytest.mark.parametrize("name", EC2_FILES)
def test_each_card_gets_its_torch(name: str) -> None:
    """A new instance type must get a line above: V100 needs a torch of its own, and so may what comes."""
    config = load(name)
    card = GENERATIONS[config["available_node_types"]["train"]["node_config"]["InstanceType"]]
    (command,) = [command for command in config["setup_commands"] if "node_setup.sh" in command]
    assert given(command) == PINS[card]


def test_the_tested_torch_brings_a_cudnn_that_torch_uses() -> None:
    """Where nothing is given it is that of constraints.txt, whose wheel on PyPI has cuDNN 9.15 or later."""
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (CLUSTER / "sagemaker" / "requirements.lock").read_text(), re.M))
    (tested,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert locked["torch"] == tested
    assert tuple(map(int, locked["nvidia-cudnn-cu13"].split(".")))[:2] >= (9, 15)


@pytest.mark.parametrize(
    "page", ["docs/ec2.md", "docs/sagemaker.md", "cluster/sagemaker/Dockerfile", "cluster/local.yaml"]
)
def test_pages_name_the_torch_of_v100(page: str) -> None:
    """The same as p3.yaml installs."""
    assert PINS["sm_70"]["TORCH"] in (ROOT / page).read_text()


class Account:
    """An AWS account as docs/ec2.md wants it; every call of boto3 is kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.ec2 = boto3.client("ec2", "us-west-2")
        for name, region in (("the-data", "us-west-2"), ("the-runs", "us-west-2"), ("far-away", "eu-west-1")):
            where: Any = {"LocationConstraint": region}
            boto3.client("s3", region).create_bucket(Bucket=name, CreateBucketConfiguration=where)
        for name in PROFILES:
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        in_zone = [{"Name": "availability-zone", "Values": [ZONE]}]
        self.public = self.ec2.describe_subnets(Filters=in_zone)["Subnets"][0]
        self.vpc = self.public["VpcId"]
        private = {"VpcId": self.vpc, "CidrBlock": "172.31.96.0/20", "AvailabilityZone": ZONE}
        self.private = self.ec2.create_subnet(**private)["Subnet"]["SubnetId"]
        gateway = self.ec2.create_nat_gateway(SubnetId=self.public["SubnetId"])["NatGateway"]["NatGatewayId"]
        table = self.ec2.create_route_table(VpcId=self.vpc)["RouteTable"]["RouteTableId"]
        self.ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=gateway)
        self.ec2.associate_route_table(RouteTableId=table, SubnetId=self.private)

    def group(self) -> dict[str, Any]:
        named = [{"Name": "group-name", "Values": ["raytrain-brats"]}]
        return dict(self.ec2.describe_security_groups(Filters=named)["SecurityGroups"][0])

    def launches(self) -> dict[str, dict[str, Any]]:
        """Parameters of each RunInstances, by instance type."""
        return {call["InstanceType"]: call for name, call in self.calls if name == "RunInstances"}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """One for the module: moto takes seconds to make an account."""
    moto_aws.complete()
    home = tmp_path_factory.mktemp("home")
    keys = {f"AWS_{key}": "testing" for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    keys |= {f"RAYTRAIN_BRATS_{name}": value for name, value in PLACES.items()}
    keys |= {"RAYTRAIN_BRATS_ZONE": ZONE, "RAYTRAIN_BRATS_SSH_FROM": HOME, "RAYTRAIN_BRATS_RECIPE": "dynunet"}
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        for name, value in ({"HOME": str(home), "AWS_DEFAULT_REGION": "us-west-2"} | keys).items():
            patch.setenv(name, value)
        made = Account()
        call = BaseClient._make_api_call

        def keep(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
            made.calls.append((operation, copy.deepcopy(parameters)))
            return call(self, operation, parameters)

        patch.setattr(BaseClient, "_make_api_call", keep)
        yield made


def filled(name: str, **block: Any) -> dict[str, Any]:
    """A YAML as it stands, as `ray up` would use it; `block` are lines at its top that somebody filled in."""
    config = load(name)
    config["provider"] |= block
    return dict(_bootstrap_config(config, no_config_cache=True))


def launch(config: dict[str, Any]) -> None:
    """What the autoscaler does with a YAML as far as EC2 sees it: a node of each type."""
    provider = Provider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)


def test_what_ec2_is_asked_for(account: Account) -> None:
    """p4d as it stands: spot, profile, IMDS, encryption on every node; four EFA cards and the placement; all of it ends
    when it is shut down, and workers that are not set up within the hour shut themselves down."""
    launch(filled("p4d.yaml"))
    head, data, train = (account.launches()[kind] for kind in ("m6i.2xlarge", "m6i.4xlarge", "p4d.24xlarge"))
    group = account.group()["GroupId"]

    for node, profile in ((head, "head"), (data, "node"), (train, "node")):
        assert node["IamInstanceProfile"] == {"Name": f"raytrain-brats-{profile}"}
        assert node["MetadataOptions"] == {
            "HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1,
        }  # fmt: skip
        assert [m["Ebs"]["Encrypted"] for m in node["BlockDeviceMappings"]] == [True]
        assert [m["Ebs"]["DeleteOnTermination"] for m in node["BlockDeviceMappings"]] == [True]
        assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert ("shutdown -h +60" in node.get("UserData", "")) == (node is not head)
    for node in (head, data):
        assert node["SubnetId"] == account.public["SubnetId"] and node["SecurityGroupIds"] == [group]
        assert node["ImageId"] == moto_aws.IMAGES["canonical"]
    assert "InstanceMarketOptions" not in head
    assert data["InstanceMarketOptions"] == train["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert train["ImageId"] == moto_aws.IMAGES["deeplearning"]
    assert train["Placement"] == {"GroupName": "raytrain-brats"}
    assert "SubnetId" not in train and "SecurityGroupIds" not in train
    cards = train["NetworkInterfaces"]
    assert [(c["NetworkCardIndex"], c["DeviceIndex"]) for c in cards] == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert {(c["InterfaceType"], c["SubnetId"], *c["Groups"]) for c in cards} == {("efa", account.private, group)}


def test_p3_asks_for_the_size_that_is_still_offered(account: Account) -> None:
    """p3 as it stands: p3dn on spot, on the plain image that gets the old driver; jobs get the places."""
    config = filled("p3.yaml", fsx="fs@tcp:/m", recipe="segresnet")
    launch(config)
    train = account.launches()["p3dn.24xlarge"]

    assert train["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert train["ImageId"] == moto_aws.IMAGES["canonical"]
    assert train["SubnetId"] == account.public["SubnetId"]
    command = f"set -a; . {config['file_mounts']['~/raytrain_brats.env']}; env | grep -E 'BRATS|REGION'"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert sorted(said.stdout.splitlines()) == [
        "AWS_DEFAULT_REGION=us-west-2",
        "RAYTRAIN_BRATS_DATA=s3://the-data/Task01",
        "RAYTRAIN_BRATS_DOLLARS_PER_HOUR=head=0.384,data=0.768,train=31.212",
        "RAYTRAIN_BRATS_FSX=fs@tcp:/m",
        "RAYTRAIN_BRATS_LOGS=s3://the-runs/brats/logs/raytrain-brats-p3",
        "RAYTRAIN_BRATS_RECIPE=segresnet",
        "RAYTRAIN_BRATS_RUN_DIR=s3://the-runs/brats/first",
        "RAYTRAIN_BRATS_STORE=s3://the-runs/brats/store",
    ]
    assert Path("~/.ray/auth_token").expanduser().stat().st_mode & 0o777 == 0o600
    assert all(Path(here).is_absolute() and Path(here).exists() for here in config["file_mounts"].values())


def test_the_security_group_is_closed(account: Account) -> None:
    """SSH from one address, all traffic among members both ways (EFA), the web outwards; twice makes no more."""
    for _ in range(2):
        filled("p3.yaml")
    group = account.group()
    among = [r for r in group["IpPermissions"] if r["IpProtocol"] == "-1"]
    ssh = [r for r in group["IpPermissions"] if r["IpProtocol"] != "-1"]
    outwards = [(r.get("FromPort"), [i["CidrIp"] for i in r["IpRanges"]]) for r in group["IpPermissionsEgress"]]

    assert [p["GroupId"] for r in among for p in r["UserIdGroupPairs"]] == [group["GroupId"]]
    assert [(r["FromPort"], r["ToPort"], [i["CidrIp"] for i in r["IpRanges"]]) for r in ssh] == [(22, 22, [HOME])]
    assert sorted(outwards, key=str) == [(443, ["0.0.0.0/0"]), (80, ["0.0.0.0/0"]), (None, [])]


def test_the_stacks_placement_group_is_used(account: Account) -> None:
    """By its tag, as CloudFormation names it; the head may launch into it, and into the one that `ray up` makes where
    there is no stack. A name of your own in the YAML stays."""

    def placed(name: str = "raytrain-brats") -> str:
        config = load("p4d.yaml")
        config["available_node_types"]["train"]["node_config"]["Placement"]["GroupName"] = name
        filled = _bootstrap_config(config, no_config_cache=True)
        return str(filled["available_node_types"]["train"]["node_config"]["Placement"]["GroupName"])

    about = template.resources()["Placement"]["Properties"]
    tags = [{"ResourceType": "placement-group", "Tags": about["Tags"]}]
    account.ec2.create_placement_group(GroupName="of-the-stack", Strategy=about["Strategy"], TagSpecifications=tags)
    assert about["Strategy"] == "cluster" and placed() == "of-the-stack"
    assert placed("mine") == "mine"
    account.ec2.delete_placement_group(GroupName="of-the-stack")
    assert placed() == "raytrain-brats"
    (launch,) = [s for s in template.statements("Head") if s["Sid"] == "WhatALaunchUses"]
    allowed = {arn.rpartition("/")[2] for arn in launch["Resource"] if ":placement-group/" in arn}
    assert allowed == {"${Placement}", "raytrain-brats"}


def test_a_zone_is_found(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: the first that has all that is needed, here the one behind whose NAT gateway p4d nodes can stand."""
    monkeypatch.delenv("RAYTRAIN_BRATS_ZONE")
    assert filled("p4d.yaml")["provider"]["availability_zone"] == ZONE


def test_a_head_that_is_up_stays_what_it_is(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer image or another first zone would make Ray replace the head, and end what runs on the cluster."""
    first = filled("p3.yaml")
    provider = Provider(first["provider"], "raytrain-brats-p3")
    node = first["available_node_types"]["head"]["node_config"]
    made = provider.create_node(node, {"ray-node-type": "head"}, 1)
    monkeypatch.setitem(moto_aws.IMAGES, "canonical", moto_aws.IMAGES["deeplearning"])
    monkeypatch.delenv("RAYTRAIN_BRATS_ZONE")

    assert filled("p3.yaml")["available_node_types"]["head"]["node_config"] == node
    provider.terminate_nodes(list(made))
    assert filled("p3.yaml")["available_node_types"]["head"]["node_config"]["ImageId"] != node["ImageId"]


REFUSALS: dict[str, tuple[dict[str, str], str]] = {
    "ssh from everywhere": ({"ssh_from": "0.0.0.0/0"}, "lets more than 65,536 addresses in"),
    "no address": ({"ssh_from": "home"}, "export RAYTRAIN_BRATS_SSH_FROM=A.B.C.D/32"),
    "a zone without p4d": ({"zone": "us-west-2z"}, "not offered in us-west-2z"),
    "another region's zone": ({"zone": "eu-north-1a"}, "not offered in eu-north-1a: p4d.24xlarge"),
    "no such bucket": ({"data": "s3://other/x"}, "bucket other: S3 says 404"),
    "a folder for a bucket": ({"runs": "/runs"}, "'/runs' is no place that nodes see: export RAYTRAIN_BRATS_RUNS="),
    "one bucket": ({"data": "s3://the-runs/data"}, "data and runs are one bucket, the-runs"),
    "a bucket elsewhere": ({"runs": "s3://far-away/x"}, "bucket far-away lies in eu-west-1, the cluster in us-west-2"),
    "no NAT gateway": ({"zone": "us-west-2a"}, "leads out through a NAT gateway"),
    "no such recipe": ({"recipe": "unet"}, "recipe 'unet' is not known: export RAYTRAIN_BRATS_RECIPE=segresnet"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused(account: Account, case: str) -> None:
    """A line that names the cure; nothing was made in the account."""
    change, message = REFUSALS[case]
    before = len(account.calls)

    with pytest.raises(NotReadyError) as refused:
        filled("p4d.yaml", **change)
    assert message in refused.value.message and refused.value.exit_code == 2
    assert not [name for name, _ in account.calls[before:] if not name.startswith(("Describe", "Get", "Head"))]


def test_all_that_is_missing_is_told_at_once(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list of everything, not one refusal after the other; without credentials, that, and what AWS need not say."""
    for name in PLACES:
        monkeypatch.delenv(f"RAYTRAIN_BRATS_{name}")
    boto3.client("iam").delete_instance_profile(InstanceProfileName=PROFILES[1])
    with pytest.raises(NotReadyError) as refused:
        filled("p4d.yaml", zone="us-west-2a", ssh_from="0.0.0.0/0")
    boto3.client("iam").create_instance_profile(InstanceProfileName=PROFILES[1])
    wanted = ("_DATA=s3://", "_RUNS=s3://", "_SSH_FROM=", f"no instance profile {PROFILES[1]}", "NAT gateway")
    assert all(word in refused.value.message for word in wanted)
    assert len(re.findall(r"^  \d+\. ", refused.value.message, re.M)) == len(wanted)

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(NotReadyError, match=r"(?s)_DATA=s3.*AWS does not accept your credentials .*aws configure"):
        filled("p4d.yaml")


def test_a_group_that_somebody_opened_is_refused(account: Account) -> None:
    opened = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    filled("p4d.yaml")
    account.ec2.authorize_security_group_ingress(GroupId=account.group()["GroupId"], IpPermissions=[opened])
    with pytest.raises(NotReadyError, match=r"lets 0\.0\.0\.0/0 in"):
        filled("p4d.yaml")
    account.ec2.revoke_security_group_ingress(GroupId=account.group()["GroupId"], IpPermissions=[opened])


def test_a_quota_of_nothing_is_told(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """New accounts have none for spot P instances: said before the head is paid for, with the command."""
    call = BaseClient._make_api_call

    def answer(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        if operation == "GetServiceQuota":
            return {"Quota": {"Value": 0.0 if parameters["QuotaCode"] == "L-7212CCBC" else 640.0}}
        return call(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)
    with pytest.raises(NotReadyError, match=r"quota of spot P .* 0 vCPUs.*quota-code L-7212CCBC --desired-value 192"):
        filled("p3.yaml")
    assert filled("p3.yaml", on_demand_fallback=True)  # on demand is allowed, and there is quota for it


def test_the_address_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text("203.0.113.9\n")
    monkeypatch.setattr(network, "WHO_AM_I", (tmp_path / "ip").as_uri())
    assert network.ssh_range("") == "203.0.113.9/32"


def test_the_words_themselves(s3_server: str, tmp_path: Path) -> None:
    """`ray up /any/where/cluster/p4d.yaml` from another folder, with nothing exported: exit code 2, one list, no
    traceback; nothing launched or made, and `ray down` in the same shell needs no more than it did."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAYTRAIN_BRATS_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}

    def ray(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [str(Path(sys.executable).with_name("ray")), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    refused = ray("up", str(CLUSTER / "p4d.yaml"))
    assert refused.returncode == 2
    said = refused.stdout + refused.stderr
    assert "not ready, and nothing was launched:\n  1. " in said and "Traceback" not in said
    assert "RAYTRAIN_BRATS_DATA" in said and "RAYTRAIN_BRATS_RUNS" in said
    ec2 = boto3.client("ec2")
    assert not [r for r in ec2.describe_instances()["Reservations"] if "raytrain" in json.dumps(r, default=str)]
    assert "raytrain-brats" not in {g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"]}
    down = ray("down", "-y", str(CLUSTER / "p4d.yaml"))
    assert down.returncode == 0 and "No nodes remaining" in down.stdout + down.stderr
    assert not list(tmp_path.glob("ray-config-*"))  # which Ray would use for any account


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> dict[bool, str]:
    """{on spot: EC2's error code} of what RunInstances shall refuse."""
    codes: dict[bool, str] = {}
    call = BaseClient._make_api_call

    def refuse(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        if operation == "RunInstances" and (code := codes.get("InstanceMarketOptions" in parameters)):
            raise ClientError({"Error": {"Code": code, "Message": "no"}}, operation)
        return call(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    return codes


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "MaxSpotInstanceCountExceeded"])
def test_on_demand_is_bought_when_it_was_said_and_never_in_silence(
    account: Account, refused: dict[bool, str], code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `on_demand_fallback: true` the order is refused, for Ray to ask again; with it, it is bought and told,
    and the next order asks for spot first. Other refusals are passed on."""
    settings = {"region": "us-west-2", "cache_stopped_nodes": False}
    subnets = {"SubnetIds": [account.public["SubnetId"]], "ImageId": moto_aws.IMAGES["canonical"]}
    node = subnets | {"InstanceType": "m6i.4xlarge", "InstanceMarketOptions": {"MarketType": "spot"}}
    refused[True] = code
    for more in ({}, {"on_demand_fallback": False}):
        with pytest.raises(NodeLaunchException, match=code):
            Provider(settings | more, "c").create_node(node, {}, 1)
    assert caplog.text.count("nothing is bought on demand") == 2

    buying = Provider(settings | {"on_demand_fallback": True}, "c")
    bought = buying.create_node(node, {}, 2)
    assert len(bought) == 2 and not any(made.instance_lifecycle for made in bought.values())
    assert "BUYING ON DEMAND" in caplog.text and code in caplog.text
    refused[True] = ""
    assert [made.instance_lifecycle for made in buying.create_node(node, {}, 1).values()] == ["spot"]
    refused[True] = "UnauthorizedOperation"
    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        buying.create_node(node, {}, 1)


@pytest.mark.parametrize(("answer", "terminal", "yes", "bought"), [
    (True, True, False, True), (False, True, False, False), (True, False, False, False), (True, True, True, False),
])  # fmt: skip
def test_who_is_asked_before_on_demand(
    account: Account, monkeypatch: pytest.MonkeyPatch, answer: bool, terminal: bool, yes: bool, bought: bool
) -> None:
    """`ask` asks with the price; where nobody can answer, and with -y, it is no."""
    asked: list[str] = []
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"isatty": lambda _: terminal})())
    monkeypatch.setattr(click, "confirm", lambda text, default: asked.append(text) is None and answer)
    with click.Context(click.Command("up")) as context:
        context.params = {"restart_only": False, "yes": yes, "cluster_config_file": str(CLUSTER / "p4d.yaml")}
        assert filled("p4d.yaml")["provider"]["on_demand_fallback"] is bought
    assert all("train=21.958" in text for text in asked) and bool(asked) == (terminal and not yes)


def test_what_is_left_is_listed(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    """Our instances, of any state that costs, and what a cluster may leave; what may not be seen is named."""
    config = filled("p3.yaml")
    provider = Provider(config["provider"], "raytrain-brats-left")
    node = config["available_node_types"]["data"]["node_config"]
    names = list(provider.create_node(node, {"ray-user-node-type": "data"}, 2))
    volume = account.ec2.create_volume(AvailabilityZone=ZONE, Size=7)["VolumeId"]
    assert left.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"instance {name}: raytrain-brats-left, m6i.4xlarge, spot, running since" in said for name in names)
    assert f"volume {volume}: 7 GB" in said and "NAT gateway nat-" in said
    provider.terminate_nodes(names)
    assert left.main([]) == 0
    assert not any(name in capsys.readouterr().out for name in names)
    account.ec2.delete_volume(VolumeId=volume)


SHIMS = {
    "sudo": 'echo "$*" >> "$HOME/done"; cat > /dev/null',
    "lsblk": "for i in 1 2; do echo /dev/nvme${i}n1 EC2 NVMe Instance Storage; done; echo /dev/nvme0n1 Amazon EBS",
    "lspci": "echo '00:1b.0 3D controller: NVIDIA Corporation GV100GL'",
    "mountpoint": '[ -e "$HOME/mounted" ]',
    "python3": 'mkdir -p "$3/bin"; ln -sf "$(command -v pip)" "$3/bin/pip"',
    "pip": 'echo "pip $*" >> "$HOME/done"',
    "curl": 'echo "curl $*" >> "$HOME/done"',
    "lsb_release": "echo noble",
    "dpkg-query": "printf '%s\n' 'ii  libnvidia-compute-580' 'un  nvidia-driver-390' 'ii  linux-image-6.8.0-aws'",
}


@pytest.fixture
def set_up(tmp_path: Path) -> Callable[..., str]:
    """Run node_setup.sh in a home with stand-ins for what changes a machine; what it did."""
    for name, body in SHIMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "raytrain_brats").mkdir()
    for name in ("constraints.txt", "cluster"):
        (tmp_path / "raytrain_brats" / name).symlink_to(ROOT / name)
    (tmp_path / "raytrain_brats" / "code.py").write_text("old")
    (tmp_path / "raytrain_brats.env").write_text("export RAYTRAIN_BRATS_FSX=fs@tcp:/m\n")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    more = {"NVIDIA_DRIVER": "580", "TORCH": "2.8.0", "TORCH_INDEX": "cu126"}

    def run(**other: str) -> str:
        (tmp_path / "done").write_text("")
        subprocess.run(
            ["bash", str(CLUSTER / "node_setup.sh")], env=environment | more | other, check=True, timeout=180
        )
        return (tmp_path / "done").read_text()

    return run


def test_a_node_is_set_up_once(tmp_path: Path, set_up: Callable[[], str]) -> None:
    """Two NVMe disks become one; V100 gets driver 580, held with its libraries and kernel, and torch for CUDA 12.6;
    FSx gets its client; nothing upgrades itself; the second run of Ray does nothing."""
    first = set_up()
    constraints = (tmp_path / "venv" / "constraints.txt").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch==")] == ["torch==2.8.0"] and len(constraints) > 90
    assert f"pip install -q -c {tmp_path}/venv/constraints.txt ." in first
    assert "mdadm --create /dev/md0 --level=0 --force --run --raid-devices=2 /dev/nvme1n1 /dev/nvme2n1" in first
    assert "mount -o noatime /dev/md0 /mnt/fast" in first
    assert "nvidia-driver-580-server" in first
    assert "apt-mark hold libnvidia-compute-580 linux-image-6.8.0-aws" in first and "390" not in first
    assert "systemctl disable --now unattended-upgrades" in first
    assert "lustre-client-modules-" in first and "mount -t lustre -o relatime,flock fs@tcp:/m /fsx" in first
    assert re.search(r"pip install -q torch==2\.8\.0 --index-url https://download.pytorch.org/whl/cu126", first)
    (tmp_path / "mounted").touch()
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    second = set_up()
    assert not re.search("mdadm|mkfs|apt-get|pip|lustre", second)
    assert (tmp_path / ".bashrc").read_text().count("raytrain_brats.profile") == 1


def test_new_code_is_installed_again(tmp_path: Path, set_up: Callable[[], str]) -> None:
    """A second `ray up` copies the files anew: the head must not go on with what it installed at first."""
    assert "/venv/constraints.txt ." in set_up()
    assert "pip" not in set_up()
    (tmp_path / "raytrain_brats" / "code.py").write_text("new")
    assert "/venv/constraints.txt ." in set_up()
    assert "pip" not in set_up()
    assert "pip install -q torch==2.8.1 " in set_up(TORCH="2.8.1")


@pytest.mark.parametrize("name", FILES)
def test_every_node_copies_its_logs_and_the_head_is_watched(name: str) -> None:
    """After Ray's start, and in the background: `ray up` neither waits for it nor ends with it. On machines of your own
    nothing is installed."""
    config = load(name)
    for role in ("head", "worker"):
        started = [c for c in config[f"{role}_start_ray_commands"][2:] if "setsid nohup" in c and c.endswith("&")]
        assert sum("raytrain_brats.logs" in c for c in started) == 1
        watched = [c for c in started if "cluster/monitoring.sh" in c]
        assert [c.startswith("INSTALL=no ") for c in watched] == [name == "local.yaml"] * (role == "head")


TOOLS = ("bash", "cat", "dirname", "flock", "mkdir", "mv", "nohup", "readlink", "setsid", "sleep", "touch")
MONITORS = {
    "prometheus": 'echo "$@" >> "$HOME/started"; read -rt 60 <> <(:)',
    "sudo": 'echo "$*" >> "$HOME/done"; case "$*" in *"recommends prometheus"*) mv "$HOME/prometheus.new" '
    '"$HOME/bin/prometheus";; *tee*|*gpg*) while read -r _; do :; done;; esac',
    "curl": '[ ! -e "$HOME/offline" ]',
}


@pytest.fixture
def monitoring(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run monitoring.sh in a home with stand-ins for what changes a machine and for Prometheus; what it did."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    for name, body in MONITORS.items():
        place = tmp_path / ("prometheus.new" if name == "prometheus" else f"bin/{name}")
        place.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        place.chmod(0o755)
    metrics = tmp_path / "ray" / "session_latest" / "metrics" / "prometheus"
    metrics.mkdir(parents=True)
    (metrics / "prometheus.yml").touch()
    environment = {name: str(tmp_path) for name in ("HOME", "RAY_TMPDIR", "TMPDIR")}
    environment |= {"PATH": str(tmp_path / "bin"), "GRAFANA_HOME": str(tmp_path / "no")}
    pids: set[int] = set()

    def run(**more: str) -> str:
        (tmp_path / "done").write_text("")
        subprocess.run(["bash", str(CLUSTER / "monitoring.sh")], env=environment | more, check=True, timeout=180)
        pids.update(int(path.read_text()) for path in tmp_path.glob("*/pid"))
        return (tmp_path / "done").read_text()

    yield run
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def starts(folder: Path, count: int) -> list[str]:
    """What Prometheus was started with, once it was `count` times: the script does not wait for it."""
    deadline, told = time.monotonic() + 180, folder / "started"
    while not told.exists() or len(told.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return told.read_text().splitlines()


def alive(folder: Path) -> int:
    """Number of the process that runs; 0 when none does."""
    pid = int((folder / "pid").read_text())
    return pid if (Path(f"/proc/{pid}/comm").exists()) else 0


def test_prometheus_and_grafana_are_installed_once_and_started_anew(
    tmp_path: Path, monitoring: Callable[..., str]
) -> None:
    """From signed packages, Ubuntu's own service masked; on loopback alone; a second `ray up` ends the old one, whose
    list of nodes has had its day, and installs nothing; where nothing can or shall be fetched it ends well."""
    assert monitoring(INSTALL="no") == ""
    (tmp_path / "offline").touch()
    first = monitoring()
    assert first.index("systemctl mask prometheus") < first.index("apt-get")
    assert "gpg --dearmor" in first and "install --no-install-recommends grafana" not in first
    assert starts(tmp_path, 1)
    before = alive(tmp_path / "prometheus")
    assert before
    (tmp_path / "offline").unlink()
    second = monitoring()
    assert "recommends prometheus" not in second and re.search(r"recommends grafana=\d+\.\d+\.\d+$", second, re.M)
    assert alive(tmp_path / "prometheus") not in (0, before) and not Path(f"/proc/{before}").exists()
    started = starts(tmp_path, 2)
    assert len(started) == 2
    assert all("--web.listen-address=127.0.0.1:9090" in line and "session_latest/metrics" in line for line in started)
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(CLUSTER / "grafana" / "grafana.ini")
    assert settings["server"]["http_addr"] == "127.0.0.1"
    assert settings["security"]["disable_initial_admin_creation"] == settings["auth"]["disable_login_form"] == "true"


@pytest.mark.parametrize(("command", "options", "taken", "ports"), [
    ("dashboard", {"port": 8265, "remote_port": 8265}, False, [(8265, 8265), (3000, 3000)]),
    ("dashboard", {"port": 8265, "remote_port": 8265}, True, [(8265, 8265)]),
    ("dashboard", {"port": 3000, "remote_port": 3000}, False, [(8265, 8265)]),
    ("attach", {}, False, [(8265, 8265)]),
])  # fmt: skip
def test_ray_dashboard_opens_grafanas_tunnel_too(
    monkeypatch: pytest.MonkeyPatch, command: str, options: dict[str, Any], taken: bool, ports: list[tuple[int, int]]
) -> None:
    """Of all commands `ray dashboard` alone, and not where the port is taken, which would end the other tunnel too."""
    asked: list[Any] = []
    monkeypatch.setattr(SSHCommandRunner, "run", lambda _self, *_, **named: asked.append(named["port_forward"]))
    monkeypatch.setattr(provider, "_is_free", lambda _: not taken)
    ours = Provider({"region": "us-west-2", "cache_stopped_nodes": False}, "c")
    with click.Context(click.Command(command), info_name=command) as context:
        context.params = options
        runner = ours.get_command_runner("", "i-1", {"ssh_user": "ubuntu"}, "c", subprocess, False)
        runner.run(None, port_forward=[(8265, 8265)])
    assert asked == [ports]


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not provider._is_free(port)
    assert provider._is_free(port)
