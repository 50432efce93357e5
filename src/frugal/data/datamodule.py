"""The LightningDataModule for text: its whole state is an index, and the index is the step."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from frugal.data.adaptive import AdaptiveCurriculum, AdaptiveOrder, Bands, check_adaptive
from frugal.data.batches import (
    EvaluationSequences,
    ShardSampler,
    TrainingSequences,
    data_ranks,
)
from frugal.data.curation.pipeline import CurationConfig
from frugal.data.curriculum import (
    BatchStage,
    Curriculum,
    LengthStage,
    PacedOrder,
    check_lengths,
)
from frugal.data.difficulty import Difficulty, Scorer, difficulty_scores
from frugal.data.mixture import Mixer, MixtureStage, check_stages
from frugal.data.packing import Prepared, prepare
from frugal.data.sources import Source
from frugal.data.splits import Split
from frugal.data.stepping import PREFETCH, SteppedData
from frugal.data.tokenization import TokenizerConfig, load_tokenizer, token_byte_lengths
from frugal.data.transforms.base import TextTransform, TextTransforms, check_order, special_tokens
from frugal.errors import UserError

log = logging.getLogger(__name__)


class TextDataModule(SteppedData):
    """Documents, tokenized and packed into fixed-length sequences.

    Args:
        source: where the documents come from.
        tokenizer: how they become tokens.
        seq_len: tokens per sequence.
        batch_size: sequences per micro-batch and device.
        eval_batch_size: sequences per evaluation batch and device; null means batch_size.
        val_fraction: share of each source's text that is held out for validation.
        split: which text that is: the last by position, or the documents that the hash of their content chooses, which
            keeps copies of one text on one side.
        mixture: how often each source is drawn from which step on; null: by the sources' own weights throughout.
        num_workers: processes that read ahead; the batches do not depend on it.
        seed: decides the order; linked to seed_everything.
        cache_dir: folder of prepared corpora.
        curriculum: which sequences are seen at which step; null: all from the start.
        lengths: stages of shorter sequences at as many tokens per batch; null: seq_len throughout.
        adaptive: how often sources, levels or bands of difficulty are drawn, decided from their measured losses; null:
            as the mixture says.
        transforms: augmentation of the training sequences, in this order; validation is never changed. What they need
            in the vocabulary is added to a newly trained tokenizer.
        curation: what training documents go through before they become tokens; null: nothing. Validation never does.
        batch_ramp: stages of batch sizes in the place of batch_size; null: that size throughout.
    """

    gives = "text"

    def __init__(
        self,
        source: Source,
        tokenizer: TokenizerConfig,
        seq_len: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.05,
        split: Literal["position", "hash"] = "position",
        mixture: list[MixtureStage] | None = None,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: str = ".cache",
        curriculum: Curriculum | None = None,
        lengths: list[LengthStage] | None = None,
        adaptive: AdaptiveCurriculum | None = None,
        transforms: list[TextTransform] | None = None,
        curation: CurationConfig | None = None,
        batch_ramp: list[BatchStage] | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, batch_ramp)
        if seq_len < 1:
            raise UserError(f"data.seq_len: must be at least 1, got {seq_len}")
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction: must lie between 0 and 1, got {val_fraction}")
        self.transforms = transforms or []
        check_order(self.transforms)
        if tokenizer.path is None and (needed := special_tokens(self.transforms)):
            tokenizer = replace(tokenizer, special_tokens=tuple(dict.fromkeys((*tokenizer.special_tokens, *needed))))
        self.source, self.tokenizer_config, self.val_fraction = source, tokenizer, val_fraction
        self.split: Split = split
        self.curation = curation
        self.curriculum, self.lengths = curriculum, lengths or []
        check_lengths(self.lengths, seq_len)
        self.part_names = [part.called for part in source.parts()]
        own = {part.called: part.weight for part in source.parts()}
        self.mixture = mixture or [MixtureStage(0, own)]
        check_stages(self.mixture, self.part_names)
        self.adaptive_curriculum = adaptive
        self.adaptive: AdaptiveOrder | None = None  # after setup
        if adaptive:
            others = [key for key, value in (("data.curriculum", curriculum), ("data.mixture", mixture)) if value]
            check_adaptive(adaptive, len(self.part_names), num_workers, PREFETCH, others)
        self._stage_samples: list[int] = []  # first sample of each stage that has begun
        self.seq_len, self.cache_dir = seq_len, cache_dir
        self.prepared: Prepared | None = None
        self.preparing_seconds = 0.0  # what this process has spent on making or finding the data

    def prepare_data(self) -> None:
        """Prepare the corpus on one process; the others find it in the cache."""
        start = time.perf_counter()
        if self.transforms and self.tokenizer_config.file:
            TextTransforms(
                self.transforms, load_tokenizer(self.tokenizer_config.file), self.seed
            )  # refused before work
        self._score(self._prepare())
        self.preparing_seconds = time.perf_counter() - start

    def _prepare(self) -> Prepared:
        return prepare(self.source, self.tokenizer_config, self.val_fraction, self.cache_dir, self.split, self.curation)

    def setup(self, stage: str) -> None:
        """Open the prepared corpus."""
        if self.prepared is None:
            self.prepared = self._prepare()
        if stage == "fit" and self.adaptive_curriculum and self.adaptive is None:
            self.adaptive = self._adaptive_order(self.adaptive_curriculum)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use (after setup)."""
        assert self.prepared is not None
        return self.prepared.tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text per token, int64 [vocab]."""
        return torch.from_numpy(token_byte_lengths(self.tokenizer))

    def train_dataloader(self) -> DataLoader:
        """Batches from the step that the trainer stands at to its last one."""
        assert self.prepared is not None and self.trainer is not None
        sampler = self._begin()
        transforms = TextTransforms(self.transforms, self.tokenizer, self.seed) if self.transforms else None
        parts = [(part.start, part.start + len(part.train)) for part in self.prepared.parts]
        mixer = self._mixer() if len(parts) > 1 else None
        if self.adaptive:
            mixer = self.adaptive.start(self._clock, self.trainer.max_steps, self.seed)
        self.training_data = TrainingSequences(
            self.prepared.train,
            self.seq_len,
            self.seed,
            parts,
            mixer,
            transforms,
            self._clock,
            self._paced(),
            self.lengths,
            self.adaptive.bands if self.adaptive else None,
            grouped=self.adaptive is not None,
        )
        self.train_loader = self._loader(self.training_data, sampler)
        return self.train_loader

    def _paced(self) -> list[PacedOrder]:
        """The curriculum's order of each source's sequences."""
        if self.curriculum is None:
            return []
        scores = self.difficulty_of_samples(self.curriculum.difficulty, self.curriculum.reference)
        return [PacedOrder(self.curriculum, score, self.seed) for score in scores]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Training and validation tokens of each source (after setup)."""
        assert self.prepared is not None
        return {part.name: (len(part.train), len(part.val)) for part in self.prepared.parts}

    def difficulty_of_samples(self, kind: Difficulty, reference: Scorer | None = None) -> list[np.ndarray]:
        """Difficulty of each source's whole sequences, [M] each (after setup)."""
        assert self.prepared is not None
        scores, _ = difficulty_scores(self.prepared, kind, self.seq_len, self.seed, reference)
        return scores

    def _score(self, prepared: Prepared) -> None:
        """Find the difficulties that the run needs, on one process; the others find them in the cache."""
        if wanted := self.wanted_difficulty():
            difficulty_scores(prepared, wanted[0], self.seq_len, self.seed, wanted[1])

    def wanted_difficulty(self) -> tuple[Difficulty, Scorer | None] | None:
        """Which difficulty the run's curriculum goes by, and by whose opinion; None without one."""
        if self.curriculum:
            return self.curriculum.difficulty, self.curriculum.reference
        if self.adaptive_curriculum and self.adaptive_curriculum.by != "source":
            return self.adaptive_curriculum.by, self.adaptive_curriculum.reference
        return None

    def _adaptive_order(self, config: AdaptiveCurriculum) -> AdaptiveOrder:
        assert self.prepared is not None
        if config.by == "source":
            return AdaptiveOrder(config, self.part_names, [part.weight for part in self.prepared.parts], None)
        (score,) = self.difficulty_of_samples(config.by, config.reference)
        bands = Bands(config.by, score, config.bands, self.seed)
        return AdaptiveOrder(config, bands.names, bands.shares, bands)

    @property
    def group_names(self) -> list[str]:
        """What an adaptive curriculum chooses among; empty without one."""
        return self.adaptive.names if self.adaptive else []

    def _mixer(self) -> Mixer:
        """Stages begin at steps; in samples that depends on the batch size, so those that have begun are remembered."""
        begun = self._loaded.get("stage_samples", [])
        to_come = [self._clock.sample(stage.start) for stage in self.mixture[len(begun) :]]
        self._stage_samples = [*begun, *to_come]
        weights = [[stage.weights.get(name, 0.0) for name in self.part_names] for stage in self.mixture]
        return Mixer(self._stage_samples, weights, self.seed)

    def val_dataloader(self) -> DataLoader:
        """Every token of the validation split once."""
        assert self.prepared is not None and self.trainer is not None
        ends = np.cumsum([len(part.val) for part in self.prepared.parts]).tolist()
        dataset = EvaluationSequences(self.prepared.val, self.seq_len, ends)
        sampler = ShardSampler(len(dataset), self.eval_batch_size, *data_ranks(self.trainer))
        return self._loader(dataset, sampler)

    def test_dataloader(self) -> DataLoader:
        """The validation split: there is no other held-out text."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """The validation split, window by window."""
        return self.val_dataloader()

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds that making the data took before this run, and that the run is charged (after setup)."""
        assert self.prepared is not None
        stages = dict(self.prepared.meta.get("seconds_by_stage", {}))
        if wanted := self.wanted_difficulty():
            _, stages["difficulty"] = difficulty_scores(self.prepared, wanted[0], self.seq_len, self.seed, wanted[1])
        return stages

    @property
    def charged_seconds(self) -> float:
        """Their sum."""
        return float(sum(self.seconds_by_stage.values()))

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, so that a checkpoint can be used on its own, and where in the data the run stands."""
        assert self.prepared is not None and self.trainer is not None
        return {
            "tokenizer": self.tokenizer.to_str(),
            "fingerprint": self.prepared.fingerprint,
            **self._position(),
            "stage_samples": self._begun(self.trainer.global_step),
            **({"adaptive": self.adaptive.state_dict()} if self.adaptive else {}),
        }

    def _begun(self, step: int) -> list[int]:
        """First samples of the stages that have begun at a step."""
        return [sample for stage, sample in zip(self.mixture, self._stage_samples, strict=False) if stage.start <= step]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with another tokenizer; say when only the corpus differs."""
        assert self.prepared is not None
        if state_dict["tokenizer"] != self.tokenizer.to_str():
            raise UserError(
                "ckpt_path: the checkpoint was trained with another tokenizer; give the same data.source and "
                "data.tokenizer, or save its tokenizer and set data.tokenizer.path"
            )
        self._go_on(state_dict)
        self._loaded["stage_samples"] = state_dict.get("stage_samples", [])
        if self.adaptive and "adaptive" in state_dict:
            self.adaptive.load_state_dict(state_dict["adaptive"])
        if state_dict["fingerprint"] != self.prepared.fingerprint:
            log.warning("the checkpoint was trained on another corpus than data.source gives now")
