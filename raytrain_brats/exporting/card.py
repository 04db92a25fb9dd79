"""The model card: what a network is, what it learned from, how well it does, and what it is not for.

In: a run's config, identity, checkpoint and evaluation. Out: Markdown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrain_brats import config, labels
from raytrain_brats.config import Config, patch_divisor
from raytrain_brats.exporting import bundle, onnx_file
from raytrain_brats.labels import MODALITIES, REGIONS

_PHANTOMS = (
    "**Trained on phantoms, which a program drew: its scores say nothing about patients.** It shows that the machinery "
    "works, and segments no real scan."
)
_LIMITS = """\
- **Not a medical device.** No diagnosis, no treatment, no clinical decision may depend on it. Research only.
- It has seen the data named above and nothing else: other scanners, protocols, ages, tumours and earlier treatment are
  untested. Four skull-stripped, co-registered modalities are needed; what is missing cannot be left out.
- Scores are of held-out cases of the same data set, by one fold; a site of its own was not tested.
- No uncertainty is given. A segmentation may be wrong anywhere; a person who knows must look at each."""


@dataclass(frozen=True)
class About:
    """What is known of a trained network."""

    config: Config
    convention: str
    dataset_identity: str
    checkpoint: str
    digest: str
    """Of the weights: the first 8 hex digits of their SHA-256."""
    parameters: int
    version: str
    """Of this package."""
    stored: Mapping[str, Any] = field(default_factory=dict)
    """The run folder's config.yaml."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """The run folder's evaluation/summary.json, if there is one."""

    @property
    def phantoms(self) -> bool:
        return bool(self.stored.get("synthetic")) or self.evaluation.get("data") == "phantom"

    @property
    def name(self) -> str:
        return f"checkpoint {self.checkpoint} ({self.digest})"


def facts(about: About) -> dict[str, str]:
    """What an ONNX file says of itself."""
    return {
        "made_by": f"raytrain_brats {about.version}",
        "checkpoint": about.name,
        "channels": ", ".join(MODALITIES),
        "outputs": f"logits of {', '.join(REGIONS)}; a sigmoid gives probabilities",
        "axes": "batch, channel, z (to superior), y (to anterior), x (to right)",
        "edges_are_multiples_of": str(patch_divisor(about.config)),
        "spacing_mm": f"{about.config.preprocess.spacing_mm:g}",
        "patch_zyx": "x".join(map(str, reversed(about.config.data.patch_xyz))),
        "normalisation": "per channel over its non-zero voxels: zero mean, unit variance; zeros stay 0",
        "intended_use": "research only, no clinical use" + ("; trained on phantoms" if about.phantoms else ""),
    }


def model_card(about: About, more: str = "") -> str:
    """Markdown; `more` sections stand before the configuration."""
    parts = [
        "# Brain-tumour segmentation: model card",
        *([_PHANTOMS] if about.phantoms else []),
        _summary(about),
        "## Limits\n\n" + _LIMITS,
        "## Data\n\n" + _data(about),
        "## Scores\n\n" + _scores(about),
    ]
    parts += [more.strip(), f"## Configuration\n\n```yaml\n{about.config.to_yaml()}```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def bundle_readme(about: About) -> str:
    """The card, and how to run the bundle."""
    run = f"""\
## Run it

The command needs `monai`, `nibabel`, `pytorch-ignite` and `fire`; it writes label volumes to `eval/`:

```bash
python -m monai.bundle run --config_file configs/inference.yaml --meta_file configs/metadata.json \\
  --bundle_root . --dataset_dir FOLDER_OF_4D_NIFTI_FILES
```

Channels: {", ".join(MODALITIES)}. A case of four files: change `datalist` to `[{{image: [FLAIR, T1w, T1gd, T2w]}}]`.
Label values: {labels.described(about.convention)}.

## Where it differs from `raytrain-brats predict`

{bundle.DIFFERENCES}
"""
    return model_card(about, run)


def _summary(about: About) -> str:
    regions = labels.regions(about.convention)
    rows = {
        "what": "voxel-wise probabilities of three nested regions: whole tumour (WT), tumour core (TC), enhancing (ET)",
        "network": f"{about.config.network.name}, {about.parameters:,} parameters",
        "trained as": config.described("run", about.config),
        "weights": f"{about.name}, {int(about.checkpoint.partition('-')[0]):,} samples",
        "input": f"{', '.join(MODALITIES)}; RAS, {about.config.preprocess.spacing_mm:g} mm, normalised by channel",
        "label values": labels.described(about.convention),
        "regions": "; ".join(f"{r} = {', '.join(map(str, regions[r]))}" for r in REGIONS),
        "made by": f"raytrain_brats {about.version}",
    }
    return _table(("", ""), list(rows.items()))


def _data(about: About) -> str:
    stored = about.stored
    rows = [
        ("data", "phantoms" if about.phantoms else "real cases"),
        ("identity", f"`{about.dataset_identity}`: of every case's checksum, preprocessing and label convention"),
        ("held out", f"fold {about.config.data.fold} of 5, by subject"),
        *([("recipe", str(stored["recipe"]))] if stored.get("recipe") else []),
        *([("cases trained on, held out", str(stored["cases"]))] if stored.get("cases") else []),
    ]
    return _table(("", ""), rows)


def _scores(about: About) -> str:
    found = about.evaluation
    if not found:
        return "None: `raytrain-brats evaluate` had not been run when this was written."
    what = "phantoms" if about.phantoms else "cases"
    head = f"{found.get('cases', '?')} {what} of split `{found.get('split', '?')}`, {found.get('checkpoint', '?')}."
    if found.get("checkpoint") != about.checkpoint:
        head += " **Of another checkpoint than the exported one.**"
    if found.get("identity") != about.dataset_identity:
        head += f" On other data than it was trained on (identity `{found.get('identity', '?')}`)."
    dice, distance = (found.get(key) or {} for key in ("dice", "hd95_mm"))
    rows = [(region, _number(dice.get(region), 3), _number(distance.get(region), 1)) for region in REGIONS]
    return f"{head}\n\n{_table(('region', 'Dice', 'HD95 mm'), rows)}"


def onnx_section(check: onnx_file.Check | None) -> str:
    """What ONNX Runtime gave beside torch; None where it was not asked."""
    if check is None:
        return "## ONNX\n\n`model.onnx` was not compared with torch: onnxruntime was not installed."
    shapes = ", ".join("x".join(map(str, shape)) for shape in check.shapes)
    return (
        f"## ONNX\n\n`model.onnx`: logits differ from torch's by {check.greatest_difference:.1e} at most (greatest "
        f"logit {check.greatest_logit:.1f}), on noise of {shapes}, by onnxruntime {check.onnxruntime}. Its metadata "
        "say how to prepare an image; cut it into overlapping windows, average logits, then take the sigmoid."
    )


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
