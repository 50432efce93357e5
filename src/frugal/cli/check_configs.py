"""Parse overlays as `train.py fit --config FILE` does, and build nothing: `python -m frugal.cli.check_configs FILE...`.

A study's runs are processes of their own. This finds a misspelt key in any of them before the first one has trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from frugal.cli.errors import in_words
from frugal.cli.train import OPTIONS, FrugalCLI, quiet, start
from frugal.errors import UserError, require


def faults(files: list[str]) -> list[str]:
    """One line for each file that does not parse: `FILE: key: what is wrong`."""
    quiet()
    found = []
    for file in files:
        OPTIONS.clear()  # a file's suggestions are keys of its own classes
        try:
            require(Path(file).is_file(), "no such file")
            start(_ParseOnly, ["fit", "--config", file])
        except (UserError, argparse.ArgumentError) as error:
            found.append(f"{file}: {in_words(error, OPTIONS).removeprefix(f'{file}: ')}")
    return found


class _ParseOnly(FrugalCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit alone: most of the time goes into making parsers."""
        return {"fit": FrugalCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        """Choose no folder."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(files: list[str]) -> None:
    """Print what is wrong with each file, and exit with code 2 if anything is."""
    found = faults(files)
    print("\n".join(found), end="\n" if found else "")
    sys.exit(2 if found else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
