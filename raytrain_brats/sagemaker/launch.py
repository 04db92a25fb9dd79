"""Train as a SageMaker training job: `raytrain-brats sagemaker launch --role ARN --image URI --data URI --run-dir URI`.

In: what `train` takes, instances, an execution role, a container image.
Out: a training job; with `--dry-run` its CreateTrainingJob request as JSON. Its price on standard error.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytrain_brats import config
from raytrain_brats.cli import Changes, Uri, Workers, cases_from, default, entry
from raytrain_brats.errors import UserError
from raytrain_brats.sagemaker import host, rules, service
from raytrain_brats.sagemaker.rules import Instances
from raytrain_brats.sagemaker.service import CHECKPOINTS, LOCAL, JobOptions

METRICS = {
    "train:loss": r"\| loss ([0-9.]+)",
    "train:samples_per_second": r"\| ([0-9.]+) samples/s",
    "train:data_wait_percent": r"\| ([0-9]+)% waiting for data",
    "train:workers": r"\| ([0-9]+) workers?",
    "validation:dice_wt": r"Dice WT ([0-9.]+)",
    "validation:dice_tc": r"Dice WT \S+ TC ([0-9.]+)",
    "validation:dice_et": r"Dice WT \S+ TC \S+ ET ([0-9.]+)",
}
"""Curves in the console, found in the lines of `monitoring.live_line.whole`."""

# AWS's images start the job by a bash that is PID 1 and passes no signal on: SIGTERM would never reach the run.
# `T` is one that comes before the run is there.
COMMAND = (
    """T=; P=; trap 'if [ "$P" ]; then kill -TERM $P; else T=1; fi' TERM; """
    'python3 -u -m raytrain_brats.sagemaker host train & P=$!; [ -z "$T" ] || kill -TERM $P; R=0; wait $P || R=$?; '
    "while kill -0 $P 2>/dev/null; do R=0; wait $P || R=$?; done; exit $R"
)
TUNNEL = (
    "aws ssm start-session --target sagemaker-training-job:{name}_algo-1 "
    "--document-name AWS-StartPortForwardingSession "
    f"--parameters portNumber={host.DASHBOARD_PORT},localPortNumber={host.DASHBOARD_PORT}"
)
RETRIES = 3
"""How often the service restarts the job after an internal failure; the run continues from its checkpoint."""


@dataclass(frozen=True)
class Args(JobOptions):
    """Train as a SageMaker training job. The run folder is on S3; the same command again goes on with it."""

    data: Uri = ""
    """s3:// folder in MSD or BraTS layout: preprocessed while training, on all instances."""
    store: Uri = ""
    """s3:// store made by `prepare` or `sagemaker process`: read instead of --data."""
    run_dir: Uri = ""
    """s3:// place of the run."""
    recipe: str = "segresnet"
    """Name of a recipe, or a YAML file."""
    workers: Workers = ""
    """Training workers; by default one a GPU."""
    set: Changes = ()
    """Change a setting of the recipe: key=value; may be given several times."""
    train_instances: str = "ml.g5.xlarge:1"
    """TYPE:NUMBER of the instances that train."""
    data_instances: str = ""
    """TYPE:NUMBER of CPU instances beside them, which only read and preprocess."""
    spot: bool = False
    """Spare capacity at a lower price; when it is taken away the job waits and goes on."""
    max_wait_hours: float | None = None
    """With --spot: the job ends after so many hours of waiting and running; by default twice --max-hours."""
    keep_alive_minutes: int = 0
    """Keep the instances for the next job this long, at full cost; not with --spot or --data-instances."""
    output_kms_key: str = ""
    """Encrypts what SageMaker itself writes to S3 and not the disks; with --kms-key, instead of that key."""
    remote_debug: bool = False
    """Let AWS Systems Manager into the containers, and start Ray's dashboard on the head's loopback."""
    input: Literal["direct", "file", "fastfile"] = "direct"
    """How cases come from S3: read by the run itself; copied to each instance first; or through SageMaker's mount."""
    fsx: str = ""
    """FSx for Lustre instead of S3: ID:/MOUNT/PATH; --data or --store is then a folder below it. Needs a VPC."""
    ship_code: bool = False
    """--image is one of AWS's own PyTorch images: bring this code along and install its requirements at each start."""


def work(args: Args) -> None:
    request = Request.of(args)
    service.show(service.cost(request.groups, args.spot))
    for remark in filter(None, (request.idle, rules.about(request.groups[-1][0]))):
        service.show(remark)
    service.send(
        args, service.bucket_of(request.run_dir), "CreateTrainingJob", lambda session: _train(request, session)
    )


@dataclass(frozen=True)
class Request:
    """A launch whose options were checked."""

    args: Args
    run_dir: str
    kind: str
    """`data` or `store`."""
    source: str
    """Where the cases are, on S3 or below the file system."""
    groups: Instances
    hyperparameters: dict[str, str]
    idle: str
    """About GPUs that no worker would use; empty when there are none."""

    @staticmethod
    def of(args: Args) -> "Request":
        """Raises UserError for all that can be checked without AWS, also the recipe, before anything is paid for."""
        service.check(args)
        given_run, (data, store) = default(args.run_dir, "RUN_DIR"), cases_from(args.data, args.store)
        run_dir = service.s3_place(given_run, "run-dir")
        if not data and not store:
            raise UserError("no cases given; name an s3:// place with --data or --store")
        groups = [service.instances(args.data_instances, "data-instances")] if args.data_instances else []
        groups.append(service.instances(args.train_instances, "train-instances"))
        kind, source = ("store", store) if store else ("data", data)
        mounted = f"{LOCAL}/input/data/{kind}"
        if args.fsx:
            if not args.subnets or args.fsx.partition(":")[2][:1] != "/":
                raise UserError("--fsx ID:/MOUNT/PATH also needs --subnets and --security-groups of its VPC")
            place = f"{mounted}/{source.strip('/')}"
        else:
            source = service.s3_place(source, kind)
            place = source if args.input == "direct" else mounted
        if args.network_isolation and (sum(n for _, n in groups) > 1 or (args.input == "direct" and not args.fsx)):
            # The run folder is then the synchronised /opt/ml/checkpoints, which several hosts do not share.
            raise UserError("--network-isolation: S3 cannot be reached; use one instance and --input file or fastfile")
        if args.spot and args.max_wait_hours is not None and args.max_wait_hours < args.max_hours:
            raise UserError("--max-wait-hours counts waiting and running; give no less than --max-hours")
        if args.network_isolation and args.remote_debug:
            raise UserError("--remote-debug: Systems Manager cannot reach a container under --network-isolation")
        if args.max_hours > rules.MAX_HOURS:
            raise UserError(f"--max-hours {args.max_hours:g}: AWS ends a training job after {rules.MAX_HOURS} hours")
        rules.check_warm_pool(args.keep_alive_minutes, args.spot, groups)
        rules.check_volume_key(groups, args.kms_key, "give the key as --output-kms-key, for the output alone")
        changes = args.set + ((f"run.workers={args.workers!r}",) if args.workers else ())
        idle = rules.check_workers(config.load(args.recipe, changes), *groups[-1])
        recipe = args.recipe
        if recipe.endswith((".yaml", ".yml")):  # no such file in the container; JSON is YAML on one line
            recipe = json.dumps(config.read_yaml(Path(recipe).read_text()))
        values = {
            kind: place,
            "run_dir": CHECKPOINTS if args.network_isolation else run_dir,
            "recipe": recipe,
            "workers": args.workers,
            "set": json.dumps(args.set) if args.set else "",
        }
        return Request(args, run_dir, kind, source, groups, {key: v for key, v in values.items() if v}, idle)


def _train(request: Request, session: Any) -> None:
    from sagemaker.core.training import configs
    from sagemaker.train import ModelTrainer

    args, own = request.args, f"{request.run_dir}/sagemaker"
    isolated = configs.CheckpointConfig(s3_uri=request.run_dir, local_path=CHECKPOINTS)
    # The run itself commits its checkpoints to S3: the service copies files as they come, in no order, from every host.
    # What it copies are the hosts' logs, which an interruption would take.
    direct = configs.CheckpointConfig(s3_uri=f"{own}/hosts", local_path=CHECKPOINTS)
    wait = {}
    if args.spot:
        hours = 2 * args.max_hours if args.max_wait_hours is None else args.max_wait_hours
        wait = {"max_wait_time_in_seconds": int(3600 * hours)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ModelTrainer(
            sagemaker_session=session,
            role=args.role,
            base_job_name=args.name,
            training_image=args.image,
            source_code=_code(Path(folder)) if args.ship_code else None,
            hyperparameters=request.hyperparameters,
            environment=service.environment(args) | ({host.DASHBOARD: "1"} if args.remote_debug else {}),
            compute=_compute(request),
            networking=_networking(args),
            stopping_condition=configs.StoppingCondition(max_runtime_in_seconds=int(3600 * args.max_hours), **wait),
            input_data_config=_channels(request),
            checkpoint_config=isolated if args.network_isolation else direct,
            output_data_config=configs.OutputDataConfig(
                s3_output_path=f"{own}/output",
                compression_type="NONE",
                kms_key_id=args.output_kms_key or args.kms_key or None,
            ),
            tags=[configs.Tag(key=key, value=value) for key, value in service.tags(args).items()],
        )
        trainer.with_metric_definitions([configs.MetricDefinition(name=n, regex=r) for n, r in METRICS.items()])
        trainer.with_retry_strategy(configs.RetryStrategy(maximum_retry_attempts=RETRIES))
        if args.remote_debug:
            trainer.with_remote_debug_config(configs.RemoteDebugConfig(enable_remote_debug=True))
        trainer.train(wait=False, logs=False)
        job = trainer._latest_training_job
    name = job.training_job_name
    print(f"{name} is sent; aws sagemaker describe-training-job --training-job-name {name}")
    if args.remote_debug:
        print(f"the dashboard, once it trains: {TUNNEL.format(name=name)}")
        print(f"it asks for a token: aws s3 cp {own}/ray_token -")
    if args.wait:
        job.wait(logs=True)


def _compute(request: Request) -> Any:
    from sagemaker.core.training import configs

    args = request.args
    shared: dict[str, Any] = {
        "volume_size_in_gb": args.volume_gb,
        "volume_kms_key_id": args.kms_key or None,
        "enable_managed_spot_training": args.spot,
        "keep_alive_period_in_seconds": 60 * args.keep_alive_minutes or None,
    }
    if len(request.groups) == 1:
        ((kind, number),) = request.groups
        return configs.Compute(instance_type=kind, instance_count=number, **shared)
    groups = [
        configs.InstanceGroup(instance_group_name=name, instance_type=kind, instance_count=number)
        for name, (kind, number) in zip(("data", "train"), request.groups, strict=True)
    ]
    return configs.Compute(instance_groups=groups, **shared)


def _networking(args: JobOptions) -> Any:
    from sagemaker.core.training import configs

    vpc = {"subnets": list(args.subnets), "security_group_ids": list(args.security_groups)} if args.subnets else {}
    return configs.Networking(
        enable_network_isolation=args.network_isolation,
        enable_inter_container_traffic_encryption=args.encrypt_traffic,
        **vpc,
    )


def _channels(request: Request) -> Any:
    """The cases' channel, to all groups as any of them may read; none when the run reads S3 itself."""
    from sagemaker.core.training import configs

    args = request.args
    if args.fsx:
        file_system, _, path = args.fsx.partition(":")
        source: Any = configs.FileSystemDataSource(
            file_system_id=file_system,
            file_system_type="FSxLustre",
            file_system_access_mode="ro",
            directory_path=path,
        )
        return [configs.InputData(channel_name=request.kind, data_source=source)]
    if args.input == "direct":
        return None
    groups = {"instance_group_names": ["data", "train"]} if len(request.groups) > 1 else {}
    source = configs.S3DataSource(
        s3_data_type="S3Prefix",
        s3_uri=f"{request.source}/",
        s3_data_distribution_type="FullyReplicated",
        **groups,
    )
    mode = {"file": "File", "fastfile": "FastFile"}[args.input]
    place = configs.DataSource(s3_data_source=source)
    return [configs.Channel(channel_name=request.kind, data_source=place, input_mode=mode)]


def _code(folder: Path) -> Any:
    """This package and its requirements, to be unpacked beside AWS's own PyTorch."""
    from sagemaker.core.training import configs

    package = Path(config.__file__).parent
    requirements = package.parent / "cluster" / "sagemaker" / "requirements.txt"
    if not requirements.exists():
        raise UserError(f"--ship-code needs a checkout of the repository: {requirements} is not there")
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(requirements, folder)
    return configs.SourceCode(source_dir=str(folder), requirements=requirements.name, command=COMMAND)


def main(name: str, argv: list[str] | None = None) -> int:
    return entry(Args, work, f"sagemaker {name}", argv)


if __name__ == "__main__":
    sys.exit(main("launch"))
