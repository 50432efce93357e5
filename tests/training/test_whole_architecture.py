"""Shared layers and multi-token prediction through the whole program: train, generate, export."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from frugal.cli.verbs import main
from frugal.training.inference import load_for_inference

OPTIONS = [
    *("--model.transformer.n_layers", "4", "--model.transformer.n_mtp", "1"),
    *("--model.transformer.sharing.n_blocks", "1", "--model.transformer.sharing.prelude", "1"),
    *("--model.transformer.sharing.rank", "2", "--model.transformer.sharing.own_norms", "true"),
]


def test_train_generate_export(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    run = train("fit", "--trainer.max_steps", "6", *OPTIONS)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/mtp_loss_1"] > 0 for row in rows if "train/loss" in row)
    capsys.readouterr()
    texts = []
    for extra in ([], ["--speculative"]):
        main(["generate", str(run), "--prompt", "the lord", "--temperature", "0", *extra])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and any("guesses kept" in record.message for record in caplog.records)
    main(["export", str(run), str(tmp_path / "hf")])
    said = capsys.readouterr().out
    assert "without its multi-token prediction (4 layers of 2 blocks, shared ones as copies)" in said
    ours, _ = load_for_inference(str(run))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["params_applied"] > summary["params_active"]
