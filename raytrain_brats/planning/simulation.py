"""A run, simulated event by event: what the closed form leaves out. Runs in the driver; needs SimPy.

In: a `Demand`, a seed. Out: a `Simulated`: paces, waiting, times with kills and joins.

Two levels, as a run has 10^7 events and its pace settles within thousands. Fine: read tasks on CPUs, S3, network,
coordinators, an object store that holds tasks back, feeds, steps of all ranks together. Coarse: the run at that pace,
with checkpoints, validations, kills and joins.
"""

import heapq
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from raytrain_brats.errors import UserError
from raytrain_brats.planning.closed_form import row_cases, task_rows
from raytrain_brats.planning.demand import PREFETCH, RARER, SEGMENT_TASKS, Demand

SEGMENTS, MOST_ROWS, RUNS = 4, 16_000, 32
"""Executions of the stream of which the pace is taken; runs with different kills of which the mean is."""
LEAST_STEPS, FILLED = 16, 4
"""So many times the tasks that run at once, as they begin together and end together: the pace settles after that."""
OTHERS_S = 0.05
"""How often the processes that are always there take a CPU."""
SPREAD = 0.2
"""Of the CPU time of a case, as cases differ in size: a uniform share more or less."""


@dataclass(frozen=True)
class Simulated:
    first_samples_per_s: float
    samples_per_s: float
    data_wait: float
    """Of the first epoch's steps."""
    seconds: float
    """Of the whole run, the mean of RUNS."""
    low_s: float
    high_s: float
    """The shortest and the longest of them."""
    interruptions: float
    seed: int


def simulate(d: Demand, seed: int) -> Simulated:
    """Raises UserError without SimPy."""
    cold, wait = pace(d, True, seed)
    warm = cold if d.residency == "stream" else pace(d, False, seed)[0]
    runs = [run(d, cold, warm, seed + number) for number in range(RUNS if d.interruptions_per_s else 1)]
    times = [seconds for seconds, _ in runs]
    return Simulated(cold, warm, wait, mean(times), min(times), max(times), mean(kills for _, kills in runs), seed)


def pace(d: Demand, cold: bool, seed: int, rows: int = MOST_ROWS) -> tuple[float, float]:
    """(samples a second, share of the steps' time spent waiting for data) over some executions of the stream."""
    if not cold:
        return d.global_batch / d.step_s, 0.0
    if d.residency == "stream":
        size = task_rows(d.ranks)
        rows = min(rows, SEGMENTS * SEGMENT_TASKS * size * d.coordinators)
        rows = max(rows, int(FILLED * size * d.cpus / d.cpus_per_task))
        most = rows * row_cases(d.ranks) * d.patches_per_case
    else:
        most = max(int(d.cold_epochs * d.epoch_samples), LEAST_STEPS * d.global_batch)
    samples = min(d.samples, most)
    return _Stream(d, samples, seed).run()


class _Stream:
    """Everything between S3 and the steps, for some samples."""

    def __init__(self, d: Demand, samples: int, seed: int) -> None:
        try:
            import simpy
        except ImportError as error:
            raise UserError("--simulate needs SimPy: pip install 'raytrain_brats[plan]'") from error
        self.d, self.draw, self.simpy = d, random.Random(seed), simpy
        self.cases = row_cases(d.ranks) if d.residency == "stream" else 1
        self.row_samples = self.cases * d.patches_per_case
        self.steps = max(2, samples // d.global_batch)
        self.rows = -(-self.steps * d.global_batch // (d.ranks * self.row_samples))
        """Of each rank."""
        self.env: Any = simpy.Environment()
        self.cpus: Any = simpy.Resource(self.env, max(1, int(d.cpus)))
        self.tasks: Any = simpy.Resource(self.env, max(1, int(d.cpus / d.cpus_per_task)))
        self.s3, self.task_net, self.deal = (_Pipe(self.env) for _ in range(3))
        self.nodes = [_Pipe(self.env) for _ in range(d.nodes)]
        self.feeds = [simpy.Store(self.env, PREFETCH) for _ in range(d.ranks)]
        room = max(2 * d.ranks, int(d.store_mb / max(1e-9, d.case_sent_mb * self.cases)))
        self.store: Any = simpy.Container(self.env, room, room)

    def run(self) -> tuple[float, float]:
        if self.d.residency == "stream":
            for group in range(self.d.coordinators):
                ranks = [r for r in range(self.d.ranks) if r * self.d.coordinators // self.d.ranks == group]
                self.env.process(self.execution(ranks))
        else:
            for rank in range(self.d.ranks):
                self.env.process(self.alone(rank))
        if self.d.other_cpus:
            self.env.process(self.others())
        trained = self.env.process(self.train())
        samples_per_s, waited = self.env.run(trained)
        return float(samples_per_s), float(waited)

    def execution(self, ranks: list[int]) -> Iterator[Any]:
        """One dataset: its tasks in order, as the object store has room; rows are dealt in order, too."""
        dealer, size = _Pipe(self.env), task_rows(self.d.ranks)
        order = [rank for _ in range(self.rows) for rank in ranks]
        for begin in range(0, len(order), SEGMENT_TASKS * size):
            segment, dealt = order[begin : begin + SEGMENT_TASKS * size], None
            for first in range(0, len(segment), size):
                chosen = segment[first : first + size]
                yield self.store.get(len(chosen))
                made = [self.env.event() for _ in chosen]
                task = self.tasks.request()
                yield task
                self.env.process(self.task(task, made))
                for rank, row in zip(chosen, made, strict=True):
                    dealt = self.env.process(self.hand_over(rank, row, dealt, dealer))
            yield dealt
            yield self.env.timeout(self.d.pause_s)

    def task(self, task: Any, rows: list[Any]) -> Iterator[Any]:
        for row in rows:
            for _ in range(self.cases):
                yield from self.read()
                with self.cpus.request() as cpu:
                    yield cpu
                    yield self.env.timeout(self.d.case_cpu_s * self.draw.uniform(1 - SPREAD, 1 + SPREAD))
            row.succeed()
        self.tasks.release(task)

    def read(self, network: "_Pipe | None" = None) -> Iterator[Any]:
        """A case from S3: the slowest of requests, network and the stream itself."""
        speed = self.d.train_node_mb_s if network else self.d.task_node_mb_s
        ends = self.s3.take(self.d.case_gets / self.d.gets_per_s)
        ends = max(ends, (network or self.task_net).take(self.d.case_read_mb / speed))
        yield self.env.timeout(max(ends - self.env.now, self.d.case_wait_s))

    def hand_over(self, rank: int, row: Any, before: Any, dealer: "_Pipe") -> Iterator[Any]:
        """In order through the coordinator, over the network, into the rank's feed; then its place is free."""
        yield row
        if before:
            yield before
        work = self.d.deal_s * self.row_samples
        yield self.env.timeout(dealer.take(work) - self.env.now)
        self.env.process(self.travel(rank))

    def travel(self, rank: int) -> Iterator[Any]:
        mb = self.cases * self.d.case_sent_mb * (1 - self.d.on_train / self.d.nodes)
        node = self.nodes[rank * self.d.nodes // self.d.ranks]
        arrival = node.take(
            mb / self.d.train_node_mb_s + self.cases * self.d.case_read_mb * self.d.on_train / self.d.train_node_mb_s
        )
        yield self.env.timeout(arrival - self.env.now)
        yield self.feeds[rank].put(1)
        self.store.put(1)

    def alone(self, rank: int) -> Iterator[Any]:
        """A rank that reads the cases itself, as they will stay."""
        for _ in range(self.rows):
            yield from self.read(self.nodes[rank * self.d.nodes // self.d.ranks])
            yield self.env.timeout(self.d.alone_case_s * self.draw.uniform(1 - SPREAD, 1 + SPREAD))
            yield self.feeds[rank].put(1)

    def train(self) -> Generator[Any, Any, tuple[float, float]]:
        """The second half counts of a stream: what lies between is filled by then. Cases that stay are read once."""
        self.held = [0.0] * self.d.ranks
        wanted, waited, began = self.d.global_batch / self.d.ranks, 0.0, 0.0
        half = self.steps // 2 if self.d.residency == "stream" else 0
        for step in range(self.steps):
            asked = self.env.now
            self.held = [held - wanted for held in self.held]
            late = [self.env.process(self.collect(rank)) for rank, held in enumerate(self.held) if held < -1e-6]
            if late:
                yield self.env.all_of(late)
            waited += (self.env.now - asked) * (step >= half)
            if self.d.step_cpu_s:
                yield self.env.all_of([self.env.process(self.on_cpu(wanted)) for _ in range(self.d.ranks)])
                yield self.env.timeout(self.d.reduce_s)
            else:
                yield self.env.timeout(self.d.step_s)
            began = self.env.now if step == half - 1 else began
        spent = self.env.now - began
        return (self.steps - half) * self.d.global_batch / spent, waited / spent

    def collect(self, rank: int) -> Iterator[Any]:
        while self.held[rank] < -1e-6:
            yield self.feeds[rank].get()
            self.held[rank] += self.row_samples

    def on_cpu(self, samples: float) -> Iterator[Any]:
        for _ in range(max(1, round(samples))):
            with self.cpus.request() as cpu:
                yield cpu
                yield self.env.timeout(self.d.step_cpu_s * samples / max(1, round(samples)))

    def others(self) -> Iterator[Any]:
        while True:
            yield self.env.timeout(OTHERS_S * (1 - self.d.other_cpus))
            with self.cpus.request() as cpu:
                yield cpu
                yield self.env.timeout(OTHERS_S * self.d.other_cpus)


class _Pipe:
    """One after the other at full speed: to whom it says when his part is done."""

    def __init__(self, env: Any) -> None:
        self._env, self._free = env, 0.0

    def take(self, seconds: float) -> float:
        self._free = max(self._free, float(self._env.now)) + seconds
        return self._free


def run(d: Demand, cold: float, warm: float, seed: int, kills_s: Sequence[float] = ()) -> tuple[float, int]:
    """(seconds, kills) of a whole run at these paces: without notice, so that what is not saved is done again.

    Kills are drawn by the spot market's rate; `kills_s`: they come at these seconds, each of one node.
    """
    draw, now, kills = random.Random(seed), d.start_s + d.prepare_s, 0
    changes = [(at, -1) for at in sorted(kills_s)]
    alive, done, saved, cold_samples = d.nodes, 0.0, 0.0, d.cold_epochs * d.epoch_samples
    if d.interruptions_per_s:
        for _ in range(d.nodes):
            heapq.heappush(changes, (now + draw.expovariate(d.interruptions_per_s), -1))
    save_at, validate_after, due = now + d.checkpoint_s, 0.0, (every := d.validate_samples or d.epoch_samples)
    while done < d.samples:
        if changes and changes[0][0] <= now:
            _, change = heapq.heappop(changes)
            alive += change
            if change < 0:
                kills, done, now = kills + 1, saved, now + d.recover_s
                heapq.heappush(changes, (now + d.replacement_s, 1))
            else:
                saved, now = done, now + d.join_s
                if d.interruptions_per_s:
                    heapq.heappush(changes, (now + draw.expovariate(d.interruptions_per_s), -1))
            save_at = now + d.checkpoint_s
            continue
        speed = (cold if done < cold_samples else warm) * alive / d.nodes
        if not speed:
            now = changes[0][0]
            continue
        target = min(due, d.samples, cold_samples if done < cold_samples else d.samples)
        next_change = changes[0][0] if changes else float("inf")
        until = max(now, min(now + (target - done) / speed, save_at, next_change))
        done, now = done + (until - now) * speed, until
        if now >= save_at:
            saved, now = done, now + d.checkpoint_stall_s
            save_at = now + d.checkpoint_s
        if done >= due - 1e-3 or done >= d.samples - 1e-3:
            done, due = min(due, d.samples), due + every
            if d.validation_s and (d.validate_samples or now >= validate_after or done >= d.samples):
                now += d.validation_s
                validate_after = now + RARER * d.validation_s
        elif target - done < 1e-3:
            done = target
    return now, kills
