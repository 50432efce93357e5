"""The shipped shapes against the published figures, from the config and as built."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from frugal.errors import UserError
from frugal.model.config import TransformerConfig, count_parameters, flops_per_token, kv_cache_bytes_per_token
from frugal.model.hf_config import to_hf_config
from frugal.model.transformer import Transformer
from frugal.model.vision import VisionTransformer
from frugal.model.vision_config import VisionConfig
from frugal.planning.model_card import as_table, model_card, read_shape, read_transformer

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "configs" / "model"
TOTALS = {
    "deepseek_v3": 671_026_419_200,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_moe_16b": 16_375_728_128,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_30b_a3b": 30_532_122_624,
    "llama2_7b": 6_738_415_616,
}


def shape(name: str) -> TransformerConfig:
    return read_transformer(str(FOLDER / f"{name}.yaml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_count_as_built_and_as_published(path: Path) -> None:
    config = read_shape(str(path))
    with torch.device("meta"):
        model = VisionTransformer(config) if isinstance(config, VisionConfig) else Transformer(config)  # type: ignore
    counts = count_parameters(config)
    biases = [b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias")]
    assert counts.total == sum(p.numel() for p in model.parameters()) + sum(biases)
    assert counts.total == TOTALS.get(path.stem, counts.total)
    if config.sharing:
        return  # tests/model/test_sharing.py counts what is active there
    idle = 0.0
    for moe in model.moe_layers().values():
        assert config.moe
        idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - config.moe.top_k / config.moe.n_experts)
    assert counts.active == counts.total - idle


@pytest.mark.parametrize("name", sorted(TOTALS.keys() - {"deepseek_moe_16b"}))  # the one without a class there
def test_transformers_builds_the_same_sizes_from_our_config(name: str) -> None:
    values = to_hf_config(shape(name))
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config)
    biases = sum(b.numel() for key, b in peer.named_buffers() if key.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in peer.parameters()) + biases == TOTALS[name]
    assert type(peer).__name__ == values["architectures"][0]


def test_every_published_total_has_its_preset() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= TOTALS.keys() | {"kjv_moe"}


def test_published_active_parameters() -> None:
    active = {name: count_parameters(shape(name)) for name in TOTALS}
    assert active["deepseek_v3"].active_without_input_embedding / 1e9 == pytest.approx(36.6, abs=0.05)
    assert active["deepseek_v2_lite"].active_without_embeddings / 1e9 == pytest.approx(2.24, abs=0.02)  # paper: 2.4
    assert active["deepseek_moe_16b"].active / 1e9 == pytest.approx(2.8, abs=0.05)
    assert active["olmoe_1b_7b"].active / 1e9 == pytest.approx(1.28, abs=0.01)
    assert active["qwen3_30b_a3b"].active / 1e9 == pytest.approx(3.35, abs=0.01)
    assert active["llama2_7b"].active == TOTALS["llama2_7b"]


def test_published_flops_and_cache() -> None:
    """Zhao et al. 2025 (arXiv 2505.09343), tables 1 and 2: 70.272 KB in bfloat16; 250 GFLOPs at 4,096 tokens."""
    deepseek = shape("deepseek_v3")
    assert kv_cache_bytes_per_token(deepseek, 2) == 70_272
    assert flops_per_token(deepseek, 4096).training / 1e9 == pytest.approx(250, abs=1)
    assert kv_cache_bytes_per_token(shape("llama2_7b"), 2) == 2 * 32 * 4096 * 2


def test_the_embedded_preset_is_the_default_run() -> None:
    import yaml

    base = yaml.safe_load((ROOT / "configs/base.yaml").read_text())
    data = base["data"]["init_args"]
    linked = {"vocab_size": data["tokenizer"]["vocab_size"], "max_seq_len": data["seq_len"]}
    preset = yaml.safe_load((FOLDER / "kjv_moe.yaml").read_text())
    assert preset == {**base["model"]["init_args"]["transformer"], **linked}
    assert read_transformer(str(ROOT / "configs/base.yaml")) == shape("kjv_moe")


def test_an_experiment_with_another_model_is_not_counted_as_ours() -> None:
    with pytest.raises(UserError, match=r"shape: .*003_hf_model\.yaml trains a HuggingFaceModel"):
        read_transformer(str(ROOT / "configs/experiments/003_hf_model.yaml"))
    with pytest.raises(UserError, match=r"shape: .*quick\.yaml is a savings study"):
        read_transformer(str(ROOT / "configs/studies/quick.yaml"))


def test_an_image_classifier_is_counted_per_patch_and_is_no_language_model() -> None:
    path = str(FOLDER / "vit_moe_s_16.yaml")
    card = model_card(read_shape(path))
    assert card["flops_per_token"]["seq_len"] == 14 * 14 and not card["flops_per_token"]["causal"]
    assert card["kv_cache_bytes_per_token"]["bfloat16"] == 0
    table = as_table(card)
    assert "all of attention" in table and "KV cache" not in table
    with pytest.raises(UserError, match=r"shape: .*vit_moe_s_16\.yaml is an image classifier; this is for language"):
        read_transformer(path)
