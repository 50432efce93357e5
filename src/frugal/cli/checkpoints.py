"""`frugal ckpt`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path


def inspect_(checkpoint: str, json: bool = False) -> None:
    """Say what a checkpoint holds; nothing in it is executed.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its last.ckpt).
        json: print JSON instead of lines.
    """
    from json import dumps

    from frugal.cli.checkpoint_card import checkpoint_card

    card = checkpoint_card(_file(checkpoint))
    print(dumps(card, indent=2) if json else "\n".join(f"{key:22} {value}" for key, value in card.items()))


def verify(checkpoints: list[str]) -> None:
    """Compare checkpoints with their checksums; exit code 1 if one is damaged.

    Args:
        checkpoints: .ckpt files, or folders of runs (all of their checkpoints; one without any is left out).
    """
    import sys

    from frugal.errors import require
    from frugal.training.checksums import damage, is_sealed

    require(bool(checkpoints), "checkpoints: name at least one, or a run's folder")
    files = {word: _files(word, "*.ckpt", "checkpoints") for word in checkpoints}
    without = ", ".join(word for word, found in files.items() if not found)
    require(any(files.values()), f"checkpoints: no checkpoints/*.ckpt in {without}")
    if without:
        print(f"checkpoints: left out, no checkpoints/*.ckpt: {without}", file=sys.stderr)
    bad = 0
    for path in [path for found in files.values() for path in found]:
        wrong = damage(path)
        bad += wrong is not None
        print(
            f"{path}: {f'DAMAGED: {wrong}' if wrong else 'good' if is_sealed(path) else 'complete, without a checksum'}"
        )
    sys.exit(1 if bad else 0)


def consolidate(checkpoint: str, out: str) -> None:
    """Write a sharded checkpoint as one file, which a single device goes on from.

    Args:
        checkpoint: a folder of shards, or a run's folder (its last.ckpt).
        out: the file to write.
    """
    from frugal.errors import require
    from frugal.training.checkpointing import read_checkpoint
    from frugal.training.checksums import META, write_sealed

    path = _file(checkpoint)
    require((path / META).is_file(), f"checkpoint: {path} is one file already")
    require(not Path(out).exists(), f"out: {out} exists already")
    write_sealed(read_checkpoint(path), Path(out))
    print(f"written to {out}")


def _file(word: str) -> Path:
    """The checkpoint that a user names, by itself or by its run's folder."""
    from frugal.errors import require

    found = _files(word, "last.ckpt", "checkpoint")
    require(bool(found), f"checkpoint: no checkpoints/last.ckpt in {word}")
    return found[0]


def _files(word: str, pattern: str, key: str) -> list[Path]:
    """The checkpoints of this pattern in a run's folder, or the one that is named."""
    from frugal.errors import require
    from frugal.training.checksums import META

    path = Path(word)
    require(path.exists(), f"{key}: no file {word}, and no folder of that name")
    is_run = path.is_dir() and not (path / META).is_file()  # a sharded checkpoint is a folder, too
    return sorted(path.glob(f"checkpoints/{pattern}")) if is_run else [path]
