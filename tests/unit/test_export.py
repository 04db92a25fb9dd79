"""A trained network for other programs: ONNX, MONAI Bundle, model card. Without Ray."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle.config_parser import ConfigParser
from monai.bundle.scripts import run as run_bundle
from monai.data.utils import decollate_batch
from torch import nn

from raytrain_brats import config, export
from raytrain_brats.cases import scan
from raytrain_brats.data.preprocess import preprocess
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.exporting import bundle, onnx_file
from raytrain_brats.labels import from_regions, to_regions
from raytrain_brats.learn.model import build_network
from raytrain_brats.run import checkpoint, predictor, spec
from raytrain_brats.run.worker import train_step_of
from raytrain_brats.scoring.metrics import dice
from tests.support.cases import make_affine, write_msd_case, write_msd_folder

SMALL = ("preprocess.spacing_mm=1.0", "data.patch_xyz=[16, 16, 8]")
GRIDS: dict[str, Any] = {
    "plain": {},
    "turned": {"affine": make_affine(permutation=(2, 0, 1), signs=(-1, 1, -1)), "shape": (18, 26, 21)},
    "coarse": {"affine": make_affine((1.3, 1.0, 2.5), signs=(-1, -1, 1))},
    "oblique": {"affine": make_affine((1, 1, 2), degrees=12)},
}


def missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


needs_onnx = pytest.mark.skipif(bool(missing("onnx", "onnxruntime")), reason="needs the extra `export`")


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, with one checkpoint whose regions have edges, on six MSD cases; `images`, scans on other grids."""
    folder = tmp_path_factory.mktemp("made")
    write_msd_folder(folder / "data", 6, shape=(24, 20, 18))
    run_spec = spec.build(config.load("demo", SMALL), str(folder / "run"), str(folder / "data"), "")
    spec.write_config(run_spec)
    tensors, state = train_step_of(run_spec, 1, torch.device("cpu")).state()
    last = "network/conv_final.2.conv.weight"
    checkpoint.save(run_spec.run_dir, 4, 1, tensors | {last: 10 * tensors[last]}, state)
    for name, options in GRIDS.items():
        write_msd_case(folder / "cases", name, **options)
    (folder / "cases" / "imagesTr").rename(folder / "images")
    return folder


@pytest.fixture
def made(_made: Path, tmp_path: Path) -> Path:
    shutil.copytree(_made, tmp_path / "made")
    return tmp_path / "made"


def do(made: Path, *arguments: str, code: int = 0) -> Path:
    out = made / "out"
    assert export.main(["--run-dir", str(made / "run"), "--out", str(out), *arguments]) == code
    return out


def predicted(made: Path) -> dict[str, Any]:
    """{case: label volume} as `predict` makes it."""
    run = spec.open_run(str(made / "run"))
    network = build_network(run.config)
    network.load_state_dict(predictor.newest_weights(str(made / "run"))[1])
    found = {}
    for root, case in scan.scan_images([str(made / "images")])[0]:
        volume = Source(root, run.convention, run.config.preprocess.spacing_mm).volume(case)
        prepared = preprocess(volume, run.config.preprocess.spacing_mm)
        masks = predictor.predict_masks(prepared, network, run.config, torch.device("cpu"))
        found[case.id] = from_regions(masks, run.convention)
    assert found.keys() == GRIDS.keys() and all(len(np.unique(label)) > 2 for label in found.values())
    return found


def agreement(found: Any, wanted: Any) -> float:
    """The least Dice of the regions of two label volumes."""
    assert found.shape == wanted.shape
    return min(dice(to_regions(found.astype(np.uint8), "msd"), to_regions(wanted, "msd")).values())


@needs_onnx
def test_onnx_gives_torch_s_logits_at_any_size(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another size and batch than the command tried; what it found is printed and written; the file says what it is."""
    import onnxruntime

    out = do(made)
    record = json.loads((out / "checks.json").read_text())
    assert record["onnx"]["greatest_difference"] < 1e-4 < 3 < record["onnx"]["greatest_logit"]
    assert len({tuple(shape) for shape in record["onnx"]["shapes"]}) == 3
    assert f"{record['onnx']['greatest_difference']:.1e}" in capsys.readouterr().out
    session = onnxruntime.InferenceSession((out / "model.onnx").read_bytes())
    network = build_network(spec.open_run(str(made / "run")).config).eval()
    network.load_state_dict(predictor.newest_weights(str(made / "run"))[1])
    image = torch.randn(3, 4, 20, 12, 16)
    with torch.inference_mode():
        np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], network(image), atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert about["edges_are_multiples_of"] == "4" and about["patch_zyx"] == "8x16x16" and "no clinical" in str(about)


@needs_onnx
def test_an_onnx_file_that_is_not_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers than torch's: nothing is written. Without onnxruntime it is said that nobody looked."""
    network = build_network(config.load("demo", SMALL))
    packed = onnx_file.content(network, 4, {})
    with torch.no_grad():
        next(network.parameters()).add_(0.5)
    with pytest.raises(RunFailed, match="differ from torch"):
        onnx_file.check(packed, network, 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert onnx_file.check(packed, network, 4) is None
    assert "not compared" in export._verdict(None)


def test_the_bundle_segments_as_predict_does(made: Path) -> None:
    """Its own transforms, network, window and weights, without Ignite: turned axes and the plain grid to the voxel, a
    resampled one within rounding. (Of an oblique one the box may be a voxel larger: docs/export.md.)"""
    out = do(made, "--formats", "bundle") / "bundle"
    parser = ConfigParser(yaml.safe_load((out / "configs/inference.yaml").read_text()))
    parser.config |= {"bundle_root": str(out), "dataset_dir": str(made / "images")}
    parser["device"] = "cpu"
    parser["postprocessing"]["transforms"].pop()  # that writes the files
    network: Any = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(out / "models/model.pt", weights_only=True))
    wanted, found = predicted(made), {}
    for batch in parser.get_parsed_content("dataloader"):
        with torch.inference_mode():
            batch["pred"] = parser.get_parsed_content("inferer")(batch["image"], network)
        (item,) = [parser.get_parsed_content("postprocessing")(one) for one in decollate_batch(batch)]
        name = Path(item["image"].meta["filename_or_obj"]).name.removesuffix(".nii.gz")
        label = item["pred"].numpy()[0]
        if name in ("plain", "turned"):
            np.testing.assert_array_equal(label, wanted[name])
        else:
            found[name] = agreement(label, wanted[name])
    assert found["coarse"] > 0.99, found


@pytest.mark.skipif(bool(missing("ignite", "fire")), reason="needs the extra `export`")
def test_monai_bundle_run_takes_it(made: Path) -> None:
    """MONAI's own command: one file a case, with the scan's geometry and predict's label values."""
    out = do(made, "--formats", "bundle") / "bundle"
    files = {"config_file": str(out / "configs/inference.yaml"), "meta_file": str(out / "configs/metadata.json")}
    run_bundle(bundle_root=str(out), dataset_dir=str(made / "images"), device="cpu", **files)
    for name, wanted in predicted(made).items():
        made_by_it, image = nib.load(out / f"eval/{name}.nii.gz"), nib.load(made / f"images/{name}.nii.gz")
        np.testing.assert_allclose(made_by_it.affine, image.affine, atol=1e-4)
        assert made_by_it.get_data_dtype() == np.uint8
        assert made_by_it.shape == wanted.shape
        assert name == "oblique" or agreement(np.asarray(made_by_it.dataobj), wanted) > 0.99


@pytest.mark.parametrize("recipe", ["demo", "demo_dynunet"])
def test_monai_s_own_class_has_the_same_logits(recipe: str) -> None:
    """For each network of the recipes; one whose weights say something else is refused."""
    settings = config.load(recipe)
    network = build_network(settings)
    bundle.plain_network(settings, network)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def state_dict(self, *args: Any, **more: Any) -> Any:
            return self.inner.state_dict()

        def forward(self, x: Any) -> Any:
            return self.inner(x) + 0.5

    with pytest.raises(RunFailed, match="other logits"):
        bundle.plain_network(settings, Other())


def test_a_network_that_monai_cannot_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of a later version: in one line, before anything is written."""
    settings = config.load("demo")
    object.__setattr__(settings.network, "name", "of_tomorrow")
    with pytest.raises(UserError, match="of_tomorrow cannot be told in a bundle"):
        bundle.definition(settings)


def test_the_card_says_what_the_network_is_not(made: Path) -> None:
    """Data, scores and limits: real cases without scores; phantoms with those of another checkpoint."""
    card = (do(made, "--formats", "bundle") / "bundle/docs/README.md").read_text()
    identity = spec.open_run(str(made / "run")).dataset_identity
    wanted = ("Not a medical device", identity, "real cases", "had not been run", "global_batch", "000000000004-g0001")
    assert not [text for text in (*wanted, "| 4, 2 |", "monai.bundle run", "differs from") if text not in card]
    assert "phantom" not in card

    about = yaml.safe_load((made / "run/config.yaml").read_text()) | {"synthetic": True}
    (made / "run/config.yaml").write_text(yaml.safe_dump(about))
    scores = {"dice": {"WT": 0.91, "TC": 0.8, "ET": 0.7}, "hd95_mm": {"WT": 4.25}, "cases": 6, "split": "val"}
    (made / "run/evaluation").mkdir()
    (made / "run/evaluation/summary.json").write_text(
        json.dumps(scores | {"checkpoint": "other", "identity": identity})
    )
    shutil.rmtree(made / "out")
    card = (do(made, "--formats", "bundle") / "bundle/docs/README.md").read_text()
    wanted = ("say nothing about patients", "| WT | 0.910 | 4.2 |", "| ET | 0.700 | - |", "another checkpoint")
    assert not [text for text in wanted if text not in card]


def test_what_is_there_is_kept(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same again makes nothing; files of others, of another checkpoint, and places among the run's are refused."""
    out = do(made, "--formats", "bundle")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    do(made, "--formats", "bundle")
    assert "0 files made, 5 were there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    (out / "bundle/LICENSE").unlink()
    do(made, "--formats", "bundle")
    assert (out / "bundle/LICENSE").exists()

    run_spec = spec.build(config.load("demo", SMALL), str(made / "run"), str(made / "data"), "")
    checkpoint.save(str(made / "run"), 8, 1, *train_step_of(run_spec, 1, torch.device("cpu")).state())
    do(made, "--formats", "bundle", code=2)
    assert "--overwrite" in capsys.readouterr().err
    assert before.items() >= {p: p.stat().st_mtime_ns for p in before if p.name != "LICENSE"}.items()
    do(made, "--formats", "bundle", "--overwrite")
    for place in ("run", "run/checkpoints/x", "run/tensorboard"):
        assert export.main(["--run-dir", str(made / "run"), "--out", str(made / place)]) == 2
    assert export.main(["--run-dir", str(made / "data"), "--out", str(made / "x")]) == 2
