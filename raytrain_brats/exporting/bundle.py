"""A network as a MONAI Bundle, which `python -m monai.bundle run` takes without this package.

In: the config, the weights, the label values to write.
Out: the bundle's files: configs, weights, LICENSE; its README is the model card.

The configuration says our preprocessing in MONAI's transforms, in the same order; DIFFERENCES tells where the two are
not the same. Specification: https://docs.monai.io/en/stable/mb_specification.html
"""

import io
import json
from importlib import metadata
from typing import Any

import torch
import yaml
from monai.bundle.config_parser import ConfigParser
from torch import nn

from raytrain_brats.config import Config, patch_divisor
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import MODALITIES, REGIONS, from_regions

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
TOLERANCE = 1e-4
"""Of the greatest logit, between our network and MONAI's own class: the two differ in nothing but their code."""
DIFFERENCES = """\
- Voxels are float32 from the file on; `predict` keeps 16 bits each, exact for whole numbers. A voxel whose probability
  is within 0.001 of one half may change.
- `predict` leaves the grid as it is where edges differ by less than 0.001 mm from those wanted; MONAI resamples for any
  difference. Where it resamples an oblique grid, the foreground's box may be a voxel larger, so that windows lie
  elsewhere.
- `predict` checks each file (shape, grid, NaN, an empty scan) and refuses it with a reason; the bundle reads on.
- One pass of the sliding window, regions where their probability is over one half. What else a version of `predict`
  does (averages over mirrored copies, rules learned on validation cases, several networks) is not in the bundle.
- CPUs compute in float32 in both; on a GPU `predict` uses mixed precision and the bundle does not."""
_LICENSE = """\
The configuration in this bundle was written by raytrain_brats and is licensed under the Apache License,
Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0): on an "AS IS" basis, without warranties or conditions of any
kind, either express or implied.

The weights in models/ were trained by whoever ran the training. They, and the terms of the data they were trained on,
decide how the weights may be used.
"""


def definition(config: Config) -> dict[str, Any]:
    """The network as a `_target_` of MONAI with its arguments. Raises UserError for one that MONAI has no class for."""
    options, channels = config.network, {"in_channels": len(MODALITIES), "out_channels": len(REGIONS)}
    name, given = str(options.name), options.model_dump(mode="json")
    three: dict[str, Any] = {"spatial_dims": 3} | channels
    if name == "segresnet":
        return {"_target_": "SegResNet"} | channels | {k: v for k, v in given.items() if k != "name"}
    if name == "dynunet":
        levels = len(given["filters"])
        return {"_target_": "DynUNet"} | three | {
            "kernel_size": [3] * levels,
            "strides": [1] + [2] * (levels - 1),
            "upsample_kernel_size": [2] * (levels - 1),
            "filters": given["filters"],
            "norm_name": ["INSTANCE", {"affine": True}],
            "act_name": ["leakyrelu", {"inplace": False, "negative_slope": 0.01}],
            "res_block": False,
        }  # fmt: skip
    if name == "mednext":
        *blocks, last_blocks = given["blocks"]
        *expansion, last_expansion = given["expansion"]
        return {"_target_": "MedNeXt"} | three | {
            "init_filters": given["init_filters"],
            "kernel_size": given["kernel_size"],
            "encoder_expansion_ratio": expansion,
            "decoder_expansion_ratio": expansion[::-1],
            "bottleneck_expansion_ratio": last_expansion,
            "use_residual_connection": True,
            "blocks_down": blocks,
            "blocks_bottleneck": last_blocks,
            "blocks_up": blocks[::-1],
        }  # fmt: skip
    if name == "unet":
        about = {"channels": given["channels"], "num_res_units": given["res_units"]}
        return {"_target_": "UNet"} | three | about | {"strides": [2] * (len(given["channels"]) - 1)}
    raise UserError(f"--formats bundle: {name} cannot be told in a bundle yet; take --formats onnx")


def plain_network(config: Config, network: nn.Module) -> nn.Module:
    """MONAI's own class with the weights of `network`, in eval mode. Raises RunFailed unless both give the same."""
    plain: nn.Module = ConfigParser({"network": definition(config)}).get_parsed_content("network").eval()
    own = network.state_dict()
    kept = {name: value for name, value in own.items() if name in plain.state_dict()}  # heads of training are left out
    try:
        plain.load_state_dict(kept, strict=False)  # MONAI's DynUNet names its layers twice
    except RuntimeError as error:
        raise RunFailed(f"MONAI's {type(plain).__name__} does not take this network's weights: {error}") from error
    edge = 2 * patch_divisor(config)
    image = torch.randn([1, len(MODALITIES), edge, edge, edge], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = network.eval()(image), plain(image)
    difference = float((wanted - found).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise RunFailed(f"MONAI's {type(plain).__name__} gives other logits, by {difference:.2g}; take --formats onnx")
    return plain


def files(config: Config, convention: str, network: nn.Module, card: str, name: str, version: str) -> dict[str, bytes]:
    """{path in the bundle: content}. `network` as trained; `card` becomes docs/README.md; `name` says which weights,
    `version` is this package's."""
    weights = io.BytesIO()
    torch.save(plain_network(config, network).state_dict(), weights)
    about = json.dumps(_metadata(config, name, version), indent=1)
    inference = yaml.safe_dump(_inference(config, convention), sort_keys=False, width=120)
    texts = {"configs/metadata.json": about, "configs/inference.yaml": inference, "docs/README.md": card}
    return {path: text.encode() for path, text in (texts | {"LICENSE": _LICENSE}).items()} | {
        "models/model.pt": weights.getvalue()
    }


def _metadata(config: Config, name: str, version: str) -> dict[str, Any]:
    edges = [f"{patch_divisor(config)}*n"] * 3
    image = {
        "type": "image", "format": "magnitude", "modality": "MR", "num_channels": len(MODALITIES),
        "spatial_shape": edges, "dtype": "float32", "value_range": [], "is_patch_data": True,
        "channel_def": {str(number): what for number, what in enumerate(MODALITIES)},
    }  # fmt: skip
    regions = {
        "type": "image", "format": "segmentation", "num_channels": len(REGIONS), "spatial_shape": edges,
        "dtype": "float32", "value_range": [], "is_patch_data": True,
        "channel_def": {str(number): what for number, what in enumerate(REGIONS)},
    }  # fmt: skip
    needed = {package: metadata.version(package) for package in ("nibabel",)}
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: name},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch").partition("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": needed | {"pytorch-ignite": ">=0.5", "fire": ">=0.5"},
        "name": "raytrain_brats",
        "task": "brain tumour regions WT, TC, ET in MRI",
        "description": name,
        "authors": "see docs/README.md",
        "copyright": "see LICENSE",
        "intended_use": "research only, no clinical use",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": regions}},
    }


def _preprocessing(config: Config) -> list[dict[str, Any]]:
    edges, image = [config.preprocess.spacing_mm] * 3, {"keys": "image"}
    return [
        {"_target_": "LoadImaged", "ensure_channel_first": True} | image,
        {"_target_": "Orientationd", "axcodes": "RAS", "labels": None} | image,
        {"_target_": "Spacingd", "pixdim": edges, "mode": "bilinear"} | image,
        # what resampling leaves beside the brain by rounding
        {"_target_": "Lambdad", "func": "$lambda x: torch.where(x.abs() <= 2.0**-25, torch.zeros_like(x), x)"} | image,
        {"_target_": "CropForegroundd", "source_key": "image", "select_fn": "$lambda x: x != 0"} | image,
        {"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True} | image,
        {"_target_": "Orientationd", "axcodes": "SAR", "labels": None} | image,  # our tensors are (c, z, y, x)
    ]


def _postprocessing(convention: str) -> list[dict[str, Any]]:
    pred = {"keys": "pred"}
    # Label values, outermost region first: what is inside writes over it.
    values = [int(from_regions(torch.eye(3, dtype=torch.bool).numpy()[:, [n]], convention)[0]) for n in range(3)]
    label = "torch.where(p[2:3] > 0.5, {2}, torch.where(p[1:2] > 0.5, {1}, torch.where(p[0:1] > 0.5, {0}, 0)))"
    return [
        {"_target_": "Activationsd", "sigmoid": True} | pred,
        {
            "_target_": "Invertd", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False,
            "to_tensor": True,
        } | pred,
        {"_target_": "Lambdad", "func": f"$lambda p: {label.format(*values)}"} | pred,
        {
            "_target_": "SaveImaged", "output_dir": "@output_dir", "output_postfix": "", "output_dtype": "$np.uint8",
            # To where it is already: without it MONAI 1.6 takes a volume for slices, and fails on turned axes.
            "resample": True, "mode": "nearest", "separate_folder": False,
        } | pred,
    ]  # fmt: skip


def _inference(config: Config, convention: str) -> dict[str, Any]:
    return {
        "imports": ["$import glob", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "/data/imagesTr",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        # one 4D file a case; or write a list of the four files of a case, in the order of the channels
        "datalist": "$[{'image': p} for p in sorted(glob.glob(@dataset_dir + '/*.nii.gz'))]",
        "network_def": definition(config),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(config)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(reversed(config.data.patch_xyz)),
            "sw_batch_size": 2,
            "overlap": config.validate_.overlap,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(convention)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "decollate": True,
        },
        "run": ["$@evaluator.run()"],
    }
