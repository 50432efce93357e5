"""The LightningModule around the transformer: losses, optimizer, and what is written into a checkpoint."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from frugal.data.batches import IGNORE
from frugal.errors import UserError
from frugal.model.config import Counts, Flops, TransformerConfig, count_parameters, flops_per_token
from frugal.model.recompute import recompute_blocks
from frugal.model.transformer import Transformer
from frugal.schedule import LossWeight, WarmupStableDecay
from frugal.training.compilation import compile_blocks, require_compiler
from frugal.training.fp8 import Float8
from frugal.training.initial import initial_shape, initial_weights
from frugal.training.lora import LoRA
from frugal.training.losses import next_token_nll, sum_and_nll, summed_nll
from frugal.training.metrics import TextLoss
from frugal.training.module import Batch, TrainingModule, shape_differences
from frugal.training.optim import ParameterGroup
from frugal.training.spikes import SkipSpikes

log = logging.getLogger(__name__)


class LanguageModel(TrainingModule):
    """Next-token prediction with a Mixture-of-Experts transformer; `train/loss` is the mean per token, in nats.

    `train/loss` leaves the losses of multi-token prediction out.

    Args:
        transformer: the model's shape.
        optimizer: any torch optimizer's class_path and init_args; `frugal.training.muon.Muon` is ours.
        schedule: the learning rate over the steps of the run (trainer.max_steps).
        parameter_groups: parameters with a learning rate or decay of their own.
        compile: compile each block with torch.compile (needs a C++ compiler on CPU).
        activation_checkpointing: keep only each block's input and compute the rest again in the backward pass: a third
            more FLOPs (not counted in cost/flops), a fraction of the memory.
        mtp_loss_weight: weight of multi-token prediction's mean loss, where model.transformer.n_mtp switches it on.
        loss_chunk: positions whose logits exist at once in training; 0 keeps all logits; null chooses by device.
        init_from: where a new run's weights come from: a checkpoint or a run's folder of this very shape, or a local
            Hugging Face folder (`frugal import` writes the config for it).
        skip_spikes: leave out steps whose gradient is far above those before; null takes every step.
        lora: train low-rank adapters on frozen weights; null trains the weights.
        fp8: take linear maps in float8, on a device that can; null keeps trainer.precision throughout.
        tf32: take float32's products in TensorFloat32, ten bits of a fraction, on a GPU that can (Ampere and newer).
    """

    reads = "text"
    go_on = "frugal generate {run} --prompt '...'"

    def __init__(
        self,
        transformer: TransformerConfig,
        optimizer: OptimizerCallable,
        schedule: WarmupStableDecay,
        parameter_groups: list[ParameterGroup] | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        mtp_loss_weight: LossWeight | None = None,
        loss_chunk: int | None = None,
        init_from: str | None = None,
        skip_spikes: SkipSpikes | None = None,
        lora: LoRA | None = None,
        fp8: Float8 | None = None,
        tf32: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, parameter_groups, skip_spikes, lora, fp8, tf32)
        if lora is not None and transformer is not None and transformer.sharing:
            raise UserError("model.lora: cannot adapt layers that share their weights (model.transformer.sharing)")
        if loss_chunk is not None and loss_chunk < 0:
            raise UserError(f"model.loss_chunk: must not be negative, got {loss_chunk}")
        if compile and not torch.cuda.is_available():
            require_compiler("cpu")
        self.loss_chunk = loss_chunk
        self.config, self.init_from = transformer, init_from
        if init_from is not None:
            self._check_shape(init_from)
        self.mtp_loss_weight = mtp_loss_weight or LossWeight()
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing
        self.model: Transformer | None = None
        self.validation_loss: TextLoss | None = None
        if transformer is not None:
            self.sums = tuple(f"mtp_loss_{k}" for k in range(1, transformer.n_mtp + 1))

    def configure_model(self) -> None:
        """Build the transformer (Lightning calls this on the right device and precision)."""
        if self.model is None:
            self.model = Transformer(self.config)
            if self.init_from is not None:
                self._take_weights(self.init_from)
            self._adapt(self.model)
            if self.compile_blocks:
                compile_blocks(self.model)
            if self.activation_checkpointing:
                recompute_blocks(self.model)

    def setup(self, stage: str) -> None:
        """Make the validation metric, which needs the tokenizer's bytes per token."""
        token_bytes = torch.zeros(self.vocab_size, dtype=torch.int64)
        known = self.trainer.datamodule.token_bytes  # type: ignore[attr-defined]
        token_bytes[: len(known)] = known
        self.validation_loss = TextLoss(token_bytes)
        # One by source of the data, where there are several.
        names = getattr(self.trainer.datamodule, "part_names", [])  # type: ignore[attr-defined]
        self.part_losses = torch.nn.ModuleList(TextLoss(token_bytes) for _ in names if len(names) > 1)
        self.part_names = [name.replace("/", "_") for name in names]

    def _check_shape(self, source: str) -> None:
        """Refuse weights of another shape before any data is read."""
        theirs = initial_shape(source)
        ignored: dict[str, Any] = {"max_seq_len": 0, "init_std": 0.0, "n_mtp": 0}
        if theirs.ngrams is None:  # they begin at zero, so what was trained without them goes on as it was
            ignored["ngrams"] = None
        differences = shape_differences(asdict(theirs) | ignored, asdict(self.config) | ignored, "model.transformer")
        if differences:
            raise UserError(
                f"model.init_from: {source} has another shape (its config.yaml gives it back, or "
                "`frugal import` for a Hugging Face folder): "
                + "; ".join(d.replace("in the checkpoint", "there") for d in differences)
            )

    def _take_weights(self, source: str) -> None:
        assert self.model is not None
        missing = self.model.load_state_dict(initial_weights(source), strict=False).missing_keys
        fresh = sorted({key.split(".")[0] for key in missing})  # multi-token prediction and n-grams may be new
        log.info("weights taken from %s%s", source, f"; begun anew: {', '.join(fresh)}" if fresh else "")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    def counts(self) -> Counts:
        """Parameters, from the config."""
        return count_parameters(self.config)

    def flops_per_token(self, seq_len: int) -> Flops:
        """What a token of a training step costs, with what is frozen now."""
        return flops_per_token(self.config, seq_len, self.frozen)

    def token_shape(self, batch: Batch) -> tuple[int, int]:
        """Sequences and their tokens."""
        rows, length = batch["input_ids"].shape
        return rows, length

    def visit(self, batch: Batch) -> None:
        """Run a batch through the layers and through multi-token prediction."""
        assert self.model is not None
        ids = batch["input_ids"]
        for _ in self.model.mtp_hidden(self.model.hidden(ids), ids):
            pass

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        assert self.model is not None
        return self.model(input_ids)

    # --- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of `input_ids` and `labels`, both [B, T]; labels of -100 do not count."""
        labels = batch["labels"]
        if self.lora is not None and self.lora.dropout:
            self._seed_dropout()
        nats, extra, nll_BT = self._nats(batch)
        mine_BT = self._mine(labels)
        if "groups" in batch:
            self._add_groups(nll_BT.sum(dim=1), (mine_BT != IGNORE).sum(dim=1), batch["groups"])
        return self._micro_batch_loss(nats, (mine_BT != IGNORE).sum(), labels.numel(), extra)

    def _nats(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of one micro-batch: the summed loss in nats, what multi-token prediction adds, each label's loss [B, T]."""
        assert self.model is not None
        return self.model.run(self._losses, batch)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        assert self.model is not None
        hidden, head = self.model.hidden(batch["input_ids"]), self.model.head.weight
        mine, labels = self._mine(hidden), self._mine(batch["labels"])
        nats, nll_BT = sum_and_nll(mine, head, labels, self.loss_chunk, fuse=self.compile_blocks)
        return nats, self._mtp_nats(hidden, batch) if self.config.n_mtp else None, nll_BT

    def _mine(self, x_BT: Tensor) -> Tensor:
        """The positions whose loss this process takes: all, unless processes share a batch."""
        assert self.model is not None
        rank, size = self.model.shared_by
        return x_BT.tensor_split(size, dim=1)[rank] if size > 1 else x_BT

    def _mtp_nats(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The weighted sum of the modules' losses (DeepSeek-V3, eq. 24 and 25)."""
        assert self.model is not None
        weight = self.mtp_loss_weight.at(self.trainer.global_step, self.trainer.max_steps) / self.config.n_mtp
        sums, weighted = [], hidden.new_zeros(())
        for k, ahead in enumerate(self.model.mtp_hidden(hidden, batch["input_ids"]), start=1):
            ahead, labels = self._mine(ahead), self._mine(batch["labels"][:, k:])
            nats = summed_nll(ahead, self.model.head.weight, labels, self.loss_chunk, fuse=self.compile_blocks)
            sums.append(torch.stack((nats.detach(), (labels != IGNORE).sum().to(nats.dtype))))
            weighted = weighted + nats * weight
        self._add_sums(torch.stack(sums))
        return weighted

    # --- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation loss."""
        assert self.validation_loss is not None
        labels = batch["labels"]
        nll = next_token_nll(self(batch["input_ids"]), labels)
        self.validation_loss.update(nll, labels)
        for part, loss in enumerate(self.part_losses):
            mine = batch["parts"] == part
            loss.update(torch.where(mine, nll, 0.0), torch.where(mine, labels, IGNORE))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the exact mean over the validation split."""
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the test loss."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the exact mean over the test split."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        assert self.validation_loss is not None
        self.log_dict({f"{split}/{name}": value for name, value in self.validation_loss.compute().items()})
        self.validation_loss.reset()
        for name, loss in zip(self.part_names, self.part_losses, strict=False):
            self.log_dict({f"{split}/{name}/{key}": value for key, value in loss.compute().items()})  # type: ignore[operator]
            loss.reset()  # type: ignore[operator]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss in nats per token of each sequence [B], and how many tokens it counts [B]."""
        nll = next_token_nll(self(batch["input_ids"]), batch["labels"])
        tokens = (batch["labels"] != IGNORE).sum(dim=1)
        return {"loss": nll.sum(dim=1) / tokens.clamp_min(1), "tokens": tokens}

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the shape as plain types, so that `weights_only=True` loads it and the model can be rebuilt."""
        checkpoint["transformer"] = asdict(self.config)
        self._save_optimizer(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another shape, naming the keys that differ."""
        theirs, ours = checkpoint.get("transformer"), asdict(self.config)
        if theirs is None:
            raise UserError(
                "ckpt_path: the file is no frugal language-model checkpoint (it has no `transformer` entry)"
                + ("; it holds a transformers model: set model.class_path" if "hugging_face" in checkpoint else "")
            )
        # Keys that are younger than the checkpoint have their neutral defaults; an unknown one is named below.
        with contextlib.suppress(TypeError, UserError):
            theirs = asdict(TransformerConfig.from_dict(theirs))
        differences = shape_differences(theirs, ours, "model.transformer")
        if differences:
            raise UserError(
                "ckpt_path: the checkpoint has another shape (its run's config.yaml gives it back): "
                + "; ".join(differences)
            )
        self._load_optimizer(checkpoint)
