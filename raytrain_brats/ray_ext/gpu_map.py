"""Map over a cluster's GPUs, each of them one process's own. Runs in the driver; the functions, in actors.

In: a function, items. Out: results in order.

A task is no way to do it: Ray's processes run many, and one that set CUDA up on its first GPU stays there when a later
task is given another, so that two share one and the other idles.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

T = TypeVar("T")
R = TypeVar("R")
TRIES = 3
"""Of an item whose process ends; then it may be the item that ends it."""


class _Mapper:
    """One process with one GPU."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def ready(self) -> None:
        pass

    def call(self, item: Any) -> Any:
        return self._function(item)


def gpu_map(function: Callable[[T], R], items: Iterable[T], gpus: int, labels: dict[str, str]) -> Iterator[R]:
    """`map` over so many GPUs of nodes with these labels; who is ready gets the next item, so GPUs that others use are
    only waited for when there is no other.

    Raises the function's own exception, and RayActorError when an item's process ended TRIES times, or none starts.
    """
    options: Any = {"num_cpus": 1, "num_gpus": 1} | ({"label_selector": labels} if labels else {})
    remote: Any = ray.remote(**options)(_Mapper)
    todo, again = enumerate(items), list[tuple[int, int, T]]()
    busy: dict[Any, tuple[Any, tuple[int, int, T] | None]] = {}
    done: dict[int, R] = {}
    following = left = stillborn = 0

    def add() -> None:
        actor = remote.remote(function)
        busy[actor.ready.remote()] = actor, None

    def work() -> tuple[int, int, T] | None:
        """(place, tries, item), those of processes that ended first."""
        nonlocal left
        if again:
            return again.pop(0)
        for place, item in todo:
            left += 1
            return place, 1, item
        return None

    try:
        for _ in range(gpus):
            add()
        while busy:
            (reference,), _ = ray.wait(list(busy), num_returns=1)
            actor, was = busy.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError:  # with its node, mostly
                stillborn = 0 if was else stillborn + 1
                if stillborn > TRIES * gpus or (was and was[1] == TRIES):
                    raise
                again += [(was[0], was[1] + 1, was[2])] if was else []
                add()
                continue
            if was:
                done[was[0]] = result
            if now := work():
                busy[actor.call.remote(now[2])] = actor, now
            while following in done:
                yield done.pop(following)
                following += 1
            if not now and following == left:
                return
    finally:
        for actor, _ in busy.values():
            with contextlib.suppress(Exception):  # Ray may be gone
                ray.kill(actor)
