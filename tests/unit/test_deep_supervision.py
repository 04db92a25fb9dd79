"""Lower heads of DynUNet and MedNeXt: MONAI's numbers at their own resolution, and the sum of their losses."""

from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.mednext import MedNeXt
from torch import nn
from torch.nn import functional

from raytrain_brats.config import parse
from raytrain_brats.learn import model

FILTERS = [4, 4, 8, 8, 8]
IMAGE = torch.randn(2, 4, 32, 32, 32, generator=torch.Generator().manual_seed(0))


def ours(**network: Any) -> nn.Module:
    return model.build_network(parse({"network": network}, "test"))


def supervised() -> tuple[nn.Module, nn.Module]:
    """(ours with three heads, MONAI's with the same weights)."""
    mine, norm = ours(name="dynunet", filters=FILTERS, heads=3), ("INSTANCE", {"affine": True})
    ends: dict[str, Any] = {"norm_name": norm, "filters": FILTERS, "deep_supervision": True, "deep_supr_num": 3}
    theirs = DynUNet(3, 4, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, **ends)
    missing, unknown = theirs.load_state_dict(mine.state_dict(), strict=False)
    assert unknown == [] and all(name.startswith("skip_layers.") for name in missing)  # the same layers once more
    return mine, theirs


def test_heads_are_monais_at_their_own_resolution() -> None:
    """Logits and heads bit for bit; enlarged they are what MONAI stacks. In eval one plain tensor, without heads."""
    mine, theirs = supervised()
    found, stacked = mine(IMAGE), theirs(IMAGE)
    assert [o.shape[2:] for o in found] == [(32 >> n,) * 3 for n in range(4)]
    enlarged = torch.stack([functional.interpolate(o, (32, 32, 32)) for o in found], dim=1)
    assert torch.equal(enlarged, stacked)
    assert torch.equal(mine.eval()(IMAGE), theirs.eval()(IMAGE))


def test_weights_that_stand_twice_are_read() -> None:
    """Checkpoints of earlier versions, and MONAI's own, name DynUNet's layers twice; ours once."""
    mine, theirs = supervised()
    names = list(mine.state_dict())
    assert len(names) == len({p.data_ptr() for p in mine.state_dict().values()})
    nn.init.ones_(theirs.output_block.conv.conv.bias)
    mine.load_state_dict(theirs.state_dict())
    assert torch.equal(mine.eval()(IMAGE), theirs.eval()(IMAGE)) and list(mine.state_dict()) == names
    with pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if "heads" not in name})


@pytest.mark.parametrize("heads", [0, 2])
def test_mednext_is_monais(heads: int) -> None:
    """The same weights give the same logits and heads, bit for bit."""
    mine = ours(name="mednext", init_filters=4, blocks=[1, 2, 1], expansion=[2, 3, 4], heads=heads)
    ends: dict[str, Any] = {"encoder_expansion_ratio": (2, 3), "decoder_expansion_ratio": (3, 2)}
    ends |= {"bottleneck_expansion_ratio": 4, "blocks_down": (1, 2), "blocks_bottleneck": 1, "blocks_up": (2, 1)}
    ends |= {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "use_residual_connection": True}
    theirs = MedNeXt(init_filters=4, deep_supervision=heads > 0, **ends)
    weights = mine.state_dict()
    for number in range(heads):  # theirs begin with the deepest
        for kind in ("weight", "bias"):
            weights[f"out_blocks.{heads - 1 - number}.conv_out.{kind}"] = weights.pop(f"heads.{number}.conv_out.{kind}")
    theirs.load_state_dict(weights)
    made = ([outputs] if isinstance(outputs, torch.Tensor) else outputs for outputs in (mine(IMAGE), theirs(IMAGE)))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert torch.equal(mine.eval()(IMAGE), theirs.eval()(IMAGE))


def test_the_loss_is_the_weighted_sum_over_the_heads() -> None:
    """8/15, 4/15, 2/15, 1/15 of each output's loss against the region masks at its resolution; by sample."""
    random = torch.Generator().manual_seed(1)
    regions = (torch.rand(2, 3, 16, 16, 16, generator=random) < 0.3).float()
    outputs = [torch.randn(2, 3, *[16 >> n] * 3, generator=random) for n in range(4)]
    expected = torch.zeros(2)
    for number, (output, weight) in enumerate(zip(outputs, (8 / 15, 4 / 15, 2 / 15, 1 / 15), strict=True)):
        factor = 1 << number
        nearest = regions[..., factor // 2 :: factor, factor // 2 :: factor, factor // 2 :: factor]
        expected += weight * model.sample_losses(output, nearest)
    found = model.sample_losses(outputs, regions)
    torch.testing.assert_close(found, expected)
    for sample in range(2):
        part = slice(sample, sample + 1)
        alone = model.sample_losses([o[part] for o in outputs], regions[part])
        torch.testing.assert_close(found[part], alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.sample_losses(outputs[:1], regions), model.sample_losses(outputs[0], regions))


def test_dice_alone_is_the_article_s_loss() -> None:
    """`train.loss: dice` leaves the cross-entropy out, and nothing else."""
    logits, regions = torch.randn(2, 3, 4, 4, 4), (torch.rand(2, 3, 4, 4, 4) < 0.3).float()
    entropy = functional.binary_cross_entropy_with_logits(logits, regions, reduction="none").flatten(1).mean(1)
    alone = model.sample_losses(logits, regions, "dice")
    torch.testing.assert_close(alone + entropy, model.sample_losses(logits, regions))
    assert np.all(alone.numpy() <= 1)
