"""`train.py`: LightningCLI with the run's folder, loggers and links between keys."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from frugal.callbacks.cost import CostMeter
from frugal.callbacks.curriculum import CurriculumMonitor
from frugal.callbacks.diagnostics import Diagnostics
from frugal.callbacks.expert_bias import ExpertBias
from frugal.callbacks.freezing import Freezing
from frugal.callbacks.progress import Progress
from frugal.callbacks.report import RunReport
from frugal.callbacks.routing import RoutingMonitor
from frugal.callbacks.samples import TextSamples
from frugal.cli.base_config import base_for, class_keys, passed_the_wrong_way
from frugal.cli.errors import one_line, one_line_errors, one_voice
from frugal.cli.memory import keep_freed_memory
from frugal.data.datamodule import TextDataModule
from frugal.data.image_datamodule import ImageDataModule
from frugal.errors import UserError
from frugal.tracking.run_folder import RunConfig, RunFolder, folder_of, new_run, newest_run
from frugal.training.checkpointing import BestCheckpoint, LastCheckpoint, SafeCheckpointIO, good_checkpoint
from frugal.training.image_classifier import ImageClassifier
from frugal.training.language_model import LanguageModel
from frugal.training.loggers import MetricsFile, SafeWandbLogger, wandb_mode
from frugal.training.precision import precision_plugin
from frugal.training.sharded import is_sharded
from frugal.training.strategies import FSDP2Strategy

log = logging.getLogger(__name__)
BASE_CONFIG = os.environ.get("FRUGAL_BASE_CONFIG", "configs/base.yaml")  # a launched run has its own copy
OPTIONS: set[str] = set()  # names of all options, filled by the parser, for suggestions


class WholeNames(LightningArgumentParser):
    """Takes no beginning of an option for the option: `n_layer` is a misspelt key. Classes get such parsers, too."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)


class FrugalCLI(LightningCLI):
    """Adds to LightningCLI: the run's folder, W&B and file loggers, named callbacks, one-line errors."""

    started: float | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the callbacks that every run has, and link keys that must agree."""
        parser.add_class_arguments(RunConfig, "run")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExpertBias, "expert_bias")
        parser.add_lightning_class_args(Freezing, "freezing")
        parser.add_lightning_class_args(TextSamples, "samples")
        parser.add_lightning_class_args(CostMeter, "cost")
        parser.add_lightning_class_args(Diagnostics, "diagnostics")
        OPTIONS.update(action.dest for action in parser._actions)
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.init_args.tokenizer.vocab_size", "model.init_args.transformer.vocab_size")
        parser.link_arguments("data.init_args.seq_len", "model.init_args.transformer.max_seq_len")
        for key in ("image_size", "channels", "n_classes"):
            parser.link_arguments(f"data.init_args.{key}", f"model.init_args.transformer.{key}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a file that is passed the wrong way is told as that."""
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError:
            keys = {action.dest.partition(".")[0] for action in self._subcommand_parsers["fit"]._actions}
            told = passed_the_wrong_way(sys.argv[1:] if args is None else args, keys)
            if told is None:
                raise
            raise UserError(told) from None

    def _parse_ckpt_path(self) -> None:
        """Keep config and command line: a checkpoint must not override them in silence (Lightning issue 21455)."""

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder: a new one, or that of the run to go on with."""
        config = self.config[self.subcommand]
        run = RunConfig(**config.run.as_dict())
        wanted = config.get("ckpt_path")
        earlier = None
        if wanted in ("last", "best"):
            earlier = newest_run(run, f"{wanted}.ckpt")
            if earlier is not None:
                checkpoint = good_checkpoint(earlier) if wanted == "last" else earlier.checkpoints / "best.ckpt"
                config.ckpt_path = str(checkpoint)
                if self.subcommand == "fit" and wanted == "best":
                    earlier = None  # a new run branches off
            elif self.subcommand == "fit":
                log.info("ckpt_path: no earlier run named %s; starting a new one", run.name)
                config.ckpt_path = None
            else:
                raise UserError(f"ckpt_path: no run named {run.name} under {run.root}/ has a {wanted}.ckpt")
        elif wanted:
            if not (Path(wanted).is_file() or is_sharded(wanted)):
                raise UserError(f"ckpt_path: no file {wanted}")
            # Only last.ckpt is where its run stands; from any other checkpoint a new run branches off.
            branches = self.subcommand == "fit" and Path(wanted).name != "last.ckpt"
            earlier = None if branches else folder_of(Path(wanted))
        elif self.subcommand != "fit":
            raise UserError(f"ckpt_path: {self.subcommand} needs a checkpoint: --ckpt_path best, last or a file")
        # Processes that Lightning starts for further devices must agree on the folder.
        inherited = os.environ.get("FRUGAL_RUN_FOLDER") if "LOCAL_RANK" in os.environ else None
        self.folder = RunFolder(Path(inherited)) if inherited else earlier or new_run(run)
        os.environ["FRUGAL_RUN_FOLDER"] = str(self.folder.path)
        self.run_config = run
        config.trainer.default_root_dir = str(self.folder.path)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a value that a class refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            # jsonargparse wraps what our dataclasses raise into a report of its own.
            if "Does not validate" not in str(error) and "Parser key" not in str(error):
                raise
            raise UserError(one_line(str(error))) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the callbacks, loggers and checkpoint reader that every run has."""
        trainer_config = self._get(self.config_init, "trainer")
        for key, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 1), ("gradient_clip_val", 0)):
            if (value := trainer_config.get(key)) is not None and value < least:
                raise UserError(f"trainer.{key}: must be at least {least}, got {value}")
        if trainer_config.get("val_check_interval") == 0:
            raise UserError("trainer.val_check_interval: must be positive; trainer.limit_val_batches 0 switches it off")
        accumulate, interval = (
            trainer_config.get("accumulate_grad_batches") or 1,
            trainer_config.get("val_check_interval"),
        )
        if isinstance(interval, int) and interval % accumulate:
            raise UserError(
                f"trainer.val_check_interval: {interval} micro-batches do not end with an optimizer step; "
                f"use a multiple of trainer.accumulate_grad_batches ({accumulate})"
            )
        fitting = self.subcommand == "fit"
        if fitting:
            try:
                Path(self.run_config.root).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"run.root: cannot write {self.run_config.root} ({error.strerror})") from None
        wants_logs = fitting and trainer_config.get("logger") is not False and not trainer_config.get("fast_dev_run")
        kwargs["logger"] = False
        plugins = [*(trainer_config.get("plugins") or []), SafeCheckpointIO()]
        if half := precision_plugin(trainer_config.get("precision"), str(trainer_config.get("accelerator") or "auto")):
            plugins.append(half)
            trainer_config["precision"] = None  # Lightning takes one or the other
        trainer_config["plugins"] = plugins
        monitors = [RoutingMonitor(), CurriculumMonitor()]
        extra = [WriteConfig(self), *monitors, Progress(), BestCheckpoint(), RunReport()]
        trainer_config["callbacks"] = [*(trainer_config.get("callbacks") or []), *(extra if fitting else [Progress()])]
        strategy = trainer_config.get("strategy")
        if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp")):
            raise UserError(
                "trainer.strategy: FSDP1 flattens weights to vectors, which the optimizer's groups would not decay; "
                "use configs/strategy/fsdp2.yaml"
            )
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            if isinstance(strategy, str) and "invalid strategy" in str(error):
                raise UserError(
                    f"trainer.strategy: {strategy} is none; see the fragments in configs/strategy/"
                ) from None
            if isinstance(strategy, Strategy):
                raise UserError(f"trainer.strategy: {type(strategy).__name__}: {error}") from None
            raise UserError(f"trainer: {error}") from None
        if isinstance(trainer.strategy, FSDP2Strategy):
            processes = trainer.num_nodes * trainer.num_devices
            trainer.strategy.check(self.model, processes, trainer.strategy.root_device.type)
        for meter in (callback for callback in trainer.callbacks if isinstance(callback, CostMeter)):
            meter.began = self.started
        for callback in trainer.checkpoint_callbacks:
            callback.dirpath = str(self.folder.checkpoints)  # type: ignore[attr-defined]
        if wants_logs:  # made last: loggers create the run's folder
            trainer.loggers = [MetricsFile(self.folder)]
            if wandb_mode(self.run_config) != "disabled":
                trainer.loggers.append(SafeWandbLogger(self.run_config, self.folder))
        return trainer

    def validate(self, **kwargs: Any) -> None:
        """Evaluate and keep the figures as `validate.json` in the run's folder."""
        self._write("validate.json", json.dumps(self.trainer.validate(**kwargs)[0], indent=2))

    def test(self, **kwargs: Any) -> None:
        """Evaluate and keep the figures as `test.json` in the run's folder."""
        self._write("test.json", json.dumps(self.trainer.test(**kwargs)[0], indent=2))

    def predict(self, **kwargs: Any) -> None:
        """Write the loss of each held-out sequence to `predictions.jsonl` in the run's folder."""
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: predict writes one file; run it on one device")
        batches: list[Any] = self.trainer.predict(**kwargs) or []
        rows = [
            json.dumps({key: value.item() for key, value in zip(batch, values, strict=True)})
            for batch in batches
            for values in zip(*batch.values(), strict=True)
        ]
        self._write("predictions.jsonl", "\n".join(rows))

    def _write(self, name: str, text: str) -> None:
        path = self.folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"written to {path}")

    def write_config(self) -> None:
        """Write the resolved config into the run's folder and send it to W&B."""
        self._dump_config()
        path = self.folder.path / "config.yaml"
        again = {"ckpt_path": None, "run": {**self.config_dump["run"], "id": None}}  # to repeat it, not to overwrite it
        text = yaml.safe_dump({**self.config_dump, **again}, sort_keys=False)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            number = len(list(self.folder.path.glob("config*.yaml")))
            path = self.folder.path / f"config.{number}.yaml"  # a resumed run with other settings keeps the first ones
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for logger in self.trainer.loggers:
            logger.log_hyperparams(self.config_dump)


class WriteConfig(pl.Callback):
    """Write the config when model, data and checkpoint have been accepted: a refused run is no run."""

    def __init__(self, cli: FrugalCLI) -> None:
        self.cli = cli

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On the first process only."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.cli.write_config()


def known_keys(config: Any, prefix: str = "") -> list[str]:
    """The keys of a nested config as users write them (`init_args` may be left out), for suggestions."""
    if not isinstance(config, dict):
        return [prefix]
    return [
        key
        for name, value in config.items()
        for key in known_keys(value, prefix if name == "init_args" else f"{prefix}.{name}".lstrip("."))
    ]


def overlays_first(args: list[str]) -> list[str]:
    """Move `--config FILE` behind the subcommand: options win over overlays wherever they stand."""
    overlays, others, waiting = [], [], False
    for arg in args:
        if waiting or arg in ("-c", "--config") or arg.startswith("--config="):
            waiting = not waiting and "=" not in arg
            overlays.append(arg)
        else:
            others.append(arg)
    return [*others[:1], *overlays, *others[1:]]


def null_as_mapping(args: list[str]) -> list[str]:
    """Write `--model.transformer.moe null` as `--model.transformer {"moe": null}`.

    jsonargparse hands the null of a nested group on as the string "None", and then refuses it.
    """
    found: list[str] = []
    for arg in args:
        if found and found[-1].startswith(("--model.", "--data.")) and "=" not in found[-1]:
            found[-1:] = [f"{found[-1]}={arg}"]
        else:
            found.append(arg)
    for i, arg in enumerate(found):
        key, _, value = arg.partition("=")
        parent, _, name = key.rpartition(".")
        if value in ("null", "None") and "." in parent.replace(".init_args", ""):
            found[i] = f'{parent}={{"{name}": null}}'
    return found


def main(args: list[str] | None = None, started: float | None = None) -> None:
    """Parse, instantiate and run one of fit, validate, test and predict.

    `started` is the `time.perf_counter()` of the program's start, from which the run is billed.
    """
    FrugalCLI.started = time.perf_counter() if started is None else started
    quiet()
    keep_freed_memory()
    if args is None:
        # In place: Lightning starts further processes from it.
        sys.argv[1:] = null_as_mapping(overlays_first(sys.argv[1:]))
    else:
        args = null_as_mapping(args)
    with one_line_errors(OPTIONS), one_voice():
        start(FrugalCLI, args)


def build(args: list[str]) -> FrugalCLI:
    """Parse and instantiate as `main` does, but run nothing; faults are raised."""
    quiet()
    return start(_BuildOnly, null_as_mapping(args))


class _BuildOnly(FrugalCLI):
    def _run_subcommand(self, subcommand: str) -> None:
        """Leave trainer, model and datamodule to the caller."""


def quiet() -> None:
    """Log our own lines only, and silence warnings that do not apply here."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("frugal").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    # The validation metric is reduced over ranks by torchmetrics before it is logged.
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")
    warnings.filterwarnings("ignore", ".*custom batch sampler.*for prediction.*")
    # Slurm being installed does not mean that this run is to be sent there.
    warnings.filterwarnings("ignore", ".*srun. command is available.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    # A short run may end before its first logged step; its validation is logged in any case.
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
    # Our sampler starts at the trainer's step, so the loader needs no state of its own.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")


def start(kind: type[FrugalCLI], args: list[str] | None) -> FrugalCLI:
    """Parse, and do what the kind of CLI does then; faults are raised."""
    if not Path(BASE_CONFIG).is_file():
        raise UserError(f"no {BASE_CONFIG} here: run from the project's root folder")
    given = sys.argv[1:] if args is None else args
    base = base_for(BASE_CONFIG, given)
    OPTIONS.update(known_keys(yaml.safe_load(Path(base).read_text(encoding="utf-8"))), class_keys(base, given))
    options = {"exit_on_error": False}
    return kind(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=WholeNames,
        parser_kwargs={**options, **{s: {**options, "default_config_files": [base]} for s in kind.subcommands()}},
        args=args,
    )


# The classes are known by name in YAML.
__all__ = ["FrugalCLI", "ImageClassifier", "ImageDataModule", "LanguageModel", "TextDataModule", "main"]
