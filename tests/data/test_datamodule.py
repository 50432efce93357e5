import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from frugal.data.datamodule import TextDataModule
from frugal.data.sources import LocalText
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError


def trainer(**changes: int) -> Any:
    values = {"global_step": 0, "max_steps": 6, "accumulate_grad_batches": 2, "global_rank": 0, "world_size": 1}
    return SimpleNamespace(**{**values, **changes})


def module(tmp_path: Path, lines: int = 400, vocab_size: int = 300, **options: Any) -> TextDataModule:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i} of the text\n" for i in range(lines)), encoding="utf-8")
    data = TextDataModule(
        LocalText(str(file)), TokenizerConfig(vocab_size), seq_len=32, cache_dir=str(tmp_path / "cache"), **options
    )
    data.prepare_data()
    data.setup("fit")
    data.trainer = trainer()
    return data


def stream(data: TextDataModule) -> torch.Tensor:
    return torch.stack([torch.stack([batch["input_ids"], batch["labels"]]) for batch in data.train_dataloader()])


def test_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    expected = stream(module(tmp_path, batch_size=3))
    assert expected.shape == (12, 2, 3, 32)
    for workers in (1, 4):
        assert torch.equal(stream(module(tmp_path, batch_size=3, num_workers=workers)), expected)


def test_resume_goes_on_where_the_run_stood(tmp_path: Path) -> None:
    data = module(tmp_path, batch_size=3)
    expected = stream(data)
    data.trainer = trainer(global_step=4)
    assert torch.equal(stream(data), expected[8:])


def test_two_ranks_see_what_one_sees(tmp_path: Path) -> None:
    one = module(tmp_path, batch_size=4)
    expected = stream(one)
    two = module(tmp_path, batch_size=2)
    parts = []
    for rank in (0, 1):
        two.trainer = trainer(global_rank=rank, world_size=2)
        parts.append(stream(two))
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
    assert all(isinstance(value, str | int) for value in state.values())  # loads with weights_only
    module(tmp_path).load_state_dict(state)
    with pytest.raises(UserError, match="another tokenizer"):
        module(tmp_path, vocab_size=290).load_state_dict(state)


def test_another_corpus_with_the_same_tokenizer_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(tmp_path)
    with caplog.at_level(logging.WARNING):
        data.load_state_dict({**data.state_dict(), "fingerprint": "another"})
    assert "another corpus" in caplog.text
