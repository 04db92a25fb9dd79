"""A run at the size of the largest data set, on tiny cases: where costs grow with the number of cases, it shows.

In: a number of cases, seconds to watch. Out: seconds to the first step, samples/s, memory by process, bytes of books.

The cases lie in an S3 server on this machine (moto, a Python process that takes its part of the two cores), which
counts what is written below the run folder. `python -m scripts.bench_pipelines.scale PLACE CASES` is that server.
"""

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from raytrain_brats import books
from raytrain_brats.errors import RunFailed
from scripts.bench_pipelines.meter import Meter

EDGE, BATCH = 16, 64
BUCKET, RUN = "scale", "run"
AWS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
RECIPE = {
    "network": {"name": "segresnet", "init_filters": 8, "blocks_down": [1], "blocks_up": []},
    "data": {"patch_xyz": [EDGE] * 3, "patches_per_case": 4},
    "train": {"epochs": 75, "global_batch": BATCH, "micro_batch": BATCH},
}


@dataclass(frozen=True)
class Scale:
    """Seconds are wall time from the start of the command."""

    cases: int
    seconds_to_first_step: float
    samples_per_s: float
    steps: int
    checkpoints: int
    book_bytes_per_checkpoint: list[int]
    """Rows, events and control documents written between two checkpoints, without the checkpoints themselves."""
    memory_mb: dict[str, float]
    """By process, when it was largest in all."""
    cpu_ms_per_sample: dict[str, float]


def measure(work: Path, cases: int, seconds: float) -> Scale:
    """Start the server and a run; stop both after `seconds` of training. Raises RunFailed when it does not begin."""
    work.mkdir(parents=True, exist_ok=True)
    recipe, written = work / "scale.yaml", work / "written.jsonl"
    recipe.write_text(yaml.safe_dump(RECIPE))
    server = subprocess.Popen([sys.executable, "-m", __name__, str(work), str(cases)])
    try:
        address = _address(work, server)
        with Meter() as meter:
            command = [sys.executable, "-m", "raytrain_brats.train", "--recipe", str(recipe)]
            command += ["--data", f"s3://{BUCKET}/data", "--run-dir", f"s3://{BUCKET}/{RUN}", "--workers", "1"]
            began = time.time()
            with (work / "train.log").open("wb") as log:
                environment = os.environ | AWS | {"AWS_ENDPOINT_URL": address, "RAY_ADDRESS": "local"}
                train = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            rows = _watched(train, address, began, seconds, work)
            since = time.monotonic() - (time.time() - rows[0]["time"])
            until = since + rows[-1]["time"] - rows[0]["time"]
            train.send_signal(signal.SIGINT)
            train.wait(120)
        lines = [json.loads(line) for line in written.read_text().splitlines()]
    finally:
        server.kill()
    samples, took = len(rows[1:]) * BATCH, rows[-1]["time"] - rows[0]["time"]
    books, checkpoints = _books(lines)
    spent = meter.spent(since, until)
    return Scale(
        cases,
        round(rows[0]["time"] - began, 1),
        round(samples / took, 1),
        len(rows),
        checkpoints,
        books,
        {kind: round(mb) for kind, mb in sorted(meter.peak_mb().items(), key=lambda item: -item[1])},
        {kind: round(1e3 * cpu_s / samples, 3) for kind, cpu_s in spent.items()},
    )


def _address(work: Path, server: "subprocess.Popen[bytes]") -> str:
    while not (work / "address").exists():
        if server.poll() is not None:
            raise RunFailed("the S3 server ended; is moto installed? (EXTRAS=dev)")
        time.sleep(0.2)
    return (work / "address").read_text()


def _watched(train: "subprocess.Popen[bytes]", address: str, began: float, seconds: float, work: Path) -> Any:
    """The rows of the run after it has trained for so long."""
    os.environ.update(AWS | {"AWS_ENDPOINT_URL": address})

    while True:
        time.sleep(2)
        if train.poll() is not None:
            raise RunFailed(f"the run ended: {(work / 'train.log').read_text()[-500:]}")
        rows = books.read_rows(f"s3://{BUCKET}/{RUN}")
        if rows and time.time() - rows[0]["time"] > seconds:
            return rows
        if time.time() - began > 1200 + seconds:
            raise RunFailed("no step within 20 minutes")


def _books(lines: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Bytes of all that was put into the run folder between one checkpoint's commit and the next, and how many."""
    books, since = list[int](), -1
    for line in lines:
        if not line["key"].startswith(f"{RUN}/"):
            continue
        if line["key"].startswith(f"{RUN}/checkpoints/"):
            if line["key"].endswith("MANIFEST.json"):
                books += [since] if since >= 0 else []
                since = 0
        elif since >= 0:
            since += line["bytes"]
    return books, len(books) + 1


def serve(work: Path, cases: int) -> None:
    """Fill a bucket with distinct cases, then listen; a line in written.jsonl for each object that is put."""
    from moto.s3.models import S3Backend, s3_backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request

    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    random = np.random.RandomState(0)
    about: dict[str, Any] = {"name": "BRATS", "tensorImageSize": "4D", "numTraining": cases, "numTest": 0, "test": []}
    about |= {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, "training": []}
    about |= {"labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}}
    image = random.randint(0, 500, (EDGE, EDGE, EDGE, 4)).astype(np.int16)
    label = np.zeros((EDGE, EDGE, EDGE), np.uint8)
    label[4:12, 4:12, 4:12] = random.randint(0, 4, (8, 8, 8))
    for number in range(1, cases + 1):
        name = f"BRATS_{number:05d}.nii.gz"
        image[number % EDGE, number // EDGE % EDGE, number // EDGE**2 % EDGE] = number % 30_000  # each is another
        about["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        for folder, voxels in (("imagesTr", image), ("labelsTr", label)):
            content = gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 1)
            backend.put_object(BUCKET, f"data/{folder}/{name}", content)
    backend.put_object(BUCKET, "data/dataset.json", json.dumps(about).encode())
    lock, log = threading.Lock(), (work / "written.jsonl").open("w", buffering=1)
    put = S3Backend.put_object

    def noted(self: Any, bucket: str, key: str, value: bytes, *rest: Any, **more: Any) -> Any:
        with lock:
            log.write(json.dumps({"time": time.time(), "key": key, "bytes": len(value)}) + "\n")
        return put(self, bucket, key, value, *rest, **more)

    S3Backend.put_object = noted  # type: ignore[method-assign, assignment]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    (work / "address").write_text(f"http://{host}:{port}")
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
