"""`frugal export` from a run to a folder that `transformers` opens by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from frugal.cli.verbs import main
from frugal.model.generation import generate
from frugal.training.inference import load_for_inference


def test_an_exported_run_says_the_same_in_transformers(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train("fit", "--trainer.max_steps", "4")
    capsys.readouterr()
    main(["export", str(run), str(tmp_path / "hf")])
    assert "Glm4MoeForCausalLM written to" in capsys.readouterr().out
    ours, tokenizer = load_for_inference(str(run))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the lord said unto moses,  let\nmy people £ go"
    assert their_tokenizer(text).input_ids == tokenizer.encode(text).ids
    assert their_tokenizer.decode(tokenizer.encode(text).ids) == text
    assert their_tokenizer.eos_token_id == tokenizer.token_to_id("<|endoftext|>") == theirs.config.eos_token_id
    ids = torch.tensor([tokenizer.encode("the lord said").ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    room = ours.config.max_seq_len - ids.shape[1]
    continued = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False)
    end = their_tokenizer.eos_token_id
    assert generate(ours, ids, room, temperature=0, stop_token=end).tolist() == continued.tolist()
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "hf")])
    assert "holds a model already" in capsys.readouterr().err


def test_a_run_without_a_counterpart_is_refused_in_one_line(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train("fit", "--trainer.max_steps", "4", "--model.transformer.moe.score", "softmax")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run), str(tmp_path / "hf")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "model.transformer.moe.expert_bias" in error
    assert not (tmp_path / "hf").exists()
