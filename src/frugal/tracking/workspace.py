"""The project's W&B workspace as code: the same views that `frugal compare` draws, for all runs of a project."""

from __future__ import annotations

from typing import Any

from frugal.errors import UserError, require

LOSS = "val/bits_per_byte"
COSTS = ("cost/tokens", "cost/flops", "cost/seconds", "cost/joules", "cost/dollars")
# Section -> (title, x, metrics) of its line plots; x null is the step.
SECTIONS: dict[str, list[tuple[str, str | None, list[str]]]] = {
    "What a loss costs": [(f"loss / {x.removeprefix('cost/')}", x, [LOSS]) for x in COSTS],
    "Training": [
        ("training loss", None, ["train/loss"]),
        ("validation loss", None, [LOSS]),
        ("learning rate", None, ["optim/lr"]),
        ("gradient norm", None, ["optim/grad_norm"]),
    ],
    "Speed": [
        ("tokens per second", None, ["speed/tokens_per_second"]),
        ("share of the peak FLOP/s", None, ["speed/mfu"]),
        ("share of the time spent waiting for data", None, ["data/wait_fraction"]),
    ],
    "Routing": [
        ("largest violation of even load", None, ["router/max_violation"]),
        ("emptiest expert / mean load", None, ["router/min_load"]),
        ("entropy of the router", None, ["router/entropy"]),
        ("dead experts", None, ["router/dead_experts"]),
    ],
}


def metric_names() -> list[str]:
    """Every metric that the workspace shows."""
    panels = [panel for panels in SECTIONS.values() for panel in panels]
    return sorted({name for _, x, metrics in panels for name in (*metrics, *([x] if x else []))})


def workspace(project: str, name: str = "frugal") -> Any:
    """The workspace of a project, not saved yet.

    Args:
        project: `ENTITY/PROJECT`.
        name: of the view.

    Raises:
        UserError: another form of project, or wandb-workspaces is not installed.
    """
    entity, _, rest = project.partition("/")
    require(bool(entity and rest) and "/" not in rest, f"project: must be ENTITY/PROJECT, got {project}")
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError:
        raise UserError('wandb-workspaces is not installed: pip install -e ".[workspaces]"') from None
    sections = []
    for title, plots in SECTIONS.items():
        lines = [
            panels.LinePlot(
                title=plot, x=panels.Metric(x) if x else "Step", y=[panels.Metric(m) for m in metrics], log_x=bool(x)
            )
            for plot, x, metrics in plots
        ]
        extra = [panels.RunComparer(diff_only="split")] if title == "What a loss costs" else []
        sections.append(ws.Section(name=title, panels=[*lines, *extra], is_open=title in list(SECTIONS)[:2]))
    return ws.Workspace(
        entity=entity,
        project=rest,
        name=name,
        sections=sections,
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )
