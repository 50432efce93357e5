"""Pictures of one run, drawn from the files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal.tracking.run_folder import RunFolder, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe & Ito (2008): distinguishable with every common colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"
OKABE_ITO = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(**kwargs: Any) -> Figure:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=120, **kwargs)
    FigureCanvasAgg(figure)
    return figure


def loss_figure(rows: list[dict[str, Any]], title: str, unit: str = "token") -> Figure:
    """Training and validation loss and the learning rate over the steps."""
    figure = new_figure(figsize=(8, 5))
    axis, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = [(row["step"] + 1, row["train/loss"]) for row in rows if "train/loss" in row]
    val = [(row["step"] + 1, row["val/loss"], row) for row in rows if "val/loss" in row]
    if train:
        axis.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.2, label="training")
    if val:
        steps, loss, found = zip(*val, strict=True)
        axis.plot(steps, loss, "o-", color=ORANGE, markersize=4, label="validation")
        best = min(range(len(loss)), key=loss.__getitem__)
        axis.annotate(
            f"{loss[best]:.3f} nats/{unit}" + _score(found[best]),
            (steps[best], loss[best]),
            xytext=(-8, 14),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
        )
    axis.set(ylabel=f"loss (nats per {unit})", title=title)
    axis.grid(alpha=0.3)
    if train or val:
        axis.legend()
    lr = [(row["step"] + 1, row["optim/lr"]) for row in rows if "optim/lr" in row]
    if lr:
        rate.plot(*zip(*lr, strict=True), color="black", linewidth=1)
    rate.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    rate.grid(alpha=0.3)
    return figure


def _score(row: dict[str, float]) -> str:
    if "val/bits_per_byte" in row:
        return f"\n{row['val/bits_per_byte']:.3f} bits/byte"
    return f"\n{row['val/accuracy']:.1%} right" if "val/accuracy" in row else ""


def expert_load_figure(rows: list[dict[str, Any]], title: str) -> Figure:
    """For each MoE layer, every expert's share of the tokens over the steps, as a multiple of the even share."""
    layers = list(rows[-1]["layers"])
    figure = new_figure(figsize=(8, 1.2 + 1.7 * len(layers)))
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    first, last = rows[0]["step"] + 1, rows[-1]["step"] + 1
    for axis, layer in zip(axes, layers, strict=True):
        n_experts = len(rows[-1]["layers"][layer])
        ratio = [[share * n_experts for share in row["layers"][layer]] for row in rows]
        columns = list(zip(*ratio, strict=True))
        axis.imshow(
            columns,
            aspect="auto",
            cmap="cividis",
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(first, max(last, first + 1), n_experts - 0.5, -0.5),
        )
        axis.set(ylabel=f"layer {layer}\nexpert")
    axes[-1].set(xlabel="optimizer step")
    figure.colorbar(axes[0].images[0], ax=list(axes), label="load / even load", shrink=0.8)
    figure.suptitle(title)
    return figure


DIFFICULTY_UNITS = {
    "rarity": "nats per token",
    "compressibility": "bytes zipped / bytes",
    "length": "tokens of the document",
    "level": "level",
    "loss": "nats by the reference",
    "random": "0 to 1",
}


def plan_figure(plan: Any, rates: list[float], names: list[str], title: str) -> Figure:
    """What a run will see (a `frugal.data.plan.Plan`): difficulty, size, mixture and learning rate over the steps."""
    figure = new_figure(figsize=(8, 7))
    hard, length, mixture, rate = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 2, 1))
    low, median, high = plan.difficulty.T
    hard.fill_between(plan.steps, low, high, color=BLUE, alpha=0.25, linewidth=0, label="10% to 90%")
    hard.plot(plan.steps, median, color=BLUE, linewidth=1.2, label="median")
    hard.set(ylabel=f"difficulty: {plan.kind}\n({DIFFICULTY_UNITS[plan.kind]})", title=title)
    hard.legend(loc="best")
    length.step(plan.steps, plan.size, where="post", color="black", linewidth=1)
    length.set(ylabel=plan.size_name.replace(" ", "\n", 1), ylim=(0, 1.15 * max(plan.size)))
    length.set_yticks([0, *sorted(set(plan.size.tolist()))])
    mixture.stackplot(plan.steps, plan.shares.T, labels=names, colors=OKABE_ITO, alpha=0.8)
    mixture.set(ylabel="share of\nsamples", ylim=(0, 1))
    mixture.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    rate.plot(plan.steps, rates, color="black", linewidth=1)
    rate.set(xlabel="optimizer step", ylabel="learning rate\n/ peak", ylim=(0, 1.05))
    for axis in (hard, length, rate):
        axis.grid(alpha=0.3)
    return figure


def draw_run(folder: RunFolder, unit: str = "token") -> dict[str, Path]:
    """Draw what the run's files allow into `plots/`; returns the pictures by name; losses are means per `unit`."""
    folder.plots.mkdir(parents=True, exist_ok=True)
    title = f"{folder.path.parent.name}/{folder.id}"
    pictures = {}
    if rows := read_lines(folder.metrics):
        pictures["loss"] = folder.plots / "loss.png"
        loss_figure(rows, f"Loss of {title}", unit).savefig(pictures["loss"])
    if loads := read_lines(folder.expert_load):
        pictures["expert_load"] = folder.plots / "expert_load.png"
        expert_load_figure(loads, f"Expert load of {title}").savefig(pictures["expert_load"])
    return pictures
