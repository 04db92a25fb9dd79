"""The account's template: made and deleted in moto, what its roles may and may not do, and how little that is."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from cfnlint.api import lint_file
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

from raytrain_brats import s3, storage
from tests.support import account_template as account

REGION = account.OWN["AWS::Region"]


def test_the_template_is_sound() -> None:
    """cfn-lint, AWS's own linter, has nothing to say."""
    assert lint_file(account.TEMPLATE) == []


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of a stack in a moto account of its own."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        s3.client.cache_clear()
        ec2 = boto3.client("ec2")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        in_vpc = [{"Name": "vpc-id", "Values": [vpc]}]
        table = ec2.describe_route_tables(Filters=in_vpc)["RouteTables"][0]["RouteTableId"]
        given = account.GIVEN | {"VpcId": vpc, "RouteTables": table}
        yield boto3.client("cloudformation").create_stack(
            StackName="raytrain-brats",
            TemplateBody=account.TEMPLATE.read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )["StackId"]
        s3.client.cache_clear()


def test_a_stack_is_made_and_deleted(stack: str) -> None:
    """Roles, profiles, buckets with KMS, registry, group and endpoint are there by the names that `ray up` looks for;
    after the deletion the buckets are left, with what was in them."""
    iam, ec2, kms = boto3.client("iam"), boto3.client("ec2"), boto3.client("kms")
    for role in ("head", "node"):
        profile = iam.get_instance_profile(InstanceProfileName=f"raytrain-brats-{role}")["InstanceProfile"]
        assert [r["RoleName"] for r in profile["Roles"]] == [f"raytrain-brats-{role}"]
    (made,) = boto3.client("cloudformation").describe_stacks(StackName=stack)["Stacks"]
    said = {row["OutputKey"]: row["OutputValue"] for row in made["Outputs"]}
    assert said["SageMakerRole"] == "arn:aws:iam::123456789012:role/raytrain-brats-sagemaker"
    assert said["Repository"].endswith("/raytrain-brats")
    store = boto3.client("s3")
    for bucket in account.GIVEN.values():
        (rule,) = store.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        key = rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"]
        assert key in [row["KeyArn"] for row in kms.list_keys()["Keys"]]
        store.put_object(Bucket=bucket, Key="case", Body=b"voxels")
    named = [{"Name": "group-name", "Values": ["raytrain-brats"]}]
    (group,) = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    assert [p["GroupId"] for r in group["IpPermissions"] for p in r["UserIdGroupPairs"]] == [group["GroupId"]]
    (endpoint,) = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    assert (endpoint["ServiceName"], len(endpoint["RouteTableIds"])) == (f"com.amazonaws.{REGION}.s3", 1)

    boto3.client("cloudformation").delete_stack(StackName=stack)
    assert iam.list_roles()["Roles"] == [] and iam.list_instance_profiles()["InstanceProfiles"] == []
    assert boto3.client("ecr").describe_repositories()["repositories"] == []
    assert ec2.describe_security_groups(Filters=named)["SecurityGroups"] == []
    for bucket in account.GIVEN.values():
        assert store.get_object(Bucket=bucket, Key="case")["Body"].read() == b"voxels"


@pytest.mark.parametrize("role", ["Node", "Head", "SageMaker"])
def test_a_role_reads_data_and_writes_runs(stack: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own reads, writes, swaps and lists pass as that role; the data cannot be changed, other buckets not seen."""
    mine = boto3.client("s3")
    mine.put_object(Bucket="the-data", Key="case", Body=b"voxels")
    mine.create_bucket(Bucket="other", CreateBucketConfiguration={"LocationConstraint": REGION})
    iam = boto3.client("iam")  # moto makes a stack's roles without their policies
    trust = {"Version": "2012-10-17", "Statement": []}
    arn = iam.create_role(RoleName="mine", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    policy = {"Version": "2012-10-17", "Statement": account.statements(role)}
    iam.put_role_policy(RoleName="mine", PolicyName="all", PolicyDocument=json.dumps(policy))
    keys = boto3.client("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
    for name, key in (("ACCESS_KEY_ID", "AccessKeyId"), ("SECRET_ACCESS_KEY", "SecretAccessKey")):
        monkeypatch.setenv(f"AWS_{name}", keys[key])
    monkeypatch.setenv("AWS_SESSION_TOKEN", keys["SessionToken"])
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys of its first use
    s3.client.cache_clear()
    client = boto3.client("s3")

    @set_initial_no_auth_action_count(0)
    def as_role() -> None:
        assert storage.read_bytes("s3://the-data/case") == b"voxels"
        assert set(storage.list_files("s3://the-data")) == {"case"}
        storage.write_bytes("s3://the-runs/run/checkpoint", b"weights")
        assert storage.swap("s3://the-runs/run/lease", None, b"mine")
        assert set(storage.list_files("s3://the-runs/run")) == {"checkpoint", "lease"}
        storage.delete("s3://the-runs/run/checkpoint")
        denied: list[Callable[[], Any]] = [
            lambda: client.put_object(Bucket="the-data", Key="case", Body=b""),
            lambda: client.delete_object(Bucket="the-data", Key="case"),
            lambda: client.delete_bucket(Bucket="the-runs"),
            lambda: client.list_objects_v2(Bucket="other"),
            lambda: client.list_buckets(),
        ]
        for call in denied:
            with pytest.raises(ClientError, match="AccessDenied"):
                call()

    as_role()


@pytest.mark.parametrize("name", ["Data", "Runs"])
def test_buckets_are_closed(name: str) -> None:
    """What moto does not know of: Block Public Access whole, TLS alone, no key but the bucket's, kept with its key."""
    found = account.resources()
    bucket = found[name]["Properties"]
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert {found[kept]["DeletionPolicy"] for kept in (name, f"{name}Policy", "Key")} == {"Retain"}
    told = {s["Sid"]: s for s in account.statements(f"{name}Policy")}
    own = f"arn:aws:s3:::{account.GIVEN[f'{name}Bucket']}"
    assert told["TlsOnly"]["Resource"] == [own, f"{own}/*"] and told["TlsOnly"]["Effect"] == "Deny"
    assert told["TlsOnly"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert told["NoOtherEncryptionThanTheBucketsKey"]["Effect"] == "Deny"


ANYWHERE = {
    "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "ssm:StartSession", "sagemaker:ListTrainingJobs",
    *(f"ssmmessages:{way}{channel}Channel" for way in ("Create", "Open") for channel in ("Control", "Data")),
    *(f"ec2:{do}NetworkInterface{what}" for do in ("Create", "Delete") for what in ("", "Permission")),
}  # fmt: skip
"""What AWS's own guides give on "*": these take no resource, or one whose name nobody knows before."""


@pytest.mark.parametrize("name", ["Head", "Node", "SageMaker", "DataAndRuns", "LauncherEc2", "LauncherSageMaker"])
def test_policies_grant_no_more_than_named_actions(name: str) -> None:
    """No wildcard action; "*" for nothing but looking, or what takes no resource; nobody deletes data or buckets."""
    for statement in account.statements(name):
        actions = statement["Action"]
        assert isinstance(actions, list) and not [action for action in actions if "*" in action]
        if statement["Resource"] == "*":
            assert not [a for a in actions if not re.search(":(Describe|Get)", a) and a not in ANYWHERE]
        assert not [a for a in actions if a.startswith("s3:Delete")] or "the-data" not in json.dumps(statement)
    if name.startswith("Launcher") or name == "DataAndRuns":
        document = account.resources()[name]["Properties"]["PolicyDocument"]
        assert len(json.dumps(document, separators=(",", ":"))) < 6144  # IAM's limit of a managed policy


@pytest.mark.parametrize(
    ("policy", "verbs", "condition"),
    [
        ("LauncherEc2", "Terminate", "aws:ResourceTag/ray-cluster-name"),
        ("LauncherEc2", "(Authorize|Revoke)SecurityGroup", "aws:ResourceTag/project"),
        ("LauncherSageMaker", "sagemaker:(Create|AddTags)", "aws:RequestTag/project"),
        ("LauncherSageMaker", "sagemaker:(Stop|Update)", "aws:ResourceTag/project"),
        ("Head", "Terminate", "aws:ResourceTag/ray-cluster-name"),
    ],
)
def test_what_changes_things_needs_our_tag(policy: str, verbs: str, condition: str) -> None:
    """A launcher touches no cluster, group or job of anybody else."""
    found = [s for s in account.statements(policy) if any(re.search(verbs, action) for action in s["Action"])]
    assert found and all(condition in json.dumps(s["Condition"]) for s in found)


def test_every_launched_instance_is_restricted() -> None:
    """RunInstances on instances: our cluster's name, our types; the head can give nodes no other profile."""
    for policy, wanted in (
        ("LauncherEc2", ["m6i.2xlarge"]),
        ("Head", ["m6i.4xlarge", "p3dn.24xlarge", "p4d.24xlarge"]),
    ):
        (found,) = [s for s in account.statements(policy) if s["Sid"].startswith("Launch")]
        types = found["Condition"]["StringEquals"]["ec2:InstanceType"]
        assert ([types] if isinstance(types, str) else types) == wanted
        assert found["Condition"]["StringLike"] == {"aws:RequestTag/ray-cluster-name": "raytrain-brats-*"}
