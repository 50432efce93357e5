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
        return Point(self.summary["loss"], costs_of(self.summary))


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
    train = max(summary["train_cpu_seconds"] - compiling, 1e-9) if by_processor(summary) else clock
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
    """Whether training ran on one thread of a CPU and its processor time was taken."""
    # Where RAPL counts, the assumption begins with that.
    device = str(summary.get("device") or summary.get("assumption", ""))
    return device.startswith("cpu") and summary.get("train_cpu_seconds") is not None and summary["threads"] == 1


def conditions(results: Mapping[str, Mapping[int, Sequence[Result]]]) -> list[str]:
    """What a reader must know about the measurement of the seconds."""
    summaries = [r.summary for seeds in results.values() for runs in seeds.values() for r in runs]
    if not summaries:
        return ["No run has finished."]
    machines = {(s.get("device"), s.get("hardware"), s.get("cores"), s.get("threads")): s for s in summaries}
    said = [f"Machine: {s.get('assumption')}; {s.get('threads', '?')} thread(s) a run." for s in machines.values()]
    if beside := sorted({s["at_a_time"] for s in summaries if s.get("at_a_time")}):
        said.append(f"{' or '.join(map(str, beside))} run(s) of the study at a time.")
    if len(machines) > 1:
        said.append(f"The runs are of {len(machines)} machines: seconds, joules and dollars compare only within one.")
    if all(map(by_processor, summaries)):
        wall = sum(s["seconds_by_phase"]["train"] for s in summaries)
        quiet = sum(s["train_cpu_seconds"] for s in summaries)
        said.append(
            "Seconds are processor seconds of training and those of preparing data: what a "
            f"quiet machine takes. The clock showed {wall / quiet:.2f} times as many training seconds (1 on a quiet "
            "machine). Joules and dollars are estimates from these seconds."
        )
    else:
        said.append(
            "Seconds are those of the clock, of training and of preparing data: on a busy machine they mean little."
        )
    commits = [str(s["code"]).partition("-") for s in summaries if s.get("code")]
    codes = sorted({f"{commit[:12]}{dash}{mark}" for commit, dash, mark in commits})
    if codes:
        said.append(f"Code: {', '.join(codes)}{'; not all runs are of one version' if len(codes) > 1 else ''}.")
    software = {", ".join(f"{k} {v}" for k, v in s["versions"].items()): s for s in summaries if s.get("versions")}
    return [*said, *(f"Software: {versions}." for versions in software)]
