"""Commands in this process, with a plain map in place of Ray Data: what they leave is the same."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import expand, prepare
from raytrain_brats.ray_ext import cluster

SPACING = "--set=preprocess.spacing_mm=1.0"
Expand = Callable[..., int]
Prepare = Callable[..., tuple[int, list[str]]]


def _plain_map(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows that were worked on since, last first: Ray Data gives results in no order."""
    worked: list[dict[str, Any]] = []

    def here(function: Any, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in reversed(rows):
            worked.append(row)
            yield function(row)

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(cluster, "data_map", here)
    return worked


def expand_here(monkeypatch: pytest.MonkeyPatch) -> Expand:
    """Runs `expand`; its exit code."""
    _plain_map(monkeypatch)
    return lambda *arguments: expand.main(expand_arguments(*arguments))


def expand_arguments(data: Path, out: Path, copies: int, *options: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--copies", str(copies), *options]


def prepare_here(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Runs `prepare`; (exit code, ids of the cases that were worked on)."""
    worked = _plain_map(monkeypatch)

    def call(data: Any, store: Any, *options: str) -> tuple[int, list[str]]:
        worked.clear()
        code = prepare.main(["--data", str(data), "--store", str(store), SPACING, *options])
        return code, sorted(json.loads(row["case"])["id"] for row in worked)

    return call


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def volumes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.nii.gz"))}


def books(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.json"))}
