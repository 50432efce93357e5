"""A reference model's loss as difficulty: against the model itself, cached, charged, and without a trace in the run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frugal.data.datamodule import TextDataModule
from frugal.data.difficulty import difficulty_scores
from frugal.data.sources import LocalText
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError
from frugal.training.inference import load_for_inference
from frugal.training.reference import ReferenceLoss

Train = Callable[..., Path]
BY_LOSS = """
data:
  curriculum:
    difficulty: loss
    steps: 8
    reference:
      class_path: frugal.training.reference.ReferenceLoss
      init_args: {checkpoint: %s}
"""


def test_difficulty_is_the_models_mean_loss(train: Train) -> None:
    run = train("fit", "--trainer.max_steps", "4")
    data = TextDataModule(LocalText("text.txt"), TokenizerConfig(300), seq_len=16)
    data.setup("fit")
    reference = ReferenceLoss(str(run), batch_size=7)
    assert data.prepared is not None
    (scores,), seconds = difficulty_scores(data.prepared, "loss", 16, 0, reference)
    model, _ = load_for_inference(str(run))
    for k in (0, 5, len(scores) - 1):
        ids = torch.from_numpy(data.prepared.train[16 * k : 16 * k + 16].astype(np.int64))
        assert scores[k] == pytest.approx(F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).item(), rel=1e-5)
    assert seconds > 0

    def never(*_: object) -> None:
        raise AssertionError("scored again")

    reference.score = never  # type: ignore[assignment, method-assign]
    again, charged = difficulty_scores(data.prepared, "loss", 16, 0, reference)
    assert (again[0] == scores).all() and charged == seconds
    with pytest.raises(AssertionError, match="scored again"):  # another length is another question
        difficulty_scores(data.prepared, "loss", 8, 0, reference)
    with pytest.raises(UserError, match=r"reference\.checkpoint: it reads 16 tokens, data\.seq_len is 32"):
        difficulty_scores(data.prepared, "loss", 32, 0, ReferenceLoss(str(run)))
    data = TextDataModule(LocalText("text.txt"), TokenizerConfig(280), seq_len=16)
    data.setup("fit")
    assert data.prepared is not None
    with pytest.raises(UserError, match=r"reference\.checkpoint: .* has another tokenizer"):
        difficulty_scores(data.prepared, "loss", 16, 0, ReferenceLoss(str(run)))


def test_a_run_by_reference_loss(train: Train, capsys: pytest.CaptureFixture) -> None:
    reference = train("fit", "--run.name", "reference", "--trainer.max_steps", "4")
    Path("by_loss.yaml").write_text(BY_LOSS % reference)
    runs = [train("fit", "--config", "by_loss.yaml", "--run.name", name) for name in ("scores", "finds_them")]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    charged = [summary["data_seconds_by_stage"]["difficulty"] for summary in summaries]
    assert charged[0] == charged[1] > 0 and summaries[0]["seconds_by_phase"]["data"] == pytest.approx(charged[0])
    # Scoring builds a model; the run's own weights are drawn as if it had not.
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    with pytest.raises(SystemExit):
        train("fit", "--data.curriculum.difficulty", "loss", "--data.curriculum.steps", "8")
    assert "data.curriculum.reference: difficulty loss needs a reference model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("fit", "--config", "by_loss.yaml", "--data.curriculum.reference.init_args.checkpoint", "nowhere.ckpt")
    assert "reference.checkpoint: no file nowhere.ckpt" in capsys.readouterr().err
