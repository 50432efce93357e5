"""A trained model and its tokenizer from one checkpoint file."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

import torch

from frugal.data.tokenization import EOT, load_tokenizer
from frugal.errors import UserError
from frugal.model.config import TransformerConfig
from frugal.model.generation import generate
from frugal.model.hf_model import HFModel
from frugal.model.speculative import generate_speculatively
from frugal.model.transformer import Transformer
from frugal.model.vision import VisionTransformer
from frugal.model.vision_config import VisionConfig
from frugal.training.checkpointing import checkpoint_file, read_checkpoint
from frugal.training.lora import is_transposed, plain_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


def load_for_inference(checkpoint: str, device: str = "cpu") -> tuple[Transformer | HFModel, Tokenizer]:
    """Rebuild the model, adapters merged in, and the tokenizer that a checkpoint holds.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt, or last.ckpt without validation).
        device: where the model shall live.

    Raises:
        UserError: no such file, a damaged one, or one without a language model.
    """
    path = checkpoint_file(checkpoint)
    content = read_checkpoint(path)
    data = content.get("TextDataModule") or {}
    if not content.keys() & {"transformer", "hugging_face"} or "tokenizer" not in data:
        raise UserError(f"{path}: holds no language model with its tokenizer (was it written by train.py fit?)")
    model: Transformer | HFModel
    if "transformer" in content:
        model = Transformer(TransformerConfig.from_dict(content["transformer"]))
    else:
        model = HFModel.rebuild(content["hugging_face"])
    transposed = {name for name, module in model.named_modules() if is_transposed(module)}
    try:
        model.load_state_dict(plain_weights(content, transposed))
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its shape ({str(error).splitlines()[-1].strip()})") from None
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device!r} is not available here ({str(error).splitlines()[0]})") from None
    return model.eval(), load_tokenizer(data["tokenizer"])


def load_classifier(checkpoint: str, device: str = "cpu") -> tuple[VisionTransformer, list[str]]:
    """Rebuild the image classifier that a checkpoint holds, and the names of its classes.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt, or last.ckpt without validation).
        device: where the model shall live.

    Raises:
        UserError: no such file, a damaged one, or one without an image classifier.
    """
    path = checkpoint_file(checkpoint)
    content = read_checkpoint(path)
    if "vision_transformer" not in content or "ImageDataModule" not in content:
        raise UserError(f"{path}: holds no image classifier (was it written by train.py fit?)")
    model = VisionTransformer(VisionConfig.from_dict(content["vision_transformer"]))
    model.load_state_dict(plain_weights(content, set()))
    return model.to(device).eval(), content["ImageDataModule"]["class_names"]


def complete(
    model: Transformer | HFModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Continuations of many prompts, without the prompts, in their order; each prompt begins a new document.

    Prompts of equal length go through the model together, so that none needs padding. Temperature 0 takes the likeliest
    token. A prompt that leaves no room in the model's max_seq_len has the empty continuation.
    """
    end = tokenizer.token_to_id(EOT)
    assert end is not None  # load_tokenizer checks it
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for number, prompt in enumerate(prompts):
        ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        by_length.setdefault(len(ids), []).append((number, ids))
    texts = [""] * len(prompts)
    for length, rows in sorted(by_length.items()):
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            batch = torch.tensor([ids for _, ids in part], device=device)
            out = generate(model, batch, max_new_tokens, temperature, top_p, stop_token=end, generator=generator)
            for (number, _), row in zip(part, out[:, length:].tolist(), strict=True):
                texts[number] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


def sample_texts(
    model: Transformer | HFModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    num_samples: int = 1,
    speculative: bool = False,
) -> list[str]:
    """Continuations of `prompt`, prompt included; an empty prompt starts a new document.

    With `speculative` the modules of multi-token prediction guess ahead, and how well is logged.
    """
    if temperature < 0:
        raise UserError(f"temperature: must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: must lie in (0, 1], got {top_p}")
    if num_samples < 1 or max_new_tokens < 1:
        raise UserError("num_samples and max_new_tokens: must be at least 1")
    end = tokenizer.token_to_id(EOT)
    assert end is not None  # load_tokenizer checks it
    ids = tokenizer.encode(prompt).ids or [end]
    if len(ids) >= model.config.max_seq_len:
        raise UserError(f"prompt: {len(ids)} tokens leave no room; the model reads {model.config.max_seq_len}")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(secrets.randbits(31) if seed is None else seed)
    prompts = torch.tensor([ids] * num_samples, device=device)
    if speculative:
        if isinstance(model, HFModel):
            raise UserError("speculative: a transformers model has no multi-token prediction")
        texts = []
        for prompt_1T in prompts.split(1):
            out, speculation = generate_speculatively(
                model, prompt_1T, max_new_tokens, temperature, top_p, stop_token=end, generator=generator
            )
            log.info("%s", speculation)
            texts.append(tokenizer.decode(out[0].tolist()))
        return texts
    out = generate(model, prompts, max_new_tokens, temperature, top_p, stop_token=end, generator=generator)
    return [tokenizer.decode(row.tolist()) for row in out]
