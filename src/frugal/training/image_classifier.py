"""The LightningModule around the vision transformer."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from frugal.data.batches import IGNORE
from frugal.errors import UserError, require
from frugal.model.config import Counts, Flops, count_parameters, flops_per_token
from frugal.model.vision import VisionTransformer
from frugal.model.vision_config import VisionConfig
from frugal.schedule import WarmupStableDecay
from frugal.training.compilation import compile_blocks, require_compiler
from frugal.training.lora import LoRA
from frugal.training.metrics import Classification
from frugal.training.module import Batch, TrainingModule, shape_differences
from frugal.training.optim import ParameterGroup
from frugal.training.spikes import SkipSpikes


class ImageClassifier(TrainingModule):
    """Tell classes of images apart with the blocks of the language model; losses are means per image, in nats.

    A token is a patch: `cost/tokens` counts those that pass through the blocks.

    Args:
        transformer: the model's shape.
        optimizer: any torch optimizer's class_path and init_args; `frugal.training.muon.Muon` is ours.
        schedule: the learning rate over the steps of the run (trainer.max_steps).
        parameter_groups: parameters with a learning rate or decay of their own.
        compile: compile each block with torch.compile (needs a C++ compiler on CPU).
        label_smoothing: share of each label that is spread evenly over all classes in training (Szegedy et al. 2016).
        skip_spikes: leave out steps whose gradient is far above those before; null takes every step.
        lora: train low-rank adapters on frozen weights; null trains the weights.
        tf32: take float32's products in TensorFloat32, ten bits of a fraction, on a GPU that can (Ampere and newer).
    """

    reads = "images"
    unit = "image"
    go_on = "python train.py test --config {run}/config.yaml --ckpt_path {run}/checkpoints/last.ckpt"
    sums = ("accuracy",)

    def __init__(
        self,
        transformer: VisionConfig,
        optimizer: OptimizerCallable,
        schedule: WarmupStableDecay,
        parameter_groups: list[ParameterGroup] | None = None,
        compile: bool = False,
        label_smoothing: float = 0.0,
        skip_spikes: SkipSpikes | None = None,
        lora: LoRA | None = None,
        tf32: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, parameter_groups, skip_spikes, lora, tf32=tf32)
        require(0 <= label_smoothing < 1, f"model.label_smoothing: must lie in [0, 1), got {label_smoothing}")
        if compile and not torch.cuda.is_available():
            require_compiler("cpu")
        require(
            lora is None or not transformer.sharing,
            "model.lora: cannot adapt layers that share their weights (model.transformer.sharing)",
        )
        self.config, self.label_smoothing, self.compile_blocks = transformer, label_smoothing, compile
        self.model: VisionTransformer | None = None
        self.scores: Classification | None = None

    def setup(self, stage: str) -> None:
        """Check the sizes of the images, and make the metrics."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for stage_ in data.resolutions:
            require(
                stage_.image_size % self.config.patch_size == 0,
                f"data.resolutions: {stage_.image_size} is no multiple of model.transformer.patch_size "
                f"({self.config.patch_size})",
            )
        self.scores = Classification(data.class_names)

    def configure_model(self) -> None:
        """Build the model (Lightning calls this on the right device and precision)."""
        if self.model is None:
            if self._trainer is not None:
                self._require_whole_weights("model.class_path: ImageClassifier")
            self.model = VisionTransformer(self.config)
            self._adapt(self.model)
            if self.compile_blocks:
                compile_blocks(self.model)

    def counts(self) -> Counts:
        """Parameters, from the config."""
        return count_parameters(self.config)

    def flops_per_token(self, seq_len: int) -> Flops:
        """What a patch of a training step costs, with what is frozen now; the head's share included."""
        return flops_per_token(self.config, seq_len, self.frozen)

    def token_shape(self, batch: Batch) -> tuple[int, int]:
        """Images and their tokens."""
        return len(batch["images"]), self.config.tokens_of(batch["images"].shape[-1])

    def visit(self, batch: Batch) -> None:
        """Run a batch through the blocks."""
        self(batch["images"])

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        assert self.model is not None
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of `images` and either `labels` [B] or soft labels `targets` [B, K]."""
        if self.lora is not None and self.lora.dropout:
            self._seed_dropout()
        logits_BK = self(batch["images"]).float()
        n_classes, labels_B = self.config.n_classes, batch["labels"]
        targets_BK = batch.get("targets")
        if targets_BK is None:
            targets_BK = torch.nn.functional.one_hot(labels_B, n_classes).float()
        targets_BK = targets_BK * (1 - self.label_smoothing) + self.label_smoothing / n_classes
        nll_B = -(targets_BK * torch.log_softmax(logits_BK, dim=-1)).sum(dim=-1)
        right = (logits_BK.argmax(dim=-1) == labels_B).sum()
        ones_B = torch.ones_like(nll_B)
        self._add_sums(torch.stack((right.to(nll_B.dtype), ones_B.sum())).unsqueeze(0))
        if "groups" in batch:
            self._add_groups(nll_B.detach(), ones_B, batch["groups"])
        return self._micro_batch_loss(nll_B.sum(), ones_B.sum(), len(labels_B))

    # --- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the scores; labels of -100 do not count."""
        assert self.scores is not None
        there_B = batch["labels"] != IGNORE
        self.scores.update(self(batch["images"])[there_B], batch["labels"][there_B])

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation split."""
        self._log_scores("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the scores."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test split."""
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        assert self.scores is not None
        self.log_dict({f"{split}/{name}": value for name, value in self.scores.compute().items()})
        self.scores.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The likeliest class of each image [B], its probability [B], and the label [B]."""
        there_B = batch["labels"] != IGNORE
        probability_B, class_B = torch.softmax(self(batch["images"])[there_B].float(), dim=-1).max(dim=-1)
        return {"class": class_B, "probability": probability_B, "label": batch["labels"][there_B]}

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the shape as plain types, so that `weights_only=True` loads it and the model can be rebuilt."""
        checkpoint["vision_transformer"] = asdict(self.config)
        self._save_optimizer(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another shape, naming the keys that differ."""
        theirs = checkpoint.get("vision_transformer")
        if theirs is None:
            raise UserError("ckpt_path: the file is no frugal image classifier (model.class_path differs)")
        with contextlib.suppress(TypeError, UserError):
            theirs = asdict(VisionConfig.from_dict(theirs))
        if differences := shape_differences(theirs, asdict(self.config), "model.transformer"):
            raise UserError(
                "ckpt_path: the checkpoint has another shape (its run's config.yaml gives it back): "
                + "; ".join(differences)
            )
        self._load_optimizer(checkpoint)
