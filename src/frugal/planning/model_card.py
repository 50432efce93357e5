"""What a model costs before it is built: read its YAML, count, print."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any, cast

from frugal.errors import UserError, require
from frugal.model.config import (
    BlocksConfig,
    TransformerConfig,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    state_memory,
)
from frugal.model.vision_config import VisionConfig
from frugal.overlay import overlaid, read_mapping

SECTIONS = {"run", "data", "trainer", "freezing", "checkpoint", "cost", "samples", "expert_bias", "diagnostics"}


def read_transformer(path: str, key: str = "shape") -> TransformerConfig:
    """The shape of a language model, as `read_shape` finds it; `key` is the argument that named the file.

    Raises:
        UserError: as there, or it is an image classifier's.
        argparse.ArgumentError: as there.
    """
    shape = read_shape(path, key)
    require(isinstance(shape, TransformerConfig), f"{key}: {path} is an image classifier; this is for language models")
    return cast(TransformerConfig, shape)


def read_shape(path: str, key: str = "shape") -> BlocksConfig:
    """The shape in a file of `configs/model/`, in a whole config (`configs/base.yaml`, a run's), or in an experiment.

    An experiment is an overlay on `configs/base.yaml`, which is looked for in the current folder. `key` is the argument
    that named the file.

    Raises:
        UserError: no such file, no YAML mapping in it, or an experiment with a model of another class.
        argparse.ArgumentError: a key that does not exist, is missing or has the wrong type.
    """
    from jsonargparse import ArgumentParser

    values = read_layers(path, key)
    if is_run(values):
        values = on_base(values)
        model = values.get("model") or {}
        kind = str(model.get("class_path") or "LanguageModel").rpartition(".")[2]
        shape = model.get("init_args", model).get("transformer") or {}
        require(
            bool(shape) or kind in ("LanguageModel", "ImageClassifier"),
            f"{key}: {path} trains a {kind}; only our own transformer is counted by config",
        )
        values = _linked_to_data(values) | shape
    require(bool(values), f"{key}: {path} holds no transformer (see configs/model/ for its keys)")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VisionConfig if "patch_size" in values else TransformerConfig, "transformer")
    return parser.instantiate(parser.parse_object({"transformer": values})).transformer


def own_length(path: str) -> int:
    """Tokens per sequence at which a file's model is counted: a run's own, and 4,096 of a bare shape."""
    return read_shape(path).max_seq_len if is_run(read_layers(path)) else 4096


def read_layers(path: str, key: str = "shape") -> dict[str, Any]:
    """What a YAML file holds; of several joined by `+`, each lies upon those before it.

    Raises:
        UserError: no such file, no keys in it, or a study.
    """
    layers = []
    for part in [path] if Path(path).is_file() else path.split("+"):
        if not Path(part).is_file():
            raise UserError(f"{key}: no file {part}")
        layers.append(read_mapping(Path(part)))
        study = "question" in layers[-1]
        require(not study, f"{key}: {part} is a savings study (frugal savings); plan the config of a run")
    return reduce(overlaid, layers)


def is_run(values: Any) -> bool:
    """Whether a file's content is a run's config or an overlay on one, rather than a bare shape."""
    return isinstance(values, dict) and (isinstance(values.get("model"), dict) or bool(values.keys() & SECTIONS))


def on_base(values: dict[str, Any]) -> dict[str, Any]:
    """An experiment laid on `configs/base.yaml` of the current folder, if there is one; a whole config as it is."""
    has_model = "class_path" in (values.get("model") or {})
    whole = has_model and "seed_everything" in values and "max_epochs" in (values.get("trainer") or {})
    if whole or not (base := Path("configs/base.yaml")).is_file():
        return values
    return overlaid(read_mapping(base), values)


def _linked_to_data(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of the model that `train.py` takes from the data's section, where it has them."""
    data = values.get("data") or {}
    data = data | (data.get("init_args") or {})
    linked = {"vocab_size": (data.get("tokenizer") or {}).get("vocab_size"), "max_seq_len": data.get("seq_len")}
    linked |= {key: data.get(key) for key in ("image_size", "channels", "n_classes")}
    return {key: value for key, value in linked.items() if value is not None}


def model_card(config: BlocksConfig, seq_len: int = 4096) -> dict[str, Any]:
    """Every count of a shape: parameters, FLOPs per token at `seq_len`, bytes of cache and of training state.

    An image classifier's tokens are patches, a sequence is a whole image, and it has no cache.
    """
    generates = isinstance(config, TransformerConfig)
    seq_len = seq_len if generates else config.max_seq_len
    counts, flops, memory = count_parameters(config), flops_per_token(config, seq_len), state_memory(config)
    return {
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "active_without_input_embedding": counts.active_without_input_embedding,
            "active_without_embeddings": counts.active_without_embeddings,
            "applied": counts.applied,
            "multi_token_prediction": counts.mtp,
        },
        "flops_per_token": {
            "seq_len": seq_len,
            "forward": flops.forward,
            "training": flops.training,
            "causal": config.attention.causal,
        },
        "kv_cache_bytes_per_token": {
            "bfloat16": kv_cache_bytes_per_token(config, 2) if generates else 0,
            "float32": kv_cache_bytes_per_token(config, 4) if generates else 0,
        },
        "state_bytes": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "adamw": memory.optimizer,
            "total": memory.total,
        },
    }


def as_table(card: dict[str, Any]) -> str:
    """A model card for the eye, one figure per line."""
    parameters, flops = card["parameters"], card["flops_per_token"]
    has_mtp = parameters["multi_token_prediction"] > 0
    shares = parameters["applied"] != parameters["active"]
    multiple = "3x and MTP" if has_mtp else "3x"
    half = "causal half" if flops["causal"] else "all"
    cache, state = card["kv_cache_bytes_per_token"], card["state_bytes"]
    rows = [
        ("parameters, total", f"{parameters['total']:,}"),
        ("parameters, active per token", f"{parameters['active']:,}"),
        ("  without input embedding", f"{parameters['active_without_input_embedding']:,}"),
        ("  without both embeddings", f"{parameters['active_without_embeddings']:,}"),
        *([("multi-token prediction, apart", f"{parameters['multi_token_prediction']:,}")] if has_mtp else []),
        *([("  shared layers counted each time", f"{parameters['applied']:,}")] if shares else []),
        (f"FLOPs per token, forward, {flops['seq_len']:,} tokens", _si(flops["forward"])),
        (f"FLOPs per token, training ({multiple}, {half} of attention)", _si(flops["training"])),
        *([("KV cache per token, bfloat16", f"{cache['bfloat16']:,} bytes")] if cache["bfloat16"] else []),
        ("training state, float32: weights", _gib(state["weights"])),
        ("  gradients", _gib(state["gradients"])),
        ("  two moments", _gib(state["adamw"])),
        ("  total, without activations", _gib(state["total"])),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>20}" for name, value in rows)


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.2f} {unit}FLOP"
    return f"{value:,.0f} FLOP"


def _gib(value: int) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**27 else f"{value / 2**20:,.2f} MiB"
