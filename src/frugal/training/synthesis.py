"""Text written by a local model, kept where verifiers accept it, with a record of what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from frugal.data.synthetic.generated import record_of
from frugal.data.synthetic.tasks import Item, Tasks
from frugal.data.synthetic.verifiers import Verifier
from frugal.errors import UserError, require
from frugal.training.inference import complete, load_for_inference

log = logging.getLogger(__name__)
Writer = Callable[[list[str], int], list[str]]  # prompts and a seed give continuations


def checkpoint_writer(model: str, max_new_tokens: int, temperature: float, top_p: float, device: str) -> Writer:
    """Continues prompts with one of our checkpoints."""
    transformer, tokenizer = load_for_inference(model, device)

    def write(prompts: list[str], seed: int) -> list[str]:
        return complete(transformer, tokenizer, prompts, max_new_tokens, temperature, top_p, seed)

    return write


def huggingface_writer(folder: str, max_new_tokens: int, temperature: float, top_p: float, device: str) -> Writer:
    """Continues prompts with any causal language model of Hugging Face transformers that lies in a folder."""
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        model = model.to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load {folder}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    start = tokenizer.bos_token or tokenizer.eos_token or ""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}

    def write(prompts: list[str], seed: int) -> list[str]:
        batch = tokenizer([prompt or start for prompt in prompts], return_tensors="pt", padding=True).to(device)
        cuda = [torch.cuda.current_device()] if device.startswith("cuda") else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(seed)
            out = model.generate(
                **batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return write


def synthesize(
    write: Writer,
    n: int,
    prompts: list[str],
    tasks: Tasks | None,
    verifiers: list[Verifier],
    seed: int,
    batch_size: int,
    max_tries: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for the text file, and the figures of the record.

    With tasks, the prompts are their training questions in order (never a held-out one), each asked once; a kept row
    is a document in the tasks' own format. Otherwise the prompts take turns.
    """
    rows: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    seconds = {"generation": 0.0, "verification": 0.0}
    asked: Iterator[tuple[str, Item | None]] = (
        ((tasks.prompt(item), item) for item in tasks.training_items())
        if tasks
        else ((prompt, None) for prompt in itertools.cycle(prompts))
    )
    tried = 0
    for number in itertools.count():
        batch = list(itertools.islice(asked, min(batch_size, max_tries * n - tried)))
        if not batch or len(rows) >= n:
            break
        start = time.perf_counter()
        continuations = write([prompt for prompt, _ in batch], seed * 1_000_003 + number)
        middle = time.perf_counter()
        for (prompt, item), continuation in zip(batch, continuations, strict=True):
            if len(rows) >= n:
                break
            text = prompt + continuation
            if tasks and item:
                text = tasks.text(dataclasses.replace(item, answer=tasks.answer_in(continuation)))
            tried += 1
            reason = next((r for r in (verifier.reason(text, item) for verifier in verifiers) if r), None)
            reason = reason or (None if text.strip() else "empty")
            if reason:
                refused[reason] += 1
            else:
                origin = {"task": item.task, "index": item.index} if item else {"prompt": prompt}
                rows.append({"text": text, "level": item.level if item else None, **origin})
        seconds["generation"] += middle - start
        seconds["verification"] += time.perf_counter() - middle
    figures = {"tried": tried, "kept": len(rows), "acceptance": len(rows) / max(tried, 1), "refused": dict(refused)}
    return rows, {**figures, "seconds": sum(seconds.values()), "seconds_by_stage": seconds}


def write_file(out: str, rows: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """The text and, beside it, its record; each appears whole or not at all.

    Raises:
        UserError: there is such a file already, or it cannot be written.
    """
    path = Path(out).expanduser()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    record = {**record, "sha256": hashlib.sha256(text).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path, text), (record_of(path), json.dumps(record, indent=2).encode() + b"\n")):
            temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(target)
    except OSError as error:
        raise UserError(f"out: cannot write {out} ({error.strerror})") from None


def check_arguments(out: str, n: int, temperature: float, top_p: float, batch_size: int, max_tries: int) -> None:
    """Refuse what cannot work before a model is loaded."""
    require(out.endswith(".jsonl"), f"out: must end with .jsonl, got {out}")
    require(not Path(out).expanduser().exists(), f"out: {out} exists already; choose another name")
    require(n >= 1, f"n: must be at least 1, got {n}")
    require(batch_size >= 1, f"batch_size: must be at least 1, got {batch_size}")
    require(max_tries >= 1, f"max_tries: must be at least 1, got {max_tries}")
    require(temperature >= 0, f"temperature: must not be negative, got {temperature}")
    require(0 < top_p <= 1, f"top_p: must lie in (0, 1], got {top_p}")
