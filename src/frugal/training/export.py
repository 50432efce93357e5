"""A checkpoint as a folder that Hugging Face `transformers` loads, tokenizer included."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from frugal.data.tokenization import EOT
from frugal.errors import UserError
from frugal.model.config import TransformerConfig
from frugal.model.hf import export, read_hf_shape
from frugal.model.hf_model import HFModel
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
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = load_for_inference(checkpoint)
    end = tokenizer.token_to_id(EOT)
    if isinstance(model, HFModel):
        if (Path(folder) / "config.json").exists():
            raise UserError(f"folder: {folder} holds a model already")
        model.lm.config.eos_token_id = end
        model.lm.save_pretrained(folder)
        architecture = type(model.lm).__name__
    else:
        architecture = export(model.config, model.state_dict(), Path(folder), eos_token_id=end)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOT, model_max_length=model.config.max_seq_len
    )
    wrapped.save_pretrained(folder)
    if isinstance(model, HFModel):
        return architecture
    if model.config.n_mtp:
        architecture += " without its multi-token prediction"
    if (blocks := len(set(model.config.layer_map))) < model.config.n_layers:
        return f"{architecture} ({model.config.n_layers} layers of {blocks} blocks, shared ones as copies)"
    return architecture


def import_folder(folder: str, experiment: str) -> TransformerConfig:
    """Write an experiment that trains on from a Hugging Face folder; returns the model's shape.

    Args:
        folder: config.json, safetensors and, if it has one, tokenizer.json.
        experiment: YAML file to write; must not exist.

    Raises:
        UserError: no model there, an architecture that ours does not compute, or a file in the way.
    """
    shape, _ = read_hf_shape(Path(folder).expanduser())
    if Path(experiment).exists():
        raise UserError(f"experiment: {experiment} exists already")
    values = asdict(shape)
    del values["vocab_size"], values["max_seq_len"]  # both follow the data
    data: dict[str, Any] = {"seq_len": min(shape.max_seq_len, 2048), "tokenizer": {"vocab_size": shape.vocab_size}}
    if (Path(folder).expanduser() / "tokenizer.json").is_file():
        data["tokenizer"]["path"] = folder
    content = {
        "run": {"name": Path(experiment).stem},
        "data": data,
        "model": {"transformer": values, "init_from": folder},
    }
    Path(experiment).parent.mkdir(parents=True, exist_ok=True)
    Path(experiment).write_text(
        f"# Trains on from {folder} (written by `frugal import`); set data.source, the learning rate and the steps.\n"
        + yaml.safe_dump(content, sort_keys=False),
        encoding="utf-8",
    )
    return shape
