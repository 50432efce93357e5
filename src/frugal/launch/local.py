"""A queue on this machine: at most so many runs at once, by priority; one that must give way goes on later.

There is no server. Every process that launches runs its own jobs and looks at the others' through files under
`<runs>/.queue/`. What is held by whom is a lock of the operating system on such a file (`flock`): it ends with the
process that holds it, however that ends, and a run inherits the locks that its launcher took for it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from frugal.errors import UserError
from frugal.launch.jobs import REFUSED, STOPPED, Job, steps_of
from frugal.launch.state import is_locked, lock, note, queue_folder

log = logging.getLogger(__name__)
TICK = 0.2  # seconds between two looks at the queue


@dataclass
class Entry:
    """A job in the hands of this process.

    Args:
        job: what is to be done.
        held: descriptor of the job's lock.
        process: the run, while there is one.
        slot: descriptor of the slot's lock while it runs.
        faults: how often it ended for no reason of ours.
        state: as in `note`.
        code: the last exit code.
    """

    job: Job
    held: int
    process: subprocess.Popen[bytes] | None = None
    slot: int | None = None
    faults: int = 0
    state: str = "waiting"
    code: int | None = None
    giving_way: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in ("done", "failed", "cancelled")


class LocalQueue:
    """Runs jobs at most so many at once.

    Args:
        jobs: what to run; a job that another process is running already is refused.
        at_once: how many runs at the same time, together with those of other processes on the same folder of runs.
        devices: what CUDA_VISIBLE_DEVICES is for each of the runs at once; their number takes the place of `at_once`.
        retries: how often a run that crashes (not one that is refused) goes on from its last checkpoint.
    """

    def __init__(self, jobs: Sequence[Job], at_once: int = 1, devices: Sequence[str] = (), retries: int = 2) -> None:
        if (at_once := len(devices) or at_once) < 1:
            raise UserError(f"at_once: must be positive, got {at_once}")
        self.at_once, self.devices, self.retries = at_once, devices, retries
        self.entries: list[Entry] = []
        for job in sorted(jobs, key=lambda job: (-job.priority, job.submitted, job.id)):
            if (held := lock(queue_folder(job) / job.id)) is None:
                raise UserError(f"{job.id}: is in the hands of another process; see `frugal launch status`")
            (job.place / "cancelled").unlink(missing_ok=True)
            self.entries.append(Entry(job, held))
            note(job, "waiting")

    def run(self, report: Callable[[Entry], None] | None = None) -> list[Entry]:
        """Run until every job is done, failed or cancelled.

        Args:
            report: called with an entry whose state has changed.

        Raises:
            KeyboardInterrupt: after every run has been told to stop and has saved its state.
        """
        tell = report or (lambda entry: None)
        try:
            with _interruptible():
                while not all(entry.ended for entry in self.entries):
                    for entry in self.step():
                        tell(entry)
                    time.sleep(TICK)
        except BaseException:
            self._stop_all()
            raise
        finally:
            for entry in self.entries:
                if entry.process is None:
                    os.close(entry.held)
                    if entry.ended:
                        (queue_folder(entry.job) / entry.job.id).unlink(missing_ok=True)
        return self.entries

    def step(self) -> list[Entry]:
        """Look once: gather what has ended, start what may start, make room for what is more urgent."""
        changed = [entry for entry in self.entries if entry.process is not None and self._gather(entry)]
        for entry in self.entries:
            if entry.state == "waiting" and (entry.job.place / "cancelled").is_file():
                self._set(entry, "cancelled")
                changed.append(entry)
            if entry.process is not None and (entry.job.place / "cancelled").is_file():
                self._stop(entry)
        others = self._waiting_elsewhere()
        for entry in self.entries:
            if entry.state != "waiting":
                continue
            if any(other > _rank(entry.job) for other in others):
                break  # it is another process' turn
            if not self._start(entry):
                break
            changed.append(entry)
        self._give_way(others)
        return changed

    def _start(self, entry: Entry) -> bool:
        """Start the job if there is a free slot."""
        job = entry.job
        for number in range(self.at_once):
            if (slot := lock(queue_folder(job) / f"slot-{number}")) is not None:
                break
        else:
            return False
        environment = {**os.environ, **job.environment}
        for name in ("LOCAL_RANK", "FRUGAL_RUN_FOLDER"):
            environment.pop(name, None)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[number]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.at_once)))
        with job.output.open("ab") as output:
            entry.process = subprocess.Popen(
                job.command,
                cwd=job.where,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the launcher, which tells the runs to stop
                pass_fds=(entry.held, slot),
            )
        entry.slot = slot
        self._set(entry, "running", pid=entry.process.pid)
        return True

    def _gather(self, entry: Entry) -> bool:
        """Whether the run has ended; then decide what becomes of the job."""
        assert entry.process is not None and entry.slot is not None
        if (code := entry.process.poll()) is None:
            return False
        os.close(entry.slot)
        entry.process, entry.slot, entry.code, entry.giving_way = None, None, code, False
        if code == 0:
            self._set(entry, "done", code=code)
        elif (entry.job.place / "cancelled").is_file():
            self._set(entry, "cancelled", code=code)
        elif code == STOPPED or code == -signal.SIGTERM:  # the latter: told before it had begun to train
            self._set(entry, "waiting", code=code)
        else:
            entry.faults += 1
            hopeless = code == REFUSED or entry.faults > self.retries
            self._set(entry, "failed" if hopeless else "waiting", code=code)
        return True

    def _set(self, entry: Entry, state: str, **more: Any) -> None:
        entry.state = state
        note(entry.job, state, **more)

    def _waiting_elsewhere(self) -> list[tuple[int, float]]:
        """Ranks of the jobs that wait in other processes on the same folder of runs."""
        if not self.entries:
            return []
        own = {entry.job.id for entry in self.entries}
        folder = queue_folder(self.entries[0].job)
        found = []
        for path in folder.iterdir():
            if path.name in own or path.name.startswith("slot-") or not is_locked(path):
                continue
            for state_file in folder.parent.glob(f"*/{path.name}/launch/state.json"):
                state = json.loads(state_file.read_text(encoding="utf-8"))
                if state["state"] == "waiting":
                    found.append((state["priority"], -state["submitted"]))
        return found

    def _give_way(self, others: Sequence[tuple[int, float]]) -> None:
        """Stop the least urgent run if something more urgent waits, here or elsewhere, and no slot is free."""
        running = [entry for entry in self.entries if entry.process is not None]
        waiting = [_rank(entry.job) for entry in self.entries if entry.state == "waiting"] + list(others)
        if not running or not waiting or any(entry.giving_way for entry in running):
            return
        least = min(running, key=lambda entry: _rank(entry.job))
        slots = (queue_folder(least.job) / f"slot-{number}" for number in range(self.at_once))
        if max(waiting)[0] > least.job.priority and all(map(is_locked, slots)):
            least.giving_way = True
            self._stop(least)

    @staticmethod
    def _stop(entry: Entry) -> None:
        """Tell a run to save its state and end."""
        if entry.process is not None and entry.process.poll() is None:
            entry.process.terminate()

    def _stop_all(self) -> None:
        running = [entry for entry in self.entries if entry.process is not None]
        for entry in running:
            self._stop(entry)
        if running:
            log.info("stopping %d run(s); each saves its state first (Ctrl-C again: at once)", len(running))
        for entry in running:
            assert entry.process is not None
            try:
                entry.process.wait()
            except KeyboardInterrupt:
                for other in running:
                    if other.process is not None:
                        other.process.kill()
            self._gather(entry)
        for entry in self.entries:
            if not entry.ended:
                self._set(entry, "stopped")


def _rank(job: Job) -> tuple[int, float]:
    return (job.priority, -job.submitted)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM to the launcher does what Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
    earlier = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, earlier)


def run_jobs(jobs: Sequence[Job], at_once: int = 1, devices: Sequence[str] = (), retries: int = 2) -> list[Entry]:
    """Run jobs and log what becomes of each; see `LocalQueue`."""
    began = {}

    def report(entry: Entry) -> None:
        job = entry.job
        if entry.state == "running":
            began[job.id] = time.time()
            log.info("%s %s: started; %s", job.name, job.id, job.output)
        elif entry.state == "waiting":
            step = steps_of(job)[0]
            log.info("%s %s: stopped at step %d (exit code %s); goes on later", job.name, job.id, step, entry.code)
        elif entry.state == "done":
            log.info("%s %s: done in %.0f s", job.name, job.id, time.time() - began[job.id])
        else:
            log.warning("%s %s: %s (exit code %s): %s", job.name, job.id, entry.state, entry.code, last_words(job))

    return LocalQueue(jobs, at_once, devices, retries).run(report)


def last_words(job: Job) -> str:
    """The last line that a run printed: its error, if it has failed."""
    text = job.output.read_bytes()[-4096:].decode(errors="replace") if job.output.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
