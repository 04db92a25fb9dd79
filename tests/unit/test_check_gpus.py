"""The first job on a new cluster: what it finds out about a card. The job itself runs in the EC2 rig."""

from typing import Any

import pytest
import torch

from raytrain_brats import check_gpus


def test_a_convolution_that_is_right_is_timed() -> None:
    assert check_gpus.convolve(torch.device("cpu"), 16) > 0


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_a_convolution_that_is_wrong_is_told(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a tenth in one place, as a broken kernel of cuDNN: the card and what is off are named."""
    asked, right = [0], check_gpus.results

    def sometimes_wrong(layer: Any, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made, gradient = right(layer, image)
        asked[0] += 1
        if asked[0] == 2:  # the card's; the first is the CPU's
            wrong = made if part == "result" else gradient
            wrong.view(-1)[0] += 0.1 * wrong.abs().max()
        return made, gradient

    monkeypatch.setattr(check_gpus, "results", sometimes_wrong)
    with pytest.raises(RuntimeError, match=f"CPU: the {part} of a 3D convolution is off by 10"):
        check_gpus.convolve(torch.device("cpu"), 16)
