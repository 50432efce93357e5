"""The stand-in of a trainer that data modules read: where a run stands, and which process this is."""

from types import SimpleNamespace
from typing import Any


def trainer(rank: int = 0, ranks: int = 1, **changes: Any) -> Any:
    values = {"global_step": 0, "max_steps": 6, "accumulate_grad_batches": 2, "training": True}
    place = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks})
    return SimpleNamespace(**{**values, "strategy": place, **changes})
