"""The verb that lays runs side by side."""

from __future__ import annotations


def compare(runs: list[str], out: str = "compare.png", json: bool = False) -> None:
    """Lay runs side by side: what differs in their configs, what they reached and spent, loss against each cost.

    Args:
        runs: run folders or folders that hold runs, .wandb files, or ENTITY/PROJECT of the W&B server.
        out: picture to write: loss against tokens, FLOPs, seconds and dollars, Pareto front marked.
        json: print what differs and every run's last figures as JSON, and draw nothing.
    """
    from json import dumps
    from pathlib import Path

    from frugal.errors import UserError, require
    from frugal.tracking.compare import comparison_figure, config_differences, metric_table, report
    from frugal.tracking.read_runs import read_runs

    require(bool(runs), "runs: name at least one run or folder of runs, such as runs/base")
    require(Path(out).suffix in (".png", ".svg", ".pdf"), f"out: {out} must end in .png, .svg or .pdf")
    found = read_runs(runs)
    if json:
        header, rows = metric_table(found)
        table = [dict(zip(header, row, strict=True)) for row in rows]
        figures = [row | {"summary": run.summary} for row, run in zip(table, found, strict=True)]
        print(dumps({"differs": config_differences(found), "runs": figures}, indent=1, default=str))
        return
    print(report(found))
    try:
        comparison_figure(found).savefig(out)
    except OSError as error:
        raise UserError(f"out: cannot write {out} ({error.strerror})") from None
    print(f"\nwritten to {out}")


def workspace(project: str, name: str = "frugal") -> None:
    """Make the W&B workspace of a project: loss against each cost, training, speed, routing, runs by study.

    Args:
        project: ENTITY/PROJECT; an API key is needed.
        name: of the view.
    """
    from frugal.errors import UserError
    from frugal.tracking.workspace import workspace as build

    made = build(project, name)
    try:
        made.save()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"project: W&B does not take the workspace: {lines[0]}") from None
    print(made.url)
