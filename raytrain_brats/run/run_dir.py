"""The layout of a run folder: where each of its files lies, and who changes it. Runs in any process.

In: the folder, local or s3://. Out: places; the documents that processes change by compare-and-swap.

| file | written by |
|---|---|
| `config.yaml`, `manifest.jsonl` | the driver, at each start |
| `lease.json` | the driver that has the run |
| `generation.json` | the controller: where the worker group goes on |
| `groups/NNNN.json` | the controller and rank 0: how that group fares |
| `save-request.json` | whoever wants a checkpoint now |
| `metrics.jsonl`, `checkpoints/`, `validation/` | rank 0 |
| `events.jsonl` | all; it tells, and decides nothing |
| `stacks/` | the driver, of ranks that hang |
| `evaluation/`, `evaluations/`, `report.html` | the commands of that name |
| `ray/` | Ray Train's own |
"""

from dataclasses import dataclass
from typing import ClassVar

from raytrain_brats import storage


@dataclass(frozen=True)
class Document:
    """A small file that several processes change, each on top of what it has read."""

    uri: str

    def read(self) -> bytes | None:
        """None when it is not there."""
        try:
            return storage.read_bytes(self.uri)
        except FileNotFoundError:
            return None

    def swap(self, before: bytes | None, after: bytes) -> bool:
        """Put `after` if the file still holds `before`; False when it does not. Raises OSError."""
        return storage.swap(self.uri, before, after)


@dataclass(frozen=True)
class RunDir:
    uri: str

    FOLDERS: ClassVar = ("checkpoints", "validation", "evaluation", "evaluations", "ray", "groups", "stacks")

    def file(self, *parts: str) -> str:
        return storage.join(storage.normal(self.uri), *parts)

    @property
    def config(self) -> str:
        return self.file("config.yaml")

    @property
    def manifest(self) -> str:
        return self.file("manifest.jsonl")

    @property
    def metrics(self) -> str:
        return self.file("metrics.jsonl")

    @property
    def events(self) -> str:
        return self.file("events.jsonl")

    @property
    def report(self) -> str:
        return self.file("report.html")

    @property
    def evaluation(self) -> str:
        return self.file("evaluation")

    @property
    def ray(self) -> str:
        return self.file("ray")

    @property
    def checkpoints(self) -> str:
        return self.file("checkpoints")

    @property
    def lease(self) -> Document:
        return Document(self.file("lease.json"))

    @property
    def generation(self) -> Document:
        return Document(self.file("generation.json"))

    @property
    def save_request(self) -> Document:
        return Document(self.file("save-request.json"))

    def group(self, generation: int) -> Document:
        return Document(self.file("groups", f"{generation:04d}.json"))

    def validation(self, samples_seen: int) -> str:
        return self.file("validation", f"{samples_seen:012d}.csv")

    def stacks(self, generation: int, rank: int) -> str:
        return self.file("stacks", f"g{generation:04d}-rank{rank}.txt")

    def earlier_evaluation(self, name: str) -> str:
        return self.file("evaluations", name)
