"""Image augmentation with kornia, batched on the images' own device; a function of (images, labels, seed, step).

Shape letters: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from frugal.errors import UserError, require
from frugal.schedule import Ramp


class ImageTransforms:
    """Rotation, flip, crop, colour, then mixup or cutmix, each switched on by its own argument.

    `data.image_datamodule` calls it while training, where the batch lies on the device already; the loss is then
    `soft_cross_entropy`. Needs `pip install -e '.[vision]'`. There is no hue: on a CPU it costs more than all the rest.

    Args:
        probability: share of the images that are transformed, by step; for mixup and cutmix, share of the batches.
        rotation: largest angle in degrees, either way.
        flip: share of the transformed images that are mirrored left to right.
        crop: smallest share of the area that a random crop keeps; 1 is no crop. The crop is resized to H, W.
        brightness: what is added to all pixels of an image is uniform in [-brightness, brightness].
        contrast: the factor on all pixels is uniform in [1 - contrast, 1 + contrast].
        saturation: likewise its factor; for images of three channels.
        mix: mixup (Zhang et al. 2018, arXiv 1710.09412), cutmix (Yun et al. 2019, arXiv 1905.04899), one of the two by
            chance for each batch, or none; the share of each image is uniform (alpha = 1 in both papers).
    """

    def __init__(
        self,
        probability: Ramp = Ramp(),  # noqa: B008 (a frozen dataclass)
        rotation: float = 0.0,
        flip: float = 0.0,
        crop: float = 1.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        mix: Literal["none", "mixup", "cutmix", "either"] = "none",
    ) -> None:
        for key, value, low, high in (
            ("probability.value", probability.value, 0, 1),
            ("rotation", rotation, 0, 180),
            ("flip", flip, 0, 1),
            ("brightness", brightness, 0, 1),
            ("contrast", contrast, 0, 1),
            ("saturation", saturation, 0, 1),
        ):
            require(low <= value <= high, f"transforms.{key}: must lie in [{low}, {high}], got {value}")
        require(0 < crop <= 1, f"transforms.crop: must lie in (0, 1], got {crop}")
        require(mix in ("none", "mixup", "cutmix", "either"), f"transforms.mix: there is no {mix!r}")
        self.probability, self.rotation, self.flip, self.crop = probability, rotation, flip, crop
        self.brightness, self.contrast, self.saturation, self.mix = brightness, contrast, saturation, mix
        self._parts: dict[tuple[int, int, int], list[Any]] = {}

    def _single(self, c: int, h: int, w: int) -> list[Any]:
        """The transforms of one image at a time, for a shape."""
        if (c, h, w) not in self._parts:
            kornia = _kornia()
            parts: list[Any] = []
            if self.rotation:
                parts.append(kornia.RandomRotation(self.rotation, p=1.0))
            if self.flip:
                parts.append(kornia.RandomHorizontalFlip(p=self.flip))
            if self.crop < 1:
                parts.append(kornia.RandomResizedCrop((h, w), scale=(self.crop, 1.0), p=1.0))
            for name, amount in (("Brightness", self.brightness), ("Contrast", self.contrast)):
                if amount:
                    parts.append(getattr(kornia, f"Random{name}")((1 - amount, 1 + amount), p=1.0))
            if self.saturation:
                require(c == 3, f"transforms.saturation: needs images of three channels, got {c}")
                parts.append(kornia.RandomSaturation((1 - self.saturation, 1 + self.saturation), p=1.0))
            self._parts[c, h, w] = parts
        return self._parts[c, h, w]

    @torch.no_grad()
    def __call__(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        n_classes: int,
        seed: int,
        number: int,
        rank: int = 0,
        ranks: int = 1,
        step: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transformed images [B, C, H, W] and soft labels [B, K], each row of which adds up to 1.

        The same arguments always give the same result; the global random state is neither read nor changed. Every rank
        draws for the images of all and takes its own, so several ranks do what one does with the whole batch; only
        mixing, which needs two images, stays within a rank's.

        Args:
            images_BCHW: float, in [0, 1].
            labels_B: int64 class numbers.
            n_classes: K.
            seed: the run's.
            number: of all ranks' batch in the run, or of its first sample: another number, other draws.
            rank: which part of that batch the images are.
            ranks: how many parts of this size it has.
            step: decides the probability; null means number.
        """
        require(
            images_BCHW.dim() == 4 and images_BCHW.is_floating_point(),
            f"transforms: images must be float [B, C, H, W], got {images_BCHW.dtype} {list(images_BCHW.shape)}",
        )
        soft_BK = torch.nn.functional.one_hot(labels_B, n_classes).to(images_BCHW.dtype)
        rng = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 0]))
        share = self.probability.at(number if step is None else step)
        # kornia draws its parameters on the CPU from torch's global generator, which is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            n, own = len(images_BCHW), slice(rank * len(images_BCHW), (rank + 1) * len(images_BCHW))
            chosen = rng.random(n * ranks) < share
            chosen_B = torch.from_numpy(chosen[own]).to(images_BCHW.device)
            out_BCHW = images_BCHW
            for part in self._single(*images_BCHW.shape[1:]) if chosen.any() else []:
                drawn = part.forward_parameters(torch.Size((n * ranks, *images_BCHW.shape[1:])))
                shape = drawn.pop("forward_input_shape")
                shape[0] = n
                own_drawn = {name: values[own] for name, values in drawn.items()}
                out_BCHW = part(out_BCHW, params={**own_drawn, "forward_input_shape": shape})
            out_BCHW = torch.where(chosen_B[:, None, None, None], out_BCHW, images_BCHW)
            mix = ("mixup", "cutmix")[int(rng.integers(2))] if self.mix == "either" else self.mix
            if mix != "none" and n > 1 and rng.random() < share:
                if rank:
                    torch.manual_seed(int(rng.integers(2**62)) + rank)  # not the first rank's pairs and shares
                out_BCHW, soft_BK = _mix(mix, out_BCHW, labels_B, soft_BK)
        return out_BCHW.clamp(0, 1), soft_BK


def _kornia() -> Any:
    try:
        import kornia.augmentation
    except ModuleNotFoundError as error:
        raise UserError(f"transforms: {error.name} is missing; run `pip install -e '.[vision]'`") from None
    return kornia.augmentation


def _mix(kind: str, images_BCHW: Tensor, labels_B: Tensor, soft_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image with another of the batch; labels in the same shares."""
    make = _kornia().RandomMixUpV2 if kind == "mixup" else _kornia().RandomCutMixV2
    # kornia's labels are (own class, other class, share of the other); row numbers as classes tell which other.
    rows_B = torch.arange(len(labels_B), device=labels_B.device)
    mixed_BCHW, pairs = make(p=1.0, data_keys=["input", "class"])(images_BCHW, rows_B)
    pairs_B3 = pairs.reshape(-1, 3)
    other_B1 = pairs_B3[:, 2:].to(soft_BK.dtype)
    return mixed_BCHW, soft_BK * (1 - other_B1) + soft_BK[pairs_B3[:, 1].long()] * other_B1


def soft_cross_entropy(logits_BK: Tensor, soft_BK: Tensor) -> Tensor:
    """Mean cross entropy in nats against soft labels; equal to the usual one where a row has a single 1."""
    return -(soft_BK * torch.log_softmax(logits_BK.float(), dim=-1)).sum(dim=-1).mean()
