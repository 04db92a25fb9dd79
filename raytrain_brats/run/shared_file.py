"""Networks of a run in one file that predicts elsewhere. Runs in the driver.

In: networks with their configs; what held-out cases taught about them; a model card.
Out: a safetensors file whose header says it all; or UserError where such a file is damaged or another program's.

No pickle: a file from elsewhere cannot run code here. Its weights are compared with their checksum when they are read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrain_brats import storage
from raytrain_brats.config import Config, parse
from raytrain_brats.errors import UserError
from raytrain_brats.run import checkpoint

SUFFIX = ".safetensors"
KIND = "raytrain_brats networks, 1"


@dataclass(frozen=True)
class SharedNetwork:
    """One network of such a file."""

    config: Config
    convention: str
    dataset_identity: str
    checkpoint: str
    weights: dict[str, Any] = field(repr=False, compare=False)

    def about(self) -> dict[str, Any]:
        """What the header says of it."""
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "convention": self.convention,
            "identity": self.dataset_identity,
            "checkpoint": self.checkpoint,
            "sha256": digest(self.weights),
        }


def digest(weights: dict[str, Any]) -> str:
    from safetensors.torch import save

    return hashlib.sha256(save(weights)).hexdigest()


def is_named(place: str) -> bool:
    """Whether a place that was given for a run is such a file."""
    return place.endswith(SUFFIX) and not storage.is_folder(place)


def content(networks: list[SharedNetwork], postprocessing: Mapping[str, Any] | None, card: str) -> bytes:
    """The file. The same networks, rules and card give the same bytes."""
    tensors = {f"{number}/{name}": t for number, n in enumerate(networks) for name, t in n.weights.items()}
    about = {"networks": [network.about() for network in networks], "postprocessing": postprocessing}
    told = {"kind": KIND, "about": json.dumps(about, sort_keys=True), "card": card}
    return bytes(checkpoint.tensors_file(tensors, metadata=told))  # the library's own puts these in a random order


def header(whole: bytes) -> dict[str, Any]:
    """{"networks", "postprocessing", "card"} as the file says. Raises ValueError when it is none of ours."""
    try:
        size = int.from_bytes(whole[:8], "little")
        told = json.loads(whole[8 : 8 + size])["__metadata__"]
        if told["kind"] != KIND:
            raise ValueError(f"its kind is {told['kind']}")
        about = json.loads(told["about"])
        return {"networks": list(about["networks"]), "postprocessing": about["postprocessing"], "card": told["card"]}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("it does not say what it holds") from error


def read(uri: str) -> list[SharedNetwork]:
    """Raises UserError when the file is not there, damaged or none of ours."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    whole = _bytes(uri)
    try:
        told, tensors = header(whole)["networks"], load(whole)
        networks = []
        for number, about in enumerate(told):
            mine = {n.partition("/")[2]: t for n, t in tensors.items() if n.partition("/")[0] == str(number)}
            if digest(mine) != about["sha256"]:
                raise ValueError("its weights differ from their checksum")
            config = parse(about["config"], uri)
            about = str(about["convention"]), str(about["identity"]), str(about["checkpoint"])
            networks.append(SharedNetwork(config, *about, mine))
        if not networks:
            raise ValueError("it holds no network")
        return networks
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{uri} is damaged, or was not made by `raytrain-brats share` ({error})") from error


def postprocessing(uri: str) -> dict[str, Any] | None:
    """What held-out cases taught about its networks, as `postprocessing.json` has it; None where they did not."""
    try:
        found = header(_bytes(uri))["postprocessing"]
        return dict(found) if found else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{uri} is damaged, or was not made by `raytrain-brats share` ({error})") from error


def _bytes(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise UserError(f"{uri} does not exist; give a run folder, or a file made by `raytrain-brats share`") from error
