"""The verb that lets a model write training text."""

from __future__ import annotations

from frugal.data.synthetic.tasks import Tasks
from frugal.data.synthetic.verifiers import Verifier


def synthesize(
    model: str,
    out: str,
    n: int = 1000,
    prompts: list[str] = [""],  # noqa: B006 (never changed)
    tasks: Tasks | None = None,
    verifiers: list[Verifier] | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    max_tries: int = 20,
    device: str = "cpu",
) -> None:
    """Let a model write text, keep what verifiers accept, and record what it cost.

    Args:
        model: a .ckpt file, a run's folder, or a folder of a Hugging Face model.
        out: the .jsonl file to write; its record (.meta.json) is written beside it. Train on it with
            data.source.class_path frugal.data.synthetic.generated.Generated.
        n: texts to keep.
        prompts: beginnings, taken in turn; empty starts a new document.
        tasks: ask a task's questions instead, for instance frugal.data.synthetic.reasoning.ReasoningGym.
        verifiers: all must accept a text: MinimumQuality, Novel, RightAnswer of frugal.data.synthetic.verifiers.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: the same seed, model and settings give the same texts.
        batch_size: prompts at once.
        max_tries: gives up after this many times n texts.
        device: cpu, cuda, mps.
    """
    import logging
    from pathlib import Path

    from frugal.errors import UserError
    from frugal.training.synthesis import (
        check_arguments,
        checkpoint_writer,
        huggingface_writer,
        write_file,
    )
    from frugal.training.synthesis import synthesize as run

    check_arguments(out, n, temperature, top_p, batch_size, max_tries)
    # A run's folder has checkpoints/; a folder of transformers has config.json.
    make = huggingface_writer if (Path(model) / "config.json").is_file() else checkpoint_writer
    write = make(model, max_new_tokens, temperature, top_p, device)
    rows, figures = run(write, n, prompts, tasks, verifiers or [], seed, batch_size, max_tries)
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(figures["refused"].items()))
    if not rows:
        raise UserError(f"verifiers: none of {figures['tried']} texts was accepted ({refused})")
    if len(rows) < n:
        logging.getLogger(__name__).warning("only %d of the %d texts asked for", len(rows), n)
    settings = {
        "model": model,
        "prompts": None if tasks else prompts,
        "tasks": tasks.fingerprint() if tasks else None,
        "verifiers": [type(verifier).__name__ for verifier in verifiers or []],
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    write_file(out, rows, {**settings, **figures})
    print(
        f"{len(rows)} texts in {out}: {figures['acceptance']:.1%} of {figures['tried']} accepted"
        f"{f' (refused: {refused})' if refused else ''}, {figures['seconds']:.1f} s, charged to runs on them"
    )
