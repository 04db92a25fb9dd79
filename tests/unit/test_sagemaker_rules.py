"""Requests that AWS refuses, and money for nothing, are told before anything is sent. No SDK is needed here."""

from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ParamValidationError
from moto.ec2.models.instance_types import INSTANCE_TYPES

from raytrain_brats import config, sagemaker
from raytrain_brats.errors import UserError
from raytrain_brats.sagemaker import rules, service

BASE = ("--role", "arn:aws:iam::123456789012:role/brats", "--image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/b:1")
LAUNCH = ("launch", *BASE, "--data", "s3://brats/cases", "--run-dir", "s3://brats/run")
PROCESS = ("process", *BASE, "--data", "s3://brats/cases", "--store", "s3://brats/store")
KEY = ("--kms-key", "11111111-2222-3333-4444-555555555555")
REFUSED = {
    "a key for the disks of g5": ((*LAUNCH, *KEY), "ml.g5.xlarge has local disks"),
    "of p4d": ((*LAUNCH, *KEY, "--train-instances", "ml.p4d.24xlarge"), "give the key as --output-kms-key"),
    "of p3dn": ((*LAUNCH, *KEY, "--train-instances", "ml.p3dn.24xlarge"), "ml.p3dn.24xlarge has local disks"),
    "of p5": ((*LAUNCH, *KEY, "--train-instances", "ml.p5.48xlarge"), "ml.p5.48xlarge has local disks"),
    "of g4dn": ((*LAUNCH, *KEY, "--train-instances", "ml.g4dn.xlarge"), "ml.g4dn.xlarge has local disks"),
    "of g6": ((*LAUNCH, *KEY, "--train-instances", "ml.g6.xlarge"), "ml.g6.xlarge has local disks"),
    "of data instances": (
        (*LAUNCH, *KEY, "--train-instances", "ml.m5.xlarge", "--data-instances", "ml.r5d.large"),
        "ml.r5d.large has local disks",
    ),
    "of a processing job": ((*PROCESS, *KEY, "--instances", "ml.r5d.xlarge:2"), "leave it out"),
    "a warm pool on spot": ((*LAUNCH, "--keep-alive-minutes", "10", "--spot"), "no warm pool of spot instances"),
    "a warm pool of groups": (
        (*LAUNCH, "--keep-alive-minutes", "10", "--data-instances", "ml.m5.xlarge"),
        "no warm pool of a job with --data-instances",
    ),
    "workers beyond the batch": (
        (*LAUNCH, "--train-instances", "ml.p4d.24xlarge:2", "--workers", "16", "--set", "train.global_batch=8"),
        "--set train.global_batch=16",
    ),
    "and by a setting": (
        (*LAUNCH, "--set", "run.workers='4:12'", "--set", "train.global_batch=8"),
        "more workers than train.global_batch = 8",
    ),
    "workers beyond the GPUs": ((*LAUNCH, "--workers", "2:4"), "1 x ml.g5.xlarge have 1 GPUs"),
    "workers in no number": ((*LAUNCH, "--workers", "many"), "is not MIN:MAX"),
    "longer than 28 days": ((*LAUNCH, "--max-hours", "1000"), "AWS ends a training job after 672 hours"),
    "a look into isolation": (
        (*LAUNCH, "--remote-debug", "--network-isolation", "--input", "file"),
        "cannot reach a container under --network-isolation",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_aws_refuses_is_refused_here(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that says what to do, dry or not: no network is asked, for there is none."""
    arguments, told = REFUSED[case]
    for more in ((), ("--dry-run",)):
        assert sagemaker.main([*arguments, *more]) == 2
        said = capsys.readouterr()
        assert told in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("workers", "batch", "kind", "number", "told"),
    [
        ("auto", 8, "ml.p4d.24xlarge", 1, ""),
        ("auto", 8, "ml.p4d.24xlarge", 2, "8 of 16 GPUs would idle and cost: 8 workers, global batch 8; give --set"),
        ("8", 16, "ml.p4d.24xlarge", 2, "8 of 16 GPUs would idle and cost: 8 workers, global batch 16; give --workers"),
        ("8:16", 16, "ml.p4d.24xlarge", 2, ""),
        ("auto", 8, "ml.g5.12xlarge", 1, ""),
        ("1", 8, "ml.g5.12xlarge", 1, "3 of 4 GPUs would idle"),
        ("4", 8, "ml.m5.xlarge", 2, ""),
    ],
)
def test_gpus_that_nobody_would_use_are_told(workers: str, batch: int, kind: str, number: int, told: str) -> None:
    """By --workers, or by a batch that is smaller than the GPUs; machines without GPUs have none to waste."""
    settings = config.load("segresnet", (f"train.global_batch={batch}", f"run.workers={workers!r}"))
    said = rules.check_workers(settings, kind, number)
    assert said.startswith(told) and bool(said) == bool(told)


def test_the_tables_are_those_of_ec2() -> None:
    """Local disks and GPUs of every type that SageMaker and EC2 both have; EC2's table as moto took it from AWS."""
    model = botocore.session.get_session().get_service_model("sagemaker")
    kinds = {kind for name in ("TrainingInstanceType", "ProcessingInstanceType") for kind in model.shape_for(name).enum}
    known = {kind: INSTANCE_TYPES[kind[3:]] for kind in kinds if kind[3:] in INSTANCE_TYPES}
    assert len(known) > 200
    assert {kind for kind in known if rules.has_local_disks(kind)} == {
        kind for kind, about in known.items() if about.get("InstanceStorageSupported")
    }
    there = {
        kind: sum(gpu["Count"] for gpu in about.get("GpuInfo", {}).get("Gpus", []) if gpu["Manufacturer"] == "NVIDIA")
        for kind, about in known.items()
    }
    assert {kind: rules.gpus(kind) for kind in known} == there


WHOLE: dict[str, Any] = {
    "TrainingJobName": "raytrain-brats-20261125",
    "RoleArn": BASE[1],
    "AlgorithmSpecification": {"TrainingImage": BASE[3], "TrainingInputMode": "File"},
    "OutputDataConfig": {"S3OutputPath": "s3://brats/run"},
    "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100},
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    "Tags": [{"Key": "Projekt-Größe", "Value": "groß & klein".replace("&", "+")}],
    "Environment": {"A_1": "any\nthing"},
}
WRONG = {
    "--role": {"RoleArn": "arn:aws:iam::1234:role/brats"},
    "--name": {"TrainingJobName": "with_underscore"},
    "--keep-alive-minutes": {"ResourceConfig": WHOLE["ResourceConfig"] | {"KeepAlivePeriodInSeconds": 21_601}},
    "--kms-key": {"ResourceConfig": WHOLE["ResourceConfig"] | {"VolumeKmsKeyId": "no key"}},
    "--subnets": {"VpcConfig": {"Subnets": ["s"] * 17, "SecurityGroupIds": ["sg-1"]}},
    "--security-groups": {"VpcConfig": {"Subnets": ["s"], "SecurityGroupIds": ["sg 1"]}},
    "--env": {"Environment": {"1A": "x"}},
    "--tag": {"Tags": [{"Key": "a", "Value": "x" * 257}]},
    "--recipe": {"HyperParameters": {"recipe": "x" * 2501}},
    "ResourceConfig.InstanceType": {"ResourceConfig": {"InstanceType": "ml.z9.huge"}},
    "RetryStrategy.MaximumRetryAttempts": {"RetryStrategy": {"MaximumRetryAttempts": 31}},
}


@pytest.mark.parametrize("option", WRONG)
def test_a_request_is_held_against_awss_own_model(option: str) -> None:
    """Choices, patterns, bounds at both ends: by the option's name where it has one."""
    rules.check_request("CreateTrainingJob", WHOLE)
    with pytest.raises(UserError, match="AWS would refuse") as refused:
        rules.check_request("CreateTrainingJob", WHOLE | WRONG[option])
    assert str(refused.value).startswith(option)


@pytest.mark.parametrize("change", [{"OutputDataConfig": {}}, {"Colour": "red"}, {"Tags": "x"}])
def test_names_types_and_what_must_be_there_are_checked_by_botocore(change: dict[str, Any]) -> None:
    """Before the request is seen here, so that our own look need not."""

    def seen(request: dict[str, Any]) -> Any:
        start = lambda session: session.client("sagemaker").create_training_job(**request)  # noqa: E731
        return service.captured("us-east-1", "brats", "CreateTrainingJob", start)

    assert seen(WHOLE) == WHOLE
    with pytest.raises(ParamValidationError):
        seen(WHOLE | change)
