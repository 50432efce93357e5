"""Low-rank adapters: what they compute, cost and leave alone; through train.py, export and back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frugal.cli.verbs import main as frugal
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, TransformerConfig, flops_per_token
from frugal.model.generation import generate
from frugal.model.hf_model import HFModel, hf_config
from frugal.model.transformer import Transformer
from frugal.training.inference import load_for_inference
from frugal.training.lora import LoRA, adapted_modules, add_adapters, is_transposed, merged
from frugal.training.losses import summed_nll

pytest.importorskip("peft")
Train = Callable[..., Path]
CONFIG = TransformerConfig(
    vocab_size=50, max_seq_len=32, d_model=16, n_layers=3, d_ff=24, attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1),
)  # fmt: skip
LATENT = AttentionConfig(n_heads=2, latent=LatentConfig(8, 8, 4, 4, 6))
IDS = torch.arange(24).view(2, 12)
ON = ("--model.lora.rank", "4", "--model.lora.alpha", "8")


def weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    state = checkpoint["state_dict"].items()
    return {name.removeprefix("model."): tensor for name, tensor in state if name.startswith("model.")}


def train_a_little(model: torch.nn.Module) -> None:
    """A few large steps, so that the adapters matter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        model(IDS).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("attention", [CONFIG.attention, LATENT], ids=["grouped-query", "latent"])
def test_adapters_start_at_the_base_and_merge_into_the_same_function(attention: AttentionConfig) -> None:
    config = replace(CONFIG, attention=attention, n_mtp=1, tie_embeddings=True)
    model = Transformer(config).eval()
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, model(IDS)
    lora = LoRA(rank=3, alpha=12.0)
    add_adapters(model, lora)
    assert torch.equal(model(IDS), plain)
    train_a_little(model)
    after = model(IDS)
    assert (after - plain).abs().max() > 0.1
    state = model.state_dict()
    for name, tensor in before.items():  # the base is untouched to the bit
        stem, _, leaf = name.rpartition(".")
        assert torch.equal(state.get(f"{stem}.base_layer.{leaf}", state.get(name)), tensor), name
    again = Transformer(config).eval()
    again.load_state_dict(merged(state, lora.scale))
    torch.testing.assert_close(again(IDS), after, rtol=1e-5, atol=1e-5)
    assert again.head.weight is again.embedding.weight
    # Decoding with the cache uses latent attention's matrix itself.
    assert torch.equal(generate(model, IDS[:1, :4], 8, 0.0), generate(model, IDS[:1, :4], 8, 0.0, use_cache=False))


def test_merging_is_what_peft_does_itself() -> None:
    from peft import LoraConfig, get_peft_model

    llama = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    for values in (
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
        {"model_type": "llama", **llama},
    ):
        lora = LoRA(rank=2)
        model = HFModel(hf_config({**values, "vocab_size": 50, "max_position_embeddings": 32})).eval()
        plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        transposed = {name for name, module in model.named_modules() if is_transposed(module)}
        names = adapted_modules(model, None)
        assert names and not any("lm_head" in name for name in names)
        add_adapters(model, lora)
        train_a_little(model)
        after = model(IDS)
        ours = merged(model.state_dict(), lora.scale, transposed)
        assert ours.keys() == plain.keys()
        again = HFModel(hf_config({**values, "vocab_size": 50, "max_position_embeddings": 32})).eval()
        again.load_state_dict(ours)
        torch.testing.assert_close(again(IDS), after, rtol=1e-4, atol=1e-5)
        peers = HFModel(hf_config({**values, "vocab_size": 50, "max_position_embeddings": 32})).eval()
        peers.load_state_dict(plain)
        theirs = get_peft_model(
            peers, LoraConfig(r=2, lora_alpha=16, target_modules=names, fan_in_fan_out=bool(transposed))
        )
        theirs.base_model.model.load_state_dict(model.state_dict())
        for name, tensor in theirs.merge_and_unload().state_dict().items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "targets", [None, ("blocks.2.attention",), ("*.w1", "blocks.1.attention.wk"), ("mtp",)], ids=str
)
def test_counted_flops_are_those_of_the_products(targets: tuple[str, ...] | None) -> None:
    config = replace(CONFIG, n_mtp=1)
    model = Transformer(config)
    frozen = add_adapters(model, LoRA(rank=3, targets=targets))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def causal(query: list, key: list, value: list, *args: object, out_shape: object = None, **kwargs: object) -> int:
        return query[0] * query[1] * query[2] * (query[2] + 1) * (query[3] + value[-1])

    def backward(grad: object, *args: list, **kwargs: object) -> int:
        return 2 * causal(*args[:3])

    kernels = {attention: causal, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        hidden = model.hidden(IDS)
        loss = summed_nll(hidden, model.head.weight, IDS, 0)
        for ahead in model.mtp_hidden(hidden, IDS):
            loss = loss + summed_nll(ahead, model.head.weight, IDS[:, 1:], 0)
        loss.backward()
    expected = flops_per_token(config, IDS.shape[1], frozen)
    assert counter.get_total_flops() / IDS.numel() == pytest.approx(expected.training, rel=1e-6)
    full = flops_per_token(config, IDS.shape[1])
    assert expected.forward >= full.forward and expected.training < full.training


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoRA(targets=("*.w9",)), r"targets: '\*.w9' matches no matrix; they are named like blocks.0.attention.wq"),
        (LoRA(targets=("*.experts",)), "targets: '.*experts' names stacked experts .blocks.1.ffn.experts.w13"),
        (LoRA(targets=("head",)), "targets: head is the output head"),
        (LoRA(train=("nothing",)), "train: 'nothing' matches no parameter"),
    ],
)
def test_patterns_that_do_nothing_are_refused(lora: LoRA, said: str) -> None:
    with pytest.raises(UserError, match=f"model.lora.{said}"):
        add_adapters(Transformer(CONFIG), lora)


def test_other_parameters_train_whole_where_named() -> None:
    model = Transformer(CONFIG)
    frozen = add_adapters(model, LoRA(targets=("*.wq",), train=("norm", "*.router")))
    trains = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trains == {"norm.weight", "blocks.1.ffn.router.weight", "blocks.2.ffn.router.weight"}
    assert not trains & frozen.names and len(frozen.adapters) == 3


RUNS = {
    "dropout, accumulation, 16-mixed, Muon": (
        *("--model.lora.dropout", "0.3", "--trainer.accumulate_grad_batches", "2"),
        *("--trainer.precision", "16-mixed", "--config", "configs/optim/muon.yaml"),
    ),
    "moving average, bf16-true": ("--config", "configs/optim/ema.yaml", "--trainer.precision", "bf16-true"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_goes_on_exactly(resumes_exactly: Callable[..., tuple[Path, Path]], kind: str) -> None:
    whole, _ = resumes_exactly("--trainer.val_check_interval", "4", *ON, *RUNS[kind])
    state = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    adapters = [tensor for name, tensor in weights(state).items() if ".lora_" in name]
    groups = state["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(adapters) > 0
    assert len(state["optimizer_states"][0]["state"]) == len(adapters)
    assert all(tensor.isfinite().all() for tensor in adapters)


def test_from_a_base_run_to_an_exported_model(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = train("fit", "--run.name", "base")
    start = ("--model.init_from", str(base), "--expert_bias.rate", "0", *ON)
    run = train("fit", "--run.name", "tuned", *start, "--model.optimizer.lr", "0.02")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["flops"] < json.loads((base / "summary.json").read_text())["flops"]
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    original, state = weights(torch.load(base / "checkpoints/best.ckpt", weights_only=True)), weights(content)
    assert torch.equal(state["blocks.1.ffn.experts.w13"], original["blocks.1.ffn.experts.w13"])
    assert torch.equal(state["blocks.0.attention.wq.base_layer.weight"], original["blocks.0.attention.wq.weight"])
    model, tokenizer = load_for_inference(str(run))
    assert isinstance(model, Transformer)
    adapted = Transformer(model.config)
    add_adapters(adapted, LoRA(**content["lora"]))
    adapted.load_state_dict(state)
    ids = torch.tensor([tokenizer.encode("the lord said").ids])
    torch.testing.assert_close(model(ids), adapted.eval()(ids), rtol=1e-5, atol=1e-5)
    frugal(["export", str(run), str(tmp_path / "exported")])
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(exported(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    # And adapters once more, on the exported model in its Hugging Face form and in ours.
    folder, short = str(tmp_path / "exported"), (*ON, "--trainer.max_steps", "4")
    tokens = ("--data.tokenizer.path", folder, "--model.transformer.attention.head_dim", "8")
    hf = ("--model.class_path", "frugal.training.hugging_face.HuggingFaceModel", "--model.init_args.path", folder)
    theirs = train("fit", "--run.name", "hf", "--data.tokenizer.path", folder, *hf, *short)
    ours = train("fit", "--run.name", "ours", "--model.init_from", folder, *tokens, *short)
    assert load_for_inference(str(theirs))[0].state_dict().keys() == HFModel(exported.config).state_dict().keys()
    first = [json.loads((r / "metrics.jsonl").read_text().splitlines()[0]) for r in (theirs, ours)]
    assert first[0]["train/loss"] == pytest.approx(first[1]["train/loss"], rel=1e-3)


def test_what_does_not_go_together_is_one_line(train: Train, capsys: pytest.CaptureFixture) -> None:
    base = train("fit", "--run.name", "base", "--trainer.max_steps", "4")
    for options, said in (
        (("--freezing.prefix.layers", "1", *ON), "freezing: model.lora freezes all but its adapters already"),
        (("--ckpt_path", str(base / "checkpoints/last.ckpt"), *ON), "start from its weights with model.init_from"),
        (("--model.transformer.sharing.n_blocks", "1", "--model.transformer.moe", "null", *ON), "share their weights"),
        (("--model.init_from", "nowhere.ckpt", *ON), "model.init_from: no file nowhere.ckpt"),
        (("--model.lora.rank", "0"), "model.lora.rank: must be positive, got 0"),
        (("--model.lora.targets", '["*.wz"]'), "'*.wz' matches no matrix"),
    ):
        with pytest.raises(SystemExit):
            train("fit", *options)
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, error
