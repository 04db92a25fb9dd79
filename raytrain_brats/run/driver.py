"""Start or resume a run. Runs in the driver.

In: a `RunSpec`, a connected cluster.
Out: the finished run folder; or RunFailed with the cause.
"""

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raytrain_brats import interrupt, provenance, storage
from raytrain_brats.data import stream
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster, elastic, roles, warm_pool
from raytrain_brats.ray_ext.internals.train import DataParallelTrainer, LocalTrainer
from raytrain_brats.ray_ext.process_group import ProcessGroup
from raytrain_brats.run import checkpoint, checkpoint_request, control, gains, journal
from raytrain_brats.run.controller import CheckpointBeforeResize, FailureLogger, factories
from raytrain_brats.run.hang_detector import HangDetector
from raytrain_brats.run.lease import Lease
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import RunSpec, write_config
from raytrain_brats.schedule import learning_rate

SHUTDOWN_S = 3.0
"""How long `fit` may take to return after Ray was shut down; if it never does, the driver ends all the same."""


def _work(arguments: dict[str, Any]) -> None:
    """What the workers run. Imported there, so that neither the driver nor Ray Train's controller imports MONAI."""
    from raytrain_brats.run.worker import train_worker

    train_worker(arguments)


def check(spec: RunSpec) -> cluster.Resources:
    """The resources that the run will use of the connected cluster. Raises UserError when it cannot run there."""
    needed = cluster.measure(spec.config.run, spec.sampler.global_batch)
    cluster.check_shared({"run folder": spec.run_dir}, {"data folder": spec.source.root})
    return needed


def train(spec: RunSpec, needed: cluster.Resources, lease: Lease) -> None:
    """Train to the sampler's last position. Raises RunFailed when the run stopped before; its checkpoints stay."""
    journal.take_over(spec.run_dir, lease.token)
    if spec.shorter:  # before config.yaml, which decides: an event too many harms nobody
        journal.event(spec.run_dir, "lengthened", **longer(spec))
    write_config(spec)
    facts: dict[str, Any] = {"workers": f"{needed.low}:{needed.high}", "route": spec.route}
    facts |= {"cases_train": len(spec.train_cases), "cases_val": len(spec.held_out_cases)}
    facts |= {"total_samples": spec.sampler.total, "dataset_identity": spec.dataset_identity}
    facts |= {"recipe": spec.recipe, "seed": spec.config.train.seed} | provenance.of_launch()
    facts |= {"initial": asdict(spec.initial)} if spec.initial else {}
    journal.event(spec.run_dir, "launch", **facts)
    began, before = time.perf_counter(), control.current(spec.run_dir)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with _sigterm_as_interrupt(), HangDetector(spec.run_dir, run_id, spec.config.run.hang_timeout_s):
        problem = _fit(spec, needed, lease, run_id)
    found, _ = checkpoint.newest_valid(spec.run_dir)
    ended = found and end_of(spec, found.samples_seen)
    if problem or found is None or not ended:
        now = control.current(spec.run_dir)
        begun = now and (before is None or now.number > before.number)  # else it is a group of an earlier launch
        stopped = control.status(spec.run_dir, now.number).stopped if now and begun else ""
        reason = stopped or problem or lease.trouble or "the workers stopped early"
        raise RunFailed(f"{reason}; see {RunDir(spec.run_dir).events}")
    seconds = round(time.perf_counter() - began, 1)
    journal.event(spec.run_dir, "finish", samples_seen=found.samples_seen, seconds=seconds, reason=ended)


def longer(spec: RunSpec) -> dict[str, Any]:
    """What changes with this start for a run that is lengthened: epochs, samples, the learning rate where it stands."""
    found, _ = checkpoint.newest_valid(spec.run_dir)
    seen, options = found.samples_seen if found else 0, spec.config.train.optimiser
    before = replace(spec.sampler, epochs=spec.shorter, earlier=spec.sampler.earlier[:-1])
    rates = [round(learning_rate(options, seen, total), 9) for total in (before.total, spec.sampler.total)]
    about: dict[str, Any] = {"epochs": [spec.shorter, spec.sampler.epochs], "samples_seen": seen}
    return about | {"total_samples": [before.total, spec.sampler.total], "learning_rate": rates}


def end_of(spec: RunSpec, samples_seen: int) -> str:
    """Why a run that stands at this sample is over, in words; "" when it goes on. Raises OSError."""
    if samples_seen >= spec.sampler.total:
        return f"all {spec.sampler.total:,} samples"
    patience = spec.config.validate_.patience_samples
    return gains.stalled(gains.history(spec.run_dir), samples_seen, patience) if patience else ""


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM, from `ray job stop` and schedulers, saves as Ctrl-C does. Afterwards it is the caller's again, who may
    have a handler of his own."""
    if interrupt.installed() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fit(spec: RunSpec, needed: cluster.Resources, lease: Lease, run_id: str) -> str:
    """Run Ray Train to its end; the reason why it failed, or "". Raises RunFailed when the lease was lost."""
    elastic.free_reservations(elastic.tag(spec.run_dir))
    where = roles.readers(needed.on_train_nodes, local=not storage.is_s3(spec.source.root))
    roles.keep_apart(roles.part("data"), where, needed.workers)
    trainer = _trainer(spec, needed, lease.token, run_id)
    # In a thread, so that we handle Ctrl-C: on the main thread Ray's own handler ends the process without a message.
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
            wait([fitting], SHUTDOWN_S)
    error = fitting.exception()
    if isinstance(error, ray.train.TrainingFailedError):
        return " ".join(str(error).split()).removeprefix("Training failed due to controller error: ")[:800]
    if error:
        raise error
    return ""


def _trainer(spec: RunSpec, needed: cluster.Resources, token: str, run_id: str) -> DataParallelTrainer:
    """Ray Train's trainer. It sends every rank and the controller references, never the cases of a large set."""
    resources = {"CPU": needed.cpus} | ({"GPU": needed.gpus} if needed.gpus else {})
    workers: Any = needed.high if needed.low == needed.high else (needed.low, needed.high)
    place, filesystem = storage.for_ray(RunDir(spec.run_dir).ray)
    train_nodes = roles.part("train").selector
    pool = warm_pool.WarmPool(partial(checkpoint_request.training, spec.run_dir))
    callbacks: list[Any] = [
        FailureLogger(spec.run_dir, token, spec.config),
        elastic.LiveNodesPolicy(elastic.tag(spec.run_dir), pool),
        CheckpointBeforeResize(spec.run_dir, needed.low if needed.low < needed.high else 0, resources, train_nodes),
        pool,
    ]
    whole = ray.put(spec)
    trainer = LocalTrainer if cluster.started_here() else DataParallelTrainer
    return trainer(
        _work,
        train_loop_config={
            "spec": ray.put(spec.for_ranks()),
            "cases": ray.put(spec.train_cases),
            "run_id": run_id,
            "prefetch": needed.prefetch,
        },
        backend_config=ProcessGroup(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=spec.config.run.resize_check_s,  # type: ignore[call-arg]
            use_gpu=bool(needed.gpus),
            resources_per_worker=resources,
            label_selector=train_nodes or None,
        ),
        # A new name for every launch: Ray's own registry of checkpoints may lose some in a crash, and Ray does not
        # start when its file is truncated, so the registry is not used.
        run_config=RunConfig(
            name=run_id,
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": warm_pool.WORKER},  # type: ignore[call-arg]
            callbacks=callbacks,
        ),
        datasets=factories(whole, needed, token),
        dataset_config=stream.OrderedSplit(),
    )


def _save(run_dir: str) -> None:
    """On Ctrl-C: request a checkpoint of the group that trains, if one does; say what came of it, and how to go on."""
    interrupt.allow(checkpoint_request.TIMEOUT_S + interrupt.GRACE_S)
    outcome, onwards = "not saved now", "goes on from the newest checkpoint"
    try:
        if checkpoint_request.training(run_dir):
            interrupt.allow(checkpoint_request.patience_s(run_dir) + interrupt.GRACE_S)
            _tell("saving a checkpoint ...")
            if checkpoint_request.request(run_dir, checkpoint_request.HOLD):
                outcome = "saved"
        else:
            outcome = "nothing to save, as no worker group trains"
        if not checkpoint.committed(run_dir):
            onwards = "begins anew, without a checkpoint"
    except (OSError, UserError, RunFailed) as error:
        _tell(f"cannot ask for a checkpoint: {error}")
    _tell(f"{outcome}: the same command {onwards}")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C ends `| tee`, too: who reads no more must not keep us from saving
        print(text, flush=True)


def _settle(fitting: "Future[Any]", trainer: DataParallelTrainer) -> None:
    try:
        fitting.set_result(trainer.fit())
    except BaseException as error:  # noqa: BLE001 - raised again in `_fit`
        fitting.set_exception(error)
