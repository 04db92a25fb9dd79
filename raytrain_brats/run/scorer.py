"""Score predicted cases beside the training. Runs in a worker, and in a process of its own (`python -m`) that it starts
where a GPU predicts: HD95 takes a second of CPU time a case.

In: predicted cases; the process reads them from its standard input.
Out: their scores; the process writes them to its standard output, and ends when its worker does: then the input ends.

Where a CPU trains, a case is scored in place: a second process would need the very CPUs that training needs, 3.5 s of
them and 0.5 GB to start (measured), and a case of the demo takes 0.03 s.
"""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raytrain_brats.data.preprocess import Prepared, restore
from raytrain_brats.run.predictor import Score, score

STUCK_S = 120.0
"""A case takes a second, and the process some more to start: then it is stuck, and ended."""


@dataclass(frozen=True)
class Predicted:
    """A case whose regions are known."""

    case_id: str
    regions: npt.NDArray[np.uint8]
    """In how many of the nested regions a voxel lies: (z, y, x) of the prepared box, or native (x, y, z)."""
    on_box: bool
    prepared: Prepared
    """Its image is not needed."""
    convention: str
    dice: dict[str, float] | None
    """Where the device has computed it."""

    def scored(self) -> Score:
        regions = restore(self.regions[None], self.prepared.geometry)[0] if self.on_box else self.regions
        masks = regions[None] >= np.array([1, 2, 3], np.uint8).reshape(3, 1, 1, 1)
        return score(self.case_id, masks, self.prepared, self.convention, self.dice)


class Scorer:
    """Scores one case after the other, `aside` in a process of its own, else at once."""

    def __init__(self, aside: bool) -> None:
        self._aside = aside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self, predicted: Predicted) -> "Future[Score]":
        if self._aside:
            return self._thread.submit(self._ask, predicted)
        done: Future[Score] = Future()
        done.set_result(predicted.scored())
        return done

    def _ask(self, predicted: Predicted) -> Score:
        """Whoever ended the process (short memory, a person): the case is scored here, a later one by a new process."""
        process = self._process = self._process or _start()
        assert process.stdin
        assert process.stdout
        stuck = threading.Timer(STUCK_S, process.kill)
        stuck.start()
        try:
            pickle.dump(predicted, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            found: Score = pickle.load(process.stdout)  # noqa: S301 - of our own process
        except (OSError, EOFError, pickle.UnpicklingError):
            self._process = None
            process.kill()
            process.wait()
            return predicted.scored()
        finally:
            stuck.cancel()
        return found

    def close(self) -> None:
        """Give up what is not scored yet."""
        if self._process:
            self._process.kill()
        self._thread.shutdown(cancel_futures=True)
        if self._process:
            self._process.kill()  # again: it may have been started meanwhile
            self._process.wait()


def _start() -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "raytrain_brats.run.scorer"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    torch.set_num_threads(1)
    while True:
        try:
            predicted: Any = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the process that started this one
        except EOFError:
            return
        pickle.dump(predicted.scored(), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
