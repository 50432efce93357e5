"""The image classifier: gradients against one plain batch, scores against plain formulas, runs of train.py."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frugal.cli.train import main
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig
from frugal.model.vision_config import VisionConfig
from frugal.schedule import WarmupStableDecay
from frugal.training.image_classifier import ImageClassifier
from frugal.training.inference import load_classifier, load_for_inference
from frugal.training.metrics import Classification
from frugal.training.reference import ImageReferenceLoss

CONFIG = VisionConfig(
    16,
    2,
    32,
    AttentionConfig(n_heads=2, causal=False),
    MoEConfig(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1),
    image_size=8,
    channels=1,
    n_classes=10,
    patch_size=4,
)
DIGITS = """
run: {wandb: disabled}
data:
  class_path: frugal.data.image_datamodule.ImageDataModule
  init_args:
    source: {class_path: frugal.data.images.SklearnDigits}
    image_size: 8
    channels: 1
    n_classes: 10
    batch_size: 8
    eval_batch_size: 128
    transforms: {class_path: frugal.data.transforms.image.ImageTransforms, init_args: {rotation: 10, mix: cutmix}}
model:
  class_path: frugal.training.image_classifier.ImageClassifier
  init_args:
    transformer:
      patch_size: 2
      d_model: 16
      n_layers: 2
      d_ff: 32
      attention: {n_heads: 2, causal: false}
      moe: {n_experts: 4, top_k: 2, d_expert: 16, n_shared_experts: 1, first_k_dense: 1}
    schedule: {warmup_steps: 2}
trainer: {max_steps: 12, val_check_interval: 4, log_every_n_steps: 2}
checkpoint: {every_n_steps: 3}
cost: {peak_tflops: 0.1}
"""


def classifier(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    module = ImageClassifier(CONFIG, torch.optim.AdamW, WarmupStableDecay(), **options)  # type: ignore[arg-type]
    module.configure_model()
    return module


def batch(n: int = 6, soft: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {"images": torch.rand(n, 1, 8, 8, generator=generator), "labels": torch.arange(n) % 10}
    if soft:
        made["targets"] = torch.softmax(torch.randn(n, 10, generator=generator), dim=1)
    return made


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy(soft: bool, smoothing: float) -> None:
    module, made = classifier(label_smoothing=smoothing), batch(soft=soft)
    loss = module.training_step(made, 0)
    target = made["targets"] if soft else made["labels"]
    expected = torch.nn.functional.cross_entropy(module(made["images"]), target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_scores_equal_plain_formulas_and_do_not_depend_on_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 3, generator=generator) * 2, torch.randint(0, 3, (200,), generator=generator)
    found = []
    for size in (200, 7):
        scores = Classification(["a", "b/c", "d"])
        for part in range(0, 200, size):
            scores.update(logits[part : part + size], labels[part : part + size])
        scores.update(logits[:0], labels[:0])
        found.append(scores.compute())
    assert found[0].keys() == {"loss", "accuracy", "calibration_error", "accuracy/a", "accuracy/b_c", "accuracy/d"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0]["loss"], torch.nn.functional.cross_entropy(logits, labels))
    right = (logits.argmax(1) == labels).float()
    torch.testing.assert_close(found[0]["accuracy"], right.mean())
    torch.testing.assert_close(found[0]["accuracy/b_c"], right[labels == 1].mean())
    confidence = torch.softmax(logits, 1).amax(1)
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [
        (right[bins == b].mean() - confidence[bins == b].mean()).abs() * (bins == b).float().mean()
        for b in bins.unique()
    ]
    torch.testing.assert_close(found[0]["calibration_error"], torch.stack(gaps).sum(), rtol=1e-5, atol=1e-6)
    scores.reset()
    scores.update(logits[:10], labels[:10])
    torch.testing.assert_close(scores.compute()["accuracy"], right[:10].mean())


@pytest.fixture
def digits(project: Path, train: Callable[..., Path]) -> Callable[..., Path]:
    (project / "tiny.yaml").write_text(DIGITS)
    return train


def test_a_run_leaves_what_a_run_on_text_leaves(digits: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    freezing = ("--freezing.prefix.layers", "1", "--freezing.prefix.start", "6")
    folder = digits("fit", *freezing, "--expert_bias.rate", "0.01", "--data.curation", "{}", "--run.wandb", "offline")
    assert "W&B logging stopped" not in caplog.text
    for sent in ("table/data/curation_filters_*.json", "images/data/curation_*.png"):
        assert list(folder.glob(f"wandb/offline-run-*/files/media/{sent}")), sent
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["loss_unit"] == "image" and summary["tokens_seen"] == 12 * 8 * 16
    assert 0 <= summary["val_accuracy"] <= 1 and 0 <= summary["test_accuracy"] <= 1 and summary["test_loss"] > 0
    assert summary["router"]["max_violation"] > 0 and summary["sample"] is None
    for name in ("plots/loss.png", "plots/expert_load.png", "checkpoints/best.ckpt", "freezing.jsonl", "config.yaml"):
        assert (folder / name).is_file(), name
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert state["state_dict"]["model.blocks.1.ffn.router.expert_bias"].any()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("val/accuracy/3" in row for row in rows) and any("test/accuracy" in row for row in rows)
    frozen = [row["cost/flops"] for row in rows if "speed/mfu" in row]
    steps = [b - a for a, b in itertools.pairwise(frozen)]
    assert steps[-1] < 0.8 * steps[0]  # what is frozen from below is not computed
    model, names = load_classifier(str(folder))
    assert names == list("0123456789") and model.config.patch_size == 2
    images = np.random.default_rng(0).integers(0, 255, (5, 1, 8, 8), np.uint8)
    loss = ImageReferenceLoss(str(folder), batch_size=2).score(images, np.arange(5), 10)
    logits = model(torch.from_numpy(images).float() / 255)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
    assert loss == pytest.approx(expected.tolist(), rel=1e-5)
    with pytest.raises(UserError, match=r"reads 10 classes of images of 1 x 8 x 8, the run has 10 of 1 x 9 x 9"):
        ImageReferenceLoss(str(folder)).score(np.zeros((1, 1, 9, 9), np.uint8), np.zeros(1, np.int64), 10)
    with pytest.raises(UserError, match="holds no language model with its tokenizer"):
        load_for_inference(str(folder))
    digits("test", "--ckpt_path", "last")
    tested = json.loads((folder / "test.json").read_text())
    assert tested["test/accuracy"] == pytest.approx(summary["test_accuracy"])
    digits("predict", "--ckpt_path", "last")
    predicted = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = sum(row["class"] == row["label"] for row in predicted) / len(predicted)
    assert len(predicted) == 360 and right == pytest.approx(summary["test_accuracy"])


def test_an_interrupted_run_goes_on_exactly(digits: Any, resumes_exactly: Callable[..., tuple[Path, Path]]) -> None:
    resumes_exactly(
        "--trainer.accumulate_grad_batches",
        "2",
        "--data.resolutions",
        "[{start: 0, image_size: 4}, {start: 7, image_size: 8}]",
        "--data.adaptive",
        "{by: compressibility, every: 2, lead: 4, bands: 2}",
        "--data.num_workers",
        "1",
        "--freezing.importance",
        "{measure: fisher, unit: expert, share: 0.5, measure_steps: 2, freeze_steps: 3}",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_size", "9"], "error: model.transformer.patch_size: 2 does not divide image_size (9)"),
        (
            ["--model.transformer.moe.top_k", "9"],
            "error: model.transformer.moe.top_k: must lie between 1 and n_experts",
        ),
        (["--model.transformer.pach_size", "2"], "did you mean model.transformer.patch_size"),
        (["--data.resolutions", "[{start: 0, image_size: 5}]"], "error: data.resolutions: 5 is no multiple of model"),
        (["--data.n_classes", "4"], "error: data.n_classes: sklearn-digits has 10 classes"),
        (["--data.source.path", "x"], "error: data.source"),
        (["--data.transforms.crop", "2"], "error: transforms.crop: must lie in (0, 1], got 2"),
    ],
)
def test_faults_are_one_line(
    digits: Callable[..., Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        digits("fit", *options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_data_and_model_of_different_kinds_are_refused(
    digits: Callable[..., Path], project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DIGITS.split("model:\n")
    (project / "images_only.yaml").write_text(whole[0])
    (project / "classifier_only.yaml").write_text("model:\n" + whole[1])
    monkeypatch.setattr("sys.argv", ["train.py"])
    for overlay, wanted in (
        ("images_only.yaml", "LanguageModel trains on text, and ImageDataModule gives images"),
        ("classifier_only.yaml", "ImageClassifier trains on images, and TextDataModule gives text"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", overlay])
        error = capsys.readouterr().err.strip().splitlines()
        assert wanted in error[-1], error


def test_a_checkpoint_of_another_model_is_refused(
    digits: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    digits("fit", "--trainer.max_steps", "3")
    with pytest.raises(SystemExit):
        digits("fit", "--ckpt_path", "last", "--model.transformer.d_ff", "48")
    assert "model.transformer.d_ff is 32 in the checkpoint, 48 in the config" in capsys.readouterr().err
