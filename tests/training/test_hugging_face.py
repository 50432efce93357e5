"""Models of `transformers` in the place of ours, and our model trained on from a Hugging Face folder."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from frugal.callbacks.routing import RoutingMonitor
from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.model.generation import generate
from frugal.model.hf_model import HFModel, hf_config
from frugal.training.inference import load_for_inference

Train = Callable[..., Path]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DROPOUT = {"attention_dropout": 0.1}  # a resumed run must drop the same
HF = ["--model.class_path", "frugal.training.hugging_face.HuggingFaceModel"]
FROM_CONFIG = [*HF, "--model.init_args.config", json.dumps(LLAMA | DROPOUT)]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupt_after_step_7(self: RoutingMonitor, trainer: pl.Trainer, *args: object) -> None:
    if trainer.global_step == 7:
        raise KeyboardInterrupt


def test_from_a_config_through_the_whole_program(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, stop, go on as if nothing had happened, generate, export, train on from the export."""
    whole = train("fit", "--run.name", "whole", *FROM_CONFIG)
    losses = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RoutingMonitor, "on_train_batch_end", interrupt_after_step_7)
        train("fit", "--run.name", "cut", *FROM_CONFIG)
    cut = train("fit", "--run.name", "cut", "--ckpt_path", "last", *FROM_CONFIG)
    states = [torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    summary = json.loads((whole / "summary.json").read_text())
    model, tokenizer = load_for_inference(str(whole))
    assert isinstance(model, HFModel)
    assert summary["params_total"] == sum(p.numel() for p in model.parameters())
    ids = torch.tensor([tokenizer.encode("the lord").ids])
    ours = generate(model, ids, 6, temperature=0)
    assert ours.tolist() == generate(model, ids, 6, temperature=0, use_cache=False).tolist()
    main(["export", str(whole), str(tmp_path / "hf")])
    assert "LlamaForCausalLM written to" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids))
    onward = train(
        "fit", "--run.name", "onward", "--trainer.max_steps", "2", *HF, "--model.init_args.path", str(tmp_path / "hf"),
        "--data.tokenizer.path", str(tmp_path / "hf"),
    )  # fmt: skip
    assert rows(onward)[-1]["val/loss"] < min(row["val/loss"] for row in rows(whole) if "val/loss" in row)
    with pytest.raises(SystemExit):
        train("fit", "--run.name", "cut", "--ckpt_path", str(cut / "checkpoints/last.ckpt"))
    assert "transformers model" in capsys.readouterr().err


def test_the_loss_is_ours_at_the_same_weights(train: Train, tmp_path: Path) -> None:
    """Our own run, exported: as a transformers model it starts with the very same losses."""
    run = train("fit", "--trainer.max_steps", "4")
    main(["export", str(run), str(tmp_path / "hf")])
    main(["import", str(tmp_path / "hf"), str(tmp_path / "import.yaml")])
    hf = [*HF, "--model.init_args.path", str(tmp_path / "hf")]
    tokenizer = ["--data.tokenizer.path", str(tmp_path / "hf"), "--data.tokenizer.vocab_size", "300"]
    common = ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", *tokenizer]
    theirs = train("fit", "--run.name", "theirs", *common, *hf)
    ours = train(
        "fit", "--config", str(tmp_path / "import.yaml"), "--run.name", "ours", *common, "--data.seq_len", "16"
    )
    fresh = train("fit", "--run.name", "fresh", *common)
    first = [next(row["train/loss"] for row in rows(folder) if "train/loss" in row) for folder in (ours, theirs, fresh)]
    assert first[0] == pytest.approx(first[1], abs=1e-5) and first[0] < first[2] - 0.1


def test_counts_and_flops_by_the_rule() -> None:
    llama = HFModel(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=64))
    counts = llama.counts()
    assert counts.total == counts.active == sum(p.numel() for p in llama.parameters())
    assert counts.active_without_input_embedding == counts.total - 64 * 16
    assert counts.active_without_embeddings == counts.total - 2 * 64 * 16
    expected = 2 * counts.active_without_input_embedding + 2 * 4 * 16 * (8 + 1) / 2
    assert llama.flops_per_token(8).training == 3 * expected
    moe = HFModel(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, intermediate_size=32, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=2,
            output_router_logits=True, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip
    experts = 2 * 8 * 3 * 16 * 8
    assert moe.counts().total - moe.counts().active == experts * 6 // 8
    moe.train()
    moe(torch.randint(0, 64, (2, 8)))
    loss = moe.take_router_loss()
    assert loss is not None and loss.requires_grad and moe.take_router_loss() is None
    assert loss.item() == pytest.approx(0.5 * 2, rel=0.5)  # about top_k when balanced


SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
WITH_EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
HEADS = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "gpt2"} | SMALL,
        {"model_type": "bloom"} | SMALL,  # no max_position_embeddings
        {"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},  # no cache of ours
        {"model_type": "qwen3_moe", "head_dim": 6, "rope_theta": 5e5} | SMALL | WITH_EXPERTS,
        {"model_type": "qwen3_next", "head_dim": 8, "shared_expert_intermediate_size": 16}
        | SMALL | WITH_EXPERTS | LINEAR | HEADS,  # layers with states beside layers with keys and values
    ],
    ids=lambda values: values["model_type"],
)  # fmt: skip
def test_any_type_generates_as_without_a_cache(values: dict) -> None:
    config = hf_config(values, {"max_position_embeddings": 16, "eos_token_id": 0, "bos_token_id": None})
    torch.manual_seed(0)
    model = HFModel(config, 16)
    model.require_causal()
    ids = torch.randint(0, 64, (2, 8))
    assert torch.equal(generate(model, ids, 8, temperature=0), generate(model, ids, 8, temperature=0, use_cache=False))
    again = HFModel.rebuild(model.values)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(ids), model.eval()(ids))
    older = json.loads(model.values) | {"transformers_version": "5.0.0"}
    assert HFModel.comparable(json.dumps(older)) == HFModel.comparable(model.values)


def test_what_follows_the_data_gives_way_to_what_is_set() -> None:
    defaults = {"vocab_size": 64, "max_position_embeddings": 16}
    assert hf_config({"model_type": "gpt2", "n_positions": 8}, defaults).max_position_embeddings == 8
    assert hf_config({"model_type": "gpt2", "n_embd": 12}, defaults).n_positions == 16
    assert hf_config({"model_type": "llama", "rope_theta": 5e5}, defaults).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (HF, "set exactly one of config and path"),
        ([*HF, "--model.init_args.config", '{"model_type": "lama"}'], "transformers knows no 'lama'"),
        ([*HF, "--model.init_args.config", '{"model_type": "llama", "hiden_size": 8}'], "model.config.hiden_size"),
        ([*HF, "--model.init_args.path", "nowhere"], "model.path: no folder nowhere"),
        ([*FROM_CONFIG[:-1], json.dumps(LLAMA | {"vocab_size": 100})], "vocabulary of 100 is smaller than"),
        ([*FROM_CONFIG[:-1], json.dumps(LLAMA | {"max_position_embeddings": 8})], "data.seq_len: 16 is more than"),
        ([*HF, "--model.init_args.config", '{"model_type": "t5"}'], "'t5' is no causal language model"),
        ([*FROM_CONFIG[:-1], json.dumps(LLAMA | {"model_type": "bert"})], "BertLMHeadModel sees later tokens"),
        ([*FROM_CONFIG[:-1], json.dumps(LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 3})], "cannot run"),
        (["--model.init_from", "nowhere"], "model.init_from: no file nowhere"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    train: Train, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("fit", *arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in error[-1]


def test_weights_of_another_shape_are_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import LlamaForCausalLM

    config = hf_config(LLAMA | {"vocab_size": 300})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(SystemExit):
        train("fit", "--model.init_from", str(tmp_path / "hf"))
    error = capsys.readouterr().err
    assert "model.init_from" in error and "model.transformer.moe" in error and "frugal import" in error
    with pytest.raises(UserError, match="lacks the tensor"):
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "hf/model.safetensors")
        tensors.pop("model.norm.weight")
        save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
        HFModel(config).load_pretrained(str(tmp_path / "hf"))
