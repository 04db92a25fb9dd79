"""What a checkpoint takes from training: how long another thread of Python waits, and how long the step does.

In: 250 MB of tensors, or a network on a GPU, saved by the package's own `Saver`. Out: milliseconds, findings.
"""

import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raytrain_brats.learn.convolution_check import now
from raytrain_brats.run.control import Generation
from raytrain_brats.run.feed import batch_of
from raytrain_brats.run.saver import Save, Saver
from raytrain_brats.run.spec import RunSpec
from scripts.gpu_parts.setting import Setting, config, patches, train_step

BYTES, TENSORS, SAVES = 250_000_000, 50, 5
STEP_S = 0.25
"""Of a step that computes while the tensors are copied."""
MOST_WAIT_MS, MOST_STALL_MS = 30.0, 5.0


class _Books:
    """Rows of a run that has none."""

    def flush(self, samples_seen: int) -> None: ...
    def check(self) -> None: ...
    def merge(self) -> None: ...


@contextmanager
def _saver(folder: str) -> Iterator[Saver]:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(RunSpec)}
    sampler = type("Sampler", (), {"total": -1})()
    spec = RunSpec(**fields | {"config": config("segresnet", 16), "run_dir": folder, "sampler": sampler})
    books: Any = _Books()
    saver = Saver(spec, Generation(1), books, lambda **_: None, lambda _: None)
    yield saver
    saver.close()


class _Watch:
    """A thread of Python that asks for its turn every millisecond, and remembers how long it waited."""

    def __init__(self) -> None:
        self.longest_s, self._stopped = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        before = time.perf_counter()
        while not self._stopped.is_set():
            time.sleep(0.001)
            after = time.perf_counter()
            self.longest_s = max(self.longest_s, after - before - 0.001)
            before = after

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def _compute(seconds: float) -> None:
    """What a step does on a CPU: kernels that leave Python alone."""
    factor, until = torch.randn(256, 256), time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(factor, factor)


def cpu_memory(setting: Setting) -> None:
    """Tensors in the CPU's memory: saves beside steps that compute. Medians, since the machine may have other work;
    the wait of the same thread beside the same steps without a save is told with them."""
    each = BYTES // TENSORS // 4
    tensors = {f"network/{number}": torch.randn(each) for number in range(TENSORS)}
    waits, stalls, idle = [], [], []
    with tempfile.TemporaryDirectory() as folder, _saver(folder) as saver:
        for number in range(SAVES + 1):  # the first writes to fresh memory
            with _Watch() as alone:
                _compute(STEP_S)
            with _Watch() as watch:
                stalls.append(_stall(saver, tensors, number))
                saver.wait()
            waits.append(1e3 * watch.longest_s)
            idle.append(1e3 * alone.longest_s)
    longest, stall, without = (round(statistics.median(found[1:]), 2) for found in (waits, stalls, idle))
    setting.found |= {"longest_wait_ms": longest, "step_stall_ms": stall, "longest_wait_without_save_ms": without}
    wrong = f"a thread waits for more than {MOST_WAIT_MS:.0f} ms" if longest - without > MOST_WAIT_MS else ""
    wrong = wrong or (f"a step stalls for more than {MOST_STALL_MS:.0f} ms" if stall > MOST_STALL_MS else "")
    facts = {"longest_wait_ms": longest, "without_a_save_ms": without, "step_stall_ms": stall}
    facts |= {"first_stall_ms": round(stalls[0], 2)}
    setting.findings.tell(f"{SAVES} saves of {BYTES // 10**6} MB", wrong, **facts)


def _stall(saver: Saver, tensors: dict[str, torch.Tensor], number: int) -> float:
    """ms that a step waits for a save that begins right before it: for its start, and before the weights change."""
    began = time.perf_counter()
    saver.save(Save(number + 1, tensors, {}, {}, {}))
    spent = time.perf_counter() - began
    _compute(STEP_S)
    began = time.perf_counter()
    saver.copied()
    return 1e3 * (spent + time.perf_counter() - began)


def beside_steps(setting: Setting) -> None:
    """A network on the device, saved again and again beside its steps: the host's part, and the slowest step."""
    if not setting.gpu:
        setting.findings.tell("saves beside steps on a GPU", left_out="on a GPU only")
        return
    step = train_step(config("segresnet", setting.edge, 1), setting.device)
    batch = batch_of(patches(0, setting.edge, 1, setting.device), 0, setting.device)

    def timed(act: Callable[[], Any]) -> float:
        began = now(setting.device)
        act()
        return 1e3 * (now(setting.device) - began)

    for _ in range(5):
        step.step(batch, 0)
    alone = statistics.median(timed(lambda: step.step(batch, 0)) for _ in range(20))
    with tempfile.TemporaryDirectory() as folder, _saver(folder) as saver, _Watch() as watch:
        step.before_update = saver.copied
        starts, beside, held = [], [], True
        for number in range(SAVES):
            tensors, _ = step.state()
            right = {name: tensor.cpu() for name, tensor in tensors.items()} if number == 0 else {}
            starts.append(timed(lambda: saver.save(Save(number + 1, tensors, {}, {}, {}))))  # noqa: B023
            while True:
                beside.append(timed(lambda: step.step(batch, 0)))
                if not saver.busy():
                    break
            saver.wait()
            held = held and (not right or _saved_equals(folder, right))
    facts = {"start_ms": round(statistics.median(starts), 2), "step_ms": round(alone, 2)}
    facts |= {"beside_ms": round(statistics.median(beside), 2), "slowest_ms": round(max(beside), 2)}
    facts |= {"longest_wait_ms": round(1e3 * watch.longest_s, 2), "steps": len(beside)}
    wrong = "" if held else "what was saved is not the state before the next step"
    setting.findings.tell("saves beside steps on a GPU", wrong, **facts)


def _saved_equals(folder: str, right: dict[str, torch.Tensor]) -> bool:
    from raytrain_brats.run import checkpoint

    (name, _, _), *_ = checkpoint.committed(folder)
    tensors, _ = checkpoint.load(folder, name)
    return all(torch.equal(tensors[key], right[key]) for key in right)
