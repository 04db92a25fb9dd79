"""nnU-Net and this package side by side: `scripts/compare_nnunet --out DIR [--data DIR]`.

In: labelled cases, phantoms by default; a recipe; seeds; a Python that has nnU-Net.
Out: `results/*.json` and `table.md` under --out. The same command again goes on with what is there.

Equal: cases, held-out fold, samples, patch, batch, the code that scores. Everything else is each program's own. CPU
seconds are those of all processes, read from outside.
"""

import sys

from raytrain_brats import home, interrupt

if __name__ == "__main__":
    interrupt.install()
    home.provide()

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from raytrain_brats import config, outputs, predict, storage
from raytrain_brats.cli import Changes, Uri, entry
from raytrain_brats.config import Config
from raytrain_brats.data.manifest import Case, Manifest
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import MODALITIES, REGIONS, from_regions, regions, to_regions
from raytrain_brats.run import spec
from scripts.bench_pipelines.meter import Meter
from scripts.nnunet_parts import scoring
from scripts.nnunet_parts.runner import NAME, Order

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = "msd"
"""nnU-Net wants label values without gaps, so both truth and predictions have MSD's there."""


@dataclass(frozen=True)
class Args:
    """Train both on the same cases, fold and number of samples, from each seed; score both by the same code."""

    out: str = "compare"
    """Local folder for all that is made; results that are there are kept."""
    data: Uri = ""
    """Labelled cases, instead of phantoms."""
    cases: int = 30
    """Phantoms to draw."""
    recipe: str = "demo"
    """Ours: its samples, patch and batch are nnU-Net's too."""
    set: Changes = ()
    """Change a setting of the recipe: key=value; may be given several times."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of weights, samples and augmentation."""
    optimisers: tuple[Literal["sgd", "adamw"], ...] = ("sgd", "adamw")
    """nnU-Net's: its own SGD at 0.01; AdamW at our recipe's rate."""
    features: int = 32
    """nnU-Net's first feature count; 32 is its own."""
    epochs: int = 36
    """nnU-Net's steps of the learning rate; samples stay."""
    trainer: str = ""
    """One of nnU-Net's own trainers, such as nnUNetTrainer_250epochs, with its own schedule, patch and batch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Of nnU-Net; ours takes the GPUs that are there."""
    threads: int = 1
    """Of nnU-Net on a CPU."""
    programs: tuple[Literal["ours", "nnunet"], ...] = ("ours", "nnunet")
    """Which of the two to run now."""
    nnunet_python: str = ""
    """Python with nnunetv2, by default this one."""


def work(args: Args) -> None:
    out = Path(storage.normal(args.out))
    if storage.is_s3(args.out):
        raise UserError(f"--out {args.out}: a local folder is needed")
    settings = config.load(args.recipe, args.set)
    python = args.nnunet_python or sys.executable
    if "nnunet" in args.programs:
        _check_nnunet(python)
    if len(set(args.seeds)) < len(args.seeds) or not args.seeds:
        raise UserError(f"--seeds {args.seeds}: give each once, one at least")
    _begin(out, args)
    data = storage.normal(args.data) if args.data else str(out / "data")
    if not args.data:
        _ours("phantom", "--out", data, "--cases", str(args.cases))
    manifest_file = str(out / "manifest.jsonl")
    if not (out / "manifest.jsonl").exists():
        _ours("index", "--data", data, "--out", manifest_file)
    manifest, source = spec.open_cases(settings, manifest_file)
    job = Job(args, settings, out, manifest, source, python)
    for seed in args.seeds:
        if "ours" in args.programs:
            job.result(f"ours-{settings.train.optimiser.name}-seed{seed}", lambda seed=seed: job.ours(seed))
        for optimiser in args.optimisers[: 1 if args.trainer else None] if "nnunet" in args.programs else ():
            name = f"nnunet-{args.trainer or optimiser}-seed{seed}"
            job.result(name, lambda seed=seed, optimiser=optimiser: job.nnunet(seed, optimiser))
    job.report()


def _check_nnunet(python: str) -> None:
    """Raises UserError where nnU-Net cannot be imported."""
    asked = "import importlib.metadata as m; print(m.version('nnunetv2'))"
    try:
        found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--nnunet-python {python}: {error.strerror}; name a Python that has nnunetv2") from error
    if found.returncode:
        raise UserError(f"{python} has no nnunetv2; scripts/venv bench installs it, or name another --nnunet-python")


def _begin(out: Path, args: Args) -> None:
    """What decides the numbers may not change within a folder. Raises UserError."""
    asked = asdict(args)
    for free in ("out", "seeds", "programs", "nnunet_python", "optimisers"):
        del asked[free]
    asked = json.loads(json.dumps(asked))
    where = str(out / "compared.json")
    try:
        before = json.loads(storage.read_bytes(where))
    except FileNotFoundError:
        if strange := sorted(storage.list_files(str(out)))[:1]:
            raise UserError(f"--out {out} holds other files ({strange[0]}); give an empty or new folder") from None
        before = asked
        storage.write_bytes(where, json.dumps(asked, indent=1).encode())
    if changed := sorted(key for key in asked if asked[key] != before.get(key)):
        told = ", ".join(f"{key} {before.get(key)!r} -> {asked[key]!r}" for key in changed)
        raise UserError(f"--out {out} holds a comparison with other settings ({told}); give another --out")


def _ours(command: str, *arguments: str) -> None:
    """A command of ours in a process of its own, on a Ray of its own. Raises RunFailed."""
    print(f"\n$ raytrain-brats {command} {' '.join(arguments)}", flush=True)
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"raytrain_brats.{command}", *arguments], env=environment, check=False
    )
    if done.returncode:
        raise RunFailed(f"{command} ended with exit code {done.returncode}")


@dataclass
class Job:
    """One comparison."""

    args: Args
    settings: Config
    out: Path
    manifest: Manifest
    source: Source
    python: str

    def __post_init__(self) -> None:
        self.training, self.held_out = self.manifest.split(self.settings.data.fold)
        if not self.training or not self.held_out:
            raise UserError(f"{self.manifest.root}: fold {self.settings.data.fold} leaves no case on one side")
        self.samples = spec.sampler_of(self.settings, len(self.training)).total

    def result(self, name: str, make: Any) -> None:
        where = self.out / "results" / f"{name}.json"
        if where.exists():
            print(f"{name}: there already")
            return
        print(f"{name}: running", flush=True)
        storage.write_bytes(str(where), json.dumps(make(), indent=1).encode())

    def ours(self, seed: int) -> dict[str, Any]:
        """`prepare`, `train` and `predict`, as a person types them."""
        folder = self.out / "ours" / f"seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was stopped: what it spent is not known any more
        run, store = str(folder / "run"), str(self.out / "store")
        recipe = ("--recipe", self.args.recipe, *(f"--set={s}" for s in self.args.set))
        _ours("prepare", "--data", str(self.out / "manifest.jsonl"), "--store", store, *recipe)
        with Meter() as meter:
            began = time.monotonic()
            _ours("train", "--store", store, "--run-dir", run, *recipe, f"--set=train.seed={seed}")
            trained = time.monotonic()
            views: dict[str, Any] = {}
            for view, options in _views().items():
                begun = time.monotonic()
                images = [storage.join(self.manifest.root, path) for case in self.held_out for path in case.images]
                _ours("predict", "--run-dir", run, "--out", str(folder / view), "--images", *images, *options)
                views[view] = {"times": [begun, time.monotonic()], "folder": str(folder / view)}
        convention = spec.open_run(run).convention
        for view in views.values():
            view["cpu_s"] = _cpu_s(meter, view.pop("times"))
            view["scores"] = scoring.scores(view.pop("folder"), convention, self.held_out, self.source)
        from raytrain_brats.learn.model import build_network

        return {
            "program": f"raytrain_brats, {self.args.recipe}",
            "optimiser": self.settings.train.optimiser.name,
            "seed": seed,
            "parameters": sum(parameter.numel() for parameter in build_network(self.settings).parameters()),
            "samples": self.samples,
            "train_cpu_s": _cpu_s(meter, [began, trained]),
            "train_wall_s": round(trained - began, 1),
            "views": views,
        }

    def nnunet(self, seed: int, optimiser: str) -> dict[str, Any]:
        """nnU-Net's own stages, in its own Python."""
        plan = self._planned()
        name = f"{self.args.trainer or optimiser}-seed{seed}"
        rate = 0.01 if optimiser == "sgd" else self.settings.train.optimiser.learning_rate
        about = {"out": str(self.out / "nnunet" / name), "seed": seed, "optimiser": optimiser, "learning_rate": rate}
        with Meter() as meter:
            found = self._run(self._order("train", **about))
        begun, ended = found["times"].pop("train")
        return {
            "program": f"nnU-Net, {self.args.trainer}"
            if self.args.trainer
            else f"nnU-Net, {self.args.features} features",
            "optimiser": "own" if self.args.trainer else optimiser,
            "seed": seed,
            "parameters": found["parameters"],
            "samples": found["samples"],
            "train_cpu_s": _cpu_s(meter, [begun, ended]),
            "train_wall_s": round(ended - begun, 1),
            "own_plan": plan,
            "views": {
                view: {
                    "cpu_s": _cpu_s(meter, times),
                    "scores": scoring.scores(found["folders"][view], WRITTEN, self.held_out, self.source),
                }
                for view, times in found["times"].items()
            },
        }

    def _planned(self) -> Any:
        """nnU-Net's data set, plan and preprocessed cases, once."""
        where = self.out / "nnunet" / "plan.json"
        if not where.exists():
            self._convert()
            storage.write_bytes(str(where), json.dumps(self._run(self._order("prepare"))["own_plan"]).encode())
        return json.loads(where.read_text())

    def _order(self, stage: str, **more: Any) -> Order:
        splits = [{"train": [c.id for c in self.training], "val": [c.id for c in self.held_out]}]
        patch = list(reversed(self.settings.data.patch_xyz))
        order = Order(str(self.out / "nnunet"), stage, splits, patch, self.settings.train.global_batch, self.samples)
        same = ("epochs", "features", "trainer", "device", "threads")
        return dataclasses.replace(order, **{key: getattr(self.args, key) for key in same}, **more)

    def _run(self, order: Order) -> dict[str, Any]:
        """A stage in nnU-Net's process; what it found. Raises RunFailed."""
        log = self.out / "nnunet" / f"{order.stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [self.python, "-m", "scripts.nnunet_parts.runner", json.dumps(asdict(order))]
        with log.open("w") as told:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=told,
                text=True, check=False,
            )  # fmt: skip
            told.write(done.stdout)
        if done.returncode:
            raise RunFailed(f"nnU-Net's {order.stage} ended with exit code {done.returncode}; see {log}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _convert(self) -> None:
        """The cases in nnU-Net's layout: a file a channel; WT, TC, ET as regions."""
        raw = self.out / "nnunet" / "nnUNet_raw" / NAME
        for folder in ("imagesTr", "labelsTr"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        for case in self.manifest.cases:
            self._convert_case(case, raw)
        values = regions(WRITTEN)
        order = [int(from_regions(np.eye(3, dtype=bool)[:, [n]], WRITTEN)[0]) for n in range(len(REGIONS))]
        about = {
            "channel_names": {str(number): name for number, name in enumerate(MODALITIES)},
            "labels": {"background": 0} | {region: list(values[region]) for region in REGIONS},
            "regions_class_order": order,
            "numTraining": len(self.manifest.cases),
            "file_ending": ".nii.gz",
        }
        storage.write_bytes(str(raw / "dataset.json"), json.dumps(about, indent=1).encode())

    def _convert_case(self, case: Case, raw: Path) -> None:
        volume = self.source.volume(case)
        assert volume.label_xyz is not None, "only labelled cases are in a fold"
        for channel, voxels in enumerate(volume.image_cxyz):
            file = raw / "imagesTr" / f"{case.id}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(voxels.astype(np.float32), volume.affine), file)  # type: ignore[attr-defined]
        label = from_regions(to_regions(volume.label_xyz, self.source.convention), WRITTEN)
        nib.save(nib.Nifti1Image(label, volume.affine), raw / "labelsTr" / f"{case.id}.nii.gz")  # type: ignore[attr-defined]

    def report(self) -> None:
        """The table of all results that are there."""
        results = [json.loads(path.read_text()) for path in sorted((self.out / "results").glob("*.json"))]
        kind = "phantoms: these scores say nothing about patients" if self.manifest.synthetic else "real cases"
        told = f"{len(self.training)} cases to train on, {len(self.held_out)} held out ({kind})."
        text = f"{told}\n\n{scoring.table(results)}\n"
        storage.write_bytes(str(self.out / "table.md"), text.encode())
        print(f"\n{text}\n{outputs.place(str(self.out))}/table.md")


def _views() -> dict[str, Sequence[str]]:
    """Our ways to predict, as far as this version has them."""
    if any(field.name == "mirror" for field in dataclasses.fields(predict.Args)):
        return {"plain": ("--no-mirror",), "mirrored": ("--mirror",)}
    return {"plain": ()}


def _cpu_s(meter: Meter, times: Sequence[float]) -> float:
    return round(sum(meter.spent(times[0], times[1]).values()), 1)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "", argv, "scripts/compare_nnunet")


if __name__ == "__main__":
    sys.exit(main())
