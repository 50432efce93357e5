"""The shape of an image classifier: the same blocks over patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from frugal.errors import require
from frugal.model.config import BlocksConfig

KEY = "model.transformer"


@dataclass(frozen=True)
class VisionConfig(BlocksConfig):
    """A vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) of the blocks that language models use.

    A token is a square patch of the image; `attention.causal` is usually false.

    Args:
        image_size: height and width in pixels; linked to data.image_size.
        channels: 1 for grey, 3 for colour; linked to data.channels.
        n_classes: classes to tell apart; linked to data.n_classes.
        patch_size: height and width of a patch; divides image_size.
        position: learned adds a vector to each patch, interpolated where images are smaller; rotary rotates queries
            and keys by the patch's row and column (half of each head's pairs for either; Heo et al. 2024, arXiv
            2403.13298), for which attention.rope_theta 100 suits grids of tens of patches.
        pool: what the head reads: the mean over patches, or a class token in front of them.
        pixel_mean: taken off every pixel, which is in [0, 1].
        pixel_std: what it is then divided by.
    """

    image_size: int = field(kw_only=True)
    channels: int = field(kw_only=True)
    n_classes: int = field(kw_only=True)
    patch_size: int = field(kw_only=True)
    position: Literal["learned", "rotary"] = field(default="learned", kw_only=True)
    pool: Literal["mean", "class"] = field(default="mean", kw_only=True)
    pixel_mean: float = field(default=0.5, kw_only=True)
    pixel_std: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "n_classes", "patch_size", "pixel_std"):
            require(getattr(self, name) > 0, f"{KEY}.{name}: must be positive, got {getattr(self, name)}")
        require(
            self.image_size % self.patch_size == 0,
            f"{KEY}.patch_size: {self.patch_size} does not divide image_size ({self.image_size})",
        )
        super().__post_init__()
        require(
            self.position == "learned" or self.rotary_dim % 4 == 0,
            f"{KEY}.position: rotary needs a rotated width that is a multiple of 4 (half for rows, half for columns), "
            f"got {self.rotary_dim}",
        )
        require(
            self.position == "rotary" or self.attention.rope_scaling is None,
            f"{KEY}.attention.rope_scaling: means nothing with learned positions",
        )
        require(
            self.pool == "mean" or not self.attention.causal,
            f"{KEY}.pool: a class token in front sees no patch with causal attention; set attention.causal to false",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of a whole image."""
        return self.image_size // self.patch_size

    @property
    def max_seq_len(self) -> int:
        """Tokens of a whole image: its patches, and the class token."""
        return self.tokens_of(self.image_size)

    def tokens_of(self, image_size: int) -> int:
        """Tokens of an image of this height and width."""
        return (image_size // self.patch_size) ** 2 + self._class_tokens

    @property
    def _class_tokens(self) -> int:
        return int(self.pool == "class")

    @property
    def n_outputs(self) -> int:
        """One per class."""
        return self.n_classes

    @property
    def input_width(self) -> int:
        """Pixels of a patch, all channels."""
        return self.channels * self.patch_size**2

    @property
    def input_parameters(self) -> int:
        """The patches' matrix, learned positions and the class token."""
        positions = self.grid**2 if self.position == "learned" else 0
        return (self.input_width + positions + self._class_tokens) * self.d_model

    @property
    def input_names(self) -> tuple[str, ...]:
        """How those are called in the model's `state_dict()`."""
        return (
            "embedding.weight",
            *(("embedding.position",) if self.position == "learned" else ()),
            *(("embedding.class_token",) if self._class_tokens else ()),
        )

    def ends_per_token(self, seq_len: int) -> tuple[float, float]:
        """All but the class token come from a patch; the head reads one vector per image."""
        return (seq_len - self._class_tokens) / seq_len, 1 / seq_len
