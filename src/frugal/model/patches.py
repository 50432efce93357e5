"""From an image to tokens: patches, projected, with their positions.

Shape letters: B images, C channels, H = W pixels of a side, G patches of a side, N = G * G patches, P pixels of a
patch's side, T tokens (patches and class token), D d_model, F pairs of a rotated head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.linear import linear
from frugal.model.rope import rotary_frequencies
from frugal.model.vision_config import VisionConfig


def to_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches row by row: [B, C, H, W] -> [B, N, C * P * P]."""
    tiles = images_BCHW.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def resized_positions(position_ND: Tensor, grid: int) -> Tensor:
    """Learned positions of a square grid on another one, [grid * grid, D], by bilinear interpolation."""
    own = round(len(position_ND) ** 0.5)
    if grid == own:
        return position_ND
    square_1DGG = position_ND.t().unflatten(1, (own, own)).unsqueeze(0)
    resized = F.interpolate(square_1DGG.float(), size=(grid, grid), mode="bilinear", align_corners=False)
    return resized.squeeze(0).flatten(1).t().to(position_ND.dtype)


def rotary_grid(config: VisionConfig, grid: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by row and column, float32, each [T, F]: the first half of the pairs turn by the row.

    A smaller grid covers the same image, so its patches stand where they would in the whole one (`config.grid` units
    a side). The class token does not turn.
    """
    frequency_F = rotary_frequencies(config.rotary_dim // 2, config.attention.rope_theta)
    place_G = (torch.arange(grid, dtype=torch.float32) + 0.5) * (config.grid / grid) - 0.5
    angle_GF = torch.outer(place_G, frequency_F)
    rows = angle_GF.unsqueeze(1).expand(-1, grid, -1)
    columns = angle_GF.unsqueeze(0).expand(grid, -1, -1)
    angle_TF = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    if config.pool == "class":
        angle_TF = F.pad(angle_TF, (0, 0, 1, 0))
    return angle_TF.cos(), angle_TF.sin()


class PatchEmbedding(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> tokens [B, T, D]; H = W may be smaller than `image_size`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.d_model, config.input_width))
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(config.grid**2, config.d_model))
        if config.pool == "class":
            self.class_token = nn.Parameter(torch.empty(config.d_model))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalise, cut, project, place."""
        config = self.config
        pixels_BCHW = (images_BCHW - config.pixel_mean) / config.pixel_std
        x_BTD = linear(to_patches(pixels_BCHW, config.patch_size), self.weight)
        if config.position == "learned":
            x_BTD = x_BTD + resized_positions(self.position, images_BCHW.shape[-1] // config.patch_size)
        if config.pool == "class":
            x_BTD = torch.cat((self.class_token.to(x_BTD.dtype).expand(len(x_BTD), 1, -1), x_BTD), dim=1)
        return x_BTD
