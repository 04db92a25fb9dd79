"""The thread that heartbeats, leases, requests, statuses and events share."""

import threading
import time

import pytest

from raytrain_brats.run.repeated import Repeated


def test_at_once_then_by_time_or_when_woken_and_once_more_at_the_end() -> None:
    """Whoever wakes it does not wait for the time; what came before the end of the block is done when it ends."""
    done, at = [], threading.Semaphore(0)

    def do() -> None:
        done.append(len(done))
        at.release()

    with Repeated("slow", do, 600.0) as thread:
        assert at.acquire(timeout=60)
        thread.wake()
        assert at.acquire(timeout=60)
    assert len(done) == 3 and not thread.alive
    with Repeated("quick", do, 0.01):
        assert all(at.acquire(timeout=60) for _ in range(5))


def test_who_wakes_it_while_it_works_is_heard() -> None:
    """It is done again, for what came too late for this time."""
    begun, go = threading.Semaphore(0), threading.Semaphore(0)

    def do() -> None:
        begun.release()
        assert go.acquire(timeout=60)

    with Repeated("work", do, 600.0) as thread:
        assert begun.acquire(timeout=60)
        thread.wake()
        go.release()
        assert begun.acquire(timeout=60)
        go.release(2)


def test_an_error_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the error; the next time may work."""
    errors: list[Exception] = [KeyError("first"), OSError("second")]
    fine = threading.Event()

    def do() -> None:
        if errors:
            raise errors.pop()
        fine.set()

    with Repeated("look for it", do, 0.01):
        assert fine.wait(60)
    assert "look for it: second" in caplog.text


def test_the_end_is_not_waited_for_longer_than_its_patience() -> None:
    """A storage that hangs does not keep the process."""
    go = threading.Event()
    began = time.monotonic()
    with Repeated("hangs", lambda: go.wait(60), 600.0, patience_s=0.1) as thread:
        pass
    assert time.monotonic() - began < 30 and thread.alive
    go.set()
