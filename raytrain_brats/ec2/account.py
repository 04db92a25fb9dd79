"""Complete a cluster's YAML from the AWS account: network, images, buckets, who may connect by SSH.

In: the YAML as Ray prepared it; its `provider` block, the environment's RAYTRAIN_BRATS_*; the AWS configuration.
Out: the YAML complete; made on the way, where missing: security group, placement group, Ray's token. Or UserError
with everything that is missing, each with its remedy, before anything was made.
"""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from raytrain_brats import config as recipes
from raytrain_brats.ec2 import network
from raytrain_brats.errors import UserError
from raytrain_brats.planning import prices
from raytrain_brats.ray_ext.internals import core

T = TypeVar("T")

QUOTAS = {
    ("p", "spot"): "L-7212CCBC",
    ("p", "on demand"): "L-417A185B",
    ("m", "spot"): "L-34B43A08",
    ("m", "on demand"): "L-1216C47A",
}
"""Service Quotas' codes, in vCPUs, by the family of the instance type (m: all standard ones)."""
ENV = "~/raytrain_brats.env"
"""File on the nodes by which every login shell, and so every job, knows the places of data and runs."""


class Missing(list[str]):
    """What is missing, a line each, for a message."""

    def try_(self, ask: Callable[..., T], *arguments: Any) -> T | None:
        """The answer; None when there is none, which is noted."""
        try:
            return ask(*arguments)
        except UserError as error:
            self.append(str(error))
        except (ClientError, BotoCoreError) as error:
            self.append(f"AWS: {error}")
        return None


def fill(config: dict[str, Any], path: str = "") -> None:
    """Complete a cluster's config in place; `path` is the YAML's. Raises UserError."""
    provider, missing = config["provider"], Missing()
    missing.try_(_mounts, config, path)
    values = {name: given(provider, name) for name in ("data", "runs", "recipe", "zone", "ssh_from", "fsx")}
    values["recipe"] = values["recipe"] or "segresnet"
    missing.try_(_recipe, values["recipe"])
    region = missing.try_(region_of, provider) or ""
    buckets = [missing.try_(bucket, provider, name, region, values["fsx"]) for name in ("data", "runs")]
    if buckets[0] and buckets[0] == buckets[1]:
        missing.append(
            f"data and runs are one bucket, {buckets[0]}; nodes may write and delete in that of the runs, so the data "
            f"need another: aws s3 mb s3://OTHER-BUCKET --region {region}; export RAYTRAIN_BRATS_RUNS=s3://OTHER-BUCKET/FOLDER"
        )
    ssh_from = missing.try_(network.ssh_range, values["ssh_from"])
    place = None
    session = boto3.Session(region_name=region or None)
    if region and missing.try_(_known, session):
        for name in sorted({name for name in buckets if name}):
            missing.try_(_bucket_is_here, session, name, region)
        missing.try_(_profiles, session, config)
        place = missing.try_(network.find, session.client("ec2"), config, values["zone"])
        for kind in config["available_node_types"].values():
            missing.try_(_image, session, kind["node_config"], place.head if place else None)
            missing.try_(_quota, session, kind, provider)
    if missing or not place or not ssh_from:
        lines = "\n".join(f"  {number}. {line}" for number, line in enumerate(missing, 1))
        raise UserError(f"not ready, and nothing was launched:\n{lines}\ndocs/ec2.md has the steps.")
    provider |= {"region": region, "availability_zone": place.zone}
    costs = given(provider, "dollars_per_hour") or prices.by_role(config["available_node_types"])
    provider["dollars_per_hour"] = costs  # what a run's cost is counted by, and `ask` asks about
    network.fill(session.client("ec2"), config, place, ssh_from)
    _places(config, values, region)
    if not (token := Path("~/.ray/auth_token").expanduser()).exists():
        core.make_token()
        token.chmod(0o600)


def given(provider: dict[str, Any], name: str) -> str:
    """The settings at the top of the YAML; where one is empty, RAYTRAIN_BRATS_<NAME>."""
    return str(provider.get(name) or os.environ.get(f"RAYTRAIN_BRATS_{name.upper()}", "")).strip()


def region_of(provider: dict[str, Any]) -> str:
    """Raises UserError when neither gives it."""
    of_zone = re.fullmatch(r"([a-z]{2}(?:-[a-z]+)+-\d)[a-z]", given(provider, "zone"))
    region = provider.get("region") or (of_zone and of_zone[1]) or os.environ.get("AWS_REGION")
    if not (region := region or boto3.Session().region_name):
        raise UserError("no AWS region is set: export AWS_DEFAULT_REGION=us-west-2")
    return str(region)


def bucket(provider: dict[str, Any], name: str, region: str, fsx: str) -> str:
    """Of `data` or `runs`; "" for data on FSx. Raises UserError when it is not given or no s3:// place."""
    uri, variable = given(provider, name), f"RAYTRAIN_BRATS_{name.upper()}"
    what = {"data": "the cases, which nodes only read", "runs": "prepared cases and runs"}[name]
    if not uri:
        raise UserError(
            f"where are {what}? export {variable}=s3://BUCKET/FOLDER, or fill in `{name}:` in the YAML; "
            f"aws s3 mb s3://BUCKET --region {region or 'REGION'} makes a bucket"
        )
    if name == "data" and fsx and uri.startswith("/fsx"):
        return ""
    if not (found := re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)(/.*)?", uri)):
        raise UserError(f"{uri!r} is no place that nodes see: export {variable}=s3://BUCKET/FOLDER ({what})")
    return found[1]


def _recipe(name: str) -> None:
    if name not in recipes.recipe_names():
        raise UserError(
            f"recipe {name!r} is not known: export RAYTRAIN_BRATS_RECIPE=segresnet (there are "
            f"{', '.join(recipes.recipe_names())}; a file of yours goes with each job: --working-dir . and --recipe)"
        )


def _known(session: Any) -> str:
    """The account's number. Raises UserError without valid credentials: every further request would fail alike."""
    try:
        return str(session.client("sts").get_caller_identity()["Account"])
    except (ClientError, BotoCoreError) as error:
        raise UserError(
            f"AWS does not accept your credentials ({error}): aws configure (or: aws sso login), then aws sts "
            "get-caller-identity. After that, `ray up` names what else is missing"
        ) from error


def _bucket_is_here(session: Any, name: str, region: str) -> None:
    try:
        there = session.client("s3").head_bucket(Bucket=name).get("BucketRegion", region)
    except ClientError as error:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        there = headers.get("x-amz-bucket-region", region)
        code = error.response["Error"]["Code"]
        if there == region:
            raise UserError(
                f"bucket {name}: S3 says {code}; correct the name, or make it: aws s3 mb s3://{name} --region {region}"
            ) from error
    if there != region:
        raise UserError(
            f"bucket {name} lies in {there}, the cluster in {region}; traffic between costs: "
            f"export AWS_DEFAULT_REGION={there}, or take a bucket in {region}"
        )


def _profiles(session: Any, config: dict[str, Any]) -> None:
    iam = session.client("iam")
    absent = []
    for name in sorted(
        {k["node_config"]["IamInstanceProfile"]["Name"] for k in config["available_node_types"].values()}
    ):
        try:
            iam.get_instance_profile(InstanceProfileName=name)
        except iam.exceptions.NoSuchEntityException:
            absent.append(name)
    if absent:
        raise UserError(
            f"no instance profile {' and '.join(absent)}: aws cloudformation deploy --stack-name raytrain-brats "
            "--template-file cluster/aws/account.yaml --capabilities CAPABILITY_NAMED_IAM --parameter-overrides "
            "DataBucket=DATA RunsBucket=RUNS (and MakeBuckets=false where both are there)"
        )


def _image(session: Any, node: dict[str, Any], head: dict[str, Any] | None) -> None:
    """`resolve:ssm:NAME`, as `aws ec2 run-instances` has it, becomes the image's id. A head that is up keeps its own:
    for a newer one Ray would end it, with what runs there."""
    name = node["ImageId"].removeprefix("resolve:ssm:")
    if name == node["ImageId"]:
        return
    ssm = session.client("ssm")
    try:
        found = (
            head["ImageId"] if head and "/canonical/" in name else ssm.get_parameter(Name=name)["Parameter"]["Value"]
        )
    except ssm.exceptions.ParameterNotFound as error:
        raise UserError(f"SSM has no parameter {name} in this region: put an image of yours into the YAML") from error
    node["ImageId"] = str(found)


def _quota(session: Any, kind: dict[str, Any], provider: dict[str, Any]) -> None:
    """Report a quota that allows not even one node; nothing where the account may not read quotas."""
    node, cpus = kind["node_config"], kind["resources"].get("CPU") or 0
    spot = "InstanceMarketOptions" in node and provider.get("on_demand_fallback") is not True
    market = "spot" if spot else "on demand"
    code = QUOTAS.get((node["InstanceType"][0], market))
    if not code or not kind.get("max_workers"):
        return
    try:
        quota = session.client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=code)
    except (ClientError, BotoCoreError):
        return
    if (allowed := quota["Quota"]["Value"]) < cpus:
        wanted = int(cpus * kind["max_workers"])
        raise UserError(
            f"your quota of {market} {node['InstanceType'][0].upper()} instances is {allowed:.0f} vCPUs, one "
            f"{node['InstanceType']} has {cpus:.0f}: aws service-quotas request-service-quota-increase --service-code "
            f"ec2 --quota-code {code} --desired-value {wanted} --region {session.region_name} (takes days)"
        )


def _mounts(config: dict[str, Any], path: str) -> None:
    """Files to copy, by absolute paths: a relative one is looked for beside the YAML's folder, in the checkout that
    this module is of, and here. The token is made later."""
    roots = [Path(path).resolve().parents[1]] if path else []
    roots += [Path(__file__).parents[2], Path.cwd()]
    absent = []
    for there, here in config["file_mounts"].items():
        wanted = Path(here).expanduser()
        found = next((p for p in (root / wanted for root in roots) if p.exists()), None)
        if found:
            config["file_mounts"][there] = str(found)
        elif wanted.name != "auth_token":
            absent.append(here)
    if absent:
        raise UserError(f"not found: {', '.join(absent)}; install the package from a checkout: pip install -e CHECKOUT")


def _places(config: dict[str, Any], values: dict[str, str], region: str) -> None:
    """What every job gets: a file for the nodes, kept beside the token."""
    runs = values["runs"].rstrip("/")
    facts = {
        "AWS_DEFAULT_REGION": region,
        "RAYTRAIN_BRATS_DATA": values["data"],
        "RAYTRAIN_BRATS_STORE": f"{runs}/store",
        "RAYTRAIN_BRATS_RUN_DIR": f"{runs}/first",
        "RAYTRAIN_BRATS_LOGS": f"{runs}/logs/{config['cluster_name']}",
        "RAYTRAIN_BRATS_RECIPE": values["recipe"],
        "RAYTRAIN_BRATS_FSX": values["fsx"],
        "RAYTRAIN_BRATS_DOLLARS_PER_HOUR": config["provider"]["dollars_per_hour"],
    }
    file = Path("~/.ray").expanduser() / f"{config['cluster_name']}.env"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in facts.items()))
    config["file_mounts"][ENV] = str(file)
