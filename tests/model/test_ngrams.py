"""Embeddings of n-grams against Python's own integers, plain look-ups and the model without them."""

from dataclasses import asdict, replace

import pytest
import torch

from frugal.errors import UserError
from frugal.model.config import NgramConfig, TransformerConfig, count_parameters
from frugal.model.generation import generate
from frugal.model.hf import to_hf
from frugal.model.ngrams import NgramEmbedding, ngram_slots
from frugal.model.speculative import generate_speculatively
from frugal.model.transformer import Transformer

NGRAMS = NgramConfig(orders=(2, 3), n_slots=50, n_hashes=4)


def trained(config: TransformerConfig, **changes: object) -> Transformer:
    """A model whose n-grams say something."""
    torch.manual_seed(0)
    model = Transformer(replace(config, ngrams=NGRAMS, **changes))
    with torch.no_grad():
        model.ngram_embedding.weight.normal_(std=0.3)
    return model


def signed(number: int) -> int:
    """The value of the lowest 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def slot_by_hand(ids: list[int], position: int, order: int, seed: int) -> int:
    key = 0
    for back in range(order):
        key = key * 65 + (ids[position - back] if position >= back else 64)
    mixed = signed((key + 1) * 0x9E3779B97F4A7C15 + (seed * 2 + order) * 0xBF58476D1CE4E5B9)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed = signed((mixed ^ (mixed >> 30)) * factor)
    return (mixed ^ (mixed >> 31)) % 50


def test_slots_by_hand() -> None:
    ids = torch.randint(0, 64, (2, 9))
    slots = ngram_slots(ids, NGRAMS, 64)
    assert slots.shape == (2, 9, 2, 4)
    for row, position, o, seed in torch.cartesian_prod(*(torch.arange(n) for n in slots.shape)).tolist():
        assert slots[row, position, o, seed] == slot_by_hand(ids[row].tolist(), position, NGRAMS.orders[o], seed)


def test_slots_are_spread_evenly_and_each_hash_by_itself() -> None:
    """Of all pairs of 64 tokens: rows are used as often as chance has it (chi-square), and two hashes collide apart."""
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    slots = ngram_slots(pairs, replace(NGRAMS, orders=(2,), n_slots=64), 64)[:, 1, 0]
    for column in slots.T:
        counts = torch.bincount(column, minlength=64).float()
        assert 25 < float(((counts - 64) ** 2 / 64).sum()) < 115  # 63 degrees of freedom: a chance of 1e-4
    same = (slots[:, None] == slots[None]).float()
    both = (same[..., 0] * same[..., 1]).mean()
    assert both < 2 / 64**2 + 2 / 4096


def test_a_token_counts_for_the_grams_that_hold_it(tiny: TransformerConfig) -> None:
    model = trained(tiny)
    ids = torch.randint(0, 63, (1, 12))
    other = ids.clone()
    other[0, 5] += 1
    changed = (model.ngram_embedding(ids) != model.ngram_embedding(other)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [5, 6, 7]


def test_the_sum_of_plain_tables() -> None:
    torch.manual_seed(0)
    layer = NgramEmbedding(NGRAMS, 32, 64)
    torch.nn.init.normal_(layer.weight)
    ids = torch.randint(0, 64, (2, 9))
    tables = layer.weight.view(2, 4, 50, 8)  # order, hash, slot, column
    slots = ngram_slots(ids, NGRAMS, 64)
    expected = sum(torch.cat([tables[o, h][slots[..., o, h]] for h in range(4)], dim=-1) for o in range(2))
    assert torch.equal(layer(ids), expected)
    layer(ids).sum().backward()
    used = {(o * 4 + h) * 50 + int(s) for o in range(2) for h in range(4) for s in slots[..., o, h].flatten()}
    assert layer.weight.grad is not None and set(layer.weight.grad.any(dim=1).nonzero().flatten().tolist()) == used


def test_nothing_changes_at_the_start(tiny: TransformerConfig) -> None:
    models = []
    for ngrams in (None, NGRAMS):
        torch.manual_seed(0)
        models.append(Transformer(replace(tiny, n_mtp=1, ngrams=ngrams)))
    ids = torch.randint(0, 64, (2, 12))
    assert torch.equal(models[0](ids), models[1](ids))


@pytest.mark.parametrize("to_head", [True, False])
def test_where_they_are_added(tiny: TransformerConfig, to_head: bool) -> None:
    """With blocks that do nothing, the head reads the token, its n-grams, and these once more with to_head."""
    model = trained(tiny)
    model.config = replace(model.config, ngrams=replace(NGRAMS, to_head=to_head))
    with torch.no_grad():
        for block in model.all_blocks():
            for name, parameter in block.named_parameters():
                if name.endswith(("wo.weight", "w2", "w2.weight")):
                    parameter.zero_()
    ids = torch.randint(0, 64, (2, 12))
    expected = model.norm(model.embedding(ids) + (1 + to_head) * model.ngram_embedding(ids))
    torch.testing.assert_close(model.hidden(ids), expected)


@pytest.mark.parametrize("fixture", ["tiny", "tiny_latent"])
def test_the_cache_remembers_the_tokens_before(fixture: str, request: pytest.FixtureRequest) -> None:
    model = trained(request.getfixturevalue(fixture), n_mtp=1).eval()
    ids = torch.randint(0, 64, (2, 16))
    caches = model.new_caches(2, 16)
    pieces = [model(ids[:, a:b], caches) for a, b in ((0, 6), (6, 7), (7, 16))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)
    plain = generate(model, ids[:1, :4], 20, temperature=0, use_cache=False)
    assert generate(model, ids[:1, :4], 20, temperature=0).tolist() == plain.tolist()
    assert generate_speculatively(model, ids[:1, :4], 20, temperature=0)[0].tolist() == plain.tolist()


def test_counts_equal_the_built_model(tiny: TransformerConfig) -> None:
    """A token uses one row of each table: of each order, as many numbers as the residual stream has."""
    for tie in (False, True):
        config = replace(tiny, ngrams=NGRAMS, tie_embeddings=tie)
        model, counts = Transformer(config), count_parameters(config)
        without = count_parameters(replace(config, ngrams=None))
        assert counts.total - without.total == model.ngram_embedding.weight.numel() == 2 * 50 * 32
        assert counts.active - without.active == 2 * 32
        assert counts.active_without_input_embedding == without.active_without_input_embedding


def test_the_shape_survives_a_checkpoint(tiny: TransformerConfig) -> None:
    config = replace(tiny, ngrams=NGRAMS)
    values = asdict(config)
    values["ngrams"]["orders"] = list(values["ngrams"]["orders"])  # as YAML has it
    assert TransformerConfig.from_dict(values) == config


def test_what_cannot_be_is_refused(tiny: TransformerConfig) -> None:
    for changes, key in (({"orders": ()}, "orders"), ({"orders": (1,)}, "orders"), ({"n_slots": 0}, "n_slots")):
        with pytest.raises(UserError, match=rf"model\.transformer\.ngrams\.{key}"):
            NgramConfig(**changes)
    with pytest.raises(UserError, match=r"ngrams\.n_hashes: 5 does not divide d_model \(32\)"):
        replace(tiny, ngrams=NgramConfig(n_hashes=5))
    model = trained(tiny)
    with pytest.raises(UserError, match=r"model\.transformer\.ngrams: .*no Hugging Face architecture"):
        to_hf(model.config, model.state_dict())
