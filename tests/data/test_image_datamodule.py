"""Batches of images: pure functions of seed and step, whatever the workers; curriculum, resolution, augmentation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import trainer
from torch import Tensor

from frugal.data.adaptive import AdaptiveCurriculum
from frugal.data.curriculum import Curriculum, ResolutionStage
from frugal.data.image_batches import EvaluationImages, resized
from frugal.data.image_datamodule import ImageDataModule
from frugal.data.image_difficulty import NeighbourLoss
from frugal.data.image_store import TEST, TRAIN, VAL
from frugal.data.images import SklearnDigits
from frugal.data.transforms.image import ImageTransforms
from frugal.errors import UserError
from frugal.schedule import Ramp
from frugal.training.reference import ReferenceLoss


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def module(cache: Path, where: dict[str, Any] | None = None, **options: Any) -> ImageDataModule:
    options = {"batch_size": 6, "val_fraction": 0.1, "seed": 3, "cache_dir": str(cache), **options}
    data = ImageDataModule(SklearnDigits(), image_size=8, channels=1, n_classes=10, **options)
    data.trainer = trainer(**{"max_steps": 8, **(where or {})})
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: ImageDataModule) -> list[dict[str, Tensor]]:
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "curriculum": Curriculum("loss", 6, reference=NeighbourLoss()),
        "resolutions": [ResolutionStage(0, 4), ResolutionStage(3, 8)],
        "transforms": ImageTransforms(rotation=20, mix="mixup"),
        "n_train": 100,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batches_depend_on_seed_and_step_only(cache: Path, options: dict[str, Any]) -> None:
    whole = batches(module(cache, **options))
    assert len(whole) == 16 and not equal(whole, batches(module(cache, **options, seed=4)))
    assert equal(whole, batches(module(cache, **options, num_workers=1)))
    data = module(cache, **options)
    iterator = iter(data.train_dataloader())
    for _ in range(10):
        next(iterator)
    data.trainer.global_step = 5
    state = data.state_dict()
    later = module(cache, {"global_step": 5}, **options)
    later.load_state_dict(state)
    assert equal(whole[10:], batches(later))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_see_the_parts_of_one_stream(cache: Path, ranks: int) -> None:
    transforms = {"transforms": ImageTransforms(rotation=20, crop=0.7)}
    one = module(cache, {"accumulate_grad_batches": 1}, batch_size=12, **transforms)
    several = [
        module(cache, {"accumulate_grad_batches": 1, "rank": r, "ranks": ranks}, batch_size=12 // ranks, **transforms)
        for r in range(ranks)
    ]
    for whole, *parts in zip(batches(one), *map(batches, several), strict=True):
        for name in ("images", "targets"):
            together = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(together, whole[name], rtol=0, atol=1e-6)


def test_an_epoch_has_every_training_image_once(cache: Path) -> None:
    data = module(cache, {"max_steps": 20, "accumulate_grad_batches": 1}, n_train=120)
    rows = [data.training_data.locate(i) for i in range(120)] if batches(data) else []
    assert sorted(rows) == list(range(120))
    assert rows != [data.training_data.locate(i) for i in range(120, 240)]


def test_pixels_and_labels_are_those_of_the_source(cache: Path) -> None:
    data = module(cache)
    first = next(iter(data.train_dataloader()))
    prepared = data.prepared
    assert prepared is not None and first["images"].shape == (6, 1, 8, 8) and first["index"].tolist() == list(range(6))
    for image, label in zip(first["images"], first["labels"], strict=True):
        same = [(row == np.rint(image.numpy() * 255)).all() for row in prepared.images]
        assert prepared.labels[same.index(True)] == label and prepared.splits[same.index(True)] == TRAIN


def test_few_training_images_are_balanced_nested_and_drawn_by_the_seed(cache: Path) -> None:
    few, more = module(cache, n_train=50), module(cache, n_train=55)
    assert few.prepared is not None
    rows, more_rows = few._rows(few.prepared), more._rows(few.prepared)
    assert np.bincount(few.prepared.labels[rows]).tolist() == [5] * 10
    assert set(rows) < set(more_rows) and np.bincount(few.prepared.labels[more_rows]).max() == 6
    assert set(rows) != set(module(cache, n_train=50, seed=4)._rows(few.prepared))
    with pytest.raises(UserError, match=r"data\.n_train: 5000 of \d+ training images"):
        module(cache, n_train=5000)


def test_evaluation_sees_each_image_once_on_any_number_of_ranks(cache: Path) -> None:
    for split, loader in ((VAL, "val_dataloader"), (TEST, "test_dataloader")):
        labels: list[int] = []
        for rank in range(3):
            data = module(cache, {"rank": rank, "ranks": 3}, eval_batch_size=50)
            assert data.prepared is not None and data.has_test_split
            for batch in getattr(data, loader)():
                labels += batch["labels"][batch["labels"] >= 0].tolist()
        assert labels == data.prepared.labels[data.prepared.of(split)].tolist()
    padded = EvaluationImages(data.prepared.images, data.prepared.labels, data.prepared.of(VAL)[:2])[5]
    assert padded["labels"].tolist() == [-100] and not padded["images"].any()


def test_validation_is_never_augmented(cache: Path) -> None:
    data = module(cache, transforms=ImageTransforms(rotation=90))
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0) is batch
    train = next(iter(data.train_dataloader()))
    assert "targets" in data.on_after_batch_transfer(train, 0)
    data.trainer.training = False
    assert data.on_after_batch_transfer(train, 0) is train


def test_the_probability_of_augmentation_follows_the_step_not_the_batch(cache: Path) -> None:
    transforms = ImageTransforms(flip=1.0, probability=Ramp(start=2))
    changed = [
        not torch.equal(data_batch["images"], plain["images"])
        for data_batch, plain in zip(batches(module(cache, transforms=transforms)), batches(module(cache)), strict=True)
    ]
    assert changed == [False] * 4 + [True] * 12  # two micro-batches a step


def test_a_curriculum_begins_with_the_images_that_neighbours_find_easy(cache: Path) -> None:
    reference = NeighbourLoss()
    data = module(cache, curriculum=Curriculum("loss", 8, start=0.2, pacing="step", reference=reference))
    assert data.prepared is not None
    rows = data._rows(data.prepared)
    loss = reference.score(np.asarray(data.prepared.images[rows]), data.prepared.labels[rows], 10)
    data.train_dataloader()
    drawn = np.array([data.training_data.locate(i) for i in range(8 * 12)])
    early, late = loss[drawn[: 4 * 12]], loss[drawn[4 * 12 :]]
    assert early.max() <= np.quantile(loss, 0.21) and late.max() > np.quantile(loss, 0.5)
    assert data.seconds_by_stage["difficulty"] > 0 and data.charged_seconds >= data.seconds_by_stage["difficulty"]


def test_an_adaptive_curriculum_draws_bands(cache: Path) -> None:
    adaptive = AdaptiveCurriculum("compressibility", every=2, lead=4, bands=3)
    data = module(cache, adaptive=adaptive)
    assert len(data.group_names) == 3
    iterator = iter(data.train_dataloader())
    first = [next(iterator) for _ in range(4)]
    assert all(batch["groups"].max() < 3 for batch in first)
    (score,) = data.difficulty_of_samples("compressibility")
    easy = [data.training_data.locate(i) for i in range(24) if data.training_data.mixer.locate(i)[0] == 0]  # type: ignore
    assert score[easy].max() <= np.quantile(score, 0.4)


def test_smaller_images_are_means_of_the_larger(cache: Path) -> None:
    data = module(cache, resolutions=[ResolutionStage(0, 4), ResolutionStage(3, 8)])
    found = batches(data)
    assert [batch["images"].shape[-1] for batch in found] == [4] * 6 + [8] * 10
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(resized(flat, 4), torch.full((1, 1, 4, 4), 0.3))
    assert resized(flat, 8) is flat


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: must be at least 1, got 0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction: must lie between 0 and 1"),
        ({"n_train": 3}, r"data\.n_train: must be at least 10, got 3"),
        ({"resolutions": [ResolutionStage(0, 16)]}, r"data\.resolutions\[0\]\.image_size: .* data\.image_size \(8\)"),
        ({"resolutions": [ResolutionStage(5, 4)]}, r"data\.resolutions\[0\]\.start: the first stage starts at step 0"),
        ({"curriculum": Curriculum("rarity", 5)}, r"images have loss, compressibility and random, not rarity"),
        ({"adaptive": AdaptiveCurriculum("source")}, r"data\.adaptive\.by: images have bands of difficulty only"),
        (
            {"curriculum": Curriculum("loss", 5, reference=ReferenceLoss("x.ckpt"))},
            r"data\.curriculum\.reference: ReferenceLoss scores text, not images",
        ),
    ],
)
def test_impossible_settings_are_refused(cache: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(cache, **options)


def test_a_checkpoint_of_other_classes_is_refused(cache: Path) -> None:
    data = module(cache)
    data.train_dataloader()
    state = data.state_dict()
    with pytest.raises(UserError, match="tells other classes apart"):
        module(cache).load_state_dict({**state, "class_names": ["cat", "dog"]})
    with pytest.raises(UserError, match=r"seed_everything: the run's order of data belongs to seed 3"):
        module(cache, seed=4).load_state_dict(state)
