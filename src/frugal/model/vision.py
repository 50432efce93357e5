"""An image classifier on the blocks of the language model.

Shape letters: B images, C channels, H = W pixels of a side, T tokens (patches and class token), D d_model, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frugal.model.patches import PatchEmbedding, rotary_grid
from frugal.model.transformer import BlockStack
from frugal.model.vision_config import VisionConfig


class VisionTransformer(BlockStack):
    """Images [B, C, H, W] in [0, 1] -> logits [B, K]; smaller images than `image_size` are fewer patches."""

    config: VisionConfig
    embedding: PatchEmbedding

    def __init__(self, config: VisionConfig) -> None:
        rotary = rotary_grid(config, config.grid) if config.position == "rotary" else (torch.empty(0), torch.empty(0))
        super().__init__(config, PatchEmbedding(config), rotary)

    def _rotary(self, grid: int) -> tuple[Tensor, Tensor] | None:
        if self.config.position == "learned":
            return None
        if grid == self.config.grid:
            return self.cos, self.sin
        cos, sin = rotary_grid(self.config, grid)
        return cos.to(self.cos.device), sin.to(self.cos.device)

    def hidden(self, images_BCHW: Tensor) -> Tensor:
        """Final normalised hidden states of all tokens [B, T, D]."""
        rotary = self._rotary(images_BCHW.shape[-1] // self.config.patch_size)
        x_BTD = self.embedding(images_BCHW)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary)
        return self.norm(x_BTD)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, K] from the mean over the patches, or from the class token."""
        hidden_BTD = self.hidden(images_BCHW)
        pooled_BD = hidden_BTD.mean(dim=1) if self.config.pool == "mean" else hidden_BTD[:, 0]
        return self.head(pooled_BD)
