"""Map over a cluster's GPUs, each of them one process's own. Runs in the driver; the functions, in actors and tasks.

In: a function, items; what reads them.
Out: results in order.

A task is no way to do it: Ray's processes run many, and one that set CUDA up on its first GPU stays there when a later
task is given another, so that two share one and the other idles. What needs no GPU is done ahead, by tasks.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray

T = TypeVar("T")
R = TypeVar("R")
TRIES = 3
"""Of an item whose process ends; then it may be the item that ends it."""
AHEAD = 2
"""Items read ahead of each GPU: what has been read lies in the object store."""


@dataclass(frozen=True)
class Ahead:
    """What makes of an item that which the function takes; by tasks on nodes of these labels, or in the function's own
    process."""

    read: Callable[[Any], Any]
    labels: dict[str, str]
    in_tasks: bool


class _Mapper:
    """One process with one GPU."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def ready(self) -> None:
        pass

    def call(self, item: Any) -> Any:
        return self._function(item)


@dataclass
class _Work(Generic[T]):
    place: int
    item: T
    value: Any
    """What the function gets: the item, or a reference to what was read."""
    tries: int = 1


def gpu_map(
    function: Callable[[Any], R],
    items: Iterable[T],
    gpus: int,
    labels: dict[str, str],
    ahead: Ahead | None = None,
    failed: Callable[[T, Exception], R] | None = None,
) -> Iterator[R]:
    """`map` over so many GPUs of nodes with these labels; who is ready gets the next item, so GPUs that others use are
    only waited for when there is no other.

    Raises the function's own exception, and RayActorError when an item's process ended TRIES times, or none starts;
    with `failed` its result stands for such an item's instead, and the next is given to a new process: CUDA does not
    recover from most errors.
    """
    if ahead and not ahead.in_tasks:
        mapping = _Mapping(after(ahead.read, function), items, gpus, labels, None, failed)
    else:
        mapping = _Mapping(function, items, gpus, labels, ahead, failed)
    try:
        yield from mapping.results(gpus)
    finally:
        mapping.end()


class _Mapping(Generic[T, R]):
    def __init__(
        self,
        function: Callable[[Any], R],
        items: Iterable[T],
        gpus: int,
        labels: dict[str, str],
        ahead: Ahead | None,
        failed: Callable[[T, Exception], R] | None,
    ) -> None:
        options: Any = {"num_cpus": 1, "num_gpus": 1} | ({"label_selector": labels} if labels else {})
        self._actor: Any = ray.remote(**options)(_Mapper)
        self._task: Any = ahead and _reader(ahead)
        self._function, self._failed, self._gpus = function, failed, gpus
        self._todo = enumerate(items)
        self._reading: dict[Any, _Work[T]] = {}
        self._ready: list[_Work[T]] = []
        self._busy: dict[Any, tuple[Any, _Work[T] | None]] = {}
        self._idle: list[Any] = []
        self._done: dict[int, R] = {}
        self._taken = self._stillborn = 0
        self._exhausted = False

    def results(self, gpus: int) -> Iterator[R]:
        for _ in range(gpus):
            self._add()
        following = 0
        while True:
            while following in self._done:
                yield self._done.pop(following)
                following += 1
            self._take()
            while self._idle and self._ready:
                work, actor = self._ready.pop(0), self._idle.pop()
                self._busy[actor.call.remote(work.value)] = actor, work
            if self._exhausted and following == self._taken:
                return
            (reference,), _ = ray.wait([*self._busy, *self._reading], num_returns=1)
            if reference in self._reading:
                self._has_read(reference)
            else:
                self._has_answered(reference)

    def end(self) -> None:
        for actor in [*self._idle, *(actor for actor, _ in self._busy.values())]:
            with contextlib.suppress(Exception):  # Ray may be gone
                ray.kill(actor)

    def _add(self) -> None:
        actor = self._actor.remote(self._function)
        self._busy[actor.ready.remote()] = actor, None

    def _take(self) -> None:
        """As many items as there is room for."""
        room = AHEAD * self._gpus if self._task else len(self._idle)
        while len(self._ready) + len(self._reading) < room:
            if (following := next(self._todo, None)) is None:
                self._exhausted = True
                return
            self._taken += 1
            place, item = following
            if self._task:
                problem, value = self._task.remote(item)
                self._reading[problem] = _Work(place, item, value)
            else:
                self._ready.append(_Work(place, item, item))

    def _has_read(self, reference: Any) -> None:
        work = self._reading.pop(reference)
        try:
            problem = ray.get(reference)
        except ray.exceptions.RayError as error:  # the end of its process, again and again
            problem = error
        if problem is None:
            self._ready.append(work)
            self._ready.sort(key=lambda each: each.place)
        else:
            self._fail(work, problem)

    def _has_answered(self, reference: Any) -> None:
        actor, work = self._busy.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayActorError as error:  # with its node, mostly
            self._stillborn = 0 if work else self._stillborn + 1
            if self._stillborn > TRIES * self._gpus:
                raise
            if work and work.tries == TRIES:
                self._fail(work, error)
            elif work:
                work.tries += 1
                self._ready.insert(0, work)
            self._add()
        except ray.exceptions.RayError as error:  # its own, or what was read is lost
            if work is None:
                raise
            self._fail(work, error)
            ray.kill(actor)
            self._add()
        else:
            self._idle.append(actor)
            if work:
                self._done[work.place] = result

    def _fail(self, work: _Work[T], error: Exception) -> None:
        if self._failed is None:
            raise error
        self._done[work.place] = self._failed(work.item, getattr(error, "cause", None) or error)


def after(read: Callable[[Any], Any], function: Callable[[Any], R]) -> Callable[[Any], R]:
    return lambda item: function(read(item))


def _reader(ahead: Ahead) -> Any:
    """A task that gives (the exception or None, what was read)."""
    read = ahead.read

    def reading(item: Any) -> tuple[Exception | None, Any]:
        try:
            return None, read(item)
        except Exception as error:  # noqa: BLE001 - raised, or named, in the driver
            return error, None

    options: Any = {"num_cpus": 1, "max_retries": 2, "num_returns": 2}
    return ray.remote(**options | ({"label_selector": ahead.labels} if ahead.labels else {}))(reading)
