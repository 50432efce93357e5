"""Generation in which the modules of multi-token prediction guess ahead and the main model checks (DeepSeek-V3, 5.4.3).

The output is exactly what the main model alone would write: the same tokens at temperature 0, the same distribution
otherwise (Leviathan et al. 2023, arXiv 2211.17192). What changes is how many tokens one pass of the main model yields.

Shape letters: T tokens, D d_model, V vocabulary. One row at a time: rows would accept different numbers of guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frugal.errors import UserError
from frugal.model.generation import distribution
from frugal.model.transformer import Transformer


@dataclass
class Speculation:
    """How the guessing went: passes of the main model, guesses made, guesses kept, tokens written."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        """One line for the terminal."""
        rate = self.accepted / max(self.drafted, 1)
        return (
            f"{self.tokens} tokens in {self.passes} passes ({self.tokens / max(self.passes, 1):.2f} per pass), "
            f"{self.accepted} of {self.drafted} guesses kept ({rate:.0%})"
        )


class _Drafter:
    """The modules' hidden states and caches, kept up to what is known for certain.

    Module k at position i has seen token i + k. Once tokens up to n are known, its positions up to n - k are certain;
    those behind rest on guesses and are done again when the guesses have been checked.
    """

    def __init__(self, model: Transformer, max_len: int) -> None:
        self.model = model
        self.caches = model.new_mtp_caches(1, max_len)
        empty_1TD = model.embedding.weight.new_zeros(1, 0, model.config.d_model)
        self.hidden_1TD = [empty_1TD] * (len(model.mtp) + 1)  # [0]: the main model's

    def draft(
        self, tokens_T: Tensor, count: int, temperature: float, top_p: float, generator: torch.Generator | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Guess `count` tokens behind `tokens_T`; returns them and the distribution [V] that each was drawn from."""
        known = len(tokens_T)
        length = self.hidden_1TD[0].shape[1]  # positions that the main model has done: all tokens but the last
        guesses: list[tuple[Tensor, Tensor]] = []
        for k in range(1, count + 1):
            start = self.caches[k - 1].length
            ahead_T = torch.cat((tokens_T, *(guess.view(1) for guess, _ in guesses)))[start + k : length + k]
            new_1TD = self.model.mtp_step(
                k, self.hidden_1TD[k - 1][:, start:length], ahead_T.unsqueeze(0), self.caches[k - 1]
            )
            self.hidden_1TD[k] = torch.cat((self.hidden_1TD[k][:, :start], new_1TD), dim=1)
            q_V = distribution(self.model.head(new_1TD[:, -1]), temperature, top_p)[0]
            guesses.append((torch.multinomial(q_V, 1, generator=generator)[0], q_V))
        for k in range(1, count + 1):
            self.caches[k - 1].truncate(max(known - k, 0))
        return guesses


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What a token is drawn from once a guess from q was turned down: max(p - q, 0), not normalised (Leviathan, 2.3).

    Where rounding alone sets p apart from q nothing may be left of it; then p is as good.
    """
    rest_V = (p_V - q_V).clamp_min(0)
    return torch.where(rest_V.sum() > 0, rest_V, p_V)


@torch.no_grad()
def generate_speculatively(
    model: Transformer,
    prompt_1T: Tensor,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Speculation]:
    """Continue one prompt [1, T]; returns prompt and continuation, [1, T + new], and how the guessing went.

    Raises:
        UserError: the model has no modules of multi-token prediction.
        ValueError: more than one row.
    """
    if not model.config.n_mtp:
        raise UserError("speculative: the model has no multi-token prediction (model.transformer.n_mtp)")
    if prompt_1T.shape[0] != 1:
        raise ValueError(f"one row at a time, got {prompt_1T.shape[0]}")
    was_training = model.training
    model.eval()
    stats = Speculation()
    end = min(prompt_1T.shape[1] + max_new_tokens, model.config.max_seq_len)
    tokens_T, caches, drafter = prompt_1T[0], model.new_caches(1, end), _Drafter(model, end)
    done = 0  # positions in the main model's cache
    while len(tokens_T) < end:
        # The first pass reads the prompt; there is nothing to guess from before it.
        count = min(model.config.n_mtp, end - len(tokens_T) - 1) if done else 0
        guesses = drafter.draft(tokens_T, count, temperature, top_p, generator)
        fresh_T = torch.cat((tokens_T[done:], *(guess.view(1) for guess, _ in guesses)))
        hidden_1TD = model.hidden(fresh_T.unsqueeze(0), caches)
        p_TV = distribution(model.head(hidden_1TD[0, -count - 1 :]), temperature, top_p)
        accepted = 0
        for p_V, (guess, q_V) in zip(p_TV, guesses, strict=False):
            if torch.rand((), generator=generator, device=p_V.device) * q_V[guess] >= p_V[guess]:
                rest_V = residual(p_V, q_V)
                break
            accepted += 1
            if stop_token is not None and int(guess) == stop_token:
                break
        else:
            rest_V = p_TV[accepted]
        stats.passes, stats.drafted, stats.accepted = stats.passes + 1, stats.drafted + count, stats.accepted + accepted
        kept = [guess for guess, _ in guesses[:accepted]]
        if not (kept and stop_token is not None and int(kept[-1]) == stop_token):
            kept.append(torch.multinomial(rest_V, 1, generator=generator)[0])
        tokens_T = torch.cat((tokens_T, torch.stack(kept)))
        stats.tokens += len(kept)
        if stop_token is not None and int(kept[-1]) == stop_token:
            break
        done = len(tokens_T) - 1
        for cache in caches:
            cache.truncate(done)
        drafter.hidden_1TD[0] = torch.cat((drafter.hidden_1TD[0], hidden_1TD), dim=1)[:, :done]
    model.train(was_training)
    return tokens_T.unsqueeze(0), stats
