"""`frugal <verb>`: each verb is a typed function; what is heavy is imported inside it."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from frugal.cli.checkpoints import consolidate, inspect_, verify
from frugal.cli.compare import compare, workspace
from frugal.cli.curate import curate
from frugal.cli.errors import keys_of, one_line_errors
from frugal.cli.launch import cancel, local, slurm, status
from frugal.cli.model_verbs import count, export, import_, shapes
from frugal.cli.plan import plan, with_experiment
from frugal.cli.prepare import prepare
from frugal.cli.receipts import receipts
from frugal.cli.savings import savings
from frugal.cli.synthesize import synthesize
from frugal.errors import UserError


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

    try:
        model, tokenizer = load_for_inference(checkpoint, device)
    except UserError as error:  # train.py calls it ckpt_path
        raise UserError(re.sub("^ckpt_path:", "checkpoint:", str(error))) from None
    texts = sample_texts(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, num_samples, speculative)
    print("\n---\n".join(texts))


VERBS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "curate": curate,
    "generate": generate,
    "count": count,
    "shapes": shapes,
    "plan": plan,
    "export": export,
    "compare": compare,
    "workspace": workspace,
    "savings": savings,
    "receipts": receipts,
    "synthesize": synthesize,
    "import": import_,
}


# Verbs of two words.
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "launch": {"local": local, "slurm": slurm, "status": status, "cancel": cancel},
    "ckpt": {"inspect": inspect_, "verify": verify, "consolidate": consolidate},
}


def verb_of(arguments: list[str]) -> Callable[..., None] | None:
    """The verb that a command line begins with."""
    group = GROUPS.get(arguments[0]) if arguments else None
    return (group or VERBS).get("".join(arguments[1:2] if group else arguments[:1]))


def known_keys(verb: Callable[..., None] | None) -> Iterator[str]:
    """What a verb takes, for suggestions; those of a study's file are looked up only if one is needed."""
    yield from inspect.signature(verb).parameters if verb else ()
    if verb is savings:
        from frugal.tracking.study import Study

        yield from keys_of(Study, "study")


def spell_out(arguments: list[str]) -> list[str]:
    """Write what users type as jsonargparse wants it.

    `--json` of a boolean becomes `--json=true`, `--seeds 1 2` of a list `--seeds=[1, 2]`, positional words of a list
    one word; what stands behind `--` becomes the list `options`.
    """
    verb = verb_of(arguments)
    if verb is None:
        return arguments
    depth = 2 if arguments[0] in GROUPS else 1
    kinds = {p.name: (str(p.annotation), p.default) for p in inspect.signature(verb).parameters.values()}
    lists = {name for name, (kind, _) in kinds.items() if kind.startswith("list[")}
    cut = arguments.index("--") if "--" in arguments and "options" in lists else len(arguments)
    words, behind = arguments[depth:cut], arguments[cut + 1 :]
    first = next(iter(kinds))
    gathered: dict[str, list[str]] = {}
    if first in lists and kinds[first][1] is inspect.Parameter.empty:
        gathered[first] = []
    if behind:
        gathered["options"] = behind
    key, found = (first if first in gathered else ""), list[str]()
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name = word.removeprefix("--")
        if word.startswith("--"):
            key = name if name in lists else ""
            if key:
                gathered.setdefault(key, [])
                continue
            if kinds.get(name, ("",))[0] == "bool" and following.lower() not in ("true", "false"):
                word += "=true"
            found.append(word)
        elif key:
            gathered[key].append(word)
        else:
            found.append(word)
    for name, values in gathered.items():
        text = f"[{', '.join(values)}]" if kinds[name][0].startswith("list[int]") else json.dumps(values)
        found.insert(0, text) if name == first and first in gathered else found.append(f"--{name}={text}")
    return [*arguments[:depth], *found]


def main(args: list[str] | None = None) -> None:
    """Entry point of the `frugal` command."""
    from jsonargparse import ArgumentParser

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("frugal").setLevel(logging.INFO)
    parser = ArgumentParser(
        prog="frugal",
        description="Tools around a training run; training itself is `python train.py fit`.",
        exit_on_error=False,
        allow_abbrev=False,  # its subcommands do as it does
    )
    commands = parser.add_subcommands(dest="verb")

    def add(commands: Any, name: str, function: Callable[..., None]) -> None:
        assert function.__doc__
        verb = ArgumentParser(exit_on_error=False, description=function.__doc__.splitlines()[0])
        verb.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, verb, help=function.__doc__.splitlines()[0])

    for name, function in VERBS.items():
        add(commands, name, function)
    for group, verbs in GROUPS.items():
        parser_of_group = ArgumentParser(exit_on_error=False)
        commands.add_subcommand(group, parser_of_group, help=", ".join(verbs))  # level by level, from above
        subcommands = parser_of_group.add_subcommands(dest="what")
        for name, function in verbs.items():
            add(subcommands, name, function)
    given = sys.argv[1:] if args is None else args
    verb = verb_of(given)
    with one_line_errors(known_keys(verb)):
        arguments = spell_out(given)
        if not arguments:
            parser.print_help()
            return
        if arguments[0] == "plan":
            arguments = with_experiment(arguments)
        config = parser.instantiate_classes(parser.parse_args(arguments))
        chosen, verbs = config[config.verb], VERBS
        if config.verb in GROUPS:
            verbs, name, chosen = GROUPS[config.verb], chosen.what, chosen[chosen.what]
        else:
            name = config.verb
        try:
            verbs[name](**{k: v for k, v in chosen.as_dict().items() if k != "config"})
            sys.stdout.flush()
        except BrokenPipeError:  # the reader (head, a pager) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
