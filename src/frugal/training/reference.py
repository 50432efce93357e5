"""A model trained before, asked how hard sequences or images are.

Shape letters: M sequences or images, B of them at a time, T tokens of a sequence, C channels, S pixels of a side.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import torch
from tokenizers import Tokenizer

from frugal.data.difficulty import TextScorer
from frugal.data.image_difficulty import ImageScorer
from frugal.errors import UserError, require
from frugal.training.checkpointing import checkpoint_file
from frugal.training.inference import load_classifier, load_for_inference
from frugal.training.losses import next_token_nll

log = logging.getLogger(__name__)


class ReferenceLoss(TextScorer):
    """Mean loss of a reference model, in nats per token, on each sequence by itself.

    Its tokenizer must be the run's: point data.tokenizer.path at it, or train it on the same text.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt, or last.ckpt).
        batch_size: sequences at a time.
        device: where the model shall live; null: on the GPU if there is one.
    """

    def __init__(self, checkpoint: str, batch_size: int = 16, device: str | None = None) -> None:
        require(batch_size >= 1, f"reference.batch_size: must be at least 1, got {batch_size}")
        self.checkpoint, self.batch_size, self.device = checkpoint, batch_size, device

    def fingerprint(self) -> str:
        """Hash of the checkpoint's content."""
        return _content_hash(self.checkpoint)

    def score(self, windows_MT: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """The mean over the T - 1 tokens that have one before them, float64 [M].

        Raises:
            UserError: the reference has another tokenizer, or reads fewer tokens.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng():  # building the model draws weights; the run's own must not depend on it
            model, theirs = load_for_inference(self.checkpoint, device)
        if theirs.to_str() != tokenizer.to_str():
            raise UserError(
                f"reference.checkpoint: {self.checkpoint} has another tokenizer than the run; save it and set "
                "data.tokenizer.path, or train the reference on the same data.source"
            )
        length = windows_MT.shape[1]
        require(
            length <= model.config.max_seq_len,
            f"reference.checkpoint: it reads {model.config.max_seq_len} tokens, data.seq_len is {length}",
        )
        log.info("scoring %s sequences with %s", f"{len(windows_MT):,}", self.checkpoint)
        losses = []
        with torch.inference_mode():
            for first in range(0, len(windows_MT), self.batch_size):
                rows_BT = torch.from_numpy(windows_MT[first : first + self.batch_size].astype(np.int64)).to(device)
                nll_BT = next_token_nll(model(rows_BT[:, :-1]), rows_BT[:, 1:])
                losses.append(nll_BT.double().mean(dim=1).cpu())
        return torch.cat(losses).numpy()


class ImageReferenceLoss(ImageScorer):
    """Loss of a reference classifier, in nats, on each image.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt, or last.ckpt).
        batch_size: images at a time.
        device: where the model shall live; null: on the GPU if there is one.
    """

    def __init__(self, checkpoint: str, batch_size: int = 256, device: str | None = None) -> None:
        require(batch_size >= 1, f"reference.batch_size: must be at least 1, got {batch_size}")
        self.checkpoint, self.batch_size, self.device = checkpoint, batch_size, device

    def fingerprint(self) -> str:
        """Hash of the checkpoint's content."""
        return _content_hash(self.checkpoint)

    def score(self, images_MCSS: np.ndarray, labels_M: np.ndarray, n_classes: int) -> np.ndarray:
        """Cross entropy of each label, float64 [M].

        Raises:
            UserError: the reference reads other images or tells other classes apart.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng():  # building the model draws weights; the run's own must not depend on it
            model, _ = load_classifier(self.checkpoint, device)
        config, size = model.config, images_MCSS.shape[-1]
        require(
            (config.channels, config.image_size, config.n_classes) == (images_MCSS.shape[1], size, n_classes),
            f"reference.checkpoint: it reads {config.n_classes} classes of images of {config.channels} x "
            f"{config.image_size} x {config.image_size}, the run has {n_classes} of {images_MCSS.shape[1]} x {size} x "
            f"{size}",
        )
        losses = []
        with torch.inference_mode():
            for first in range(0, len(images_MCSS), self.batch_size):
                rows = slice(first, first + self.batch_size)
                images_BCSS = torch.from_numpy(images_MCSS[rows]).to(device).float() / 255
                labels_B = torch.from_numpy(labels_M[rows]).to(device)
                losses.append(torch.nn.functional.cross_entropy(model(images_BCSS), labels_B, reduction="none").cpu())
        return torch.cat(losses).double().numpy()


def _content_hash(checkpoint: str) -> str:
    path = checkpoint_file(checkpoint)
    if not path.is_file():
        raise UserError(f"reference.checkpoint: no file {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
