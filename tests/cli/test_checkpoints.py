"""`frugal ckpt` on what users name."""

from pathlib import Path

import pytest
import torch

from frugal.cli.checkpoint_card import checkpoint_card
from frugal.cli.verbs import main
from frugal.training.checksums import write_sealed


def test_a_run_without_checkpoints_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    empty.mkdir()
    write_sealed({"a": 1}, full / "checkpoints/last.ckpt")
    with pytest.raises(SystemExit) as stopped:
        main(["ckpt", "verify", str(empty), str(full)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0 and out == f"{full}/checkpoints/last.ckpt: good\n"
    assert err == f"checkpoints: left out, no checkpoints/*.ckpt: {empty}\n"
    for words, message in (
        (["verify", str(empty)], f"checkpoints: no checkpoints/*.ckpt in {empty}"),
        (["verify"], "checkpoints: name at least one"),
        (["verify", str(full), "none"], "checkpoints: no file none"),
        (["inspect", str(empty)], f"checkpoint: no checkpoints/last.ckpt in {empty}"),
        (["inspect", "none"], "checkpoint: no file none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["ckpt", *words])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1, error


def test_a_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    embedding, other = torch.ones(300, 4), torch.ones(200)
    weights = {"embed": embedding, "head": embedding, "other": other, "flag": torch.tensor(1)}
    write_sealed({"state_dict": weights, "global_step": 3, "pytorch-lightning_version": "2"}, tmp_path / "a.ckpt")
    told = checkpoint_card(tmp_path / "a.ckpt")["weights"]
    assert told == "1.401k values in 3 tensors, 5.608 kB, float32, int64, and tied to them 1.2k"
