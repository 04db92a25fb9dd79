"""A map over GPUs on a real Ray that believes it has two: each is one process's own, whatever dies."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raytrain_brats.ray_ext import cluster

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
