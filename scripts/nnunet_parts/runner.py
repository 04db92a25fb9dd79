"""Plan, train and predict by nnU-Net 2.8. Runs in nnU-Net's own process: `python -m scripts.nnunet_parts.runner JSON`.

In: one JSON value (`Order`); `nnUNet_raw` etc. below its folder, with the data set already in nnU-Net's layout.
Out: one line of JSON: parameters, times of the stages (time.monotonic), folders with label volumes.

Equal to ours, unless --trainer names one of nnU-Net's own: samples, patch, batch. nnU-Net's own in any case:
fingerprint, preprocessing, sampling, augmentation, network, loss, rate schedule, Gaussian window. It needs neither Ray
nor the package, so that nnU-Net may live in an environment of its own.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER, NAME = 501, "Dataset501_Compared"
OWN = "3d_fullres"


@dataclass(frozen=True)
class Order:
    folder: str
    stage: str
    """`prepare`: once for all seeds; `train`: train, and predict the held-out cases."""
    splits: list[dict[str, list[str]]]
    patch_zyx: list[int]
    batch: int
    samples: int
    out: str = ""
    seed: int = 0
    epochs: int = 36
    """The rate falls once an epoch: enough steps for its curve."""
    features: int = 32
    optimiser: str = "sgd"
    learning_rate: float = 0.01
    trainer: str = ""
    """One of nnU-Net's own, with its own schedule, patch and batch: `samples` and the settings above do not count."""
    device: str = "cpu"
    threads: int = 1
    views: tuple[str, ...] = ("plain", "mirrored")


def environment(order: Order) -> None:
    """nnU-Net reads these when it is imported."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(Path(order.folder) / name)
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    workers = "1" if order.device == "cpu" else str(min(12, os.cpu_count() or 1))  # planning fails with 0
    os.environ |= {"nnUNet_n_proc_DA": workers, "nnUNet_def_n_proc": workers}
    if order.device == "cpu":
        os.environ["nnUNet_compile"] = "F"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(order.threads)


def prepare(order: Order) -> dict[str, Any]:
    """nnU-Net's fingerprint, plan and preprocessing; our folds; beside its plan one of our patch and batch."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess_dataset,
    )

    processes = int(os.environ["nnUNet_def_n_proc"])
    extract_fingerprints([NUMBER], num_processes=processes, check_dataset_integrity=True)
    plan_experiments([NUMBER])
    preprocess_dataset(NUMBER, configurations=(OWN,), num_processes=[processes], show_progress_bar=False)
    base = Path(os.environ["nnUNet_preprocessed"]) / NAME
    (base / "splits_final.json").write_text(json.dumps(order.splits, indent=1))
    own = json.loads((base / "nnUNetPlans.json").read_text())["configurations"][OWN]
    kept = {key: own[key] for key in ("patch_size", "batch_size", "spacing")}
    return {"own_plan": kept | {"features": own["architecture"]["arch_kwargs"]["features_per_stage"]}}


def configured(order: Order, plans: dict[str, Any]) -> str:
    """Add the configuration of our patch and batch to the plans; its name."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    own = plans["configurations"][OWN]
    _, strides, kernels, size, _ = get_pool_and_conv_props(own["spacing"], order.patch_zyx, 4, 999999)
    stages = len(strides)
    architecture = json.loads(json.dumps(own["architecture"]))
    architecture["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": [min(320, order.features * 2**stage) for stage in range(stages)],
        "strides": [list(map(int, each)) for each in strides],
        "kernel_sizes": [list(map(int, each)) for each in kernels],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    name = "compared"
    plans["configurations"][name] = {
        "inherits_from": OWN,
        "patch_size": list(map(int, size)),
        "batch_size": order.batch,
        "architecture": architecture,
    }
    return name


def trainer_of(order: Order, base: type) -> type:
    """The trainer's class, with as many samples as ours; nothing else is changed but the optimiser, if asked for."""
    import torch
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    class Compared(base):  # type: ignore[misc, valid-type]
        """nnUNetTrainer for a budget of samples."""

        def __init__(self, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)  # nnU-Net reads these names back
            self.initial_lr, self.num_epochs = order.learning_rate, order.epochs
            self.num_iterations_per_epoch = max(1, order.samples // (order.batch * order.epochs))
            self.num_val_iterations_per_epoch, self.save_every, self.disable_checkpointing = 1, 10**6, True

        def configure_optimizers(self) -> Any:
            if order.optimiser == "sgd":
                return super().configure_optimizers()
            adamw = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
            return adamw, PolyLRScheduler(adamw, self.initial_lr, self.num_epochs)

    return Compared


def train(order: Order) -> dict[str, Any]:
    """Train one fold, then segment its held-out cases with and without mirroring, by the same weights."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    if order.device == "cpu":
        os.environ["nnUNet_n_proc_DA"] = "0"  # augment in this process: one core for all, as planning wanted 1
    torch.set_num_threads(order.threads)
    torch.manual_seed(order.seed)
    np.random.seed(order.seed)  # nnU-Net seeds nothing itself
    base = Path(os.environ["nnUNet_preprocessed"]) / NAME
    plans = json.loads((base / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    about = json.loads((base / "dataset.json").read_text())
    if order.trainer:
        # Looks through all trainers, one of which needs torchvision, of the same build as torch.
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        kind, configuration = recursive_find_trainer_class_by_name(order.trainer), OWN
    else:
        configuration = configured(order, plans)
        kind = trainer_of(order, nnUNetTrainer)
    began = time.monotonic()
    trainer = kind(plans, configuration, 0, about, torch.device(order.device))
    trainer.initialize()
    seen = trainer.num_epochs * trainer.num_iterations_per_epoch * trainer.batch_size
    trainer.run_training()
    times = {"train": [began, time.monotonic()]}
    axes, folders = trainer.inference_allowed_mirroring_axes, {}
    for view in order.views:
        began = time.monotonic()
        trainer.inference_allowed_mirroring_axes = axes if view == "mirrored" else None
        trainer.perform_actual_validation(False)
        times[view] = [began, time.monotonic()]
        folders[view] = str(Path(order.out) / view)
        shutil.rmtree(folders[view], ignore_errors=True)
        shutil.copytree(Path(trainer.output_folder) / "validation", folders[view])
    count = sum(parameter.numel() for parameter in trainer.network.parameters())
    return {"parameters": count, "samples": seen, "times": times, "folders": folders}


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    environment(order)
    found = prepare(order) if order.stage == "prepare" else train(order)
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
