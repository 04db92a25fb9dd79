"""A map over GPUs on a real Ray that believes it has two: each is one process's own, whatever dies."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raytrain_brats.ray_ext import cluster, gpu_map

ITEMS = range(12)


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def function(folder: Path) -> Callable[[int], Any]:
    """A case's work: (item, process, its GPUs); it dies once, or always, where a file says so. It travels by value."""
    place = str(folder)

    def one(item: int) -> tuple[int, int, tuple[str, ...]]:
        import os
        import pathlib
        import time

        import ray

        mark = pathlib.Path(place, f"dies-{item}")
        if mark.exists():
            if mark.read_text() == "once":
                mark.unlink()
            os._exit(1)
        if pathlib.Path(place, f"raises-{item}").exists():
            raise LookupError(f"item {item}")
        time.sleep(0.3 if item % 3 else 0.02)
        return item, os.getpid(), tuple(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    return one


def test_each_gpu_has_one_process(tmp_path: Path) -> None:
    """In order; both GPUs work; no process is ever given a second one, as CUDA would stay on its first."""
    found = list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True))
    assert [item for item, _, _ in found] == list(ITEMS)
    assert {gpus for _, _, gpus in found} == {("0",), ("1",)}
    assert len({(process, gpus) for _, process, gpus in found}) == 2
    assert len({process for _, process, _ in found}) == 2 and os.getpid() not in {p for _, p, _ in found}
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU", 0) < 2:  # they are free for others afterwards
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_process_that_dies_costs_no_item(tmp_path: Path) -> None:
    """Its item is done again by another, in its place in the order."""
    for item in (0, 5):
        (tmp_path / f"dies-{item}").write_text("once")
    found = list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True))
    assert [item for item, _, _ in found] == list(ITEMS)


def test_an_item_that_ends_every_process_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "dies-3").write_text("always")
    with pytest.raises(ray.exceptions.RayActorError):
        list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True))


def test_an_exception_comes_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "raises-3").touch()
    with pytest.raises(LookupError, match="item 3"):
        list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True))


def test_a_gpu_in_use_is_not_waited_for(tmp_path: Path) -> None:
    """Others may train on it for days: the work goes on with what there is. Nothing to do needs none."""

    @ray.remote(num_gpus=1)
    class Other:
        def there(self) -> None:
            pass

    other: Any = Other.remote()
    ray.get(other.there.remote())
    found = list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True))
    assert [item for item, _, _ in found] == list(ITEMS) and len({gpus for _, _, gpus in found}) == 1
    assert list(cluster.parallel_map(function(tmp_path), [], on_gpus=True)) == []
    ray.kill(other)


def reader(folder: Path) -> Callable[[int], Any]:
    """What is done ahead: (item, process, how many were read then and not yet worked on to the end)."""
    place = str(folder)

    def read(item: int) -> tuple[int, int, int]:
        import os
        import pathlib

        pathlib.Path(place, f"read-{item}").touch()
        if pathlib.Path(place, f"unreadable-{item}").exists():
            raise LookupError(f"item {item} is damaged")
        begun, ended = (len(list(pathlib.Path(place).glob(f"{what}-*"))) for what in ("read", "worked"))
        return item, os.getpid(), begun - ended

    return read


def taker(folder: Path) -> Callable[[tuple[int, int, int]], Any]:
    """What is done on a GPU with what was read: (item, who read, how many were ahead, who worked)."""
    work, place = function(folder), str(folder)

    def take(was_read: tuple[int, int, int]) -> tuple[int, int, int, int]:
        import os
        import pathlib

        work(was_read[0])
        pathlib.Path(place, f"worked-{was_read[0]}").touch()
        return *was_read, os.getpid()

    return take


def named(item: int, error: Exception) -> Any:
    return item, f"{type(error).__name__}: {error}".splitlines()[0]


def test_cpus_read_ahead_of_the_gpus(tmp_path: Path) -> None:
    """By other processes, while the GPUs work; two items a GPU and no more lie ready, so memory does not grow."""
    found = list(cluster.parallel_map(taker(tmp_path), ITEMS, on_gpus=True, read=reader(tmp_path)))
    assert [item for item, *_ in found] == list(ITEMS)
    readers, workers = {row[1] for row in found}, {row[3] for row in found}
    assert len(workers) == 2 and not readers & workers
    ahead = [row[2] for row in found]
    assert 2 < max(ahead) <= 2 * (gpu_map.AHEAD + 1)  # those that lie ready, and those in work


def test_one_bad_item_ends_no_other(tmp_path: Path) -> None:
    """Unreadable, raising, or the end of every process that gets it: its name stands in its place in the order."""
    (tmp_path / "unreadable-2").touch()
    (tmp_path / "raises-4").touch()
    (tmp_path / "dies-7").write_text("always")
    found = list(cluster.parallel_map(taker(tmp_path), ITEMS, on_gpus=True, read=reader(tmp_path), failed=named))
    assert [row[0] for row in found] == list(ITEMS)
    bad = {row[0]: row[1] for row in found if len(row) == 2}
    assert bad.keys() == {2, 4, 7}
    assert bad[2] == "LookupError: item 2 is damaged" and bad[4] == "LookupError: item 4"
    assert bad[7].startswith("ActorDiedError")


def test_without_gpus_too(tmp_path: Path) -> None:
    """Tasks on CPUs read and work; what raises, and what ends its process, is named."""
    (tmp_path / "unreadable-2").touch()
    (tmp_path / "dies-7").write_text("always")
    found = list(cluster.parallel_map(taker(tmp_path), ITEMS, read=reader(tmp_path), failed=named))
    assert [row[0] for row in found] == list(ITEMS)
    bad = {row[0]: row[1] for row in found if len(row) == 2}
    assert bad.keys() == {2, 7} and bad[2] == "LookupError: item 2 is damaged"
    assert bad[7].startswith("WorkerCrashedError")
    with pytest.raises(LookupError, match="item 2 is damaged"):
        list(cluster.parallel_map(taker(tmp_path), [1, 2], read=reader(tmp_path)))


def test_what_failed_may_concern_all(tmp_path: Path) -> None:
    """`failed` ends the map by raising: a full disk is no matter of one item."""
    (tmp_path / "raises-4").touch()

    def ends(item: int, error: Exception) -> Any:
        raise ArithmeticError(f"{item}: {error}")

    with pytest.raises(ArithmeticError, match="4: item 4"):
        list(cluster.parallel_map(function(tmp_path), ITEMS, on_gpus=True, failed=ends))


def test_gpus_without_a_cpu_to_spare_read_themselves(tmp_path: Path) -> None:
    """Else they would wait for readers that never start."""
    where = gpu_map.Ahead(reader(tmp_path), {}, in_tasks=False)
    found = list(gpu_map.gpu_map(taker(tmp_path), range(4), 2, {}, where))
    assert [row[0] for row in found] == [0, 1, 2, 3] and all(row[1] == row[3] for row in found)
