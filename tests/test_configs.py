"""Every shipped YAML is parsed, and every model in it is built on the meta device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import frugal.cli.train as cli
from frugal.model.hf_model import hf_config
from frugal.model.transformer import Transformer
from frugal.model.vision import VisionTransformer
from frugal.planning.model_card import read_shape, read_transformer
from frugal.training.hugging_face import HuggingFaceModel
from frugal.training.image_classifier import ImageClassifier

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", [None, *EXPERIMENTS], ids=lambda path: path.stem if path else "base")
def test_shipped_configs_parse_and_build(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    built = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: built.append(self))
    cli.main(["fit", *(["--config", str(path)] if path else [])])
    (made,) = built
    if isinstance(made.model, HuggingFaceModel):
        assert made.model.values and hf_config(made.model.values)
    else:
        config, data = made.model.config, made.datamodule
        images = isinstance(made.model, ImageClassifier)
        with torch.device("meta"):
            model = VisionTransformer(config) if images else Transformer(config)
        assert sum(p.numel() for p in model.parameters()) > 100_000
        if images:
            assert (config.image_size, config.channels, config.n_classes) == (
                data.image_size,
                data.channels,
                data.n_classes,
            )
            assert read_shape(str(path)) == config
        else:
            assert config.vocab_size == data.tokenizer_config.vocab_size
            assert config.max_seq_len == data.seq_len
    if path:
        assert made.run_config.name == path.stem
        assert made.trainer.default_root_dir.startswith(f"runs/{path.stem}/")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_open_with_a_header(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Question:", "Command:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks {word}"
    commands = [line for line in header if "python train.py fit --config configs/" in line]
    assert any(f"--config configs/experiments/{path.name}" in line for line in commands)


PRESETS = sorted((ROOT / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in PRESETS if not p.stem.startswith("vit")], ids=lambda path: path.stem)
def test_a_model_preset_leaves_nothing_of_the_default_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML files are merged, so a key that a preset leaves out would keep the value of base.yaml."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    built = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: built.append(self))
    cli.main(["fit", "--model.transformer", f"configs/model/{path.name}"])
    preset = read_transformer(str(path))
    config = built[0].model.config
    assert replace(config, vocab_size=preset.vocab_size, max_seq_len=preset.max_seq_len) == preset
    assert config.vocab_size == built[0].datamodule.tokenizer_config.vocab_size  # the data decide these two
    assert config.max_seq_len == built[0].datamodule.seq_len
