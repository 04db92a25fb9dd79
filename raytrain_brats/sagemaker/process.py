"""Prepare as a SageMaker Processing job: `raytrain-brats sagemaker process --role ARN --image URI --data URI ...`.

In: what `prepare` takes, CPU instances, an execution role, a container image.
Out: a processing job that fills the store, over all its instances by Ray; with `--dry-run` its CreateProcessingJob
request as JSON. Its price on standard error.
"""

import sys
from dataclasses import dataclass
from typing import Any

from raytrain_brats import config
from raytrain_brats.cli import Changes, Uri, default, entry
from raytrain_brats.errors import UserError
from raytrain_brats.sagemaker import rules, service
from raytrain_brats.sagemaker.service import JobOptions


@dataclass(frozen=True)
class Args(JobOptions):
    """Preprocess all cases once as a SageMaker Processing job; a second one does only what is missing."""

    data: Uri = ""
    """s3:// folder in MSD or BraTS layout."""
    store: Uri = ""
    """s3:// place of the store."""
    recipe: str = "segresnet"
    """Recipe whose `preprocess` section counts."""
    set: Changes = ()
    """Change a setting of the recipe: key=value; may be given several times."""
    instances: str = "ml.m5.4xlarge:1"
    """TYPE:NUMBER; the instances form one Ray cluster and share the cases."""


def work(args: Args) -> None:
    service.check(args)
    data = service.s3_place(default(args.data, "DATA"), "data")
    store = service.s3_place(default(args.store, "STORE"), "store")
    if args.recipe.endswith((".yaml", ".yml")):
        raise UserError("a recipe file does not reach a processing job; name a recipe, and change it with --set")
    if args.network_isolation:
        raise UserError("--network-isolation: `prepare` reads and writes S3 itself; use --subnets and a VPC endpoint")
    config.load(args.recipe, args.set)
    instances = service.instances(args.instances, "instances", "ProcessingInstanceType")
    rules.check_volume_key([instances], args.kms_key, "leave it out; the store is encrypted as its bucket says")
    arguments = ["prepare", "--data", data, "--store", store, "--recipe", args.recipe]
    arguments += [f"--set={change}" for change in args.set]
    service.show(service.cost([instances]))
    service.send(
        args,
        service.bucket_of(store),
        "CreateProcessingJob",
        lambda session: _start(args, instances, arguments, session),
    )


def _start(args: Args, instances: tuple[str, int], arguments: list[str], session: Any) -> None:
    from sagemaker.core.network import NetworkConfig
    from sagemaker.core.processing import Processor

    processor = Processor(
        sagemaker_session=session,
        role=args.role,
        image_uri=args.image,
        instance_type=instances[0],
        instance_count=instances[1],
        volume_size_in_gb=args.volume_gb,
        volume_kms_key=args.kms_key or None,
        max_runtime_in_seconds=int(3600 * args.max_hours),
        base_job_name=args.name,
        env=service.environment(args),
        tags=[{"Key": key, "Value": value} for key, value in service.tags(args).items()],
        network_config=NetworkConfig(
            encrypt_inter_container_traffic=args.encrypt_traffic,
            subnets=list(args.subnets) or None,
            security_group_ids=list(args.security_groups) or None,
        ),
    )
    processor.run(arguments=arguments, wait=False, logs=False)
    name = processor.latest_job.processing_job_name
    print(f"{name} is sent; aws sagemaker describe-processing-job --processing-job-name {name}")
    if args.wait:
        processor.latest_job.wait(logs=True)


def main(name: str, argv: list[str] | None = None) -> int:
    return entry(Args, work, f"sagemaker {name}", argv)


if __name__ == "__main__":
    sys.exit(main("process"))
