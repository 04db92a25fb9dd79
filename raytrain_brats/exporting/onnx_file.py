"""A network as an ONNX file, and how far ONNX Runtime's numbers are from torch's.

In: a network in eval mode, the divisor of its input's edges.
Out: the file's content; the greatest difference at three sizes and two batch sizes.

By torch's tracing exporter (`dynamo=False`): it takes every network here with batch and edges free, in a second and
without onnxscript; the other one takes minutes on a busy machine and cannot prove MedNeXt's edges.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.labels import MODALITIES

INPUT, OUTPUT = "image", "logits"
OPSET = 17
TOLERANCE = 1e-3
"""Of the greatest logit: float32 sums in another order differ by some 1e-6 of it."""


@dataclass(frozen=True)
class Check:
    """What ONNX Runtime computed beside torch, on noise of these (b, 4, z, y, x) shapes."""

    shapes: list[list[int]]
    greatest_difference: float
    greatest_logit: float
    onnxruntime: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def check_installed() -> None:
    """Raises UserError where the library that writes the files is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--formats onnx needs the library onnx; scripts/venv export installs it")


def content(network: nn.Module, divisor: int, facts: Mapping[str, str]) -> bytes:
    """`image` (b, 4, z, y, x) -> `logits` (b, 3, z, y, x), float32; any b, edges that are multiples of `divisor`.
    `facts` become the file's metadata."""
    import onnx

    free = {0: "batch", 2: "z", 3: "y", 4: "x"}
    example = torch.zeros(2, len(MODALITIES), *[2 * divisor] * 3)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        file = str(Path(folder) / "model.onnx")
        warnings.simplefilter("ignore")  # that torch will one day prefer the other exporter
        torch.onnx.export(
            network.eval(), (example,), file, dynamo=False, opset_version=OPSET,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_axes={INPUT: free, OUTPUT: free},
        )  # fmt: skip
        model = onnx.load(file)
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    packed: bytes = model.SerializeToString()
    return packed


def check(packed: bytes, network: nn.Module, divisor: int) -> Check | None:
    """None where onnxruntime is not installed. Raises RunFailed when the numbers are not torch's."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(packed, providers=["CPUExecutionProvider"])
    shapes = [
        [batch, len(MODALITIES), *(divisor * times for times in edges)]
        for batch, edges in ((1, (2, 2, 2)), (2, (3, 2, 4)), (1, (4, 3, 2)))
    ]
    noise, difference, greatest = torch.Generator().manual_seed(0), 0.0, 0.0
    for shape in shapes:
        image = torch.randn(shape, generator=noise)
        with torch.inference_mode():
            wanted = network.eval()(image).numpy()
        found = session.run([OUTPUT], {INPUT: image.numpy()})[0]
        difference = max(difference, float(np.abs(wanted - found).max()))
        greatest = max(greatest, float(np.abs(wanted).max()))
    if not difference <= TOLERANCE * max(1.0, greatest):  # not <= also holds for NaN
        raise RunFailed(f"ONNX Runtime's logits differ from torch's by {difference:.2g}; nothing is written")
    return Check(shapes, difference, greatest, onnxruntime.__version__)
