"""The verbs about models as such: what one costs, and its way to Hugging Face."""

from __future__ import annotations


def count(shape: str, seq_len: int = 4096, json: bool = False) -> None:
    """Count a model's parameters, FLOPs and memory from its config, without building it.

    Args:
        shape: a file of configs/model/, configs/base.yaml, or a run's config.yaml.
        seq_len: sequence length at which attention's FLOPs are counted.
        json: print JSON instead of a table.
    """
    from json import dumps

    from frugal.errors import UserError
    from frugal.planning.model_card import as_table, model_card, read_transformer

    if seq_len < 1:
        raise UserError(f"seq_len: must be positive, got {seq_len}")
    card = model_card(read_transformer(shape), seq_len)
    print(dumps(card, indent=2) if json else as_table(card))


def export(checkpoint: str, folder: str) -> None:
    """Write a trained model as a folder that Hugging Face transformers loads.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt).
        folder: where to write; AutoModelForCausalLM and AutoTokenizer read it.
    """
    from frugal.training.export import export_checkpoint

    print(f"{export_checkpoint(checkpoint, folder)} written to {folder}")
