"""Simulated physics as text: MuJoCo rolls out a system with known parameters; the label is what comes next."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from frugal.data.synthetic.tasks import Item, Tasks, refuse_level
from frugal.errors import UserError, require

TIMESTEP = 0.01  # seconds; fourth-order Runge-Kutta


@dataclass(frozen=True)
class System:
    """A mechanical system: its MuJoCo body, and the ranges of what is drawn.

    Args:
        body: MJCF of the moving body.
        parameter: name and range of the parameter that may be asked for.
        position: range of each coordinate at the start (m or rad).
        velocity: range of each velocity at the start (m/s or rad/s).
    """

    body: str
    parameter: tuple[str, float, float]
    position: tuple[tuple[float, float], ...]
    velocity: tuple[tuple[float, float], ...]


POINT = '<inertial pos="0 0 -1" mass="1" diaginertia="1e-9 1e-9 1e-9"/>'  # a point of 1 kg, a metre below the joint
SYSTEMS = {
    # Free flight; the parameter is gravity in m/s^2.
    "projectile": System(
        '<joint type="slide" axis="1 0 0"/><joint type="slide" axis="0 0 1"/>' + POINT,
        ("gravity", 1.0, 20.0),
        ((0.0, 0.0), (0.0, 10.0)),
        ((-5.0, 5.0), (-5.0, 10.0)),
    ),
    # A point on a rod without friction; the parameter is the rod's length in m.
    "pendulum": System(
        '<joint type="hinge" axis="0 1 0"/>' + POINT, ("length", 0.2, 2.0), ((-2.5, 2.5),), ((-2.0, 2.0),)
    ),
    # A point of 1 kg on a spring without friction; the parameter is its stiffness in N/m.
    "spring": System(
        '<joint type="slide" axis="1 0 0" stiffness="1"/>' + POINT,
        ("stiffness", 1.0, 40.0),
        ((-2.0, 2.0),),
        ((-3.0, 3.0),),
    ),
}


@lru_cache(maxsize=len(SYSTEMS))
def _model(system: str) -> Any:
    """The compiled system, with a parameter of 1."""
    try:
        import mujoco
    except ModuleNotFoundError:
        raise UserError("data.source: mujoco is missing; run `pip install -e '.[physics]'`") from None
    return mujoco.MjModel.from_xml_string(
        f'<mujoco><option integrator="RK4"/><worldbody><body>{SYSTEMS[system].body}</body></worldbody></mujoco>'
    )


def simulate(
    system: str, parameter: float, position: list[float], velocity: list[float], interval: float, n: int
) -> np.ndarray:
    """Roll a system out with MuJoCo; coordinates and velocities at 0, interval, ..., float64 [n, 2 * coordinates].

    Args:
        system: one of SYSTEMS.
        parameter: gravity (m/s^2), length (m) or stiffness (N/m).
        position: coordinates at the start (m, or rad from hanging down).
        velocity: their rates (m/s, rad/s).
        interval: seconds between two states.
        n: how many states.
    """
    model = _model(system)
    import mujoco

    name, steps = SYSTEMS[system].parameter[0], max(1, round(interval / TIMESTEP))
    model.opt.timestep = interval / steps
    model.opt.gravity[:] = (0, 0, -{"projectile": parameter, "pendulum": 9.81, "spring": 0.0}[system])
    if name == "length":
        model.body_ipos[1, 2] = -parameter
    elif name == "stiffness":
        model.jnt_stiffness[:] = parameter
    state: Any = mujoco.MjData(model)
    mujoco.mj_setConst(model, state)
    mujoco.mj_resetData(model, state)
    state.qpos[:], state.qvel[:] = position, velocity
    out = np.empty((n, 2 * len(position)))
    for i in range(n):
        out[i] = np.concatenate((state.qpos, state.qvel))
        mujoco.mj_step(model, state, nstep=steps)
    return out


class Physics(Tasks):
    """Trajectories that MuJoCo rolled out (Todorov et al. 2012), quantised into text: `pip install -e '.[physics]'`.

    A question gives some consecutive states of a system; the answer is a later state, or the parameter that governs
    them. Level k asks k + 1 intervals ahead. Friction-free systems: projectile, pendulum, spring.

    Args:
        tasks: weight of each system.
        levels: 0 (next state) to 9 (ten intervals ahead).
        n: documents per level.
        seed: decides parameters and starting states.
        holdout: share of all questions that is kept for measuring accuracy.
        ask: for a later state, or for the parameter (gravity, length or stiffness).
        given: states that a question shows.
        interval: seconds between two states.
        decimals: digits after the point of every number.
        tolerance: how far a right answer's numbers may be off, in units of the last digit.
        template: a document's text.
        order: documents of all levels mixed, or level by level.
    """

    name = "physics"

    def __init__(
        self,
        tasks: dict[str, float] = {"projectile": 1.0, "pendulum": 1.0, "spring": 1.0},  # noqa: B006
        levels: list[int] = [0],  # noqa: B006
        n: int = 5000,
        seed: int = 0,
        holdout: float = 0.05,
        ask: Literal["state", "parameter"] = "state",
        given: int = 4,
        interval: float = 0.1,
        decimals: int = 2,
        tolerance: float = 1.0,
        template: str = "{question}\n{answer}\n",
        order: Literal["mixed", "levels"] = "mixed",
    ) -> None:
        super().__init__(tasks, levels, n, seed, holdout, template, order)
        if unknown := set(tasks) - set(SYSTEMS):
            raise UserError(f"data.source.tasks: no system {sorted(unknown)[0]!r}; there are {', '.join(SYSTEMS)}")
        for level in levels:
            refuse_level("physics", level, 9)
        require(given >= 3, f"data.source.given: at least 3 states show an acceleration, got {given}")
        require(interval > 0, f"data.source.interval: must be positive, got {interval}")
        require(0 <= decimals <= 6, f"data.source.decimals: must lie in [0, 6], got {decimals}")
        require(tolerance >= 0, f"data.source.tolerance: must not be negative, got {tolerance}")
        self.ask, self.given, self.interval = ask, given, interval
        self.decimals, self.tolerance = decimals, tolerance

    def item(self, task: str, level: int, index: int) -> Item:
        """One roll-out; a pure function of the source's settings, task, level and index."""
        system = SYSTEMS[task]
        word = int.from_bytes(hashlib.sha256(f"{task} {level}".encode()).digest()[:8], "big")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, word, 1]))
        name, low, high = system.parameter
        parameter = float(round(rng.uniform(low, high), self.decimals))
        position, velocity = (
            [float(round(rng.uniform(*bounds), self.decimals)) for bounds in ranges]
            for ranges in (system.position, system.velocity)
        )
        states = simulate(task, parameter, position, velocity, self.interval, self.given + level + 1)
        coordinates = states[:, : len(position)]
        shown = [self._write(row) for row in coordinates[: self.given]]
        if self.ask == "parameter":
            question, answer = f"{name}?", self._write(np.array([parameter]))
        else:
            question, answer = f"after {level + 1}?", self._write(coordinates[-1])
        return Item(task, level, index, "\n".join((task, *shown, question)), answer, parameter)

    def _write(self, values: np.ndarray) -> str:
        # Adding zero turns a rounded -0.0 into 0.0.
        return " ".join(f"{round(float(value), self.decimals) + 0.0:.{self.decimals}f}" for value in values)

    def score(self, item: Item, answer: str) -> float:
        """1 if every number is within the tolerance, else 0."""
        try:
            given, true = ([float(word) for word in text.split()] for text in (answer, item.answer))
        except ValueError:
            return 0.0
        slack = (self.tolerance + 1e-6) * 10**-self.decimals
        return float(len(given) == len(true) and all(abs(a - b) <= slack for a, b in zip(given, true, strict=True)))

    def version(self) -> str:
        """Of the simulator."""
        for name in ("mujoco", "mujoco-core"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        raise UserError("data.source: mujoco is missing; run `pip install -e '.[physics]'`")
