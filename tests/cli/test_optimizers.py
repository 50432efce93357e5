"""Every shipped optimizer through train.py: it learns, is what the config says, and resumes exactly."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from frugal.tracking.run_folder import read_lines

Train = Callable[..., Path]
OPTIMIZERS = {
    "adamw": "AdamW",
    "sgd": "SGD",
    "adafactor": "Adafactor",
    "schedule_free": "AdamWScheduleFree",
    "soap": "SOAP",
    "ema": "Muon",
    "cosine": "Muon",
}
FUSED_SGD = ("--config", "configs/optim/sgd.yaml", "--model.optimizer.fused", "true")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fragment_trains_and_resumes_exactly(resumes_exactly: Callable[..., tuple[Path, Path]], name: str) -> None:
    whole, _ = resumes_exactly("--config", f"configs/optim/{name}.yaml")
    rows = [row for row in read_lines(whole / "metrics.jsonl") if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    checkpoint = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["optimizer"] == OPTIMIZERS[name]


def test_products_of_an_optimizer_that_is_not_ours_are_on_the_bill(train: Train) -> None:
    plain, soap = (
        json.loads(
            (train("fit", "--config", f"configs/optim/{name}.yaml", "--run.name", name) / "summary.json").read_text()
        )
        for name in ("adamw", "soap")
    )
    assert soap["tokens_seen"] == plain["tokens_seen"] and soap["flops"] > 1.5 * plain["flops"]


def test_eight_bit_moments_train(train: Train) -> None:
    pytest.importorskip("torchao")
    folder = train("fit", "--config", "configs/optim/adamw_8bit.yaml", "--trainer.max_steps", "4")
    assert json.loads((folder / "summary.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("name", ["schedule_free", "ema"])
def test_a_checkpoint_holds_the_averaged_weights_that_were_validated(train: Train, name: str) -> None:
    options = ("--config", f"configs/optim/{name}.yaml")
    folder = train("fit", *options)
    logged = [row["val/loss"] for row in read_lines(folder / "metrics.jsonl") if "val/loss" in row]
    train("validate", *options, "--ckpt_path", str(folder / "checkpoints/last.ckpt"))
    assert json.loads((folder / "validate.json").read_text())["val/loss"] == pytest.approx(logged[-1], rel=1e-6)
    plain = train("fit", "--run.name", "plain")
    assert logged != [row["val/loss"] for row in read_lines(plain / "metrics.jsonl") if "val/loss" in row]


def refused(train: Train, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train("fit", *options)
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("error:")]
    assert stopped.value.code == 2
    return line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.optimizer.lr", "-1"], "model.optimizer: Invalid lr: -1.0"),
        (["--model.optimizer.wieght_decay", "1"], "wieght_decay: there is no such key"),
        (["--model.optimizer.ns_steps", "0"], "Invalid ns_steps: 0"),
        (["--model.optimizer", "nowhere.Muon"], "nowhere"),
        ([*FUSED_SGD, "--trainer.precision", "bf16-true"], "fused SGD is wrong in 16 bits"),
        (["--model.parameter_groups", '[{"pattern": "*.nothing", "lr_scale": 2}]'], "*.nothing matches no parameter"),
        (["--model.parameter_groups", '[{"pattern": "norm", "matrix": true}]'], "norm.weight is no matrix"),
        (["--model.parameter_groups", '[{"pattern": "norm", "lr_scale": -1}]'], "lr_scale must not be negative"),
    ],
)
def test_a_wrong_setting_is_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(train, capsys, *options)


def test_another_optimizers_moments_are_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("fit", "--trainer.max_steps", "6")
    again = ("--ckpt_path", "last")
    line = refused(train, capsys, *again, "--config", "configs/optim/adamw.yaml")
    assert "trained with Muon, not AdamW" in line
    groups = ("--model.parameter_groups", '[{"pattern": "embedding", "weight_decay": 0}]')
    assert "other parameter groups" in refused(train, capsys, *again, *groups)


def test_a_group_has_a_rate_and_a_decay_of_its_own(train: Train) -> None:
    groups = '[{"pattern": "*.router", "lr_scale": 0.5}, {"pattern": "embedding", "weight_decay": 0}]'
    folder = train("fit", "--model.parameter_groups", groups, "--trainer.log_every_n_steps", "1")
    rows = read_lines(folder / "metrics.jsonl")
    for row in rows:
        if "optim/lr" in row:
            scaled = row["optim/lr/embeddings and routers of *.router"]
            assert scaled == pytest.approx(row["optim/lr/vectors"] / 2)
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["name"]: group["weight_decay"] for group in state["param_groups"]}[
        "embeddings and routers of embedding"
    ] == 0


def test_a_ramp_of_batch_sizes_counts_right_and_resumes_exactly(
    resumes_exactly: Callable[..., tuple[Path, Path]], train: Train, capsys: pytest.CaptureFixture
) -> None:
    """Stages change before, at and after the checkpoint of step 6; a mixture of lengths goes by the same steps."""
    ramp = '[{"start": 0, "batch_size": 1}, {"start": 3, "batch_size": 2}, {"start": 7, "batch_size": 5}]'
    options = ("--data.batch_ramp", ramp, "--data.lengths", '[{"start": 0, "seq_len": 8}, {"start": 5, "seq_len": 16}]')
    whole, _ = resumes_exactly(*options, "--trainer.accumulate_grad_batches", "2")
    summary = json.loads((whole / "summary.json").read_text())
    sizes = [1] * 3 + [2] * 4 + [5] * 5
    assert summary["tokens_seen"] == 2 * 16 * sum(sizes)
    state = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    assert state["TextDataModule"]["samples_seen"] == 2 * sum(sizes)
    rates = [row["optim/lr"] for row in read_lines(whole / "metrics.jsonl") if "optim/lr" in row]
    plain = train("fit", "--run.name", "plain")
    expected = [row["optim/lr"] for row in read_lines(plain / "metrics.jsonl") if "optim/lr" in row]
    assert rates == expected  # the learning rate does not follow the size
    for wrong, said in (
        ('[{"start": 1, "batch_size": 1}]', "starts at step 0"),
        (ramp.replace("5", "0"), "at least 1"),
    ):
        with pytest.raises(SystemExit):
            train("fit", "--data.batch_ramp", wrong)
        assert said in (error := capsys.readouterr().err) and "data.batch_ramp[" in error
