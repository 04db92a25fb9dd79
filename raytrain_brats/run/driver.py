"""Start (or go on with) a run. Runs in the driver.

In: a `RunSpec`, a connected cluster.
Out: the finished run folder; or RunFailed with the cause.
"""

import signal
import threading
import time
import uuid
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raytrain_brats import interrupt, storage
from raytrain_brats.data import stream
from raytrain_brats.errors import RunFailed
from raytrain_brats.ray_ext import cluster, elastic, roles, warm_pool
from raytrain_brats.run import checkpoint, checkpoint_request, control, gauges, journal
from raytrain_brats.run.controller import CheckpointBeforeResize, FailureLogger, StreamFactory
from raytrain_brats.run.hang_detector import HangDetector
from raytrain_brats.run.lease import Lease
from raytrain_brats.run.progress import Progress
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import RunSpec, write_config
from raytrain_brats.run.spilling import Spilling

LAST_WORDS_S = 3.0
"""How long Ray's call may take to notice that Ray was shut down; a thread it holds for ever holds no driver up."""


def _work(arguments: dict[str, Any]) -> None:
    """What the workers run. Imported there: neither the driver nor Ray Train's controller needs MONAI for it."""
    from raytrain_brats.run.worker import train_worker

    train_worker(arguments)


def check(spec: RunSpec) -> cluster.Resources:
    """What the run will use of the connected cluster. Raises UserError when it cannot run there."""
    gauges.prices()
    needed = cluster.measure(spec.config.run, spec.sampler.global_batch)
    cluster.check_shared({"run folder": spec.run_dir}, {"data folder": spec.source.root})
    return needed


def train(spec: RunSpec, needed: cluster.Resources, lease: Lease) -> None:
    """Train until the plan's end. Raises RunFailed when it had to give up; what was committed stays."""
    journal.take_over(spec.run_dir, lease.token)
    write_config(spec)
    facts = {
        "workers": f"{needed.low}:{needed.high}",
        "route": spec.route,
        "cases_train": len(spec.train_cases),
        "cases_val": len(spec.held_out_cases),
        "total_samples": spec.sampler.total,
        "dataset_identity": spec.dataset_identity,
    }
    journal.event(spec.run_dir, "launch", **facts)
    if threading.current_thread() is threading.main_thread() and not interrupt.installed():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers: as Ctrl-C
    began, before = time.perf_counter(), journal.current(spec.run_dir)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with (
        Progress(spec, lambda: lease.trouble),
        HangDetector(spec.run_dir, run_id, spec.config.run.hang_timeout_s),
        Spilling(spec.run_dir),
    ):
        problem = _fit(spec, needed, lease, run_id)
    found, _ = checkpoint.newest_valid(spec.run_dir)
    if problem or found is None or found.samples_seen < spec.sampler.total:
        now = journal.current(spec.run_dir)
        begun = now and (before is None or now.number > before.number)  # else the last launch's group had stopped
        stopped = control.status(spec.run_dir, now.number).stopped if now and begun else ""
        reason = stopped or problem or lease.trouble or "the workers stopped early"
        raise RunFailed(f"{reason}; see {RunDir(spec.run_dir).events}")
    journal.event(
        spec.run_dir, "finish", samples_seen=spec.sampler.total, seconds=round(time.perf_counter() - began, 1)
    )


def _fit(spec: RunSpec, needed: cluster.Resources, lease: Lease, run_id: str) -> str:
    """Run Ray Train to its end; why it failed, or an empty string."""
    resources = {"CPU": needed.cpus} | ({"GPU": needed.gpus} if needed.gpus else {})
    workers: Any = needed.high if needed.low == needed.high else (needed.low, needed.high)
    place, filesystem = storage.for_ray(RunDir(spec.run_dir).ray)
    tag, train_nodes = elastic.tag(spec.run_dir), roles.part("train").selector
    pool = warm_pool.WarmPool(partial(checkpoint_request.is_training, spec.run_dir))
    callbacks: list[Any] = [
        FailureLogger(spec.run_dir, lease.token),
        elastic.LiveNodesPolicy(tag, pool),
        CheckpointBeforeResize(spec.run_dir, needed.low if needed.low < needed.high else 0, resources, train_nodes),
        pool,
    ]
    elastic.free_reservations(tag)
    roles.keep_apart(roles.part("data"))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"spec": spec, "run_id": run_id, "prefetch": needed.prefetch},
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=spec.config.run.resize_check_s,  # type: ignore[call-arg]
            use_gpu=bool(needed.gpus),
            resources_per_worker=resources,
            label_selector=train_nodes or None,
        ),
        # A name of its own for every launch: Ray's registry of checkpoints loses some around a crash and does not
        # start from a torn file, so it is neither told nor asked.
        run_config=RunConfig(
            name=run_id,
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": warm_pool.WORKER},  # type: ignore[call-arg]
            callbacks=callbacks,
        ),
        datasets={"train": StreamFactory(spec, needed, lease.token)},
        dataset_config=stream.OrderedSplit(),
    )
    # In a thread, so that Ctrl-C reaches us: on the main thread Ray's own handler ends the process without a word.
    fitting: Future[Any] = Future()
    threading.Thread(target=_settle, args=(fitting, trainer), name="fit", daemon=True).start()
    try:
        while not fitting.done():
            time.sleep(0.2)
            if lease.lost:
                raise RunFailed(f"the run was taken over by {lease.lost}; this driver ends")
    except KeyboardInterrupt:
        _save(spec.run_dir)
        raise
    finally:
        interrupt.allow(interrupt.GRACE_S)
        if not fitting.done():
            ray.shutdown()  # ends the workers, also on a second Ctrl-C
            wait([fitting], LAST_WORDS_S)
    error = fitting.exception()
    if isinstance(error, ray.train.TrainingFailedError):
        return " ".join(str(error).split()).removeprefix("Training failed due to controller error: ")[:800]
    if error:
        raise error
    return ""


def _save(run_dir: str) -> None:
    """On Ctrl-C: have the group that trains save, if one does."""
    interrupt.allow(checkpoint_request.TIMEOUT_S + interrupt.GRACE_S)
    if checkpoint_request.training(run_dir):
        print("saving a checkpoint ...", flush=True)
        try:
            saved = checkpoint_request.request(run_dir, checkpoint_request.HOLD)
        except OSError as error:
            print(f"cannot ask for one: {error}", flush=True)
            saved = False
        told = "saved" if saved else "not saved now"
        print(f"{told}: the same command goes on from the newest checkpoint", flush=True)


def _settle(fitting: "Future[Any]", trainer: TorchTrainer) -> None:
    try:
        fitting.set_result(trainer.fit())
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        fitting.set_exception(error)
