"""The networks that a recipe may name, and their options.

In: a recipe's `network` section.
Out: frozen options, checked; learn/model.py builds the network. `width` names the option that makes it smaller.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from raytrain_brats.parts import OwnPart


class Frozen(BaseModel):
    """A section of a recipe: unknown keys are refused, nothing in it changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SegResNetOptions(Frozen):
    """MONAI SegResNet without its VAE branch (Myronenko 2018, arXiv 1810.11654); group norm."""

    width: ClassVar = "init_filters"
    name: Literal["segresnet"]
    """Which network: segresnet, dynunet, mednext or unet."""
    init_filters: PositiveInt = 16
    """Channels at full resolution; each level below has twice as many."""
    blocks_down: tuple[PositiveInt, ...] = (1, 2, 2, 4)
    """Residual blocks of each level, the deepest last."""
    blocks_up: tuple[PositiveInt, ...] = (1, 1, 1)
    """Likewise on the way up, but for the deepest."""

    @model_validator(mode="after")
    def _fits(self) -> "SegResNetOptions":
        if len(self.blocks_up) != len(self.blocks_down) - 1:
            raise ValueError("blocks_up must have one entry less than blocks_down")
        if self.init_filters % 8:
            raise ValueError("init_filters must be a multiple of 8, for group norm")
        return self

    @property
    def levels(self) -> int:
        return len(self.blocks_down)


class DynUNetOptions(Frozen):
    """MONAI DynUNet, nnU-Net's network (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z); instance norm."""

    width: ClassVar = "filters"
    name: Literal["dynunet"]
    """Which network: segresnet, dynunet, mednext or unet."""
    filters: Annotated[tuple[PositiveInt, ...], Field(min_length=3)] = (32, 64, 128, 256, 320)
    """Channels of each level, the deepest last."""
    heads: int = Field(default=0, ge=0)
    """Deep supervision: outputs at 1/2, 1/4, ... of the resolution, in training only. Each weighs half as much as the
    one above."""

    @model_validator(mode="after")
    def _fits(self) -> "DynUNetOptions":
        if self.heads > len(self.filters) - 2:
            raise ValueError(f"heads must be {len(self.filters) - 2} at most: the deepest two levels have none")
        return self

    @property
    def levels(self) -> int:
        return len(self.filters)


class MedNeXtOptions(Frozen):
    """MONAI MedNeXt (Roy et al. 2023, arXiv 2303.09975); group norm. By default its size S."""

    width: ClassVar = "init_filters"
    name: Literal["mednext"]
    """Which network: segresnet, dynunet, mednext or unet."""
    init_filters: PositiveInt = 32
    """Channels at full resolution; each level below has twice as many."""
    kernel_size: Literal[3, 5] = 3
    """Edge of the depthwise convolutions, in voxels."""
    blocks: Annotated[tuple[PositiveInt, ...], Field(min_length=2)] = (2, 2, 2, 2, 2)
    """By level, the deepest last; the way up has as many. B has the same, L 3, 4, 8, 8, 8."""
    expansion: tuple[PositiveInt, ...] = (2, 2, 2, 2, 2)
    """Likewise. B has 2, 3, 4, 4, 4; L 3, 4, 8, 8, 8."""
    heads: int = Field(default=0, ge=0)
    """As DynUNet's."""

    @model_validator(mode="after")
    def _fits(self) -> "MedNeXtOptions":
        if len(self.expansion) != len(self.blocks):
            raise ValueError("expansion must have as many entries as blocks")
        if self.heads > len(self.blocks) - 1:
            raise ValueError(f"heads must be {len(self.blocks) - 1} at most")
        return self

    @property
    def levels(self) -> int:
        return len(self.blocks)


class UNetOptions(Frozen):
    """MONAI UNet with residual units (Kerfoot et al. 2019, doi 10.1007/978-3-030-12029-0_40); instance norm."""

    width: ClassVar = "channels"
    name: Literal["unet"]
    """Which network: segresnet, dynunet, mednext or unet."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=2)] = (16, 32, 64, 128, 256)
    """Of each level, the deepest last."""
    res_units: PositiveInt = 2
    """Convolutions of a residual unit, on the way down; one on the way up."""

    @property
    def levels(self) -> int:
        return len(self.channels)


class OwnNetwork(OwnPart):
    """A class of one's own, or of a library, as `package.module:Class` (docs/own-parts.md); options beside the name are
    the class's own."""

    width: ClassVar = "name"


OURS, OWN = "(ours)", "(own)"
"""What Pydantic puts into the place of an error; no keys of a recipe."""


def whose(value: Any) -> str:
    """Whether a value of a recipe names a part of this package, or another's."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    return OWN if isinstance(name, str) and ":" in name else OURS


_Ours = Annotated[SegResNetOptions | DynUNetOptions | MedNeXtOptions | UNetOptions, Field(discriminator="name")]
Network = Annotated[Annotated[_Ours, Tag(OURS)] | Annotated[OwnNetwork, Tag(OWN)], Discriminator(whose)]
NAMES = ("segresnet", "dynunet", "mednext", "unet")
