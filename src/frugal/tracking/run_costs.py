"""What a finished run of a study spent, by cost axis, and what must be known of how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugal.tracking.statistics import Point
from frugal.tracking.study import AXES, RunSpec


@dataclass(frozen=True)
class Result:
    """A finished run: its share of the study's steps and its `summary.json`."""

    spec: RunSpec
    length: float
    summary: dict[str, Any]

    @property
    def point(self) -> Point:
        """Loss and the five costs."""
        return Point(
            self.summary["loss"], costs_of(self.summary), how_measured(self.summary), self.summary.get("source")
        )


def costs_of(summary: dict[str, Any]) -> dict[str, float]:
    """What a run spent on training and data, by axis.

    Start-up, compiling, validation and checkpoints are left out: they are much the same in every arm, and in a short
    run they would hide what differs.

    On a CPU the training seconds of one thread are those of its processor: what a machine takes that does nothing else.
    Of several threads, which wait for each other, and of a summary without them, they are those of the clock.
    """
    phases = summary["seconds_by_phase"]
    compiling = summary.get("seconds_by_part", {}).get("compile", 0.0)
    clock, data = phases["train"] - compiling, phases.get("data", 0.0)
    train = summary["train_cpu_seconds"] if by_processor(summary) else clock
    seconds = train + data
    joules = dollars = float("nan")  # no row for the device: no estimate, which the report leaves out
    if summary.get("dollars"):
        dollars = summary["dollars"] * seconds / summary["seconds"]
    if whole := summary.get("joules"):
        # A device that trains draws more than one that waits; older summaries do not tell the two apart.
        own = summary.get("train_joules") or whole * clock / summary["seconds"]
        joules = own * train / clock + (whole - own) * data / max(summary["seconds"] - clock, 1e-9)
    return dict(zip(AXES, (summary["tokens_seen"], summary["flops"], seconds, joules, dollars), strict=True))


def by_processor(summary: dict[str, Any]) -> bool:
    """Whether training ran on one thread of a CPU, no process read ahead, and its processor time was taken."""
    # Where RAPL counts, the assumption begins with that.
    device = str(summary.get("device") or summary.get("assumption", ""))
    alone = summary.get("threads") == 1 and not summary.get("workers")
    return device.startswith("cpu") and summary.get("train_cpu_seconds") is not None and alone


def how_measured(summary: dict[str, Any]) -> dict[str, str]:
    """What two runs must share for a ratio of their seconds, joules and dollars to mean something."""
    prices = str(summary.get("assumption", "")).rpartition("; ")[2]
    machine = ", ".join(str(summary.get(key)) for key in ("device", "hardware", "devices", "cores", "threads"))
    seconds = f"{machine}, {'processor' if by_processor(summary) else 'clock'}"
    # An estimate has all cores at full power: it cannot tell a core that reads ahead from one that waits.
    power = "counted" if summary.get("joules_measured") else f"{prices}, {summary.get('workers', 0)} workers"
    return {"seconds": seconds, "joules": f"{seconds}, {power}", "dollars": f"{seconds}, {prices}"}


def conditions(results: Mapping[str, Mapping[int, Sequence[Result]]]) -> list[str]:
    """What a reader must know about the measurement of the seconds."""
    summaries = [r.summary for seeds in results.values() for runs in seeds.values() for r in runs]
    if not summaries:
        return ["No run has finished."]
    machines = {how_measured(summary)["dollars"]: summary for summary in summaries}
    said = [f"Machine: {s.get('assumption')}; {s.get('threads', '?')} thread(s) a run." for s in machines.values()]
    if beside := sorted({s["at_a_time"] for s in summaries if s.get("at_a_time")}):
        said.append(f"{' or '.join(map(str, beside))} run(s) of the study at a time.")
    if len(machines) > 1:
        said.append(f"Measured in {len(machines)} ways: seconds, joules and dollars compare only within one.")
    if all(map(by_processor, summaries)):
        wall = sum(s["seconds_by_phase"]["train"] for s in summaries)
        quiet = sum(s["train_cpu_seconds"] for s in summaries)
        said.append(
            "Seconds are processor seconds of training and those of preparing data; other work on the machine changes "
            f"them less than the clock's, which showed {wall / quiet:.2f} times as many training seconds (1 on a quiet "
            "machine). Joules and dollars are estimates from these seconds."
        )
    else:
        said.append(
            "Seconds are those of the clock, of training and of preparing data: on a busy machine they mean little."
        )
    commits = [str(s["code"]).partition("-") for s in summaries if s.get("code")]
    codes = sorted({f"{commit[:12]}{dash}{mark}" for commit, dash, mark in commits})
    if codes:
        unlike = len({s.get("source") or s.get("code") for s in summaries}) > 1
        said.append(f"Code: {', '.join(codes)}{'; not all runs are of one version' if unlike else ''}.")
    software = {", ".join(f"{k} {v}" for k, v in s["versions"].items()): s for s in summaries if s.get("versions")}
    return [*said, *(f"Software: {versions}." for versions in software)]
