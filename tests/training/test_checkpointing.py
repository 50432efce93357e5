"""Checkpoints are whole, know their checksum, and a damaged one costs no more than the steps since the one before."""

import errno
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.tracking.run_folder import RunFolder, read_lines
from frugal.training import checksums, sharded
from frugal.training.checkpointing import good_checkpoint, keep_copies, read_checkpoint
from frugal.training.checksums import damage, is_sealed, write_sealed

Train = Callable[..., Path]
CONTENT = {"state_dict": {"w": torch.arange(300.0).view(30, 10), "n": torch.tensor(7)}, "global_step": 3}


def test_torch_reads_what_is_sealed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_sealed(CONTENT, path)
    assert is_sealed(path) and damage(path) is None
    for memory_mapped in (False, True):
        content = torch.load(path, weights_only=True, mmap=memory_mapped)
        assert torch.equal(content["state_dict"]["w"], CONTENT["state_dict"]["w"]) and content["global_step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    torch.save(CONTENT, tmp_path / "plain.ckpt")  # of an earlier version, or of other tools
    assert not is_sealed(tmp_path / "plain.ckpt") and damage(tmp_path / "plain.ckpt") is None


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
def test_any_changed_byte_and_any_cut_is_seen(
    tmp_path_factory: pytest.TempPathFactory, position: float, change: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("x") / "a.ckpt"
    write_sealed(CONTENT, path)
    whole = bytearray(path.read_bytes())
    at = int(position * len(whole))
    whole[at] ^= change
    path.write_bytes(whole[:at] if cut else whole)
    assert damage(path) is not None
    if at < len(whole) - checksums.SEAL:  # beyond it everything is there still
        with pytest.raises(UserError, match=r"damaged|no checkpoint"):
            read_checkpoint(path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    write_sealed(CONTENT, path)
    before = path.read_bytes()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            if self.file.tell() > 300:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    hashing = checksums._Hashing
    monkeypatch.setattr(checksums, "_Hashing", lambda file: hashing(Full(file)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written \(No space left on device\); .* untouched"):
        write_sealed({**CONTENT, "global_step": 9}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_states_are_kept(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(5):
        with keep_copies(path, keep):
            write_sealed({**CONTENT, "global_step": step}, path)
    with pytest.raises(UserError), keep_copies(path, keep):
        raise UserError("the new state is refused")
    steps = {file.name: torch.load(file, weights_only=True)["global_step"] for file in tmp_path.iterdir()}
    assert steps == dict(list({"last.ckpt": 4, "last.1.ckpt": 3, "last.2.ckpt": 2}.items())[:keep])


def test_folders_of_shards_are_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(3):
        with keep_copies(path, 2):
            (path / "shards").mkdir(parents=True, exist_ok=True)
            new = path / "shards" / "new"
            new.write_text(str(step))
            new.replace(path / "shards/0")
    assert (path / "shards/0").read_text() == "2" and (tmp_path / "last.1.ckpt/shards/0").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    train: Train, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    constant = ("--model.schedule.decay_fraction", "0")  # the same rates whatever max_steps is
    whole = train("fit", "--run.name", "whole", *constant)
    folder = train("fit", "--trainer.max_steps", "9", "--trainer.val_check_interval", "100", *constant)
    place = folder / "checkpoints"

    def spoil(name: str) -> None:
        content = bytearray((place / name).read_bytes())
        content[len(content) // 2] ^= 1
        (place / name).write_bytes(content)

    capsys.readouterr()
    with pytest.raises(SystemExit) as clean:
        main(["ckpt", "verify", str(folder)])
    assert clean.value.code == 0 and capsys.readouterr().out.count(": good\n") == 3
    main(["ckpt", "inspect", str(place / "last.1.ckpt")])
    assert "step                   6" in capsys.readouterr().out
    spoil("last.ckpt")
    with pytest.raises(SystemExit) as damaged:
        main(["ckpt", "verify", str(folder)])
    out = capsys.readouterr().out
    assert damaged.value.code == 1 and "last.ckpt: DAMAGED: its checksum differs" in out and out.count("good") == 2
    with caplog.at_level("WARNING"):
        train("fit", "--trainer.max_steps", "9", "--ckpt_path", "last", *constant)
    assert "last.ckpt is damaged (its checksum differs); going on from last.1.ckpt" in caplog.text
    assert torch.load(place / "last.ckpt", weights_only=True)["global_step"] == 9
    assert damage(place / "last.1.ckpt") is None
    # To the end: as if nothing had been.
    again = train("fit", "--ckpt_path", "last", *constant)
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, again))
    assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in ours["state_dict"])
    steps = [row["step"] for row in read_lines(again / "metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 3, 5, 7, 8, 9, 11]  # 8: the last step of the shorter run
    for name in ("last.ckpt", "last.1.ckpt", "best.ckpt"):
        spoil(name)
    with pytest.raises(UserError, match="no other checkpoint of the run is left"):
        good_checkpoint(RunFolder(again))


class ByName:
    """Is pickled as Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)


def test_an_index_names_members_of_enumerations_by_getattr_and_reaches_nothing_else_so() -> None:
    def load(owner: Any, name: str) -> Any:
        return sharded._Unpickler(io.BytesIO(pickle.dumps(ByName(owner, name)))).load()

    assert load(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT") is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for owner, name in ((Path, "unlink"), (Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")):
        with pytest.raises(sharded._NotATensor, match=r"builtins\.getattr"):
            load(owner, name)
