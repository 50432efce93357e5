"""The data module for labelled images; like that for text, its whole state is an index."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from frugal.data.adaptive import AdaptiveCurriculum, AdaptiveOrder, Bands, check_adaptive
from frugal.data.batches import ShardSampler, data_ranks
from frugal.data.curation.images import ImageCuration
from frugal.data.curriculum import BatchStage, Curriculum, PacedOrder, ResolutionStage, check_resolutions
from frugal.data.difficulty import Difficulty, Scorer
from frugal.data.image_batches import EvaluationImages, TrainingImages
from frugal.data.image_difficulty import image_difficulty, require_image_difficulty
from frugal.data.image_store import TEST, TRAIN, VAL, PreparedImages, prepare_images
from frugal.data.images import ImageSource
from frugal.data.stepping import PREFETCH, SteppedData
from frugal.data.transforms.image import ImageTransforms
from frugal.errors import UserError, require

log = logging.getLogger(__name__)


class ImageDataModule(SteppedData):
    """Labelled images, decoded once to one size.

    Args:
        source: where the images come from.
        image_size: height and width in pixels; images are cut to their middle square and resized.
        channels: 1 makes all images grey, 3 colour.
        n_classes: classes; labels outside are refused.
        batch_size: images per micro-batch and device.
        eval_batch_size: images per evaluation batch and device; null means batch_size.
        val_fraction: share of the training images that is held out for validation, by the hash of their pixels.
        n_train: train on so many images only, equally many of each class, chosen by the seed; null: on all.
        num_workers: processes that read ahead; the batches do not depend on it.
        seed: decides the order; linked to seed_everything.
        cache_dir: folder of prepared images.
        max_pixels: images with more are refused before their pixels are read.
        curation: what training images go through; null: nothing, and an unreadable one stops the preparation.
        curriculum: which images are seen at which step; null: all from the start. Difficulty is loss, compressibility
            or random.
        adaptive: how often bands of difficulty are drawn, decided from their measured losses.
        resolutions: stages of smaller images (progressive resizing); null: image_size throughout.
        transforms: augmentation of training batches on the device; null: none.
        batch_ramp: stages of batch sizes in the place of batch_size; null: that size throughout.
    """

    gives = "images"

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        channels: int,
        n_classes: int,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.05,
        n_train: int | None = None,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: str = ".cache",
        max_pixels: int = 50_000_000,
        curation: ImageCuration | None = None,
        curriculum: Curriculum | None = None,
        adaptive: AdaptiveCurriculum | None = None,
        resolutions: list[ResolutionStage] | None = None,
        transforms: ImageTransforms | None = None,
        batch_ramp: list[BatchStage] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, batch_ramp)
        for key, value, least in (
            ("image_size", image_size, 1),
            ("n_classes", n_classes, 2),
            ("max_pixels", max_pixels, 1),
            ("n_train", n_classes if n_train is None else n_train, n_classes),
        ):
            require(value >= least, f"data.{key}: must be at least {least}, got {value}")
        require(channels in (1, 3), f"data.channels: must be 1 (grey) or 3 (colour), got {channels}")
        require(0 < val_fraction < 1, f"data.val_fraction: must lie between 0 and 1, got {val_fraction}")
        self.source, self.image_size, self.channels, self.n_classes = source, image_size, channels, n_classes
        self.val_fraction, self.n_train, self.cache_dir = val_fraction, n_train, cache_dir
        self.max_pixels, self.curation, self.transforms = max_pixels, curation, transforms
        self.curriculum, self.adaptive_curriculum = curriculum, adaptive
        self.resolutions = resolutions or []
        check_resolutions(self.resolutions, image_size)
        self.adaptive: AdaptiveOrder | None = None  # after setup
        if adaptive:
            require(adaptive.by != "source", "data.adaptive.by: images have bands of difficulty only")
            check_adaptive(adaptive, 1, num_workers, PREFETCH, ["data.curriculum"] if curriculum else [])
        if wanted := self.wanted_difficulty():
            require_image_difficulty(*wanted)
        self.prepared: PreparedImages | None = None

    def prepare_data(self) -> None:
        """Prepare the images on one process; the others find them in the cache."""
        prepared = self._prepare()
        if wanted := self.wanted_difficulty():
            image_difficulty(prepared, self._rows(prepared), *wanted, self.seed)

    def _prepare(self) -> PreparedImages:
        return prepare_images(
            self.source,
            self.image_size,
            self.channels,
            self.n_classes,
            self.val_fraction,
            self.cache_dir,
            self.max_pixels,
            self.curation,
        )

    def setup(self, stage: str) -> None:
        """Open the prepared images."""
        if self.prepared is None:
            self.prepared = self._prepare()
        self._rows(self.prepared)  # n_train is checked before training begins
        if stage == "fit" and self.adaptive_curriculum and self.adaptive is None:
            config = self.adaptive_curriculum
            assert config.by != "source"
            bands = Bands(config.by, self._difficulty(config.by, config.reference)[0], config.bands, self.seed)
            self.adaptive = AdaptiveOrder(self.adaptive_curriculum, bands.names, bands.shares, bands)

    def _rows(self, prepared: PreparedImages) -> np.ndarray:
        """The images to train on; with `n_train`, rounds of one image per class, in an order drawn from the seed."""
        rows = prepared.of(TRAIN)
        if self.n_train is None:
            return rows
        require(self.n_train <= len(rows), f"data.n_train: {self.n_train} of {len(rows)} training images")
        shuffled = np.random.Generator(np.random.Philox(key=[self.seed, 1 << 61])).permutation(rows)
        labels = prepared.labels[shuffled]
        rounds = np.empty(len(rows), dtype=np.int64)
        for label in range(self.n_classes):
            rounds[labels == label] = np.arange((labels == label).sum())
        return np.sort(shuffled[np.argsort(rounds, kind="stable")[: self.n_train]])

    @property
    def class_names(self) -> list[str]:
        """By number (after setup)."""
        assert self.prepared is not None
        return self.prepared.class_names

    @property
    def group_names(self) -> list[str]:
        """What an adaptive curriculum chooses among; empty without one."""
        return self.adaptive.names if self.adaptive else []

    def wanted_difficulty(self) -> tuple[Difficulty, Scorer | None] | None:
        """Which difficulty the run's curriculum goes by, and by whose opinion; None without one."""
        if self.curriculum:
            return self.curriculum.difficulty, self.curriculum.reference
        if self.adaptive_curriculum and self.adaptive_curriculum.by != "source":
            return self.adaptive_curriculum.by, self.adaptive_curriculum.reference
        return None

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Training and validation images of the source (after setup)."""
        assert self.prepared is not None
        return {self.source.name: (len(self._rows(self.prepared)), len(self.prepared.of(VAL)))}

    def difficulty_of_samples(self, kind: Difficulty, reference: Scorer | None = None) -> list[np.ndarray]:
        """Difficulty of the training images, [M], in a list of one (after setup)."""
        return [self._difficulty(kind, reference)[0]]

    def _difficulty(self, kind: Difficulty, reference: Scorer | None) -> tuple[np.ndarray, float]:
        assert self.prepared is not None
        return image_difficulty(self.prepared, self._rows(self.prepared), kind, reference, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Batches from the step that the trainer stands at to its last one."""
        assert self.prepared is not None and self.trainer is not None
        sampler = self._begin()
        paced = None
        if self.curriculum:
            (scores,) = self.difficulty_of_samples(self.curriculum.difficulty, self.curriculum.reference)
            paced = PacedOrder(self.curriculum, scores, self.seed)
        self.training_data = TrainingImages(
            self.prepared.images,
            self.prepared.labels,
            self._rows(self.prepared),
            self.seed,
            self._clock,
            paced,
            self.resolutions,
            self.adaptive.bands if self.adaptive else None,
            self.adaptive.start(self._clock, self.trainer.max_steps, self.seed) if self.adaptive else None,
        )
        self.train_loader = self._loader(self.training_data, sampler)
        return self.train_loader

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Augment a training batch on the device: its images, and soft labels `targets` [B, K]."""
        if self.transforms is None or "index" not in batch or self.trainer is None or not self.trainer.training:
            return batch
        rank, ranks = data_ranks(self.trainer)
        first = int(batch["index"][0]) - rank * len(batch["index"])  # of all ranks' batch
        step = self._clock.at(first)
        images, targets = self.transforms(
            batch["images"], batch["labels"], self.n_classes, self.seed, first, rank, ranks, step
        )
        return {**batch, "images": images, "targets": targets}

    def _evaluation(self, split: int) -> DataLoader:
        assert self.prepared is not None and self.trainer is not None
        dataset = EvaluationImages(self.prepared.images, self.prepared.labels, self.prepared.of(split))
        return self._loader(dataset, ShardSampler(len(dataset), self.eval_batch_size, *data_ranks(self.trainer)))

    def val_dataloader(self) -> DataLoader:
        """Every validation image once."""
        return self._evaluation(VAL)

    @property
    def has_test_split(self) -> bool:
        """Whether there are images that neither train nor validate (after setup)."""
        assert self.prepared is not None
        return bool((self.prepared.splits == TEST).any())

    def test_dataloader(self) -> DataLoader:
        """Every test image once; of a source without a test split the validation images."""
        return self._evaluation(TEST if self.has_test_split else VAL)

    def predict_dataloader(self) -> DataLoader:
        """The test images."""
        return self.test_dataloader()

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds that making the data took before this run, and that the run is charged (after setup)."""
        assert self.prepared is not None
        stages = dict(self.prepared.meta["seconds_by_stage"])
        if wanted := self.wanted_difficulty():
            stages["difficulty"] = self._difficulty(*wanted)[1]
        return stages

    @property
    def charged_seconds(self) -> float:
        """Their sum."""
        return float(sum(self.seconds_by_stage.values()))

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run stands, and the classes, so that a checkpoint can be used on its own."""
        assert self.prepared is not None
        return {
            **self._position(),
            "fingerprint": self.prepared.fingerprint,
            "class_names": self.class_names,
            **({"adaptive": self.adaptive.state_dict()} if self.adaptive else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other classes; say when only the images differ."""
        assert self.prepared is not None
        if state_dict["class_names"] != self.class_names:
            raise UserError("ckpt_path: the checkpoint tells other classes apart than data.source has")
        self._go_on(state_dict)
        if self.adaptive and "adaptive" in state_dict:
            self.adaptive.load_state_dict(state_dict["adaptive"])
        if state_dict["fingerprint"] != self.prepared.fingerprint:
            log.warning("the checkpoint was trained on other images than data.source gives now")
