"""Ask a running worker group for a checkpoint now: before a resize, on a preemption notice, on Ctrl-C.

In: a request, put into the run folder by Ray Train's controller or by the driver.
Out: all ranks save at the same step; whoever asked knows when it is committed.

Ray ends the workers of a resize amid their step and asks nobody; without this all since the last checkpoint is redone.
"""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState, RunningState
from ray.train.v2._internal.execution.preemption import _get_draining_nodes

from raytrain_brats import storage
from raytrain_brats.ray_ext import roles
from raytrain_brats.run import control, journal

TIMEOUT_S = 30.0
HOLD_S = 60.0
SAVE, HOLD = 1, 2
"""What ranks agree on: save and train on; save, then wait to be ended."""


def training(run_dir: str) -> journal.Generation | None:
    """The worker group that has come to a step; None while none trains."""
    generation = journal.current(run_dir)
    return generation if generation and control.status(run_dir, generation.number).trains else None


def ask(run_dir: str, what: int) -> bool:
    """Ask for a checkpoint and wait until it is committed; False when no group trains, or none came in time.

    Controller and driver may ask at once: whoever comes second asks for no less, and an answer to the later request
    answers the earlier. A group that holds already is at its checkpoint.
    """
    if (generation := training(run_dir)) is None:
        return False
    asked = time.time()
    for _ in range(20):  # as often as another is quicker
        before = _content(run_dir)
        other = _parsed(before)
        if other.get("generation") == generation.number and other["time"] > asked - TIMEOUT_S:
            what = max(what, other["what"])
        request = {"generation": generation.number, "what": what, "time": asked}
        if storage.swap(_request(run_dir), before, json.dumps(request).encode()):
            break
    else:
        return False
    while time.time() < asked + TIMEOUT_S and journal.current(run_dir) == generation:
        now = control.status(run_dir, generation.number)
        if now.holds_since > asked - HOLD_S or (now.answered >= asked and what == SAVE):
            return True
        time.sleep(0.2)
    return False


@dataclass(frozen=True)
class CheckpointBeforeResize(ControllerCallback):
    """Lives in Ray Train's controller: has a group saved before it is resized or its node goes."""

    run_dir: str
    low: int
    """A group that can be resized goes on with fewer workers at once when a node is to go, if so many find room on the
    nodes that stay; else, and with 0, it uses the node to its end."""
    per_worker: dict[str, float]
    """What a worker needs of a node, as Ray counts."""
    nodes: dict[str, str]
    """Labels of the nodes that workers may run on."""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(previous_state, RunningState) and isinstance(current_state, ResizingState | PreemptingState):
            began, resize = time.perf_counter(), isinstance(current_state, ResizingState)
            saved = leave = False
            try:
                leave = not resize and self.low > 0 and _room(self.per_worker, self.nodes) >= self.low
                saved = ask(self.run_dir, HOLD if resize or leave else SAVE)
            except Exception as error:  # noqa: BLE001 - Ray would end the run for an error here; a full disk, say
                print(f"no checkpoint could be asked for: {error!r}")
            seconds = round(time.perf_counter() - began, 3)
            journal.event(self.run_dir, "resize" if resize else "preemption", saved=saved, seconds=seconds)
            if saved and leave and isinstance(current_state, PreemptingState):
                # Ray would wait for the node's deadline; what is trained until then would be lost with it
                info = current_state.preemption_info
                current_state.preemption_info = replace(info, deadline_ms=int(time.time() * 1000))


def _room(per_worker: dict[str, float], labels: dict[str, str]) -> int:
    """How many workers the nodes with these labels have room for that are up and stay."""
    leaving = set(_get_draining_nodes() or {})
    nodes = [node for node in roles.alive() if roles.has(node, labels)]
    staying = [node["Resources"] for node in nodes if node["NodeID"] not in leaving]
    return sum(
        int(min(there.get(name, 0.0) // amount for name, amount in per_worker.items() if amount)) for there in staying
    )


class RequestPoller:
    """Rank 0 listens for requests, in a thread: storage that is slow or away must not hold a step up."""

    def __init__(self, run_dir: str, generation: int) -> None:
        self._run_dir, self._generation = run_dir, generation
        self._every_s = 5.0 if storage.is_s3(run_dir) else 0.5
        self._request: dict[str, Any] = {}
        self._closed = threading.Event()
        self.answered = 0.0
        """Time of the last request heard: its name."""
        threading.Thread(target=self._listen, name="ear", daemon=True).start()

    def poll(self) -> int:
        """SAVE or HOLD when there is a new request to this worker group, else 0."""
        request = self._request
        if request.get("generation") != self._generation or request["time"] == self.answered:
            return 0
        self.answered = request["time"]
        return int(request["what"])

    def close(self) -> None:
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.wait(self._every_s):
            with contextlib.suppress(OSError):  # storage may be away for a while
                self._request = _parsed(_content(self._run_dir)) or self._request


def _request(run_dir: str) -> str:
    return storage.join(run_dir, "save-request.json")


def _content(run_dir: str) -> bytes | None:
    try:
        return storage.read_bytes(_request(run_dir))
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> dict[str, Any]:
    """A request; empty when there is none."""
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(content or b"{}")
        return found
    return {}
