"""Start (or go on with) a run: the driver's part.

In: a `RunSpec`, a connected cluster.
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
from raytrain_brats.ray_ext import cluster, elastic, roles, warm_pool
from raytrain_brats.run import checkpoint, control, gauges, journal, saving
from raytrain_brats.run.hang_detector import HangDetector
from raytrain_brats.run.lease import Lease
from raytrain_brats.run.progress import Progress
from raytrain_brats.run.saving import CheckpointBeforeResize
from raytrain_brats.run.spec import RunSpec, write_config
from raytrain_brats.run.spilling import Spilling

LAST_WORDS_S = 3.0
"""How long Ray's call may take to notice that Ray was shut down; a thread it holds for ever holds no driver up."""


@dataclass(frozen=True)
class StreamFactory:
    """Called by Ray Train's controller before each worker group starts: decides where it goes on."""

    spec: RunSpec
    needed: cluster.Resources
    driver: str
    """Token of the driver's lease."""

    def __call__(self) -> Any:
        generation = journal.begin_generation(self.spec.run_dir, self.driver)
        spec, again = self.spec, generation.failures_in_place
        if again > spec.config.run.max_failures_in_place:
            causes = [e["error"] for e in journal.read_events(spec.run_dir) if e["event"] == "failure"]
            last = f"; the last failure: {causes[-1]}" if causes else ""
            raise RunFailed(f"{again} failures in a row at sample {generation.samples_seen}{last}")
        made = stream.dataset(
            spec.sampler, spec.train_cases, spec.source, spec.patch_spec, generation.samples_seen,
            self.needed.cpus_per_task, self.needed.tasks, roles.part("data").selector,
        )  # fmt: skip
        made.set_name(elastic.tag(spec.run_dir))
        return made


@dataclass(frozen=True)
class FailureLogger(UserCallback):
    """Lives in Ray Train's controller: notes why workers failed, also those that were killed."""

    run_dir: str
    driver: str

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        try:
            self._note(worker_exceptions)
        except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here
            print(f"a failure of workers is not in the books: {error!r}")

    def _note(self, worker_exceptions: dict[int, Exception]) -> None:
        generation = journal.current(self.run_dir)
        rank, error = min(worker_exceptions.items())
        lines = str(error).strip().splitlines() or [type(error).__name__]
        cause = next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[0])[:500]
        if generation and generation.driver != self.driver:
            return  # fenced off by the driver that took the run over: none of its groups failed
        number = generation.number if generation else 0
        control.note(self.run_dir, number, failure=cause)
        last = {"last_row": at} if (at := elastic.last_row_time(self.run_dir)) else {}
        journal.event(self.run_dir, "failure", generation=number, rank=rank, error=cause, **last)


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
        raise RunFailed(f"{reason}; see {storage.join(spec.run_dir, 'events.jsonl')}")
    journal.event(
        spec.run_dir, "finish", samples_seen=spec.sampler.total, seconds=round(time.perf_counter() - began, 1)
    )


def _fit(spec: RunSpec, needed: cluster.Resources, lease: Lease, run_id: str) -> str:
    """Run Ray Train to its end; why it failed, or an empty string."""
    resources = {"CPU": needed.cpus} | ({"GPU": needed.gpus} if needed.gpus else {})
    workers: Any = needed.high if needed.low == needed.high else (needed.low, needed.high)
    place, filesystem = storage.for_ray(storage.join(spec.run_dir, "ray"))
    ready, train_nodes = warm_pool.WarmPool(spec.run_dir), roles.part("train").selector
    callbacks: list[Any] = [
        FailureLogger(spec.run_dir, lease.token),
        elastic.LiveNodesPolicy(spec.run_dir, ready),
        CheckpointBeforeResize(spec.run_dir, needed.low if needed.low < needed.high else 0, resources, train_nodes),
        ready,
    ]
    elastic.free_reservations(spec.run_dir)
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
