"""What a run has spent: plain numbers that survive kills and resumes. Needs neither torch nor Lightning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Where the seconds go. `start_up`: from the program's start to the first step; `data`: making the corpus, once for a
# run; `lost`: spent by a process that was killed, since its last checkpoint.
PARTS = ("step", "data_wait", "compile", "validation", "checkpoint", "start_up", "data", "lost", "other")
TRAINING = ("step", "data_wait", "compile")
MONEY = ("joules", "joules_measured", "dollars")


@dataclass
class Ledger:
    """The run's account.

    Args:
        step: optimizer steps done.
        tokens: tokens trained on; what a killed process did and another one does again counts once.
        flops: FLOPs of these steps.
        validations: how many there were.
        joules: energy, measured or estimated.
        joules_measured: how much of it was measured.
        train_joules: how much of it went into steps and waiting for data.
        dollars: price of the machine's time.
        seconds: by part (`PARTS`).
        train_cpu_seconds: processor time of this process while training.
        cached_data_seconds: how many of the data's seconds an earlier process spent, on behalf of any run.
        charged: whether the data's seconds are in.
        lost: steps, tokens and FLOPs that killed processes did in vain.
        peak_bytes: the most memory of the first process (rank 0), over all times that the run was resumed.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    validations: int = 0
    joules: float = 0.0
    joules_measured: float = 0.0
    train_joules: float = 0.0
    dollars: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    train_cpu_seconds: float = 0.0
    cached_data_seconds: float = 0.0
    charged: bool = False
    lost: dict[str, float] = field(default_factory=lambda: {"steps": 0, "tokens": 0, "flops": 0.0})
    peak_bytes: int | None = None

    @staticmethod
    def load(values: dict[str, Any]) -> Ledger:
        """From `state()`; the seconds of older files that knew only training are taken for steps."""
        known = {key: value for key, value in values.items() if key in Ledger.__dataclass_fields__}
        ledger = Ledger(**{**known, "seconds": dict.fromkeys(PARTS, 0.0), "lost": {**Ledger().lost}})
        for part, seconds in values["seconds"].items():
            ledger.seconds[part if part in PARTS else "step"] += seconds
        ledger.lost |= values.get("lost", {})
        return ledger

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint or a JSON file."""
        return asdict(self)

    @property
    def total_seconds(self) -> float:
        """All that is billed."""
        return sum(self.seconds.values())

    @property
    def train_seconds(self) -> float:
        """Steps, waiting for data, compiling."""
        return sum(self.seconds[part] for part in TRAINING)

    @property
    def wall_seconds(self) -> float:
        """Of all processes of this run: all that is billed but what the data took before it."""
        return self.total_seconds - self.cached_data_seconds

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps that count were computed."""
        return self.seconds["step"] / max(self.wall_seconds, 1e-9)

    def charge_data(self, seconds: float, here: float) -> float:
        """Book what making the data took, of which `here` passed in this process, as part of its start.

        Returns the seconds that are billed on top.
        """
        here = min(seconds, here, self.seconds["start_up"])
        self.seconds["start_up"] -= here
        self.seconds["data"] += seconds
        self.cached_data_seconds += seconds - here
        self.charged = True
        return seconds - here

    def add_lost(self, spent: Ledger) -> None:
        """Add what an earlier process had spent beyond the checkpoint that this ledger comes from.

        Where it had done steps that are now done again, all of it is lost; otherwise it keeps its parts (the closing
        validation of a run that is made longer, say).
        """
        beyond = {part: max(spent.seconds[part] - self.seconds[part], 0.0) for part in PARTS}
        self.lost = {key: max(value, spent.lost[key]) for key, value in self.lost.items()}
        if spent.step > self.step:
            self.seconds["lost"] += sum(beyond.values())
            for key, more in (
                ("steps", spent.step - self.step),
                ("tokens", spent.tokens - self.tokens),
                ("flops", spent.flops - self.flops),
            ):
                self.lost[key] += max(more, 0)
        else:
            for part, seconds in beyond.items():
                self.seconds[part] += seconds
            self.validations = max(self.validations, spent.validations)
            self.train_joules = max(self.train_joules, spent.train_joules)
        for name in MONEY:
            setattr(self, name, max(getattr(self, name), getattr(spent, name)))
        self.note_peak(spent.peak_bytes)

    def note_peak(self, size: int | None) -> None:
        """Keep the larger one."""
        self.peak_bytes = max(filter(None, (self.peak_bytes, size)), default=None)
