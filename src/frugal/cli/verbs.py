"""`frugal <verb>`: each verb is a typed function; what is heavy is imported inside it."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable

from frugal.cli.curate import curate
from frugal.cli.errors import one_line_errors
from frugal.cli.model_verbs import count, export, import_, shapes
from frugal.cli.prepare import prepare
from frugal.cli.synthesize import synthesize


def generate(
    checkpoint: str,
    prompt: str = "",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    num_samples: int = 1,
    device: str = "cpu",
    speculative: bool = False,
) -> None:
    """Continue a prompt with a trained model.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its best.ckpt).
        prompt: the beginning; empty starts a new document.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token each time; higher is more random.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: makes the samples repeatable.
        num_samples: how many continuations.
        device: cpu, cuda, mps.
        speculative: let the model's multi-token prediction guess ahead (same tokens, fewer passes).
    """
    from frugal.training.inference import load_for_inference, sample_texts

    model, tokenizer = load_for_inference(checkpoint, device)
    texts = sample_texts(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, num_samples, speculative)
    print("\n---\n".join(texts))


VERBS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "curate": curate,
    "generate": generate,
    "count": count,
    "shapes": shapes,
    "export": export,
    "synthesize": synthesize,
    "import": import_,
}


def spell_out_flags(arguments: list[str]) -> list[str]:
    """`--json` means `--json true` for a verb's boolean options: jsonargparse wants a value."""
    verb = VERBS.get(arguments[0]) if arguments else None
    flags = (
        {f"--{p.name}" for p in inspect.signature(verb).parameters.values() if p.annotation == "bool"} if verb else ()
    )
    return [
        f"{word}=true" if word in flags and following.lower() not in ("true", "false") else word
        for word, following in zip(arguments, [*arguments[1:], ""], strict=False)
    ]


def main(args: list[str] | None = None) -> None:
    """Entry point of the `frugal` command."""
    from jsonargparse import ArgumentParser

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("frugal").setLevel(logging.INFO)
    parser = ArgumentParser(
        prog="frugal",
        description="Tools around a training run; training itself is `python train.py fit`.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="verb")
    for name, function in VERBS.items():
        assert function.__doc__
        verb = ArgumentParser(exit_on_error=False, description=function.__doc__.splitlines()[0])
        verb.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, verb, help=function.__doc__.splitlines()[0])
    with one_line_errors():
        arguments = spell_out_flags(args if args is not None else sys.argv[1:])
        if not arguments:
            parser.print_help()
            return
        config = parser.instantiate_classes(parser.parse_args(arguments))
        try:
            VERBS[config.verb](**{k: v for k, v in config[config.verb].as_dict().items() if k != "config"})
            sys.stdout.flush()
        except BrokenPipeError:  # the reader (head, a pager) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
