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


def _files(given: list[str], pattern: str) -> list:
    from pathlib import Path

    from frugal.errors import UserError

    found: list[Path] = []
    for word in given:
        path = Path(word)
        inside = sorted(path.glob(f"checkpoints/{pattern}")) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise UserError(f"checkpoint: no file {word}, and no checkpoints/{pattern} in a folder of that name")
        found += inside
    if not found:
        raise UserError("checkpoints: name at least one")
    return found
