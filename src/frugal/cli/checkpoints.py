"""`frugal ckpt`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations


def inspect_(checkpoint: str, json: bool = False) -> None:
    """Say what a checkpoint holds; nothing in it is executed.

    Args:
        checkpoint: a .ckpt file, or a run's folder (its last.ckpt).
        json: print JSON instead of lines.
    """
    from json import dumps

    from frugal.cli.checkpoint_card import checkpoint_card

    card = checkpoint_card(_files([checkpoint], "last.ckpt")[0])
    print(dumps(card, indent=2) if json else "\n".join(f"{key:22} {value}" for key, value in card.items()))


def verify(checkpoints: list[str]) -> None:
    """Compare checkpoints with their checksums; exit code 1 if one is damaged.

    Args:
        checkpoints: .ckpt files, or folders of runs (all of their checkpoints).
    """
    import sys

    from frugal.training.checksums import damage, is_sealed

    bad = 0
    for path in _files(checkpoints, "*.ckpt"):
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
    from pathlib import Path

    from frugal.errors import require
    from frugal.training.checkpointing import read_checkpoint
    from frugal.training.checksums import META, write_sealed

    (path,) = _files([checkpoint], "last.ckpt")
    require((path / META).is_file(), f"checkpoint: {path} is one file already")
    require(not Path(out).exists(), f"out: {out} exists already")
    write_sealed(read_checkpoint(path), Path(out))
    print(f"written to {out}")


def _files(given: list[str], pattern: str) -> list:
    from pathlib import Path

    from frugal.errors import UserError
    from frugal.training.checksums import META

    found: list[Path] = []
    for word in given:
        path = Path(word)
        is_run = path.is_dir() and not (path / META).is_file()  # a sharded checkpoint is a folder, too
        inside = sorted(path.glob(f"checkpoints/{pattern}")) if is_run else [path]
        if not inside or not inside[0].exists():
            raise UserError(f"checkpoint: no file {word}, and no checkpoints/{pattern} in a folder of that name")
        found += inside
    if not found:
        raise UserError("checkpoints: name at least one")
    return found
