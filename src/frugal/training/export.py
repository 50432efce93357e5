"""A checkpoint as a folder that Hugging Face `transformers` loads, tokenizer included."""

from __future__ import annotations

from pathlib import Path

from frugal.data.tokenization import EOT
from frugal.model.hf import export
from frugal.training.inference import load_for_inference


def export_checkpoint(checkpoint: str, folder: str) -> str:
    """Write weights, config and tokenizer into `folder`; returns the architecture's name and what was unfolded.

    Args:
        checkpoint: a .ckpt file, or a run's folder.
        folder: is created; must not hold a model yet.

    Raises:
        UserError: no such checkpoint, a folder in use, or a shape that no Hugging Face architecture computes.
    """
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = load_for_inference(checkpoint)
    end = tokenizer.token_to_id(EOT)
    architecture = export(model.config, model.state_dict(), Path(folder), eos_token_id=end)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOT, model_max_length=model.config.max_seq_len
    )
    wrapped.save_pretrained(folder)
    if model.config.n_mtp:
        architecture += " without its multi-token prediction"
    if (blocks := len(set(model.config.layer_map))) < model.config.n_layers:
        return f"{architecture} ({model.config.n_layers} layers of {blocks} blocks, shared ones as copies)"
    return architecture
