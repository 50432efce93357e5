import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import trainer

from frugal.data.curriculum import Curriculum, LengthStage
from frugal.data.datamodule import TextDataModule
from frugal.data.mixture import MixtureStage
from frugal.data.sources import LocalText, Mixture, Source, WeightedSource
from frugal.data.synthetic.physics import Physics
from frugal.data.tokenization import TokenizerConfig
from frugal.data.transforms.rewriting import BpeDropout
from frugal.data.transforms.text import FillInTheMiddle, TokenMask
from frugal.errors import UserError
from frugal.schedule import Ramp


def module(tmp_path: Path, lines: int = 400, vocab_size: int = 300, **options: Any) -> TextDataModule:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i} of the text\n" for i in range(lines)), encoding="utf-8")
    source: Source = LocalText(str(file))
    if "mixture" in options:
        (tmp_path / "b.txt").write_text("".join(f"another text, {i} times\n" for i in range(lines)), encoding="utf-8")
        other = LocalText(str(tmp_path / "b.txt"))
        source = Mixture([WeightedSource(source, 1, "a"), WeightedSource(other, 3, "b")])
    data = TextDataModule(source, TokenizerConfig(vocab_size), seq_len=32, cache_dir=str(tmp_path / "cache"), **options)
    data.prepare_data()
    data.setup("fit")
    data.trainer = trainer()
    return data


def stream(data: TextDataModule) -> torch.Tensor:
    batches = [torch.stack([batch["input_ids"], batch["labels"]]) for batch in data.train_dataloader()]
    return torch.stack([batch.reshape(2, -1, 32) for batch in batches])  # stages of shorter sequences side by side


AUGMENTED = {
    "transforms": [
        FillInTheMiddle(Ramp(0.8, start=1, ramp_in=2)),
        BpeDropout(Ramp(0.5, stop=5)),
        TokenMask(Ramp(0.9, start=2)),
    ]
}
MIXED = {"mixture": [MixtureStage(0, {"a": 1, "b": 1}), MixtureStage(2, {"a": 1, "b": 4})]}
PACED = {"curriculum": Curriculum("rarity", steps=4), "lengths": [LengthStage(0, 16), LengthStage(3, 32)]}
PLAIN_OR_AUGMENTED = pytest.mark.parametrize(
    "options",
    [{}, AUGMENTED, MIXED, PACED, {**AUGMENTED, **MIXED, **PACED}],
    ids=["plain", "augmented", "mixed", "paced", "all"],
)


@PLAIN_OR_AUGMENTED
def test_batches_do_not_depend_on_workers(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = stream(module(tmp_path, batch_size=3, **options))
    assert expected.shape == (12, 2, 3, 32)
    for workers in (1, 4):
        assert torch.equal(stream(module(tmp_path, batch_size=3, num_workers=workers, **options)), expected)


@PLAIN_OR_AUGMENTED
def test_resume_goes_on_where_the_run_stood(tmp_path: Path, options: dict[str, Any]) -> None:
    data = module(tmp_path, batch_size=3, **options)
    expected = stream(data)
    data.trainer = trainer(global_step=4)
    assert torch.equal(stream(data), expected[8:])


def test_transforms_change_training_by_their_schedule_and_never_validation(tmp_path: Path) -> None:
    plain, data = module(tmp_path), module(tmp_path, transforms=[TokenMask(Ramp(start=2))])
    mask = data.tokenizer.token_to_id("<|mask|>")
    assert mask is not None and plain.tokenizer.token_to_id("<|mask|>") is None
    hidden = (stream(data)[:, 0] == mask).flatten(1).float().mean(1)  # two micro-batches a step
    assert not hidden[:4].any() and (hidden[4:] > 0.02).all()
    for batch in data.val_dataloader():
        assert not (batch["input_ids"] == mask).any() and not (batch["labels"] == mask).any()
    assert data.prepared and torch.equal(
        torch.cat([batch["labels"][batch["labels"] != -100] for batch in data.val_dataloader()]),
        torch.from_numpy(data.prepared.val[1:].astype("int64")),
    )


def test_transforms_survive_the_way_to_another_process(tmp_path: Path) -> None:
    dataset = module(tmp_path, **AUGMENTED).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.transforms.tokenizer.encode_special_tokens
    for key, value in dataset[9].items():
        assert torch.equal(copy[9][key], value)


def test_a_loaded_tokenizer_without_their_tokens_is_refused(tmp_path: Path) -> None:
    path = module(tmp_path).prepared.folder  # type: ignore[union-attr]
    data = TextDataModule(
        LocalText(str(tmp_path / "a.txt")), TokenizerConfig(300, path=str(path)), transforms=[TokenMask()]
    )
    with pytest.raises(UserError, match=r"TokenMask needs the token <\|mask\|>"):
        data.prepare_data()


def test_what_making_the_data_took_is_charged(tmp_path: Path) -> None:
    assert module(tmp_path).charged_seconds == 0
    data = TextDataModule(Physics(n=150), TokenizerConfig(300), seq_len=32, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # made, and found in the cache
        data.prepared = None
        data.setup("fit")
        assert 0 < data.charged_seconds <= data.prepared.meta["seconds"]  # type: ignore[attr-defined]


@PLAIN_OR_AUGMENTED
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_see_what_one_sees(tmp_path: Path, options: dict[str, Any], world_size: int) -> None:
    expected = stream(module(tmp_path, batch_size=4, **options))
    data = module(tmp_path, batch_size=4 // world_size, **options)
    parts = []
    for rank in range(world_size):
        data.trainer = trainer(rank, world_size)
        parts.append(stream(data))
    assert torch.equal(torch.cat(parts, dim=2), expected)


def test_validation_covers_the_split(tmp_path: Path) -> None:
    data = module(tmp_path, eval_batch_size=5)
    assert data.prepared is not None
    labels = [batch["labels"] for batch in data.val_dataloader()]
    assert labels[0].shape == (5, 32)
    kept = torch.cat([part[part != -100] for part in labels])
    assert kept.tolist() == data.prepared.val[1:].tolist()
    assert data.token_bytes[kept].sum() == data.prepared.meta["val"]["bytes"]


def test_a_run_without_a_number_of_steps_is_refused(tmp_path: Path) -> None:
    data = module(tmp_path)
    data.trainer = trainer(max_steps=-1)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("key", "value"),
    [("seq_len", 0), ("batch_size", 0), ("eval_batch_size", 0), ("num_workers", -1), ("val_fraction", 1.0)],
)
def test_bad_values_name_their_key(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}: must .*got {value}"):
        TextDataModule(LocalText("unused.txt"), TokenizerConfig(), **{key: value})  # type: ignore[arg-type]


def test_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    state = module(tmp_path).state_dict()
    assert all(isinstance(value, str | int | list) for value in state.values())  # loads with weights_only
    module(tmp_path).load_state_dict(state)
    with pytest.raises(UserError, match="another tokenizer"):
        module(tmp_path, vocab_size=290).load_state_dict(state)


def test_another_corpus_with_the_same_tokenizer_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(tmp_path)
    with caplog.at_level(logging.WARNING):
        data.load_state_dict({**data.state_dict(), "fingerprint": "another"})
    assert "another corpus" in caplog.text
