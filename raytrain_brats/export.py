"""Give a trained network to other programs: `raytrain-brats export --run-dir URI --out FOLDER`.

In: a run folder.
Out: below --out `model.onnx` with `MODEL_CARD.md` and `checks.json`; `bundle/`, a MONAI Bundle whose docs/README.md is
the card; `made-by.json`. What was made earlier of the same checkpoint is not made again.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Literal

from safetensors.torch import save as tensors_to_bytes

from raytrain_brats import __version__, config, outputs, storage
from raytrain_brats.cli import Uri, entry, run_folder
from raytrain_brats.config import patch_divisor
from raytrain_brats.data import manifest as manifests
from raytrain_brats.errors import UserError
from raytrain_brats.exporting import bundle, card, onnx_file
from raytrain_brats.learn.model import build_network
from raytrain_brats.run import members, own_parts, spec
from raytrain_brats.run.predictor import newest_weights
from raytrain_brats.run.run_dir import RunDir

README = "docs/README.md"
BUNDLE = ("configs/metadata.json", "configs/inference.yaml", "models/model.pt", README, "LICENSE")
CARD, CHECKS, ONNX = "MODEL_CARD.md", "checks.json", "model.onnx"
ALONE = {CARD, CHECKS, ONNX}


@dataclass(frozen=True)
class Args:
    """Write the network of a run's newest checkpoint as an ONNX file and as a MONAI Bundle, with a model card."""

    out: Uri
    """Where the files go (local or s3://)."""
    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""
    formats: tuple[Literal["onnx", "bundle"], ...] = ("onnx", "bundle")
    """Which of the two."""
    best: bool = False
    """The checkpoint with the best mean validation Dice, instead of the newest."""
    overwrite: bool = False
    """Also replace files in --out that came of another checkpoint or evaluation, or from another program."""


def work(args: Args) -> None:
    run_dir, out = run_folder(args.run_dir), storage.normal(args.out)
    if not args.formats:
        raise UserError("no format given; name onnx, bundle or both with --formats")
    if outputs.same(out, run_dir) or any(outputs.within(out, RunDir(run_dir).file(name)) for name in RunDir.FOLDERS):
        raise UserError(f"--out {out} holds the run's own files; give another --out")
    run = spec.open_run(run_dir)
    if "onnx" in args.formats:
        onnx_file.check_installed()
    if "bundle" in args.formats:
        bundle.definition(run.config)
    checkpoint, weights = newest_weights(run_dir, args.best)
    own_parts.check_weights(run_dir, run, weights)
    network = build_network(run.config)
    network.load_state_dict(weights)
    about = card.About(
        run.config, run.convention, run.dataset_identity, checkpoint,
        hashlib.sha256(tensors_to_bytes(weights)).hexdigest()[:8],
        sum(parameter.numel() for parameter in network.parameters()), __version__, *members.told(run_dir),
    )  # fmt: skip
    there = _claimed(args, about, run_dir)
    print(f"{config.described('run', run.config)}; {about.name}")
    files: dict[str, bytes] = {}
    if "onnx" in args.formats and not there >= ALONE:
        divisor = patch_divisor(run.config)
        files[ONNX] = onnx_file.content(network, divisor, card.facts(about))
        check = onnx_file.check(files[ONNX], network, divisor)
        print(_verdict(check))
        files[CARD] = card.model_card(about, card.onnx_section(check)).encode()
        record = {"checkpoint": about.name, "onnx": check and check.record()}
        files[CHECKS] = json.dumps(record, indent=1).encode()
    if "bundle" in args.formats:
        made = bundle.files(run.config, run.convention, network, card.bundle_readme(about), about.name, __version__)
        files |= {f"bundle/{path}": content for path, content in made.items()}
    written = files.keys() - there
    for name in sorted(written):
        storage.write_bytes(storage.join(out, name), files[name])
    print(f"{len(written)} files made{f', {len(there)} were there already' if there else ''}, in {out}")
    if about.phantoms:
        print("trained on phantoms: scores say nothing about patients")


def _claimed(args: Args, about: card.About, run_dir: str) -> set[str]:
    """Names of what need not be made again; notes down what the others are made from. Raises UserError."""
    scores = hashlib.sha256(json.dumps(about.evaluation, sort_keys=True).encode()).hexdigest()[:8]
    told = f"{about.name}, evaluation {scores if about.evaluation else 'none'}"
    names = {f"bundle/{path}" for path in BUNDLE} if "bundle" in args.formats else set()
    names |= ALONE if "onnx" in args.formats else set()
    origins = {name: told if name in (CARD, f"bundle/{README}") else about.name for name in names}
    settings = {"run": outputs.place(run_dir), "made_with": about.name} | manifests.meaning(about.convention)
    return outputs.claim(args.out, "export", origins, settings=settings, overwrite=args.overwrite)


def _verdict(check: onnx_file.Check | None) -> str:
    if check is None:
        return "ONNX: not compared with torch, as onnxruntime is not installed (scripts/venv export)"
    sizes = ", ".join("x".join(map(str, shape)) for shape in check.shapes)
    return (
        f"ONNX: logits differ from torch's by {check.greatest_difference:.1e} at most "
        f"(greatest logit {check.greatest_logit:.1f}; {sizes}; onnxruntime {check.onnxruntime})"
    )


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "export", argv)


if __name__ == "__main__":
    sys.exit(main())
