"""Multi-token prediction against plain loops, and generation that guesses ahead against generation that does not."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from frugal.errors import UserError
from frugal.model.config import TransformerConfig, count_parameters, flops_per_token
from frugal.model.generation import distribution, generate
from frugal.model.speculative import generate_speculatively, residual
from frugal.model.transformer import Transformer
from frugal.planning.model_card import read_transformer


def build(config: TransformerConfig, n_mtp: int, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(replace(config, n_mtp=n_mtp))


@pytest.mark.parametrize("fixture", ["tiny", "tiny_latent"])
def test_hidden_states_equal_the_paper_position_by_position(fixture: str, request: pytest.FixtureRequest) -> None:
    """DeepSeek-V3, eq. 21-23, with one call per prefix: no position may see a token beyond i + k."""
    model = build(request.getfixturevalue(fixture), 2).eval()
    ids = torch.randint(0, 64, (2, 9))
    hidden = model.hidden(ids)
    previous = [hidden[:, i] for i in range(9)]
    for k, ours in enumerate(model.mtp_hidden(hidden, ids), start=1):
        module = model.mtp[k - 1]
        joined = []
        for i in range(9 - k):
            token = model.embedding.weight[ids[:, i + k]]
            h = F.rms_norm(previous[i], (32,), module.hidden_norm.weight, 1e-6)
            e = F.rms_norm(token, (32,), module.embedding_norm.weight, 1e-6)
            joined.append(torch.cat((h, e), dim=-1) @ module.proj.weight.T)
        current = []
        for i in range(9 - k):
            rotary = (model.cos[: i + 1], model.sin[: i + 1])
            out = module.block(torch.stack(joined[: i + 1], dim=1), rotary)[:, -1]
            current.append(F.rms_norm(out, (32,), module.norm.weight, 1e-6))
        assert ours.shape == (2, 9 - k, 32)
        torch.testing.assert_close(ours, torch.stack(current, dim=1), atol=1e-5, rtol=1e-5)
        previous = current


def test_without_modules_nothing_changes(tiny: TransformerConfig) -> None:
    plain, with_mtp = build(tiny, 0), build(tiny, 1)
    assert len(plain.mtp) == 0 and list(with_mtp.moe_layers()) == [1, 2, 3]
    others = with_mtp.state_dict()  # one seed draws the same weights but for the modules
    assert all(torch.equal(tensor, others[name]) for name, tensor in plain.state_dict().items())
    ids = torch.randint(0, 64, (2, 16))
    assert torch.equal(plain(ids), with_mtp(ids))


@pytest.mark.parametrize("moe", [True, False])
def test_counts_equal_the_built_model(tiny: TransformerConfig, moe: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny if moe else replace(tiny, moe=None)
    model = build(config, 2)
    counts = count_parameters(model.config)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias"))
    assert counts.total + counts.mtp == sum(p.numel() for p in model.parameters()) + biases
    assert counts.total == count_parameters(config).total
    batch, seq_len = 2, 32
    ids = torch.randint(0, 64, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids)
        outputs = [hidden, *model.mtp_hidden(hidden, ids)]
        sum(model.head(h).sum() for h in outputs).backward()
    counted = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    scores = 0.0
    for layers, length in ((config.n_layers, seq_len), (1, seq_len - 1), (1, seq_len - 2)):
        scores += layers * 3 * 2 * 4 * 2 * config.head_dim * (length + 1) / 2 * length * batch
    ours = flops_per_token(model.config, seq_len)
    assert counted == pytest.approx(ours.training * batch * seq_len - scores, rel=1e-6)
    assert ours.forward == flops_per_token(config, seq_len).forward


def test_deepseek_v3s_published_module() -> None:
    """README_WEIGHTS of the model: "11.5B unique parameters" beside a total of 671B without them; exactly, 11.61B."""
    config = replace(read_transformer("configs/model/deepseek_v3.yaml"), n_mtp=1)
    counts = count_parameters(config)
    assert counts.total == 671_026_419_200
    assert counts.mtp / 1e9 == pytest.approx(11.6, abs=0.05)
    with torch.device("meta"):
        built = Transformer(config)
    assert counts.mtp == sum(p.numel() for p in built.mtp.parameters()) + 256


@pytest.mark.parametrize("fixture", ["tiny", "tiny_latent"])
@pytest.mark.parametrize("n_mtp", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_guessing_ahead_writes_the_same_tokens(
    fixture: str, n_mtp: int, seed: int, request: pytest.FixtureRequest
) -> None:
    model = build(request.getfixturevalue(fixture), n_mtp, seed).train()
    prompt = torch.randint(0, 64, (1, 4))
    plain = generate(model, prompt, 40, temperature=0)
    guessed, stats = generate_speculatively(model, prompt, 40, temperature=0)
    assert guessed.tolist() == plain.tolist() and guessed.shape[1] == 32  # the model's longest
    assert stats.tokens == 28 and stats.passes == 28 - stats.accepted and model.training
    stop = int(plain[0, 9])
    stopped, _ = generate_speculatively(model, prompt, 40, temperature=0, stop_token=stop)
    assert stopped.tolist() == generate(model, prompt, 40, temperature=0, stop_token=stop).tolist()


def test_perfect_guesses_are_all_kept(tiny: TransformerConfig) -> None:
    """A main model that always says the same token, and modules that agree."""
    model = build(tiny, 3)
    with torch.no_grad():
        model.head.weight.zero_()  # all logits are equal, so that argmax is token 0 everywhere
    out, stats = generate_speculatively(model, torch.tensor([[5, 6]]), 21, temperature=0)
    assert out[0, 2:].tolist() == [0] * 21
    assert stats.accepted == stats.drafted and stats.passes == 6  # 1 + 4 * 5


@pytest.mark.parametrize("n_mtp", [1, 2])
def test_sampling_keeps_the_distribution(tiny: TransformerConfig, n_mtp: int) -> None:
    """Frequencies of three sampled tokens against their exact probabilities: chi-square over all sequences."""
    model = build(replace(tiny, vocab_size=3, init_std=0.2), n_mtp)
    prompt = torch.tensor([[0, 1]])
    exact = {}
    for sequence in itertools.product(range(3), repeat=3):
        ids = torch.tensor([[0, 1, *sequence]])
        with torch.no_grad():
            p = distribution(model.eval()(ids)[0], 1.5, 0.95)
        exact[sequence] = float(p[1, sequence[0]] * p[2, sequence[1]] * p[3, sequence[2]])
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    generator, counts, n = torch.Generator().manual_seed(0), Counter[tuple[int, ...]](), 1500
    drafted = accepted = 0
    for _ in range(n):
        out, stats = generate_speculatively(model, prompt, 3, 1.5, 0.95, generator=generator)
        counts[tuple(out[0, 2:].tolist())] += 1
        drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    assert 0.3 < accepted / drafted < 0.98  # both ways are taken
    assert all(exact[sequence] > 0 for sequence in counts)
    chi2 = sum((counts[s] - n * p) ** 2 / (n * p) for s, p in exact.items() if p > 0)
    freedom = sum(p > 0 for p in exact.values()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_rounding_leaves_something_to_draw_from() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(residual(p, q), torch.tensor([0.3, 0.0, 0.0]))
    assert torch.equal(residual(p, p * (1 + 2e-7)), p)  # turned down by a hair


def test_what_cannot_guess_is_refused(tiny: TransformerConfig) -> None:
    with pytest.raises(UserError, match=r"speculative: .*model\.transformer\.n_mtp"):
        generate_speculatively(build(tiny, 0), torch.tensor([[1]]), 3)
    with pytest.raises(ValueError, match="one row"):
        generate_speculatively(build(tiny, 1), torch.tensor([[1], [2]]), 3)
    with pytest.raises(UserError, match="n_mtp"):
        replace(tiny, n_mtp=-1)
