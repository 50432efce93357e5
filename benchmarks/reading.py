"""Tokens per second that the loader gives, beside what the default model takes.

    python benchmarks/reading.py            # plain, with a mixture, a curriculum, each text transform; 0 and 2 workers

The model's own speed is measured in the same run, so the ratio is fair on a noisy machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from frugal.data.curriculum import Curriculum, LengthStage  # noqa: E402
from frugal.data.datamodule import TextDataModule  # noqa: E402
from frugal.data.mixture import MixtureStage  # noqa: E402
from frugal.data.sources import KingJames, Mixture, WeightedSource  # noqa: E402
from frugal.data.tokenization import TokenizerConfig  # noqa: E402
from frugal.data.transforms.rewriting import BpeDropout  # noqa: E402
from frugal.data.transforms.text import FillInTheMiddle, TokenMask  # noqa: E402
from frugal.model.transformer import Transformer  # noqa: E402
from frugal.planning.model_card import read_transformer  # noqa: E402
from frugal.schedule import Ramp  # noqa: E402
from frugal.training.losses import summed_nll  # noqa: E402


def reading_speed(seconds: float, **options: Any) -> float:
    """Tokens per second of the training loader with the default run's batch."""
    data = TextDataModule(options.pop("source", KingJames()), TokenizerConfig(2048), batch_size=4, **options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, max_steps=10**6, accumulate_grad_batches=1, global_rank=0, world_size=1
    )
    data.prepare_data()
    data.setup("fit")
    tokens, start = 0, None
    for i, batch in enumerate(data.train_dataloader()):
        if i == 20:
            start = time.perf_counter()
        if start is not None:
            tokens += batch["input_ids"].numel()
            if time.perf_counter() - start > seconds:
                break
    assert start is not None
    return tokens / (time.perf_counter() - start)


def training_speed(seconds: float) -> float:
    """Tokens per second of the default model's training step."""
    config = read_transformer(str(ROOT / "configs/base.yaml"))
    model = Transformer(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (4, 256))
    steps, start = 0, time.perf_counter()
    while steps < 10 or time.perf_counter() - start < seconds:
        loss = summed_nll(model.hidden(ids), model.head.weight, ids) / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == 5:  # warm
            start = time.perf_counter()
    return (steps - 5) * ids.numel() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    two = Mixture([WeightedSource(KingJames(), 1, "a"), WeightedSource(KingJames(), 1, "b")])
    stages = [MixtureStage(0, {"a": 1, "b": 2})]
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "two sources": {"source": two, "mixture": stages},
        "curriculum": {"curriculum": Curriculum("rarity", 10**6)},
        "short sequences": {"lengths": [LengthStage(0, 64)]},
        "masking": {"transforms": [TokenMask(Ramp(1.0))]},
        "fill-in-the-middle": {"transforms": [FillInTheMiddle(Ramp(0.5))]},
        "BPE-dropout": {"transforms": [BpeDropout(Ramp(1.0))]},
    }
    model = training_speed(seconds)
    print(f"the default model trains at {model:,.0f} tokens/s ({torch.get_num_threads()} threads)\n")
    print("| data | workers | tokens/s | times the model |\n|---|---|---|---|")
    for name, options in cases.items():
        for workers in (0, 2):
            speed = reading_speed(seconds, num_workers=workers, **options)
            print(f"| {name} | {workers} | {speed:,.0f} | {speed / model:.1f} |", flush=True)


if __name__ == "__main__":
    main()
