"""Start (or go on with) a run: the driver's part.

In: a `Job`, a connected cluster.
Out: the finished run folder; or RunFailed with the cause.
"""

import signal
import threading
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from raytrain_brats import interrupt, storage
from raytrain_brats.data import stream
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint, cluster, control, gauges, ledger, recovery, roles, saving, spares
from raytrain_brats.run.job import Job, write_config
from raytrain_brats.run.lease import Lease
from raytrain_brats.run.progress import Progress
from raytrain_brats.run.saving import SaveFirst
from raytrain_brats.run.spilling import Spilling
from raytrain_brats.run.watch import Watch

LAST_WORDS_S = 3.0
"""How long Ray's call may take to notice that Ray was shut down; a thread it holds for ever holds no driver up."""


@dataclass(frozen=True)
class StreamFactory:
    """Called by Ray Train's controller before each worker group starts: decides where it goes on."""

    job: Job
    needed: cluster.Resources
    driver: str
    """Token of the driver's lease."""

    def __call__(self) -> Any:
        generation = ledger.begin_generation(self.job.run_dir, self.driver)
        job, again = self.job, generation.failures_in_place
        if again > job.config.run.max_failures_in_place:
            causes = [e["error"] for e in ledger.read_events(job.run_dir) if e["event"] == "failure"]
            last = f"; the last failure: {causes[-1]}" if causes else ""
            raise RunFailed(f"{again} failures in a row at sample {generation.samples_seen}{last}")
        made = stream.dataset(
            job.plan, job.train_cases, job.source, job.cutting, generation.samples_seen,
            self.needed.cpus_per_task, self.needed.tasks, roles.part("data").selector,
        )  # fmt: skip
        made.set_name(recovery.tag(job.run_dir))
        return made


@dataclass(frozen=True)
class FailureBook(UserCallback):
    """Lives in Ray Train's controller: notes why workers failed, also those that were killed."""

    run_dir: str
    driver: str

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        try:
            self._note(worker_exceptions)
        except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here
            print(f"a failure of workers is not in the books: {error!r}")

    def _note(self, worker_exceptions: dict[int, Exception]) -> None:
        generation = ledger.current(self.run_dir)
        rank, error = min(worker_exceptions.items())
        lines = str(error).strip().splitlines() or [type(error).__name__]
        cause = next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[0])[:500]
        if generation and generation.driver != self.driver:
            return  # fenced off by the driver that took the run over: none of its groups failed
        number = generation.number if generation else 0
        control.note(self.run_dir, number, failure=cause)
        last = {"last_row": at} if (at := recovery.last_row_time(self.run_dir)) else {}
        ledger.event(self.run_dir, "failure", generation=number, rank=rank, error=cause, **last)


def _work(arguments: dict[str, Any]) -> None:
    """What the workers run. Imported there: neither the driver nor Ray Train's controller needs MONAI for it."""
    from raytrain_brats.run.loop import train_worker

    train_worker(arguments)


def check(job: Job) -> cluster.Resources:
    """What the run will use of the connected cluster. Raises UserError when it cannot run there."""
    gauges.prices()
    needed = cluster.measure(job.config.run, job.plan.global_batch)
    cluster.check_shared({"run folder": job.run_dir}, {"data folder": job.source.root})
    return needed


def train(job: Job, needed: cluster.Resources, lease: Lease) -> None:
    """Train until the plan's end. Raises RunFailed when it had to give up; what was committed stays."""
    ledger.forgive(job.run_dir, lease.token)
    write_config(job)
    facts = {
        "workers": f"{needed.low}:{needed.high}",
        "route": job.route,
        "cases_train": len(job.train_cases),
        "cases_val": len(job.held_out_cases),
        "total_samples": job.plan.total,
        "dataset_identity": job.identity,
    }
    ledger.event(job.run_dir, "launch", **facts)
    if threading.current_thread() is threading.main_thread() and not interrupt.installed():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers: as Ctrl-C
    began, before = time.perf_counter(), ledger.current(job.run_dir)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with (
        Progress(job, lambda: lease.trouble),
        Watch(job.run_dir, run_id, job.config.run.hang_timeout_s),
        Spilling(job.run_dir),
    ):
        problem = _fit(job, needed, lease, run_id)
    found, _ = checkpoint.newest_valid(job.run_dir)
    if problem or found is None or found.samples_seen < job.plan.total:
        now = ledger.current(job.run_dir)
        begun = now and (before is None or now.number > before.number)  # else the last launch's group had stopped
        stopped = control.status(job.run_dir, now.number).stopped if now and begun else ""
        reason = stopped or problem or lease.trouble or "the workers stopped early"
        raise RunFailed(f"{reason}; see {storage.join(job.run_dir, 'events.jsonl')}")
    ledger.event(job.run_dir, "finish", samples_seen=job.plan.total, seconds=round(time.perf_counter() - began, 1))


def _fit(job: Job, needed: cluster.Resources, lease: Lease, run_id: str) -> str:
    """Run Ray Train to its end; why it failed, or an empty string."""
    resources = {"CPU": needed.cpus} | ({"GPU": needed.gpus} if needed.gpus else {})
    workers: Any = needed.high if needed.low == needed.high else (needed.low, needed.high)
    place, filesystem = storage.for_ray(storage.join(job.run_dir, "ray"))
    ready, train_nodes = spares.Spares(job.run_dir), roles.part("train").selector
    callbacks: list[Any] = [
        FailureBook(job.run_dir, lease.token),
        recovery.FreshNodes(job.run_dir, ready),
        SaveFirst(job.run_dir, needed.low if needed.low < needed.high else 0, resources, train_nodes),
        ready,
    ]
    recovery.free_reservations(job.run_dir)
    roles.keep_apart(roles.part("data"))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "run_id": run_id, "prefetch": needed.prefetch},
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=job.config.run.resize_check_s,  # type: ignore[call-arg]
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
            worker_runtime_env={"env_vars": spares.WORKER},  # type: ignore[call-arg]
            callbacks=callbacks,
        ),
        datasets={"train": StreamFactory(job, needed, lease.token)},
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
        _save(job.run_dir)
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
    interrupt.allow(saving.TIMEOUT_S + interrupt.GRACE_S)
    if saving.training(run_dir):
        print("saving a checkpoint ...", flush=True)
        try:
            saved = saving.ask(run_dir, saving.HOLD)
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
