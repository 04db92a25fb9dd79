"""The whole way on EC2 and over SSH, with machines made of namespaces: the unmodified `ray up`, jobs, a spot reclaim.

Eight minutes; needs root, namespaces and sshd, and is skipped, saying why, without.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import s3, storage, verify
from raytrain_brats.run import journal
from raytrain_brats.synthetic.phantom import write_set
from tests import account as template
from tests.rigs.machines import GATEWAY, ROOT, Machines, missing, own_network, tool

WHY_NOT = missing()
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"the EC2 rig cannot run here: {WHY_NOT}"),
]
ZONE, RUN = "us-west-2b", "s3://the-runs/brats/first"
EXPORTS = {
    "RAYTRAIN_BRATS_DATA": "s3://the-data/brats",
    "RAYTRAIN_BRATS_RUNS": "s3://the-runs/brats",
    "RAYTRAIN_BRATS_SSH_FROM": f"{GATEWAY}/32",  # nobody answers here who would tell the address
    "RAYTRAIN_BRATS_RECIPE": "demo",
}
TRAINING = ["preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]", "train.epochs=4000", "run.resize_check_s=2"]
TRAINING += ["checkpoint.every_samples=400", "validate.every_samples=10000000", "run.cpus_per_worker=1"]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines in a network of their own; this test's boto3 and our S3 client speak with their moto."""
    with tempfile.TemporaryDirectory(prefix="rig", dir="/tmp") as folder, own_network():
        machines = Machines(Path(folder))
        for name, value in machines.environment.items():
            monkeypatch.setenv(name, value)
        s3.client.cache_clear()
        try:
            run(machines, "ray get-auth-token --generate")
            yield machines
        finally:
            keep = os.environ.get("RAYTRAIN_BRATS_RIG_LOGS")
            if keep:
                subprocess.run(["cp", "-r", "--no-preserve=mode", folder, keep], check=False)
            machines.close()
            s3.client.cache_clear()


def run(machines: Machines, command: str, expect: int = 0, **environment: str) -> str:
    """A command line as a user types it at the root of the checkout; what it said."""
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=machines.environment | environment, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


@contextmanager
def tunnel(machines: Machines, config: Path) -> Iterator[None]:
    """`ray dashboard` in the background, until the dashboard answers."""
    with (machines.folder / "tunnel.log").open("wb") as log:
        command = [str(tool("ray")), "dashboard", str(config)]
        ssh = subprocess.Popen(
            command, cwd=ROOT, env=machines.environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        asked = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8265/api/version"]
        wait(lambda: subprocess.run(asked, capture_output=True).stdout in (b"200", b"401"), 60, "a dashboard")
        yield
    finally:
        os.killpg(ssh.pid, signal.SIGTERM)
        ssh.wait()


def wait(until: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := until():
            return found
        time.sleep(1)
    raise AssertionError(f"no {what} within {seconds:.0f} s")


def account(machines: Machines) -> None:
    """Buckets, profiles, and a subnet behind a NAT gateway: docs/ec2.md, once per account."""
    where = {"CreateBucketConfiguration": {"LocationConstraint": "us-west-2"}}
    for name in ("the-data", "the-runs"):
        machines.client("s3").create_bucket(Bucket=name, **where)
    iam, ec2 = machines.client("iam"), machines.ec2
    for role in ("head", "node"):
        iam.create_instance_profile(InstanceProfileName=f"raytrain-brats-{role}")
    public = public_subnet(machines)
    private = ec2.create_subnet(VpcId=public["VpcId"], CidrBlock="172.31.96.0/20", AvailabilityZone=ZONE)["Subnet"]
    gateway = ec2.create_nat_gateway(SubnetId=public["SubnetId"])["NatGateway"]["NatGatewayId"]
    table = ec2.create_route_table(VpcId=public["VpcId"])["RouteTable"]["RouteTableId"]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=gateway)
    ec2.associate_route_table(RouteTableId=table, SubnetId=private["SubnetId"])


def public_subnet(machines: Machines) -> dict[str, Any]:
    found: dict[str, Any] = machines.ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [ZONE]}])
    return dict(found["Subnets"][0])


def upload_phantoms(machines: Machines) -> None:
    data = machines.folder / "phantoms"
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    for path in data.rglob("*"):
        if path.is_file():
            machines.client("s3").upload_file(str(path), "the-data", f"brats/{path.relative_to(data)}")


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The shipped YAML for machines of one CPU without GPUs: nothing else is changed."""
    for name, kind in config["available_node_types"].items():
        if name != "head":
            kind["resources"] = {"CPU": 1, "GPU": 0}
    config["available_node_types"]["data"]["max_workers"] = 1
    config["provider"]["on_demand_fallback"] = True
    config["worker_start_ray_commands"][2] = config["worker_start_ray_commands"][2].replace(
        "raytrain_brats.spot", "raytrain_brats.spot --headless-minutes 0.5"
    )
    return small(config)


def small(config: dict[str, Any]) -> dict[str, Any]:
    """With object stores that fit several times into this machine."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key][1] += " --object-store-memory=150000000"
    return config


def worlds() -> list[int]:
    """World size of each worker group that applied steps, in order."""
    found: dict[int, int] = {row["generation"]: row["world_size"] for row in journal.read_rows(RUN)}
    return list(found.values())


def test_a_run_on_ec2_outlives_a_spot_reclaim(rig: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """`ray up p4d` as it stands, a job from outside, nodes by demand, a reclaim with the fallback to on demand; a head
    that dies takes its nodes with it; a second `ray up`; `ray down`."""
    account(rig)
    upload_phantoms(rig)
    config = rig.folder / "p4d.yaml"
    shipped = yaml.safe_load((ROOT / "cluster" / "p4d.yaml").read_text())
    config.write_text(yaml.safe_dump(shrink(shipped), sort_keys=False))
    refused = run(rig, f"ray up -y {config}", expect=2)
    assert "nothing was launched" in refused and "RAYTRAIN_BRATS_DATA" in refused and not rig.instances()
    rig.environment |= EXPORTS
    run(rig, f"ray up -y {config}")
    assert [node["InstanceType"] for node in rig.instances()] == ["m6i.2xlarge"]

    with tunnel(rig, config):
        socket.create_connection(("127.0.0.1", 3000), timeout=5).close()  # Grafana's tunnel
        api = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
        refused = run(rig, "ray job list", expect=1, **api, RAY_AUTH_MODE="disabled")
        assert "401" in refused or "token" in refused.lower()
        sets = " ".join(f"--set '{setting}'" for setting in TRAINING)
        run(rig, f"ray job submit --no-wait --submission-id rig -- python -m raytrain_brats.train {sets}", **api)
        wait(lambda: len(worlds()) and worlds()[-1] == 2, 400, "run with two workers")
        kinds = [rig.instances(kind) for kind in ("data", "train")]
        assert [len(found) for found in kinds] == [1, 2]
        assert {node["InstanceLifecycle"] for found in kinds for node in found} == {"spot"}

        groups = len(worlds())
        victim = max(kinds[1], key=lambda node: node["PrivateIpAddress"])["InstanceId"]
        (rig.folder / "no_spot").touch()
        rig.notice(victim, within_s=60)
        wait(lambda: len(worlds()) > groups and worlds()[-1] == 2, 400, "two workers again")
        rows = len(journal.read_rows(RUN))
        wait(lambda: len(journal.read_rows(RUN)) > rows + 20, 120, "steps after the reclaim")
        train_nodes = rig.instances("train")
        assert victim not in [node["InstanceId"] for node in train_nodes]
        assert sorted(node.get("InstanceLifecycle", "on demand") for node in train_nodes) == ["on demand", "spot"]

        stopped = run(rig, "ray job stop rig", **api)
        logs = run(rig, "ray job logs rig", **api)
        assert "s3://the-runs/brats/store is no finished store yet" in logs, logs[:3000]
        assert "goes on from the newest checkpoint" in logs, logs[-3000:] + stopped
    events = journal.read_events(RUN)
    told = [event for event in events if event["event"] in ("preemption", "resize", "failure", "group")]
    assert any(event["saved"] for event in told if event["event"] in ("preemption", "resize")), told
    assert {event["redone_steps"] for event in told if event["event"] == "group"} == {0}, told
    assert verify.main(["--run-dir", RUN]) == 0
    assert "each once, in order" in capsys.readouterr().out

    (head,) = rig.instances("head")
    assert len(rig.instances()) > 1
    rig.ec2.terminate_instances(InstanceIds=[head["InstanceId"]])
    wait(lambda: not rig.instances() and not rig.live, 120, "end of the nodes that lost their head")
    logs_of = storage.list_files("s3://the-runs/brats/logs/raytrain-brats-p4d")
    assert [name for name in logs_of if name.endswith("/job-driver-rig.log")], logs_of
    assert len({name.split("/")[1] for name in logs_of}) >= 4  # the head, a data node, two that train

    run(rig, f"ray up -y {config}")
    (head,) = rig.instances()
    run(rig, f"ray up -y --no-restart {config}")
    assert [node["InstanceId"] for node in rig.instances()] == [head["InstanceId"]]
    assert f"instance {head['InstanceId']}: raytrain-brats-p4d" in run(rig, "raytrain-brats ec2 left")
    run(rig, f"ray down -y {config}")
    wait(lambda: not rig.instances() and not rig.live, 30, "end of all machines")
    assert "instance" not in run(rig, "raytrain-brats ec2 left")
    for who, policy in (("you", "LauncherEc2"), ("head", "Head"), ("node", "Node")):
        called = {call for call in rig.calls(who) if not call.startswith("s3:")}
        assert called <= template.actions(policy) | set(RIG_ONLY[who])


RIG_ONLY: dict[str, tuple[str, ...]] = {
    "head": (),
    "node": (),
    "you": (  # this test plays the account's owner too, and moto's watcher
        "ec2:CreateNatGateway", "ec2:CreateRoute", "ec2:CreateRouteTable", "ec2:CreateSubnet",
        "ec2:AssociateRouteTable", "ec2:DescribeInstanceAttribute", "iam:CreateInstanceProfile",
        "ec2:CreateSecurityGroup",  # the account's stack has made it where there is one
        "service-quotas:GetServiceQuota",  # moto's name for servicequotas
    ),
}  # fmt: skip


def test_local_machines_by_ssh(rig: Machines) -> None:
    """`ray up cluster/local.yaml` over three machines: all join, by role; a job runs over both workers."""
    key = rig.ec2.create_key_pair(KeyName="own")["KeyMaterial"]
    private = rig.folder / "home" / ".ssh" / "id_ed25519"
    private.write_text(key)
    private.chmod(0o600)
    subnet = public_subnet(rig)["SubnetId"]  # without one, moto gives addresses of no network
    about = {"ImageId": "ami-12c6146b", "InstanceType": "m6i.4xlarge", "KeyName": "own", "SubnetId": subnet}
    rig.ec2.run_instances(MinCount=3, MaxCount=3, **about)
    wait(lambda: len(rig.live) == 3, 60, "machines")
    head, *workers = [node["PrivateIpAddress"] for node in rig.instances()]
    text = (ROOT / "cluster" / "local.yaml").read_text()
    for name, value in (("HEAD", head), ("WORKER_1", workers[0]), ("WORKER_2", workers[1]), ("USER", "ubuntu")):
        text = text.replace(f"FILL_{name}", value)
    settings = small(yaml.safe_load(text))
    settings["worker_start_ray_commands"][1] += " --num-cpus=1"
    settings["auth"]["ssh_private_key"] = str(private)  # to ssh, "~" is not HOME but the user's home
    config = rig.folder / "local.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    rig.environment |= {"RAY_UP_enable_autoscaler_v2": "0", "RAY_TMPDIR": str(rig.folder)}  # where it knows nodes from
    run(rig, f"ray up -y --no-config-cache {config}")

    with tunnel(rig, config):
        api = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
        said = run(rig, "ray job submit -- python -m raytrain_brats.check_gpus --cpu --workers 2", **api)
    assert "rank 0" in said and "rank 1" in said and "3D convolution" in said and "all-reduce of 256 MiB over 2" in said
    names = {line.split(": ")[1] for line in said.splitlines() if "rank " in line and ": CPU" in line}
    assert len(names) == 2
    run(rig, f"ray down -y {config}")
