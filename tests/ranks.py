"""Start n processes that do the same jobs, as a launcher would; imports are paid once, by forking.

    python tests/ranks.py N JOBS.json

A job is the arguments of train.py (`args`) and the run's folder (`folder`), or `call`, a `module:function` of this
folder to be called in every process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(n: int, jobs: list[dict[str, Any]], cwd: Path, timeout: float = 300) -> str:
    """Do the jobs one after the other on n processes; returns what they printed."""
    (cwd / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).resolve()), str(n), "jobs.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def work(rank: int, n: int, port: int, jobs: list[dict[str, Any]]) -> None:
    """What one process does."""
    from frugal.cli.train import main

    os.environ |= {"RANKS": str(n), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for job in jobs:
        if "call" in job:
            module, _, name = job["call"].partition(":")
            getattr(__import__(module), name)()
            continue
        os.environ["FRUGAL_RUN_FOLDER"] = job["folder"]
        sys.argv = ["train.py", *job["args"], "--trainer.accelerator", "cpu", "--trainer.devices", str(n)]
        main()


def start(n: int, path: str) -> int:
    """Fork the processes and wait; the first failure ends all."""
    import torch

    torch.set_num_threads(1)
    import frugal.callbacks.report
    import frugal.cli.train  # noqa: F401

    jobs = json.loads(Path(path).read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(rank, n, port, jobs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[pid] = rank
    failed = 0
    while children:
        pid, status = os.wait()
        children.pop(pid)
        if status:
            failed = 1
            for other in children:
                os.kill(other, 9)
    return failed


if __name__ == "__main__":
    sys.exit(start(int(sys.argv[1]), sys.argv[2]))
