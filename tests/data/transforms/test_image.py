"""Image augmentation: deterministic by (seed, step), exact where a closed form exists."""

from typing import Any

import pytest
import torch

from frugal.data.transforms.image import ImageTransforms, soft_cross_entropy
from frugal.errors import UserError
from frugal.schedule import Ramp

IMAGES = torch.rand(16, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 5
ALL = {
    "rotation": 20.0,
    "flip": 0.5,
    "crop": 0.6,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "mix": "either",
}


def run(images: torch.Tensor = IMAGES, seed: int = 1, step: int = 0, rank: int = 0, **options: Any) -> Any:
    return ImageTransforms(**options)(images, LABELS[: len(images)], 5, seed, step, rank)


@pytest.mark.parametrize("options", [*({key: value} for key, value in ALL.items()), ALL], ids=str)
def test_the_same_seed_and_step_give_the_same_batch(options: dict[str, Any]) -> None:
    transforms = ImageTransforms(**options)
    images, soft = transforms(IMAGES, LABELS, 5, 1, 7)
    state = torch.random.get_rng_state()
    torch.rand(5)  # what others draw does not matter
    again, soft_again = transforms(IMAGES, LABELS, 5, 1, 7)
    assert torch.equal(images, again) and torch.equal(soft, soft_again)
    assert images.shape == IMAGES.shape and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    for seed, step, rank in ((2, 7, 0), (1, 8, 0), (1, 7, 1)):
        assert not torch.equal(transforms(IMAGES, LABELS, 5, seed, step, rank, 2)[0], images)
    torch.random.set_rng_state(state)
    transforms(IMAGES, LABELS, 5, 1, 7)
    assert torch.equal(torch.random.get_rng_state(), state)  # and nothing of it changed


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_together_what_one_does(ranks: int) -> None:
    transforms = ImageTransforms(**{**ALL, "mix": "none", "probability": Ramp(0.7)})
    size = len(IMAGES) // ranks
    whole, soft = transforms(IMAGES, LABELS, 5, 1, 7)
    parts = [transforms(IMAGES[r * size :][:size], LABELS[r * size :][:size], 5, 1, 7, r, ranks) for r in range(ranks)]
    torch.testing.assert_close(torch.cat([images for images, _ in parts]), whole, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([labels for _, labels in parts]), soft)


def test_off_is_off() -> None:
    for options in ({}, {**ALL, "probability": Ramp(0.0)}, {**ALL, "probability": Ramp(start=1)}):
        images, soft = run(**options)
        assert torch.equal(images, IMAGES)
        assert torch.equal(soft, torch.nn.functional.one_hot(LABELS, 5).float())


def test_flip_mirrors_every_image() -> None:
    assert torch.equal(run(flip=1.0)[0], IMAGES.flip(-1))


def test_the_probability_is_a_share_of_the_images() -> None:
    changed = [
        (run(flip=1.0, probability=Ramp(0.3), step=step)[0] != IMAGES).flatten(1).any(1).float().mean()
        for step in range(40)
    ]
    assert sum(changed) / 40 == pytest.approx(0.3, abs=4 * (0.21 / 640) ** 0.5)


def test_brightness_shifts_and_contrast_stretches() -> None:
    middle = 0.4 + 0.2 * IMAGES  # nothing is cut off at 0 or 1
    shift = (run(middle, brightness=0.3)[0] - middle).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=0)
    assert -0.3 <= shift.min() < -0.1 and 0.1 < shift.max() <= 0.3
    ratio = (run(middle, contrast=0.3)[0] / middle).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-5, rtol=0)
    assert 0.7 <= ratio.min() < 0.9 and 1.1 < ratio.max() <= 1.3


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(mix: str) -> None:
    """Constant images of their class number: the mean of the pixels must be the mean of the soft label."""
    images = (LABELS.float() / 4)[:, None, None, None].expand(16, 1, 24, 24).contiguous()
    mixed, soft = run(images, mix=mix, step=3)
    expected = (soft * torch.arange(5.0)).sum(1) / 4
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-5, rtol=1e-5)
    assert ((soft > 0).sum(1) == 2).sum() > 5
    if mix == "cutmix":
        assert all(len(image.unique()) <= 2 for image in mixed)


def test_either_takes_both() -> None:
    images = (LABELS.float() / 4)[:, None, None, None].expand(16, 1, 24, 24).contiguous()
    kinds = {max(len(image.unique()) for image in run(images, mix="either", step=step)[0]) for step in range(12)}
    assert kinds == {1, 2}  # mixup leaves a constant image constant


def test_soft_cross_entropy_is_the_usual_one_for_hard_labels() -> None:
    logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.cross_entropy(logits, LABELS)
    torch.testing.assert_close(soft_cross_entropy(logits, run()[1]), expected)
    soft = run(mix="mixup")[1]
    torch.testing.assert_close(soft_cross_entropy(logits, soft), torch.nn.functional.cross_entropy(logits, soft))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0.0}, r"transforms\.crop"),
        ({"flip": 1.5}, r"transforms\.flip: must lie in \[0, 1\], got 1.5"),
        ({"rotation": -1.0}, r"transforms\.rotation"),
        ({"mix": "blend"}, r"transforms\.mix: there is no 'blend'"),
        ({"probability": Ramp(2.0)}, r"transforms\.probability\.value"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageTransforms(**options)


def test_bad_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"images must be float \[B, C, H, W\], got torch.uint8"):
        run((IMAGES * 255).byte())
    with pytest.raises(UserError, match=r"transforms\.saturation: needs images of three channels, got 1"):
        run(IMAGES[:, :1], saturation=0.5)
