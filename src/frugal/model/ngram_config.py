"""Which groups of tokens have embeddings of their own."""

from __future__ import annotations

from dataclasses import dataclass

from frugal.errors import require

KEY = "model.transformer.ngrams"


@dataclass(frozen=True)
class NgramConfig:
    """Embeddings of the last n tokens, looked up by their hash: parameters that cost no product.

    Conditional memory as a second kind of sparsity beside experts (Engram, Cheng et al. 2026, arXiv 2601.07372), in
    the plain form of Over-Encoding (Huang et al. 2025, arXiv 2501.16975): added to the token's embedding, with no gate.
    They begin at zero, so switching them on changes nothing at first.

    Args:
        orders: the n of each kind; 2 is the pair of a token and the one before it.
        n_slots: rows of each table; different n-grams may share one.
        n_hashes: tables per kind, each of width d_model / n_hashes, so that two n-grams rarely share all of their rows.
        to_head: add them once more behind the last layer, where the head reads.
    """

    orders: tuple[int, ...] = (2,)
    n_slots: int = 16384
    n_hashes: int = 8
    to_head: bool = True

    def __post_init__(self) -> None:
        require(
            bool(self.orders) and min(self.orders, default=0) >= 2 and len(set(self.orders)) == len(self.orders),
            f"{KEY}.orders: must be different numbers of at least 2, got {list(self.orders)}",
        )
        for name in ("n_slots", "n_hashes"):
            require(getattr(self, name) > 0, f"{KEY}.{name}: must be positive, got {getattr(self, name)}")

    @property
    def n_tables(self) -> int:
        """One per order and hash."""
        return len(self.orders) * self.n_hashes

    def parameters(self, d_model: int) -> int:
        """Stored numbers, of which a token uses len(orders) * d_model."""
        return len(self.orders) * self.n_slots * d_model
