"""The files of cluster/: valid for Ray, closed to the world, and what they make EC2 do, with moto in its place."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

from raytrain_brats.ec2 import SpotFirst
from tests.rigs import moto_aws

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(path.name for path in CLUSTER.glob("*.yaml"))
EC2_FILES = ["p3.yaml", "p4d.yaml"]
sys.path.append(str(CLUSTER))
import render  # noqa: E402 - it stands beside the YAMLs, not in the package

ZONE = "us-west-2b"
PLACES = ["--zone", ZONE, "--data", "s3://the-data/Task01", "--runs", "s3://the-runs/brats"]
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
def test_every_yaml_is_valid_for_ray_and_closed(name: str) -> None:
    """All YAMLs in cluster/ pass Ray's schema and our rules, new ones too."""
    assert FILES == ["local.yaml", "p3.yaml", "p4d.yaml"]
    config = load(name)

    assert problems(config) == []
    validate_config(prepare_config(config))


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
def test_a_yaml_that_opens_something_is_refused(opening: str) -> None:
    """The rules see what they are for: each opening of p4d.yaml is found."""
    config = copy.deepcopy(load("p4d.yaml"))  # anchors make parts one object
    config["available_node_types"] = json.loads(json.dumps(config["available_node_types"]))
    OPENINGS[opening](config)

    assert problems(config)


@pytest.mark.parametrize("name", EC2_FILES)
def test_the_numbers_fit_the_trainer(name: str) -> None:
    """--workers in the head comment is GPUs of one and of all training nodes; roles are labelled; the head idles."""
    config, types = load(name), load(name)["available_node_types"]
    low, high = map(int, re.findall(r"--workers (\d+):(\d+)", (CLUSTER / name).read_text())[0])
    gpus, train = types["train"]["resources"]["GPU"], types["train"]

    assert (low, high) == (gpus * max(1, train["min_workers"]), gpus * train["max_workers"])
    assert {kind: node["labels"] for kind, node in types.items()} == {k: {"role": k} for k in ("head", "data", "train")}
    assert types["head"]["resources"] == {"CPU": 0}
    assert config["max_workers"] == sum(node.get("max_workers", 0) for node in types.values())


def test_p3_and_p4d_differ_in_what_they_must() -> None:
    """The two files are twins but for the training nodes and the driver."""
    p3, p4d = load("p3.yaml"), load("p4d.yaml")
    assert "NVIDIA_DRIVER=580 TORCH_INDEX=cu126 " in p3["setup_commands"][1]
    p3["setup_commands"][1] = p3["setup_commands"][1].replace("NVIDIA_DRIVER=580 TORCH_INDEX=cu126 ", "")
    for config in (p3, p4d):
        del config["metadata"], config["cluster_name"], config["available_node_types"]["train"]
        config["setup_commands"][0] = re.sub(r"train=[\d.]+", "", config["setup_commands"][0])

    assert p3 == p4d


class Account:
    """An AWS account as docs/ec2.md wants it; every call of boto3 is kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.ec2 = boto3.client("ec2", "us-west-2")
        for name in ("the-data", "the-runs"):
            where = {"LocationConstraint": "us-west-2"}
            boto3.client("s3", "us-west-2").create_bucket(Bucket=name, CreateBucketConfiguration=where)
        for name in render.PROFILES:
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
        self.map_public(True)

    def map_public(self, value: bool) -> None:
        self.ec2.modify_subnet_attribute(SubnetId=self.private, MapPublicIpOnLaunch={"Value": value})

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


def rendered(what: str, out: Path, *more: str) -> dict[str, Any]:
    assert render.main([what, *PLACES, "--ssh-from", HOME, "--out", str(out), *more]) == 0
    return dict(yaml.safe_load(out.read_text()))


def launch(config: dict[str, Any]) -> None:
    """What `ray up` and the autoscaler do with a YAML as far as EC2 sees it: bootstrap, then a node of each type."""
    ready = _bootstrap_config(copy.deepcopy(config), no_config_cache=True)
    provider = SpotFirst(ready["provider"], ready["cluster_name"])
    for name, kind in ready["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)


def test_what_ec2_is_asked_for(account: Account, tmp_path: Path) -> None:
    """p4d rendered and launched: spot, profile, IMDS, encryption on every node; four EFA cards and the placement."""
    launch(rendered("p4d", tmp_path / "p4d.yaml"))
    head, data, train = (account.launches()[kind] for kind in ("m6i.2xlarge", "m6i.4xlarge", "p4d.24xlarge"))
    group = account.group()["GroupId"]

    for node, profile in ((head, "head"), (data, "node"), (train, "node")):
        assert node["IamInstanceProfile"] == {"Name": f"raytrain-brats-{profile}"}
        assert node["MetadataOptions"] == {
            "HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1,
        }  # fmt: skip
        assert [m["Ebs"]["Encrypted"] for m in node["BlockDeviceMappings"]] == [True]
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


def test_p3_asks_for_the_size_that_is_still_offered(account: Account, tmp_path: Path) -> None:
    """p3 rendered and launched: p3dn on spot, on the plain image that gets the old driver."""
    launch(rendered("p3", tmp_path / "p3.yaml", "--fsx", "fs-0abc.fsx.us-west-2.amazonaws.com@tcp:/mnt"))
    train = account.launches()["p3dn.24xlarge"]

    assert train["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert train["ImageId"] == moto_aws.IMAGES["canonical"]
    assert train["SubnetId"] == account.public["SubnetId"]
    places = rendered("p3", tmp_path / "p3.yaml", "--fsx", "fs@tcp:/m")["setup_commands"][0]
    said = subprocess.run(["bash", "-c", places.replace(" > ~/raytrain_brats.env", "")], capture_output=True, text=True)
    assert said.stdout.splitlines() == [
        "export AWS_DEFAULT_REGION=us-west-2",
        "export RAYTRAIN_BRATS_FSX=fs@tcp:/m",
        "export RAYTRAIN_BRATS_DATA=s3://the-data/Task01",
        "export RAYTRAIN_BRATS_STORE=s3://the-runs/brats/store",
        "export RAYTRAIN_BRATS_RUN_DIR=s3://the-runs/brats/first",
        "export RAYTRAIN_BRATS_DOLLARS_PER_HOUR=head=0.384,data=0.768,train=31.212",
    ]


def test_the_security_group_is_closed(account: Account, tmp_path: Path) -> None:
    """SSH from one address, all traffic among members both ways (EFA), the web outwards; twice makes no more."""
    for _ in range(2):
        rendered("p3", tmp_path / "p3.yaml")
    group = account.group()
    among = [r for r in group["IpPermissions"] if r["IpProtocol"] == "-1"]
    ssh = [r for r in group["IpPermissions"] if r["IpProtocol"] != "-1"]
    outwards = [(r.get("FromPort"), [i["CidrIp"] for i in r["IpRanges"]]) for r in group["IpPermissionsEgress"]]

    assert [p["GroupId"] for r in among for p in r["UserIdGroupPairs"]] == [group["GroupId"]]
    assert [(r["FromPort"], r["ToPort"], [i["CidrIp"] for i in r["IpRanges"]]) for r in ssh] == [(22, 22, [HOME])]
    assert sorted(outwards, key=str) == [(443, ["0.0.0.0/0"]), (80, ["0.0.0.0/0"]), (None, [])]


REFUSALS = {
    "ssh from everywhere": (["--ssh-from", "0.0.0.0/0"], "lets more than 65,536 addresses in"),
    "no address": (["--ssh-from", "home"], "your own address alone is A.B.C.D/32"),
    "a zone without p4d": (["--zone", "eu-north-1a"], "p4d.24xlarge is not offered in eu-north-1a"),
    "no such bucket": (["--data", "s3://other/x"], "bucket other: S3 says 404"),
    "a folder for a bucket": (["--runs", "/runs"], "--runs '/runs' is not s3://BUCKET/FOLDER"),
    "a subnet of another zone": (["--subnet", "subnet-0"], "subnet-0 in us-west-2b gives public addresses"),
    "no NAT gateway": (["--train-subnet", "subnet-0"], "leads out through a NAT gateway"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused(
    account: Account, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the cure, exit code 2, and no file."""
    change, message = REFUSALS[case]
    out = tmp_path / "p4d.yaml"

    assert render.main(["p4d", *PLACES, "--ssh-from", HOME, "--out", str(out), *change]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not out.exists()


def test_an_account_that_is_not_ready_is_refused(
    account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A subnet Ray would refuse, a group that somebody opened, a profile that is missing: named with the cure."""
    command = ["p4d", *PLACES, "--ssh-from", HOME, "--out", str(tmp_path / "out.yaml")]
    account.map_public(False)
    assert render.main(command) == 2
    assert "aws ec2 modify-subnet-attribute" in capsys.readouterr().err
    account.map_public(True)

    opened = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    rendered("p4d", tmp_path / "before.yaml")
    account.ec2.authorize_security_group_ingress(GroupId=account.group()["GroupId"], IpPermissions=[opened])
    assert render.main(command) == 2
    assert "lets 0.0.0.0/0 in" in capsys.readouterr().err
    account.ec2.revoke_security_group_ingress(GroupId=account.group()["GroupId"], IpPermissions=[opened])

    boto3.client("iam").delete_instance_profile(InstanceProfileName="raytrain-brats-node")
    assert render.main(command) == 2
    assert "no instance profile raytrain-brats-node" in capsys.readouterr().err
    boto3.client("iam").create_instance_profile(InstanceProfileName="raytrain-brats-node")
    assert not (tmp_path / "out.yaml").exists()


def test_spot_without_capacity_is_bought_on_demand(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where EC2 says that spot has none, and only where it is wanted; other refusals are told."""
    refused: dict[str, str] = {}
    call = BaseClient._make_api_call

    def refuse(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        if operation == "RunInstances" and (code := refused.get(str("InstanceMarketOptions" in parameters))):
            raise ClientError({"Error": {"Code": code, "Message": "no"}}, operation)
        return call(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    settings = {"region": "us-west-2", "cache_stopped_nodes": False}
    subnets = {"SubnetIds": [account.public["SubnetId"]], "ImageId": moto_aws.IMAGES["canonical"]}
    node = subnets | {"InstanceType": "m6i.4xlarge", "InstanceMarketOptions": {"MarketType": "spot"}}

    refused["True"] = "InsufficientInstanceCapacity"
    made = SpotFirst(settings, "c").create_node(node, {}, 2)
    assert len(made) == 2 and node["InstanceMarketOptions"]
    for more, code in (({"on_demand_fallback": False}, "InsufficientInstanceCapacity"), ({}, "UnauthorizedOperation")):
        refused["True"] = code
        with pytest.raises(NodeLaunchException, match=code):
            SpotFirst(settings | more, "c").create_node(node, {}, 1)


def test_nodes_may_read_data_and_write_runs(account: Account, tmp_path: Path) -> None:
    """With the rendered node.json: data can be read, not changed; runs can be written; other buckets are closed."""
    assert render.main(["iam", *PLACES, "--out", str(tmp_path)]) == 0
    names = ["bucket-the-data.json", "bucket-the-runs.json", "head.json", "key.json", "launcher.json", "node.json"]
    assert sorted(os.listdir(tmp_path)) == [*names, "trust.json"]
    assert not any("FILL" in path.read_text() for path in tmp_path.iterdir())
    iam, s3 = boto3.client("iam"), boto3.client("s3")
    trust, policy = ((tmp_path / f"{name}.json").read_text() for name in ("trust", "node"))
    role = iam.create_role(RoleName="raytrain-brats-node", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    iam.put_role_policy(RoleName="raytrain-brats-node", PolicyName="node", PolicyDocument=policy)
    keys = boto3.client("sts").assume_role(RoleArn=role, RoleSessionName="node")["Credentials"]
    for name in ("the-data", "the-runs"):
        s3.put_object(Bucket=name, Key="case", Body=b"voxels")
    node = boto3.client(
        "s3",
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
    )

    @set_initial_no_auth_action_count(0)
    def as_node() -> None:
        assert node.get_object(Bucket="the-data", Key="case")["Body"].read() == b"voxels"
        assert node.list_objects_v2(Bucket="the-data")["KeyCount"] == 1
        node.put_object(Bucket="the-runs", Key="checkpoint", Body=b"weights")
        node.delete_object(Bucket="the-runs", Key="checkpoint")
        denied: list[Callable[[], Any]] = [
            lambda: node.put_object(Bucket="the-data", Key="case", Body=b""),
            lambda: node.delete_object(Bucket="the-data", Key="case"),
            lambda: node.delete_bucket(Bucket="the-runs"),
            lambda: node.list_buckets(),
        ]
        for call in denied:
            with pytest.raises(ClientError, match="AccessDenied"):
                call()

    as_node()


@pytest.mark.parametrize("name", ["head", "launcher", "node"])
def test_policies_grant_no_more_than_named_actions(name: str) -> None:
    """No wildcard action; a wildcard resource for nothing but looking; nobody may delete data or buckets."""
    for statement in json.loads((CLUSTER / "iam" / f"{name}.json").read_text())["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert not [action for action in actions if "*" in action]
        if statement["Resource"] == "*":
            assert not [a for a in actions if not re.search(":(Describe|Get)", a)]
        assert not [a for a in actions if a.startswith("s3:Delete")] or "DATA" not in json.dumps(statement)


SHIMS = {
    "sudo": 'echo "$*" >> "$HOME/done"',
    "lsblk": "for i in 1 2; do echo /dev/nvme${i}n1 EC2 NVMe Instance Storage; done; echo /dev/nvme0n1 Amazon EBS",
    "lspci": "echo '00:1b.0 3D controller: NVIDIA Corporation GV100GL'",
    "mountpoint": '[ -e "$HOME/mounted" ]',
    "python3": 'mkdir -p "$3/bin"; ln -sf "$(command -v pip)" "$3/bin/pip"',
    "pip": 'echo "pip $*" >> "$HOME/done"; cp "$0" "$HOME/venv/bin/raytrain-brats"',
}


def test_a_node_is_set_up_once(tmp_path: Path) -> None:
    """Two NVMe disks become one; V100 gets driver 580 and torch for CUDA 12.6; the second run of Ray does nothing."""
    for name, body in SHIMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "raytrain_brats").mkdir()
    (tmp_path / "raytrain_brats" / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    (tmp_path / "raytrain_brats.env").write_text("export RAYTRAIN_BRATS_FSX=\n")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    more = {"NVIDIA_DRIVER": "580", "TORCH_INDEX": "cu126"}

    def run() -> str:
        (tmp_path / "done").write_text("")
        subprocess.run(["bash", str(CLUSTER / "node_setup.sh")], env=environment | more, check=True, timeout=30)
        return (tmp_path / "done").read_text()

    first = run()
    assert "mdadm --create /dev/md0 --level=0 --force --run --raid-devices=2 /dev/nvme1n1 /dev/nvme2n1" in first
    assert "mount -o noatime /dev/md0 /mnt/fast" in first
    assert "nvidia-driver-580-server" in first
    assert re.search(r"pip install -q torch==\S+ --index-url https://download.pytorch.org/whl/cu126", first)
    (tmp_path / "mounted").touch()
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    second = run()
    assert not re.search("mdadm|mkfs|apt-get|pip", second)
    assert (tmp_path / ".bashrc").read_text().count("raytrain_brats.profile") == 1
