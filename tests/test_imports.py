"""Holds the house's one rule: data flows down, imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "frugal"
# Which rooms each room may import from; those without any (`errors`, `units`, ...) are leaves that anyone may use.
ALLOWED = {
    "errors": set(),
    "units": set(),
    "overlay": {"errors"},
    "provenance": set(),
    "schedule": {"errors"},
    "model": {"errors"},
    "data": {"errors", "schedule"},
    "tracking": {"errors", "units", "overlay", "provenance"},
    "planning": {"errors", "units", "overlay", "model.config", "model.vision_config"},
    "launch": {"errors", "units", "overlay", "provenance", "tracking", "planning"},
    "training": {"errors", "schedule", "model", "data", "tracking"},
    "callbacks": {"errors", "provenance", "schedule", "data", "model", "training", "planning", "tracking"},
    "cli": {
        "errors",
        "units",
        "overlay",
        "schedule",
        "model",
        "data",
        "tracking",
        "planning",
        "launch",
        "training",
        "callbacks",
    },
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("frugal.") for name in names if name.startswith("frugal.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    allowed = ALLOWED[room] | {room}
    bad = {name for name in imports_of(path) if not any(name == a or name.startswith(a + ".") for a in allowed)}
    assert not bad, f"{path.relative_to(SOURCE)} may not import {sorted(bad)}"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from frugal.training.optim import parameter_groups\n")
    assert imports_of(bad) == {"training.optim"}


@pytest.mark.parametrize(
    "module",
    [
        "frugal.tracking.plots",
        "frugal.planning.hardware",
        "frugal.planning.model_card",
        "frugal.launch.local",
        "frugal.cli.verbs",
    ],
)
def test_starts_without_torch(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
