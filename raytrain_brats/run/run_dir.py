"""The layout of a run folder: the path of each of its files, and which process changes it. Runs in any process.

In: the folder, local or s3://. Out: paths; the documents that processes change by compare-and-swap.

Who writes each file, and what for: docs/architecture.md, "The run folder".
"""

import json
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from raytrain_brats import books, storage
from raytrain_brats.errors import RunFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A small file that several processes change, each on top of what it has read."""

    uri: str

    def read(self) -> bytes | None:
        """None when there is no such file."""
        try:
            return storage.read_bytes(self.uri)
        except FileNotFoundError:
            return None

    def swap(self, before: bytes | None, after: bytes) -> bool:
        """Put `after` if the file still holds `before`; False when it does not. Raises OSError."""
        return storage.swap(self.uri, before, after)

    def parsed(self, content: bytes | None, kind: type[T]) -> T | None:
        """The dataclass in the content that was read; None for None. Raises RunFailed when it is damaged."""
        try:
            return None if content is None else kind(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise RunFailed(
                f"{self.uri} is damaged ({error}); remove it: the checkpoints say where to go on"
            ) from error


class RunDir:
    """The paths and documents of one run folder."""

    FOLDERS: ClassVar = (
        "checkpoints", "validation", "evaluation", "evaluations", "ray", "groups", "stacks", "tensorboard", books.ROWS,
        books.EVENTS,
    )  # fmt: skip

    def __init__(self, uri: str) -> None:
        self.uri = storage.normal(uri)
        self.config, self.manifest = self.file("config.yaml"), self.file("manifest.jsonl")
        self.metrics, self.events = self.file(books.ROWS), self.file(books.EVENTS)
        self.report, self.evaluation = self.file("report.html"), self.file("evaluation")
        self.tensorboard = self.file("tensorboard")
        self.ray, self.checkpoints, self.groups = (self.file(name) for name in ("ray", "checkpoints", "groups"))
        self.lease, self.generation = Document(self.file("lease.json")), Document(self.file("generation.json"))
        self.initial = self.file("initial.safetensors")
        self.postprocessing = self.file("postprocessing.json")
        self.save_request = Document(self.file("save-request.json"))

    def file(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def group(self, generation: int) -> Document:
        return Document(storage.join(self.groups, f"{generation:04d}.json"))

    def validation(self, samples_seen: int) -> str:
        return self.file("validation", f"{samples_seen:012d}.csv")

    def stacks(self, generation: int, rank: int) -> str:
        return self.file("stacks", f"g{generation:04d}-rank{rank}.txt")

    def earlier_evaluation(self, name: str) -> str:
        return self.file("evaluations", name)
