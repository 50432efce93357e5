from pathlib import Path

import jsonargparse
import pytest
from lightning.pytorch import LightningDataModule

from frugal.data.datamodule import TextDataModule
from frugal.data.sources import Source

FOLDER = Path(__file__).parents[2] / "configs" / "data"


@pytest.mark.parametrize("name", ["kjv", "local_text", "hub_text", "reasoning", "physics"])
def test_fragment_builds_a_datamodule(name: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_args([f"--data={FOLDER / f'{name}.yaml'}"])).data
    assert isinstance(data, TextDataModule)
    assert isinstance(data.source, Source)
