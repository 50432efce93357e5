"""Energy counters on folders and libraries that stand in for the machine's."""

import time
from pathlib import Path

import pytest

from frugal.callbacks.energy import Nvml, Rapl, open_counters


def package(root: Path, name: str, kind: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


class FakeNvml:
    def __init__(self) -> None:
        self.millijoules = {"GPU-a": 5_000, "GPU-b": 70_000}

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise RuntimeError("not found")
        return uuid

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return {"GPU-a": 110_000, "GPU-b": 350_500}[handle]  # milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.millijoules[handle]


def test_rapl_adds_up_packages_and_sees_a_counter_start_again(tmp_path: Path) -> None:
    one = package(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    two = package(tmp_path, "intel-rapl:1", "package-1", 262_143_328_000)
    package(tmp_path, "intel-rapl:0:0", "core", 0)  # part of the first package
    psys = package(tmp_path, "intel-rapl:2", "psys", 0)  # the whole machine, packages included
    counter = Rapl(tmp_path)
    assert counter.joules() == 0
    one.write_text("3500000\n")
    psys.write_text("9900000\n")
    assert counter.joules() == 2.5
    two.write_text("1149\n")  # 851 to the end of its range, one more to zero, 1149 on
    assert counter.joules() == pytest.approx(2000e-6)
    assert counter.joules() == 0


def test_rapl_takes_watts_from_its_own_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    counter = Rapl(tmp_path)
    began, start = time.perf_counter(), counter._read()[0]
    monkeypatch.setattr(counter, "_read", lambda: [start + int(40e6 * (time.perf_counter() - began))])
    assert counter.watts() == pytest.approx(40.0, rel=0.05)
    assert counter.joules() >= 40 * 0.05  # what passed meanwhile is still counted


def test_nvml_counts_the_gpus_in_use_only() -> None:
    library = FakeNvml()
    counter = Nvml(["b"], library)
    library.millijoules["GPU-a"] += 1_000_000
    library.millijoules["GPU-b"] += 2_500
    assert counter.joules() == 2.5 and counter.joules() == 0
    assert counter.name == "NVML, 1 GPU(s)"
    assert counter.watts() == 350.5 and Nvml(["a", "b"], library).watts() == 460.5
    library.nvmlDeviceGetPowerUsage = lambda handle: 1 / 0  # a card that does not tell ends no run
    assert counter.watts() == 0.0


def test_counters_are_what_the_machine_has(tmp_path: Path) -> None:
    assert open_counters(root=tmp_path / "none") == []
    package(tmp_path, "intel-rapl:0", "package-0", 0)
    assert [type(counter) for counter in open_counters(root=tmp_path)] == [Rapl]
    both = open_counters(["GPU-a"], tmp_path, FakeNvml())
    assert [type(counter) for counter in both] == [Nvml, Rapl]
    # A GPU that cannot be counted must not look like a run on the processor alone.
    assert open_counters(["c"], tmp_path, FakeNvml()) == []
