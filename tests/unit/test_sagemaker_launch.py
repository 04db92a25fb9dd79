"""What `sagemaker launch` and `process` send, captured on its way to a local AWS."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from raytrain_brats import sagemaker
from raytrain_brats.monitoring import live_line
from raytrain_brats.planning import prices
from raytrain_brats.sagemaker import host, launch, service

ROLE = "arn:aws:iam::123456789012:role/brats"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/raytrain-brats:1"
KEY = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
SMALL = ("--role", ROLE, "--image", IMAGE, "--data", "s3://brats/cases", "--run-dir", "s3://brats/run")
WHOLE = (
    *(
        "--role",
        ROLE,
        "--image",
        IMAGE,
        "--store",
        "s3://brats/store/",
        "--run-dir",
        "s3://brats/run",
        "--name",
        "exp7",
    ),
    *("--train-instances", "ml.p4d.24xlarge:2", "--data-instances", "ml.m5.4xlarge:4", "--spot"),
    *(
        "--max-hours",
        "10",
        "--max-wait-hours",
        "30",
        "--volume-gb",
        "500",
        "--output-kms-key",
        KEY,
        "--encrypt-traffic",
    ),
    *("--subnets", "subnet-1", "subnet-2", "--security-groups", "sg-1", "--tag", "study=7", "--tag", "who=me"),
    *("--recipe", "dynunet", "--set", "train.epochs=3", "--set", "train.global_batch=16", "--workers", "4:16"),
    *("--env", "NCCL_DEBUG=INFO", "--join-minutes", "20", "--input", "fastfile"),
)
SENT = {
    "AlgorithmSpecification": {
        "TrainingImage": IMAGE,
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in launch.METRICS.items()],
    },
    "RoleArn": ROLE,
    "HyperParameters": {
        "store": "/opt/ml/input/data/store",
        "run_dir": "s3://brats/run",
        "recipe": "dynunet",
        "workers": "4:16",
        "set": '["train.epochs=3", "train.global_batch=16"]',
    },
    "InputDataConfig": [
        {
            "ChannelName": "store",
            "InputMode": "FastFile",
            "DataSource": {
                "S3DataSource": {
                    "S3DataType": "S3Prefix",
                    "S3Uri": "s3://brats/store/",
                    "S3DataDistributionType": "FullyReplicated",
                    "InstanceGroupNames": ["data", "train"],
                }
            },
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://brats/run/sagemaker/output", "CompressionType": "NONE", "KmsKeyId": KEY},
    "ResourceConfig": {
        "InstanceGroups": [
            {"InstanceGroupName": "data", "InstanceType": "ml.m5.4xlarge", "InstanceCount": 4},
            {"InstanceGroupName": "train", "InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2},
        ],
        "VolumeSizeInGB": 500,
    },
    "VpcConfig": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
    "StoppingCondition": {"MaxRuntimeInSeconds": 36_000, "MaxWaitTimeInSeconds": 108_000},
    "EnableManagedSpotTraining": True,
    "EnableNetworkIsolation": False,
    "EnableInterContainerTrafficEncryption": True,
    "CheckpointConfig": {"S3Uri": "s3://brats/run/sagemaker/hosts", "LocalPath": "/opt/ml/checkpoints"},
    "Environment": {"RAYTRAIN_BRATS_JOIN_S": "1200", "NCCL_DEBUG": "INFO"},
    "RetryStrategy": {"MaximumRetryAttempts": 3},
    "Tags": [
        {"Key": "project", "Value": "raytrain-brats"},
        {"Key": "study", "Value": "7"},
        {"Key": "who", "Value": "me"},
    ],
}

Capture = Callable[..., Any]


def sdk() -> None:
    """Skip where the SDK is missing: 410 MB beside this package, and older versions of rich, protobuf and pyarrow."""
    pytest.importorskip("sagemaker.train.model_trainer", reason="the SageMaker SDK is an extra: scripts/venv sagemaker")


@pytest.fixture
def sent(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Run a step against the local AWS; the body of its create request, as it went over the wire."""
    sdk()
    boto3.client("s3").create_bucket(Bucket="brats")
    bodies: list[Any] = []

    class Recording(boto3.Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for operation in ("CreateTrainingJob", "CreateProcessingJob"):
                self.events.register(f"before-send.sagemaker.{operation}", self.note)

        def note(self, request: Any, **_: Any) -> None:
            bodies.append(json.loads(request.body))

    monkeypatch.setattr(boto3, "Session", Recording)
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")  # the local AWS has no iam:SimulatePrincipalPolicy

    def run(*arguments: str) -> Any:
        bodies.clear()
        assert sagemaker.main(list(arguments)) == 0
        assert len(bodies) == 1
        return bodies[0]

    return run


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Capture:
    """A dry run's request, on a machine without credentials, configuration or network."""
    sdk()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)

    def run(*arguments: str) -> Any:
        assert sagemaker.main([*arguments, "--dry-run"]) == 0
        said = capsys.readouterr()
        assert "USD an hour" in said.err
        return json.loads(said.out)

    return run


def test_the_request_is_sent_whole(sent: Capture) -> None:
    """Groups, spot, VPC, KMS, tags, channel, checkpoints, metrics: every field, and no other."""
    request = sent("launch", *WHOLE)
    assert re.fullmatch(r"exp7-\d{14}", request.pop("TrainingJobName"))
    assert request == SENT


def test_a_dry_run_prints_what_would_be_sent(dry: Capture) -> None:
    """The very request, from a machine that has nothing; the price beside it, not in it."""
    request = dry("launch", *WHOLE)
    assert request.pop("TrainingJobName").startswith("exp7-")
    assert request == SENT


def test_the_smallest_request(dry: Capture) -> None:
    """One instance, on demand: the run reads S3 itself, so there is no channel."""
    request = dry("launch", *SMALL)
    assert request["ResourceConfig"] == {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86_400}
    assert request["HyperParameters"] == {
        "data": "s3://brats/cases",
        "run_dir": "s3://brats/run",
        "recipe": "segresnet",
    }
    assert not request["EnableManagedSpotTraining"]
    assert request["Tags"] == [{"Key": "project", "Value": "raytrain-brats"}]
    assert not request.keys() & {"InputDataConfig", "VpcConfig"}
    assert dry("launch", *SMALL, "--spot")["StoppingCondition"]["MaxWaitTimeInSeconds"] == 172_800
    more = ("--train-instances", "ml.m5.xlarge", "--keep-alive-minutes", "30", "--kms-key", KEY)
    kept = dry("launch", *SMALL, *more)
    assert kept["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1800
    assert kept["ResourceConfig"]["VolumeKmsKeyId"] == kept["OutputDataConfig"]["KmsKeyId"] == KEY


def test_a_look_into_a_job(dry: Capture) -> None:
    """--remote-debug lets Systems Manager in and has the head show Ray's dashboard; else nobody asks for either."""
    request = dry("launch", *SMALL, "--remote-debug")
    assert request["RemoteDebugConfig"] == {"EnableRemoteDebug": True}
    assert request["Environment"][host.DASHBOARD] == "1"
    assert "RemoteDebugConfig" not in (plain := dry("launch", *SMALL)) and host.DASHBOARD not in plain["Environment"]


def test_an_isolated_container_uses_what_the_service_copies(dry: Capture) -> None:
    """Without network the cases come by channel and the run folder is the synchronised folder."""
    request = dry("launch", *SMALL, "--network-isolation", "--input", "file")
    assert request["EnableNetworkIsolation"]
    assert request["CheckpointConfig"] == {"S3Uri": "s3://brats/run", "LocalPath": "/opt/ml/checkpoints"}
    assert request["HyperParameters"]["run_dir"] == "/opt/ml/checkpoints"
    assert request["HyperParameters"]["data"] == "/opt/ml/input/data/data"
    (channel,) = request["InputDataConfig"]
    assert (channel["ChannelName"], channel["InputMode"]) == ("data", "File")
    assert "InstanceGroupNames" not in channel["DataSource"]["S3DataSource"]


def test_cases_on_fsx(dry: Capture) -> None:
    """The file system is mounted, and the cases are a folder below it."""
    vpc = ("--subnets", "subnet-1", "--security-groups", "sg-1")
    request = dry(
        "launch", *SMALL[:4], "--run-dir", "s3://brats/run", "--data", "brats", "--fsx", "fs-0123456789:/mnt/x", *vpc
    )
    assert request["HyperParameters"]["data"] == "/opt/ml/input/data/data/brats"
    assert request["InputDataConfig"][0]["DataSource"]["FileSystemDataSource"] == {
        "FileSystemId": "fs-0123456789",
        "FileSystemType": "FSxLustre",
        "FileSystemAccessMode": "ro",
        "DirectoryPath": "/mnt/x",
    }


def test_code_is_shipped_to_images_of_aws(sent: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    """The package and its requirements are uploaded, dry they are not; PID 1's bash hands SIGTERM on."""
    assert sagemaker.main(["launch", *SMALL, "--ship-code", "--dry-run"]) == 0
    assert "sm_drivers" in capsys.readouterr().out
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket="brats")
    request = sent("launch", *SMALL, "--ship-code")
    channels = {channel["ChannelName"]: channel for channel in request["InputDataConfig"]}
    assert channels.keys() == {"code", "sm_drivers"}
    place = channels["code"]["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://brats/")
    listed = boto3.client("s3").list_objects_v2(Bucket="brats", Prefix=place)["Contents"]
    names = {there["Key"].removeprefix(place).lstrip("/") for there in listed}
    assert {"requirements.txt", "raytrain_brats/sagemaker/host.py", "raytrain_brats/recipes/demo.yaml"} <= names
    assert not any("__pycache__" in name for name in names)
    place = channels["sm_drivers"]["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://brats/")
    script = (
        boto3.client("s3").get_object(Bucket="brats", Key=f"{place.rstrip('/')}/sm_train.sh")["Body"].read().decode()
    )
    assert launch.COMMAND in script


def test_the_bash_that_aws_starts_hands_sigterm_on(tmp_path: Path) -> None:
    """AWS's images make bash PID 1: the run still hears SIGTERM, may take its time, and its exit code is the job's."""
    run = tmp_path / "python3"
    run.write_text(
        '#!/bin/bash\ntrap "sleep 1; echo saved; exit 143" TERM\necho training\nwhile :; do sleep 0.1; done\n'
    )
    run.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = tmp_path / "said"
    with said.open("w") as out:
        bash = subprocess.Popen(["bash", "-ec", launch.COMMAND], env=environment, stdout=out)
    deadline = time.monotonic() + 60
    while said.read_text() != "training\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    bash.terminate()
    assert (bash.wait(120), said.read_text()) == (143, "training\nsaved\n")


def test_a_recipe_file_travels_in_the_request(dry: Capture, tmp_path: Path) -> None:
    """The containers have no such file: its content goes along, on one line as the service wants it."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((resources.files("raytrain_brats") / "recipes" / "segresnet.yaml").read_text())
    found = dry("launch", *SMALL, "--recipe", str(recipe))["HyperParameters"]["recipe"]
    assert yaml.safe_load(found) == yaml.safe_load(recipe.read_text())
    assert "\n" not in found


def test_a_processing_job(sent: Capture, dry: Capture) -> None:
    """`prepare`, over several instances, in a VPC."""
    options = ("--role", ROLE, "--image", IMAGE, "--data", "s3://brats/cases", "--store", "s3://brats/store")
    more = ("--instances", "ml.m5.4xlarge:4", "--set", "preprocess.spacing_mm=2", "--kms-key", KEY, "--tag", "a=b")
    vpc = ("--subnets", "subnet-1", "--security-groups", "sg-1")
    request = dry("process", *options, *more, *vpc)
    assert request.pop("ProcessingJobName").startswith("raytrain-brats-")
    assert request == {
        "RoleArn": ROLE,
        "AppSpecification": {
            "ImageUri": IMAGE,
            "ContainerArguments": [
                *("prepare", "--data", "s3://brats/cases", "--store", "s3://brats/store"),
                *("--recipe", "segresnet", "--set=preprocess.spacing_mm=2"),
            ],
        },
        "ProcessingResources": {
            "ClusterConfig": {
                "InstanceType": "ml.m5.4xlarge",
                "InstanceCount": 4,
                "VolumeSizeInGB": 100,
                "VolumeKmsKeyId": KEY,
            }
        },
        "Environment": {"RAYTRAIN_BRATS_JOIN_S": "900"},
        "NetworkConfig": {
            "EnableNetworkIsolation": False,
            "EnableInterContainerTrafficEncryption": False,
            "VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]},
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 86_400},
        "Tags": [{"Key": "project", "Value": "raytrain-brats"}, {"Key": "a", "Value": "b"}],
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("launch",), "--role and --image must be given"),
        (("launch", "--role", "brats", *SMALL[2:]), "whole ARN"),
        (("launch", *SMALL[:4], "--run-dir", "s3://brats/run"), "--data or --store"),
        (("launch", *SMALL[:6], "--run-dir", "/home/me/run"), "--run-dir /home/me/run: a SageMaker job"),
        (("launch", *SMALL[:4], "--data", "cases", "--run-dir", "s3://brats/run"), "--data cases: a SageMaker job"),
        (("launch", *SMALL, "--train-instances", "ml.p4d.24xlage"), "did you mean ml.p4d.24xlarge"),
        (("launch", *SMALL, "--train-instances", "ml.p4d.24xlarge:none"), "TYPE:NUMBER"),
        (("launch", *SMALL, "--subnets", "subnet-1"), "go together"),
        (("launch", *SMALL, "--network-isolation"), "one instance and --input file"),
        (("launch", *SMALL, "--spot", "--max-wait-hours", "1"), "no less than --max-hours"),
        (("launch", *SMALL, "--tag", "brats"), "KEY=VALUE"),
        (("launch", *SMALL, "--recipe", "segrsnet"), "did you mean segresnet"),
        (("launch", *SMALL, "--set", "train.epoch=1"), "did you mean train.epochs"),
        (("launch", *SMALL, "--fsx", "fs-1:/x"), "--subnets"),
        (("process", *SMALL[:4], "--data", "s3://brats/x"), "--store"),
        (("lunch",), "did you mean launch"),
    ],
)
def test_mistakes_are_told_before_anything_is_paid_for(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line; the recipe and its settings are checked here, not an hour later in a container."""
    if "--tag" in arguments:
        sdk()
    assert sagemaker.main([*arguments, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.out == ""


def test_without_the_sdk_the_way_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sagemaker.core.helper.session_helper", None)
    assert sagemaker.main(["launch", *SMALL, "--dry-run"]) == 2
    assert "scripts/venv sagemaker" in capsys.readouterr().err


def test_without_credentials_the_way_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2, and no traceback of the SDK's."""
    sdk()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
    assert sagemaker.main(["launch", *SMALL, "--region", "us-east-1"]) == 2
    assert "aws configure" in capsys.readouterr().err


def test_the_curves_are_found_in_what_the_trainer_prints() -> None:
    """Every metric's expression takes its number out of the progress line."""
    row = {
        "loss": 0.4321, "positions": [96, 100], "step_s": 2.0, "wait_s": 0.1, "world_size": 2,
        "samples_seen": 1100, "time": 9.0,
    }  # fmt: skip
    events = [
        {"event": "group", "generation": 1, "time": 1.0},
        {"event": "validation", "time": 5.0, "dice": {"WT": 0.91, "TC": 0.82, "ET": 0.73}},
    ]
    line = live_line.whole(live_line.standing([row], events, 5000))
    found = {name: float(re.findall(regex, line)[0]) for name, regex in launch.METRICS.items()}
    assert found == {
        "train:loss": 0.432,
        "train:samples_per_second": 2.0,
        "train:data_wait_percent": 5,
        "train:workers": 2,
        "validation:dice_wt": 0.91,
        "validation:dice_tc": 0.82,
        "validation:dice_et": 0.73,
    }


def test_prices_are_dated_and_of_types_that_exist() -> None:
    table = prices.table("sagemaker")
    for name in table["instances"]:
        assert service.instances(name, "x") == (name, 1)
    assert re.fullmatch(r"\d{4}-\d{2}", str(table["date"]))
    assert "about 54.19 USD an hour" in service.cost([("ml.m5.4xlarge", 4), ("ml.p4d.24xlarge", 2)])
    assert "about 35.86 USD an hour" in service.cost([("ml.p3dn.24xlarge", 1)])
    assert "without ml.p4de.24xlarge" in service.cost([("ml.m5.4xlarge", 1), ("ml.p4de.24xlarge", 1)])
