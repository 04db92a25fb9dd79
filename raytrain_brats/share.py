"""Put a trained network into one file: `raytrain-brats share --run-dir URI --out FILE.safetensors`.

In: a run folder, or one with the runs of folds.
Out: a safetensors file with weights, config, label convention, post-processing and model card, which `predict
--run-dir FILE` and `train --init-from FILE` take wherever it lies.
"""

import json
import sys
from dataclasses import dataclass

from raytrain_brats import __version__, config, outputs, storage
from raytrain_brats.cli import Uri, entry, run_folder
from raytrain_brats.errors import UserError
from raytrain_brats.exporting import card
from raytrain_brats.run import members, shared_file
from raytrain_brats.run.members import Member
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.shared_file import SharedNetwork


@dataclass(frozen=True)
class Args:
    """Write the network of a run, or those of its folds, into one file that predicts elsewhere. No pickle."""

    out: Uri
    """The file (local or s3://); its name ends in .safetensors."""
    run_dir: Uri = ""
    """The run; by default RAYTRAIN_BRATS_RUN_DIR."""
    best: bool = False
    """The checkpoint with the best mean validation Dice, instead of the newest."""
    overwrite: bool = False
    """Also replace a file at --out of other networks or of another program; never an image or a label."""


def work(args: Args) -> None:
    run_dir, out = run_folder(args.run_dir), storage.normal(args.out)
    if not out.endswith(shared_file.SUFFIX):
        raise UserError(f"--out {out}: the name of such a file ends in {shared_file.SUFFIX}")
    networks = members.opened([run_dir], args.best)
    places = [run_dir, *(member.run_dir for member in networks)]
    if any(outputs.within(out, RunDir(place).file(name)) for place in places for name in RunDir.FOLDERS):
        raise UserError(f"--out {out} is among the run's own files; give another --out")
    rules, said = members.rules_of([run_dir], networks)
    told = members.told(networks[0].run_dir)
    about = card.About(
        networks[0].run.config, networks[0].run.convention, networks[0].run.dataset_identity, networks[0].checkpoint,
        networks[0].digest, sum(t.numel() for t in networks[0].weights.values()), __version__, *told,
    )  # fmt: skip
    more = f"## Networks\n\n{members.named(networks)}; {said}." if len(networks) > 1 else f"## Label volumes\n\n{said}."
    of = [{"fold": m.fold, "weights": m.digest} for m in networks]
    learned = {"rules": rules.to_json(), "members": of} if rules else None
    content = shared_file.content([_network(member) for member in networks], learned, card.model_card(about, more))
    outputs.claim_file(out, lambda before: _same_networks(before, content), overwrite=args.overwrite)
    storage.write_bytes(out, content)
    print(f"{config.described('run', networks[0].run.config)}; {members.named(networks)}; {said}")
    print(f"{len(content) / 1e6:,.1f} MB in {out}; elsewhere:")
    print("  raytrain-brats predict --run-dir FILE --images ... --out ...")
    if about.phantoms:
        print("trained on phantoms: it segments no real scan")


def _network(member: Member) -> SharedNetwork:
    run = member.run
    return SharedNetwork(run.config, run.convention, run.dataset_identity, member.checkpoint, member.weights)


def _same_networks(before: bytes, content: bytes) -> bool:
    """Whether a file that is there holds the same weights."""
    try:
        found = [shared_file.header(whole)["networks"] for whole in (before, content)]
    except ValueError:
        return False
    one, other = (json.dumps(each, sort_keys=True) for each in found)
    return one == other


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "share", argv)


if __name__ == "__main__":
    sys.exit(main())
