"""Layers that share weights, against the same model without sharing."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.errors import UserError
from frugal.model.config import MoEConfig, SharingConfig, TransformerConfig, count_parameters, flops_per_token
from frugal.model.generation import generate
from frugal.model.hf import to_hf
from frugal.model.sharing import LowRankLinear, shared_layers, without_sharing
from frugal.model.transformer import Transformer

LOOPED = SharingConfig(n_blocks=2, prelude=1, coda=1)  # 0 | 1 2 1 2 | 3
SHARINGS = [LOOPED, replace(LOOPED, own_norms=True), replace(LOOPED, rank=3), replace(LOOPED, own_norms=True, rank=2)]


def shared(tiny: TransformerConfig, sharing: SharingConfig | None, **changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(replace(tiny, n_layers=6, sharing=sharing, **changes))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.up.normal_(std=0.1)
            elif isinstance(module, torch.nn.RMSNorm):
                module.weight.uniform_(0.5, 1.5)
    return model


def unshared(model: Transformer) -> Transformer:
    """The same function with a block of its own for every layer."""
    other = Transformer(replace(model.config, sharing=None))
    other.load_state_dict(without_sharing(model.state_dict()))
    return other


def close(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize(
    ("sharing", "n_layers", "expected"),
    [
        (SharingConfig(n_blocks=3), 6, (0, 1, 2, 0, 1, 2)),
        (SharingConfig(n_blocks=3, pattern="sequence"), 6, (0, 0, 1, 1, 2, 2)),
        (LOOPED, 6, (0, 1, 2, 1, 2, 3)),
        (SharingConfig(n_blocks=1, prelude=2, coda=1), 6, (0, 1, 2, 2, 2, 3)),
        (SharingConfig(layers=(0, 1, 0, 2)), 4, (0, 1, 0, 2)),
    ],
)
def test_the_map(sharing: SharingConfig, n_layers: int, expected: tuple[int, ...]) -> None:
    assert sharing.layer_map(n_layers) == expected


@pytest.mark.parametrize("fixture", ["tiny", "tiny_latent"])
@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_a_shared_model_is_the_unshared_one_with_copied_weights(
    fixture: str, sharing: SharingConfig, request: pytest.FixtureRequest
) -> None:
    """Same logits; a shared weight's gradient is the sum of its copies'; own parameters keep their own gradients."""
    model = shared(request.getfixturevalue(fixture), sharing)
    plain = unshared(model)
    ids = torch.randint(0, 64, (2, 16))
    logits, expected = model(ids), plain(ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    layers_of = {block: [i for i, b in enumerate(model.config.layer_map) if b == block] for block in range(4)}
    ours, theirs = dict(model.named_parameters(remove_duplicate=False)), dict(plain.named_parameters())
    checked = 0
    for block, layers in layers_of.items():
        for name, parameter in model.blocks[layers[0]].named_parameters():
            stem, _, leaf = name.rpartition(".")
            if leaf in ("down", "up"):
                for layer in layers:
                    grad = theirs[f"blocks.{layer}.{stem}.weight"].grad
                    up, down = (ours[f"blocks.{layer}.{stem}.{x}"] for x in ("up", "down"))
                    want = grad @ down.T if leaf == "up" else up.T @ grad
                    close(ours[f"blocks.{layer}.{name}"].grad, want)
                continue
            own = sharing.own_norms and "norm" in name
            grads = [theirs[f"blocks.{layer}.{name}"].grad for layer in (layers[:1] if own else layers)]
            want = sum(grads)
            close(parameter.grad, want)
            assert own or all(ours[f"blocks.{layer}.{name}"] is parameter for layer in layers), block
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("sharing", [None, SharingConfig(n_blocks=6)], ids=str)
def test_sharing_nothing_changes_nothing(tiny: TransformerConfig, sharing: SharingConfig | None) -> None:
    torch.manual_seed(3)
    plain = Transformer(replace(tiny, n_layers=6))
    torch.manual_seed(3)
    other = Transformer(replace(tiny, n_layers=6, sharing=sharing))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert count_parameters(other.config) == count_parameters(plain.config)


def test_low_rank_starts_from_plain_sharing(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(tiny, n_layers=6, sharing=replace(LOOPED, rank=4)))
    plain = Transformer(replace(tiny, n_layers=6, sharing=LOOPED))
    plain.load_state_dict(without_sharing(model.state_dict()))
    ids = torch.randint(0, 64, (2, 16))
    torch.testing.assert_close(model(ids), plain(ids))
    assert shared_layers(model.config.sharing, 6) == [1, 2, 3, 4]
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("down"))


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    own_norms=st.booleans(),
    rank=st.sampled_from([0, 2]),
    latent=st.booleans(),
    moe=st.booleans(),
    top_k=st.integers(1, 4),
)
def test_counts_equal_the_built_model(
    layers: list[int], own_norms: bool, rank: int, latent: bool, moe: bool, top_k: int
) -> None:
    from frugal.model.config import AttentionConfig, LatentConfig

    number = {block: i for i, block in enumerate(dict.fromkeys(layers))}
    sharing = SharingConfig(layers=tuple(number[block] for block in layers), own_norms=own_norms, rank=rank)
    attention = AttentionConfig(4, latent=LatentConfig(12, 20, 6, 4, 10) if latent else None)
    experts = MoEConfig(4, top_k, 24, n_shared_experts=1) if moe else None
    config = TransformerConfig(32, len(layers), 48, attention, experts, vocab_size=64, sharing=sharing)
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias"))
    assert counts.total == sum(p.numel() for p in model.parameters()) + biases
    with torch.device("meta"):
        plain = Transformer(replace(config, sharing=None))
    corrections = sum(p.numel() for name, p in model.named_parameters() if name.endswith((".up", ".down")))
    assert counts.applied == count_parameters(plain.config).active + corrections
    extra = flops_per_token(config, 64).forward - flops_per_token(plain.config, 64).forward
    assert extra == pytest.approx(2 * corrections)
    assert counts.active <= counts.total and counts.active <= counts.applied


@pytest.mark.parametrize("fixture", ["tiny", "tiny_latent"])
def test_every_layer_has_its_own_cache(fixture: str, request: pytest.FixtureRequest) -> None:
    model = shared(request.getfixturevalue(fixture), SHARINGS[-1]).eval()
    prompt = torch.randint(0, 64, (2, 5))
    with_cache = generate(model, prompt, 12, temperature=0)
    assert with_cache.tolist() == generate(model, prompt, 12, temperature=0, use_cache=False).tolist()


def test_loads_and_losses_of_every_application_count(tiny: TransformerConfig) -> None:
    assert tiny.moe
    model = shared(tiny, LOOPED, moe=replace(tiny.moe, sequence_loss_coef=0.1, z_loss_coef=0.1)).train()
    plain = unshared(model).train()
    ids = torch.randint(0, 64, (2, 16))
    model(ids), plain(ids)
    assert list(model.moe_layers()) == [1, 2, 3, 4, 5]
    for ours, theirs in zip(model.moe_layers().values(), plain.moe_layers().values(), strict=True):
        assert torch.equal(ours.load, theirs.load) and ours.load.sum() == 2 * 16 * tiny.moe.top_k
    torch.testing.assert_close(model.take_router_loss(), plain.take_router_loss())


def test_ties_survive_copies_casts_checkpoints_and_the_meta_device(tiny: TransformerConfig) -> None:
    model = shared(tiny, SHARINGS[-1])
    with torch.device("meta"):
        from_meta = Transformer(model.config)
    from_meta.to_empty(device="cpu")
    from_meta.load_state_dict(model.state_dict())
    count = len(list(model.parameters()))
    for other in (copy.deepcopy(model), from_meta, copy.deepcopy(model).to(torch.float64)):
        assert len(list(other.parameters())) == count
        assert other.blocks[1].attention.wq.weight is other.blocks[3].attention.wq.weight
    assert TransformerConfig.from_dict(asdict(model.config)) == model.config


@pytest.mark.parametrize("sharing", [SHARINGS[0], SHARINGS[-1]], ids=str)
def test_hugging_face_gets_copies(tiny: TransformerConfig, sharing: SharingConfig) -> None:
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    from frugal.model.hf_config import to_hf_config

    model = shared(tiny, sharing).eval()
    theirs = AutoModelForCausalLM.from_config(Glm4MoeConfig(**to_hf_config(model.config))).eval()
    tensors = to_hf(model.config, model.state_dict())
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)  # a file may hold no tensor twice
    plain = unshared(model)
    expected = to_hf(plain.config, plain.state_dict())
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in tensors)
    assert theirs.config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tiny: SharingConfig(), "set either n_blocks or layers"),
        (lambda tiny: SharingConfig(n_blocks=2, layers=(0, 1)), "set either n_blocks or layers"),
        (lambda tiny: SharingConfig(layers=(1, 0)), r"sharing\.layers: number the blocks"),
        (lambda tiny: SharingConfig(n_blocks=2, rank=-1), r"sharing\.rank"),
        (
            lambda tiny: replace(tiny, sharing=SharingConfig(n_blocks=2)),
            r"sharing\.n_blocks: 2 blocks cannot fill the 3",
        ),
        (lambda tiny: replace(tiny, sharing=SharingConfig(layers=(0, 1))), r"sharing\.layers: names .* 2 layers"),
        (lambda tiny: replace(tiny, sharing=SharingConfig(n_blocks=1)), "layers 0 and 1 share .* add to the prelude"),
    ],
)
def test_impossible_maps_name_their_key(tiny: TransformerConfig, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny)  # type: ignore[operator]
