"""The verb that prepares the data of a run and draws what the run will see."""

from __future__ import annotations


def prepare(experiment: str, out: str = "plan.png", points: int = 100) -> None:
    """Prepare a run's data and draw what it will see, step by step, before any training.

    Args:
        experiment: a file of configs/experiments/, or configs/base.yaml.
        out: picture to write: difficulty, size of a sample, mixture and learning rate over the steps.
        points: windows along the run that are looked at.
    """
    import logging
    from pathlib import Path

    from frugal.cli.train import build
    from frugal.data.plan import plan_of
    from frugal.errors import UserError, require
    from frugal.planning.hints import late_curriculum
    from frugal.tracking.plots import plan_figure

    require(points > 0, f"points: must be positive, got {points}")
    require(Path(out).suffix in (".png", ".svg", ".pdf"), f"out: {out} must end in .png, .svg or .pdf")
    made = build(["fit", "--config", experiment, "--trainer.logger", "false"])
    data, steps = made.datamodule, made.trainer.max_steps
    data.trainer = made.trainer
    data.prepare_data()
    data.setup("fit")
    data.train_dataloader()
    if data.adaptive:
        data.adaptive.assume_unchanged()
        print("data.adaptive: decided from measured losses as the run goes; drawn are the usual shares")
    plain, unit = {"text": ("rarity", "tokens"), "images": ("compressibility", "images")}[data.gives]
    kind, reference = data.wanted_difficulty() or (plain, None)
    plan = plan_of(data.training_data, data.difficulty_of_samples(kind, reference), kind, steps, points)
    shares = data.adaptive.shares_at(0) if data.adaptive and data.adaptive.bands else {}
    schedule = made.model.schedule
    rates = [schedule.factor(step, steps) for step in plan.steps.tolist()]
    assert data.prepared is not None
    ends = zip(data.sizes.items(), plan.epochs, plan.shares[0], plan.shares[-1], strict=True)
    for (name, (train, val)), epochs, first, last in ends:
        print(
            f"{name}: {train:,} training and {val:,} validation {unit}, "
            f"{first:.0%} of the samples at first, {last:.0%} at last, {epochs:.2f} epochs"
        )
    for name, share in shares.items():
        print(f"{name}: {share:.0%} of the samples")
    print(
        f"{kind} (median): {plan.difficulty[0, 1]:.4g} at step 0, {plan.difficulty[-1, 1]:.4g} at step "
        f"{plan.steps[-1]}; {plan.size[0]} {plan.size_name} at first, {plan.size[-1]} at last"
    )
    if data.curriculum and (hint := late_curriculum(data.curriculum.steps, steps, schedule.factor)):
        logging.getLogger("frugal").warning(hint)
    title = f"What {made.run_config.name} will see"
    figure = plan_figure(plan, rates, list(data.sizes), title)
    try:
        figure.savefig(out)
    except OSError as error:
        raise UserError(f"out: cannot write {out} ({error.strerror})") from None
    print(f"written to {out}; prepared data in {data.prepared.folder}")
