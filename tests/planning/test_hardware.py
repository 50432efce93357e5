from pathlib import Path

import pytest

from frugal.errors import UserError
from frugal.planning.hardware import choose_hardware, load_hardware

TABLE = str(Path(__file__).parents[2] / "configs" / "hardware.yaml")


def test_every_row_has_figures_with_a_source_and_a_date() -> None:
    rows = load_hardware(TABLE)
    assert {"cpu", "h100-80gb"} <= {row.name for row in rows}
    for row in rows:
        assert row.watts > 0 and row.dollars_per_hour > 0 and row.source and row.date.startswith("20")


def test_the_device_name_chooses_the_row() -> None:
    rows = load_hardware(TABLE)
    for device, wanted, name in (
        ("NVIDIA H100 80GB HBM3", "auto", "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "auto", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "auto", "a100-40gb"),
        ("NVIDIA H100 PCIe", "auto", "h100-pcie"),
        ("NVIDIA H800", "auto", "h800"),
        ("NVIDIA L4", "auto", "l4"),
        ("NVIDIA L40S", "auto", "l40s"),
        ("Tesla T4", "auto", "t4"),
        ("NVIDIA GeForce RTX 4090", "auto", "rtx-4090"),
        ("cpu", "auto", "cpu"),
        ("NVIDIA H100", "a100-80gb", "a100-80gb"),
    ):
        row = choose_hardware(rows, device, wanted)
        assert row and row.name == name
    for device in ("NVIDIA GeForce RTX 5090", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 NVL"):
        assert choose_hardware(rows, device) is None  # better no estimate than a wrong one
    with pytest.raises(UserError, match="no row 'tpu'; there are cpu"):
        choose_hardware(rows, "", "tpu")


def test_costs_by_hand() -> None:
    row = next(row for row in load_hardware(TABLE) if row.name == "h100-80gb")
    assert row.joules(3600, 2) == row.watts * 2 * 3600
    assert row.dollars(1800, 4) == pytest.approx(row.dollars_per_hour * 2)
    assert "2 device(s)" in row.assumption(2)


def test_bad_tables_name_file_and_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load_hardware(str(tmp_path / "none.yaml"))
    path = tmp_path / "bad.yaml"
    path.write_text("rows:\n  - {name: x, wats: 3}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: row 1 \(x\)"):
        load_hardware(str(path))
