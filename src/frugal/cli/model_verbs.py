"""The verbs about models as such: what one costs, and its way to Hugging Face."""

from __future__ import annotations


def count(shape: str, seq_len: int | None = None, json: bool = False) -> None:
    """Count a model's parameters, FLOPs and memory from its config, without building it.

    Args:
        shape: a file of configs/model/, configs/base.yaml, or a run's config.yaml.
        seq_len: sequence length at which attention's FLOPs are counted; of a run's config its own, of a shape 4096.
        json: print JSON instead of a table.
    """
    from json import dumps

    from frugal.errors import UserError
    from frugal.planning.model_card import as_table, model_card, own_length, read_shape

    if seq_len is not None and seq_len < 1:
        raise UserError(f"seq_len: must be positive, got {seq_len}")
    card = model_card(read_shape(shape), seq_len or own_length(shape))
    print(dumps(card, indent=2) if json else as_table(card))


def shapes(
    shape: str,
    budget: str = "params",
    seq_len: int | None = None,
    tolerance: float = 0.05,
    hardware: str = "h100-80gb",
    precision: str = "bfloat16",
    mfu: float | None = None,
    tflops: float | None = None,
    tokens_per_step: int = 65536,
    json: bool = False,
) -> None:
    """List models of equal cost, from shallow and wide to deep and narrow, without building them.

    Args:
        shape: the family: a file of configs/model/, configs/base.yaml, or a run's config.yaml.
        budget: what is equal: params, active or flops (as much as the shape has), or an amount: 100M, 2GFLOP.
        seq_len: sequence length at which attention's FLOPs are counted; of a run's config its own, of a shape 4096.
        tolerance: largest relative distance from the budget.
        hardware: row of configs/hardware.yaml for the step time.
        precision: whose peak of that row counts.
        mfu: share of the peak that training achieves, the same for every shape, all overheads included; without it
            0.3, and on a GPU no step is shorter than launching its kernels takes.
        tflops: TFLOP/s that training achieves on your device (the closing card gives peak times MFU), instead.
        tokens_per_step: tokens of one optimizer step.
        json: print JSON instead of a table.
    """
    from json import dumps

    from frugal.errors import require
    from frugal.planning.hardware import achieved_flops, choose_hardware, load_hardware
    from frugal.planning.model_card import own_length, read_transformer
    from frugal.planning.offers import MFU
    from frugal.planning.shapes import Budget, equal_shapes, shape_row, shapes_table

    for name, value in {
        "seq_len": seq_len,
        "tolerance": tolerance,
        "mfu": mfu,
        "tokens_per_step": tokens_per_step,
    }.items():
        require(value is None or value > 0, f"{name}: must be positive, got {value}")
    base = read_transformer(shape)
    length = seq_len or own_length(shape)
    wanted = Budget.parse(budget, base, length)
    row = choose_hardware(load_hardware("configs/hardware.yaml"), "", hardware, "hardware")
    assert row is not None
    speed, assumption = achieved_flops(row, precision, mfu or MFU, tflops)
    launched = speed is not None and mfu is None and tflops is None and not row.per_core
    if launched:
        assumption += ", and no less than launching the kernels of one micro-batch takes (as in frugal plan)"
    rows = [
        shape_row(config, wanted, length, speed, tokens_per_step, launched)
        for config in equal_shapes(base, wanted, length, tolerance)
    ]
    if json:
        print(dumps({"budget": {"kind": wanted.kind, "value": wanted.value}, "shapes": rows}, indent=2))
        return
    print(shapes_table(rows, base))
    print(
        f"* the given shape. FLOP/token: at {length:,} tokens. state: float32 weights, gradients and AdamW's moments, "
        f"no activations. step, of {tokens_per_step:,} tokens: {assumption}."
    )


def export(checkpoint: str, folder: str) -> None:
    """Write a trained model as a folder that Hugging Face transformers loads.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt).
        folder: where to write; AutoModelForCausalLM and AutoTokenizer read it.
    """
    from frugal.training.export import export_checkpoint

    print(f"{export_checkpoint(checkpoint, folder)} written to {folder}")


def import_(folder: str, experiment: str) -> None:
    """Write the config that trains on from a Hugging Face folder with our own model.

    Args:
        folder: a local folder with config.json and safetensors, of an architecture that `frugal export` can write.
        experiment: YAML file to write, for `train.py fit --config`.
    """
    from frugal.planning.model_card import as_table, model_card, own_length
    from frugal.training.export import import_folder

    shape = import_folder(folder, experiment)
    print(as_table(model_card(shape, own_length(experiment))))
    print(f"written: python train.py fit --config {experiment}")
