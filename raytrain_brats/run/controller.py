"""Callbacks: where a group starts, why it failed, a checkpoint before a resize. Runs in Ray Train's controller.

In: a `RunSpec`, the driver's lease token; states and failures of worker groups.
Out: the dataset of each worker group; generations, statuses, events in the run folder.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.train import UserCallback

from raytrain_brats import books, storage
from raytrain_brats.config import Config
from raytrain_brats.data import stream
from raytrain_brats.data.turns import StreamSpec
from raytrain_brats.errors import RunFailed
from raytrain_brats.ray_ext import cluster, elastic, roles
from raytrain_brats.ray_ext.internals import train as ray_train
from raytrain_brats.ray_ext.internals.train import ControllerCallback, PreemptingState, ResizingState, RunningState
from raytrain_brats.run import checkpoint_request, control, final_failures, journal
from raytrain_brats.run.checkpoint_request import HOLD, SAVE
from raytrain_brats.run.control import Generation
from raytrain_brats.run.spec import RunSpec


@dataclass(frozen=True)
class StreamFactory:
    """Called by Ray Train's controller before each worker group starts, one for each group of ranks; the first decides
    where the worker group starts."""

    spec: "ray.ObjectRef[RunSpec]"
    """By reference: the cases of a large set are many megabytes."""
    needed: cluster.Resources
    driver: str
    """Token of the driver's lease."""
    group: int

    def __call__(self) -> Any:
        spec: RunSpec = ray.get(self.spec)
        generation = self._begin(spec) if self.group == 0 else control.current(spec.run_dir)
        assert generation is not None, "the first factory is called first, and writes it"
        step = generation.samples_seen // spec.sampler.global_batch
        where = roles.readers(self.needed.on_train_nodes, local=not storage.is_s3(spec.source.root))
        tasks = self.needed.tasks and max(1, self.needed.tasks // stream.groups(self.needed.high))
        made = stream.dataset(
            StreamSpec(spec.sampler, spec.train_cases, spec.source, spec.patch_spec, step, self.needed.store_bytes),
            self.needed.cpus_per_task, tasks, where.first, where.then,
        )  # fmt: skip
        made.set_name(f"{elastic.tag(spec.run_dir)}-{self.group}")
        return made

    def _begin(self, spec: RunSpec) -> Generation:
        """Raises RunFailed when failures in a row have used up what the config allows."""
        generation = journal.begin_generation(spec.run_dir, self.driver)
        again = generation.failures_in_place
        if again > spec.config.run.max_failures_in_place:
            causes = [e["error"] for e in books.read_events(spec.run_dir) if e["event"] == "failure"]
            last = f"; the last failure: {causes[-1]}" if causes else ""
            raise RunFailed(f"{again} failures in a row at sample {generation.samples_seen}{last}")
        return generation


def factories(spec: "ray.ObjectRef[RunSpec]", needed: cluster.Resources, driver: str) -> dict[str, Any]:
    """The datasets of a run: as many as its largest worker group needs."""
    groups = range(stream.groups(needed.high))
    return {stream.group_name(group): StreamFactory(spec, needed, driver, group) for group in groups}


@dataclass(frozen=True)
class FailureLogger(UserCallback):
    """Records why workers failed, also when they were killed; stops the run where it would fail again."""

    run_dir: str
    driver: str
    config: Config
    _noted: dict[str, int] = field(default_factory=dict)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        try:
            self._note(worker_exceptions)
        except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here
            journal.warn(self.run_dir, f"cannot record a failure of workers: {error!r}")

    def _note(self, worker_exceptions: dict[int, Exception]) -> None:
        generation = control.current(self.run_dir)
        number = generation.number if generation else 0
        rank, error, stopped = self._first(worker_exceptions, generation)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        cause = next((line for line in reversed(lines) if "Error" in line or "Exception" in line), lines[0])[:500]
        if generation and generation.driver != self.driver:
            return  # another driver took the run over and fenced this group off: that is no failure
        if number == self._noted.get("generation"):
            return  # Ray calls this at each poll while a node is going
        last = {"last_row": at} if (at := journal.last_row_time(self.run_dir)) else {}
        journal.event(self.run_dir, "failure", generation=number, rank=rank, error=cause, **last)
        control.note(self.run_dir, number, failure=cause, **stopped)
        self._noted["generation"] = number

    def _first(self, failed: dict[int, Exception], generation: Generation | None) -> tuple[int, Exception, Any]:
        """(rank, error, changes of the group's status) of the failure that ends the run, else of the lowest rank: the
        others may have failed only because that one did."""
        trained = False
        if generation and generation.failures_in_place == 0:
            trained = generation.samples_seen > 0 or control.status(self.run_dir, generation.number).committed
        for rank, error in sorted(failed.items()):
            if told := final_failures.advice(error, self.config, trained):
                return rank, error, {"stopped": f"rank {rank}: {told}"}
        return *min(failed.items()), {}


@dataclass(frozen=True)
class CheckpointBeforeResize(ControllerCallback):
    """Requests a checkpoint before a group is resized or loses a node."""

    run_dir: str
    low: int
    """When a node is preempted and at least `low` workers fit on the others, the group restarts there at once; else,
    and with 0 (a group of fixed size), it uses the node until its deadline."""
    per_worker: dict[str, float]
    """Ray resources of one worker."""
    nodes: dict[str, str]
    """Labels of the nodes that workers may run on."""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(previous_state, RunningState) and isinstance(current_state, ResizingState | PreemptingState):
            began, resize = time.perf_counter(), isinstance(current_state, ResizingState)
            saved = leave = False
            try:
                leave = (
                    not resize and self.low > 0 and elastic.room_for_workers(self.per_worker, self.nodes) >= self.low
                )
                saved = checkpoint_request.request(self.run_dir, HOLD if resize or leave else SAVE)
            except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here, such as a full disk
                journal.warn(self.run_dir, f"no checkpoint before the resize or preemption: {error!r}")
            seconds = round(time.perf_counter() - began, 3)
            journal.event(self.run_dir, "resize" if resize else "preemption", saved=saved, seconds=seconds)
            if saved and leave:  # steps after this checkpoint would be lost at the node's deadline
                ray_train.end_preemption_wait_at(current_state, int(time.time() * 1000))
