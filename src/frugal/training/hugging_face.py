"""The same LightningModule around any causal language model of `transformers`."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from frugal.data.tokenization import EOT
from frugal.errors import UserError, require
from frugal.model.counts import Counts, Flops
from frugal.model.hf_model import HFModel, hf_config, read_hf_config
from frugal.schedule import WarmupStableDecay
from frugal.training.fp8 import Float8
from frugal.training.language_model import LanguageModel
from frugal.training.lora import LoRA
from frugal.training.losses import next_token_nll
from frugal.training.module import Batch, shape_differences
from frugal.training.optim import ParameterGroup
from frugal.training.spikes import SkipSpikes


class HuggingFaceModel(LanguageModel):
    """A `transformers` model in the place of ours, all else the same: loss, optimizer, checkpoints, cost, samples.

    Exactly one of `config` and `path` says which model. Its mixtures, if any, balance themselves by their own auxiliary
    loss (config key output_router_logits); expert_bias has no hold on them.

    Args:
        optimizer: any torch optimizer's class_path and init_args; `frugal.training.muon.Muon` is ours.
        schedule: the learning rate over the steps of the run (trainer.max_steps).
        config: model_type and the fields of its config, for random weights; vocab_size, max_position_embeddings and
            the special tokens follow the data where they are left out.
        path: a local folder as `save_pretrained` or `frugal export` writes it, or a model of the Hub.
        load_weights: take the weights from `path` too; false starts that architecture from random weights.
        compile: torch.compile the whole model.
        parameter_groups: parameters with a learning rate or decay of their own.
        skip_spikes: leave out steps whose gradient is far above those before; null takes every step.
        lora: train low-rank adapters on frozen weights; null trains the weights.
        fp8: take linear maps in float8, on a device that can; null keeps trainer.precision throughout.
        tf32: take float32's products in TensorFloat32, ten bits of a fraction, on a GPU that can (Ampere and newer).
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        schedule: WarmupStableDecay,
        config: dict[str, Any] | None = None,
        path: str | None = None,
        load_weights: bool = True,
        compile: bool = False,
        parameter_groups: list[ParameterGroup] | None = None,
        skip_spikes: SkipSpikes | None = None,
        lora: LoRA | None = None,
        fp8: Float8 | None = None,
        tf32: bool = False,
    ) -> None:
        require((config is None) != (path is None), "model: set exactly one of config and path (a transformers model)")
        no_shape = cast(Any, None)  # it is no TransformerConfig
        formats: dict[str, Any] = {"fp8": fp8, "tf32": tf32}
        super().__init__(
            no_shape, optimizer, schedule, parameter_groups, compile, skip_spikes=skip_spikes, lora=lora, **formats
        )
        self.values, self.path, self.load_weights = config, path, load_weights
        if config is not None:
            hf_config(config)  # a wrong key is refused before any data is read
        elif path is not None:
            read_hf_config(path)

    def setup(self, stage: str) -> None:
        """Fit the config to the data: vocabulary and length."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tokens = max(data.tokenizer.get_vocab().values()) + 1
        if self.path is not None:
            config = read_hf_config(self.path)
        else:
            assert self.values is not None
            special = {"bos_token_id": None, "eos_token_id": data.tokenizer.token_to_id(EOT), "pad_token_id": None}
            config = hf_config(self.values, {"vocab_size": tokens, "max_position_embeddings": data.seq_len, **special})
        require(
            config.vocab_size >= tokens,
            f"model: its vocabulary of {config.vocab_size} is smaller than the tokenizer's {tokens} tokens; set "
            + ("data.tokenizer.path to the model's tokenizer" if self.path else "model.config.vocab_size"),
        )
        room = getattr(config, "max_position_embeddings", data.seq_len)
        require(room >= data.seq_len, f"data.seq_len: {data.seq_len} is more than the model's {room} positions")
        self.hf_config, self.seq_len = config, data.seq_len
        super().setup(stage)

    def configure_model(self) -> None:
        """Build the model and fill in its weights."""
        if self.model is not None:
            return
        self.model = HFModel(self.hf_config, self.seq_len)  # type: ignore[assignment]
        if self.path is not None and self.load_weights:
            self.hf.load_pretrained(self.path)
        self.hf.require_causal()
        self._adapt(self.hf)
        if self.compile_blocks:
            self.hf.lm.compile()

    @property
    def hf(self) -> HFModel:
        """The model, once it is built."""
        assert isinstance(self.model, HFModel)
        return self.model

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return int(self.hf_config.vocab_size)

    def counts(self) -> Counts:
        """Parameters, from the built model."""
        return self.hf.counts()

    def flops_per_token(self, seq_len: int) -> Flops:
        """By the rule of 2 N forward and 4 N backward, and causal attention."""
        return self.hf.flops_per_token(seq_len)

    def _nats(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """From the logits, since some architectures scale or cap them; their own dropout is on."""
        self._seed_dropout()
        nll_BT = next_token_nll(self(batch["input_ids"]), batch["labels"])
        return nll_BT.sum(), None, nll_BT.detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the config as JSON text, from which the model can be rebuilt."""
        checkpoint["hugging_face"] = self.hf.values
        self._save_optimizer(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming the fields that differ."""
        if "hugging_face" not in checkpoint:
            raise UserError("ckpt_path: the file holds no transformers model (model.class_path differs)")
        theirs, ours = HFModel.comparable(checkpoint["hugging_face"]), HFModel.comparable(self.hf.values)
        differences = shape_differences(theirs, ours, "model.config")
        if differences:
            raise UserError("ckpt_path: the checkpoint has another shape: " + "; ".join(differences))
        self._load_optimizer(checkpoint)
