"""Do something again and again in a thread, beside the work at hand. Runs in workers and in the driver.

In: what to do, and how often. Out: nothing; what it raises is logged, and it is done again.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Self

_logger = logging.getLogger(__name__)


class Repeated:
    """For the time of a `with` block: at once, then every `every_s` seconds, and once more at the end.

    The end is waited for, `patience_s` at most: slow storage, or a cluster that is gone, must not keep the process.
    """

    def __init__(self, name: str, do: Callable[[], None], every_s: float, patience_s: float = 5.0) -> None:
        self._do, self._every_s, self._patience_s = do, every_s, patience_s
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over = True
        self._wake.set()
        self._thread.join(self._patience_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Do it now."""
        self._wake.set()

    def _repeat(self) -> None:
        while True:
            self._wake.clear()  # before it is done: who wakes it meanwhile wants it done again
            over = self._over
            try:
                self._do()
            except Exception as error:  # noqa: BLE001 - whatever the cause, the next time must come
                _logger.warning("%s: %s", self._thread.name, error)
            if over:
                return
            self._wake.wait(self._every_s)
