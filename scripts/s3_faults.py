"""Reading, preparing and training over S3 that lies: `scripts/s3_faults [--cases 40] [--out FILE]`.

In: how many tiny phantoms, how often each kind of fault comes, a seed.
Out: figures, by holding what was made against the same work without faults; as JSON for docs/benchmarks.

A real server and a real proxy on this machine; the data are put without stored checksums, so that boto3 itself would
notice none of the flips.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

from raytrain_brats import s3
from raytrain_brats.cases import scan
from raytrain_brats.data import store as stores
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.store import Source
from raytrain_brats.synthetic.phantom import write_set
from scripts.s3_proxy import ISSUE_RATES, Asked, FaultyProxy

BUCKET = "brats"
WORDS = {"503": "503", "reset": "resets", "truncated": "truncated", "short": "short by its head too", "flip": "flips"}

RUN = """
import importlib, json, os, sys, time
os.environ["RAY_ADDRESS"] = "local"
for command, *arguments in json.loads(sys.argv[1]):
    began = time.monotonic()
    code = importlib.import_module(f"raytrain_brats.{command}").main(arguments)
    print(f"took {time.monotonic() - began:.2f}", flush=True)
    if code:
        sys.exit(f"{command} {arguments} exited with {code}")
"""


def commands(root: str, epochs: int, patches: int, raw: bool) -> list[list[str]]:
    values = [f"train.epochs={epochs}", f"data.patches_per_case={patches}", "data.patch_xyz=[16, 16, 16]"]
    values += ["preprocess.spacing_mm=7.5", "checkpoint.every_samples=64", "validate.every_samples=100000"]
    values += ["run.cpus_per_task=0.5"]
    options = [f"--set={value}" for value in values]
    data, store = f"{root}/data", f"{root}/store"
    made = [["prepare", "--data", data, "--store", store, *options]]
    made += [["train", "--store", store, "--run-dir", f"{root}/by-store", "--workers", "1", *options]]
    made += [["train", "--data", data, "--run-dir", f"{root}/by-raw", "--workers", "1", *options]] if raw else []
    return made


def measure(
    cases: int, rates: dict[str, float], seed: int = 0, epochs: int = 1, patches: int = 4, raw: bool = True
) -> dict[str, Any]:
    """The commands, on a Ray of their own: under `clean/`, which nothing befalls, and the same under `spoilt/`."""
    with _spoilt_s3(cases, rates, seed) as (bare, proxy):
        todo = [c for where in ("clean", "spoilt") for c in commands(f"s3://{BUCKET}/{where}", epochs, patches, raw)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(todo)], capture_output=True, text=True, timeout=3000, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        took = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("took ")]
        return _figures(bare, proxy.log, took, raw)


def reads(cases: int, rates: dict[str, float], seed: int = 0, epochs: int = 1) -> dict[str, Any]:
    """Index, prepare and load every case by both routes, in threads: what the commands read, without their waits."""
    took, found, log = {}, {}, {}
    with _spoilt_s3(cases, rates, seed) as (_, proxy):
        for where in ("warm-up", "clean", "spoilt"):
            root, before = f"s3://{BUCKET}/{'clean' if where == 'warm-up' else where}", len(proxy.log)
            began = time.perf_counter()
            found[where] = _read_all(root, f"{root}/store-{where}", epochs if where != "warm-up" else 1)
            took[where], log[where] = time.perf_counter() - began, proxy.log[before:]
    asked = {where: len(log[where]) for where in ("clean", "spoilt")}
    faults = Counter(a.fault for a in log["spoilt"] if a.fault)
    return {
        "requests": asked,
        "request_amplification": round(asked["spoilt"] / asked["clean"], 3),
        "faults": {WORDS[kind]: faults[kind] for kind in WORDS if faults[kind]},
        "cases_loaded": len(found["clean"]),
        "cases_that_differ": sum(a != b for a, b in zip(found["clean"], found["spoilt"], strict=True)),
        "seconds": {where: round(took[where], 2) for where in ("clean", "spoilt")},
        "throughput_of_clean": round(took["clean"] / took["spoilt"], 3),
    }


def _read_all(root: str, store: str, epochs: int) -> list[str]:
    """A digest of all that each load gave."""
    found = scan.open_manifest(f"{root}/data")
    raw, options = Source(f"{root}/data", found.convention, 7.5), {"spacing_mm": 7.5}

    def load(spec: tuple[Source, Case]) -> str:
        made = spec[0].load(spec[1])
        return hashlib.sha256(stores.encode(made)).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(lambda case: stores.put(store, raw, case, options), found.cases))
        stored = Source(store, found.convention, 7.5)
        jobs = [(raw, case) for case in found.cases] + [(stored, case) for case in prepared]
        return [case.object_sha256 for case in prepared] + list(pool.map(load, jobs * epochs))


@contextlib.contextmanager
def _spoilt_s3(cases: int, rates: dict[str, float], seed: int) -> Iterator[tuple[Any, FaultyProxy]]:
    """(a client that goes past the proxy, the proxy), which the environment points to; phantoms in `*/data`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(port, rates, seed, only="/spoilt/")
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update(keys | {"AWS_ENDPOINT_URL": proxy.url, s3.PATIENCE: "60"})
    s3.client.cache_clear()
    try:
        bare = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            config=Config(request_checksum_calculation="when_required"),
        )
        _upload(bare, cases)
        yield bare, proxy
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3.client.cache_clear()
        proxy.close()
        server.stop()


def _upload(bare: Any, cases: int) -> None:
    bare.create_bucket(Bucket=BUCKET)
    with TemporaryDirectory() as folder:
        write_set(folder, cases=cases, seed=2, grid=32, anatomy="procedural")
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            for where in ("clean", "spoilt"):
                key = f"{where}/data/{path.relative_to(folder)}"
                bare.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def _figures(bare: Any, log: list[Asked], took: list[float], raw: bool) -> dict[str, Any]:
    runs = ("by-store", "by-raw") if raw else ("by-store",)
    clean, spoilt = ([a for a in log if f"/{where}/" in a.path] for where in ("clean", "spoilt"))
    objects = {where: _objects(bare, f"{where}/store/objects/") for where in ("clean", "spoilt")}
    rows = {where: [r for run in runs for r in _rows(bare, f"{where}/{run}")] for where in ("clean", "spoilt")}
    losses = {where: [row["loss"] for row in rows[where]] for where in rows}
    bad = sum(row["bad"] for row in rows["spoilt"])
    faults = Counter(a.fault for a in spoilt if a.fault)
    half = len(took) // 2
    clean_s, spoilt_s = sum(took[:half]), sum(took[half:])
    reads = [[a for a in asked if a.method == "GET" and "/data/" in a.path] for asked in (clean, spoilt)]
    return {
        "requests_with_those_that_recur_by_time": {"clean": len(clean), "spoilt": len(spoilt)},
        "reads_of_images_and_labels": {"clean": len(reads[0]), "spoilt": len(reads[1])},
        "read_amplification": round(len(reads[1]) / len(reads[0]), 3),
        "faults": {WORDS[kind]: faults[kind] for kind in WORDS if faults[kind]},
        "objects_prepared": len(objects["spoilt"]),
        "objects_that_differ": len(set(objects["clean"].items()) ^ set(objects["spoilt"].items())),
        "cases_set_aside": len(json.loads(_body(bare, "spoilt/store/quarantine.json"))),
        "steps_trained": len(losses["spoilt"]),
        "samples_without_weight": bad,
        "greatest_difference_of_a_loss": max(
            (abs(a - b) for a, b in zip(losses["clean"], losses["spoilt"], strict=True)), default=0.0
        ),
        "seconds": {"clean": [round(s, 1) for s in took[:half]], "spoilt": [round(s, 1) for s in took[half:]]},
        "throughput_of_clean": round(clean_s / spoilt_s, 3),
    }


def _body(bare: Any, key: str) -> bytes:
    return bytes(bare.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def _objects(bare: Any, prefix: str) -> dict[str, bytes]:
    pages = bare.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [row["Key"] for page in pages for row in page.get("Contents", [])]
    return {key.removeprefix(prefix): _body(bare, key) for key in keys}


def _rows(bare: Any, run: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for _, part in sorted(_objects(bare, f"{run}/metrics/").items()) for line in part.splitlines()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=30, help="times that every case is read by each route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    began, load = time.monotonic(), os.getloadavg()
    figures = {
        "reading": reads(args.cases, ISSUE_RATES, args.seed, args.epochs),
        "prepare_and_train_on_ray": measure(args.cases, ISSUE_RATES, args.seed, epochs=2, patches=1),
    }
    about = {
        "command": f"scripts/s3_faults --cases {args.cases} --epochs {args.epochs} --seed {args.seed}",
        "rates": ISSUE_RATES,
        "machine": f"{_cpu()}, {os.cpu_count()} cores, no GPU; server and proxy on it too",
        "load_average": [round(load[0], 1), round(os.getloadavg()[0], 1)],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "duration_s": round(time.monotonic() - began, 1),
    }
    text = json.dumps(about | figures, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    read, run = figures["reading"], figures["prepare_and_train_on_ray"]
    wrong = read["cases_that_differ"] + run["objects_that_differ"] + run["samples_without_weight"]
    return 1 if wrong or run["cases_set_aside"] or run["greatest_difference_of_a_loss"] else 0


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
