"""train.py end to end on a text of seconds: what a run leaves behind, resume, and faults in one line."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run as start

from frugal.cli.base_config import passed_the_wrong_way
from frugal.cli.train import null_as_mapping, overlays_first
from frugal.schedule import WarmupStableDecay
from frugal.tracking.run_folder import read_lines

Train = Callable[..., Path]
SUMMARY_KEYS = {
    "val_loss",
    "val_bits_per_byte",
    "tokens_seen",
    "flops",
    "seconds",
    "joules",
    "dollars",
    "params_total",
    "params_active",
    "tokens_per_second",
    "mfu",
    "global_step",
}


def test_a_run_leaves_everything_in_its_folder(train: Train, capsys: pytest.CaptureFixture) -> None:
    folder = train("fit", "--trainer.max_steps", "40", "--model.optimizer.lr", "0.02")
    out = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["global_step"] == 40 and summary["tokens_seen"] == 40 * 4 * 16
    rows = read_lines(folder / "metrics.jsonl")
    val = [row["val/loss"] for row in rows if "val/loss" in row]
    assert val[-1] < val[0] - 0.5 and summary["val_loss"] == min(val)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 40, 2))
    names = set().union(*rows)
    assert names >= {
        "train/loss",
        "val/bits_per_byte",
        "optim/lr",
        "optim/grad_norm",
        "speed/tokens_per_second",
        "speed/mfu",
        "router/max_violation",
        "router/dead_experts",
        "cost/dollars",
    }
    for name in ("loss", "expert_load"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    loads = read_lines(folder / "expert_load.jsonl")
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for row in loads for layer in row["layers"].values())
    for shown in ("bits per byte", "parameters", str(folder), "frugal generate", f"{summary['val_bits_per_byte']:.4f}"):
        assert shown in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 40 and config["model"]["init_args"]["transformer"]["vocab_size"] == 300
    # The resolved config alone repeats the run.
    again = train("fit", "--config", str(folder / "config.yaml"), "--run.name", "again")
    assert history(again) == history(folder)


def same_weights(a: Path, b: Path) -> bool:
    a_state, b_state = (torch.load(p / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for p in (a, b))
    return a_state.keys() == b_state.keys() and all(torch.equal(a_state[key], b_state[key]) for key in a_state)


def history(folder: Path) -> list[dict]:
    timed = ("time", "data/wait_fraction", "speed/", "cost/seconds", "cost/joules", "cost/dollars")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in read_lines(folder / "metrics.jsonl")
    ]


# A run that ends by SIGKILL at the end of a step (the checkpoint before the 5th was written at the end of a validation,
# the one before the 7th was not), or in the middle of the validation after its 8th.
KILLER = """
import os, signal, sys
import frugal.callbacks.routing as routing
from frugal.training.language_model import LanguageModel
def kill(when):
    if when:
        os.kill(os.getpid(), signal.SIGKILL)
step_end, val_end = routing.RoutingMonitor.on_train_batch_end, LanguageModel.on_validation_epoch_end
def on_step_end(self, trainer, *args):
    step_end(self, trainer, *args)
    kill(sys.argv[1] == f"step {trainer.global_step}")
def on_val_end(self):
    kill(sys.argv[1] == "validation" and self.trainer.global_step == 8)
    val_end(self)
routing.RoutingMonitor.on_train_batch_end, LanguageModel.on_validation_epoch_end = on_step_end, on_val_end
from frugal.cli.train import main
main(["fit", "--config", "tiny.yaml", "--run.name", "cut", *sys.argv[2:]])
"""


TWO_SOURCES = [
    {"source": {"class_path": "frugal.data.sources.LocalText", "init_args": {"path": "text.txt"}}, "name": "a"},
    {"source": {"class_path": "frugal.data.sources.KingJames"}, "name": "b", "weight": 2},
]
SHARED_AND_AHEAD = (
    *("--model.transformer.n_layers", "4", "--model.transformer.n_mtp", "1", "--model.mtp_loss_weight.final", "0.1"),
    *("--model.transformer.sharing.n_blocks", "1", "--model.transformer.sharing.prelude", "1"),
    *("--model.transformer.sharing.rank", "2", "--model.transformer.sharing.own_norms", "true"),
)

ADAPTIVE = (
    *("--data.adaptive.by", "rarity", "--data.adaptive.rule", "loss", "--data.adaptive.sharpness", "9"),
    *("--data.adaptive.every", "2", "--data.adaptive.lead", "2"),
)

AUGMENTED = (
    "--data.transforms",
    """[
  {class_path: frugal.data.transforms.text.FillInTheMiddle, init_args: {probability: {value: 0.5, ramp_in: 6}}},
  {class_path: frugal.data.transforms.rewriting.BpeDropout, init_args: {probability: {value: 0.5, stop: 9}}},
  {class_path: frugal.data.transforms.text.TokenMask},
]""",
)
DROPOUT = ("--model.lora", "{rank: 2, dropout: 0.2}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "extra"),
    [
        ("validation", ()),
        ("step 5", SHARED_AND_AHEAD),
        (
            "step 7",
            (
                *("--data.curriculum.difficulty", "compressibility", "--data.curriculum.steps", "8"),
                *("--data.lengths", "[{start: 0, seq_len: 8}, {start: 6, seq_len: 16}]"),
                *("--data.source.class_path", "Mixture", "--data.source.sources", json.dumps(TWO_SOURCES)),
                *("--data.mixture", "[{start: 0, weights: {a: 1}}, {start: 6, weights: {a: 1, b: 3}}]"),
                *(*AUGMENTED, *DROPOUT, "--data.num_workers", "2"),
            ),
        ),
        (
            "step 7",
            ("--trainer.accumulate_grad_batches", "2", "--data.num_workers", "1", "--trainer.val_check_interval", "8"),
        ),
        ("step 5", (*ADAPTIVE, *AUGMENTED, *DROPOUT, "--data.adaptive.lead", "4", "--data.num_workers", "1")),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(train: Train, moment: str, extra: tuple[str, ...]) -> None:
    whole = train("fit", "--run.name", "whole", *extra)
    assert subprocess.run([sys.executable, "-c", KILLER, moment, *extra], capture_output=True).returncode == -9
    cut = train("fit", "--run.name", "cut", "--ckpt_path", "last", *extra)
    assert len(list(Path("runs/cut").iterdir())) == 1  # the same folder
    assert same_weights(whole, cut)
    assert history(whole) == history(cut)
    for file in ("expert_load.jsonl", "curriculum.jsonl"):
        assert read_lines(whole / file) == read_lines(cut / file)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    for key in ("tokens_seen", "flops", "global_step", "val_loss"):
        assert summaries[0][key] == summaries[1][key]
    # A finished run has nothing left to do.
    before = (cut / "metrics.jsonl").read_text()
    train("fit", "--run.name", "cut", "--ckpt_path", "last", *extra)
    assert (cut / "metrics.jsonl").read_text() == before and same_weights(whole, cut)


@pytest.mark.slow
def test_killed_at_random_moments_and_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """As `benchmarks/random_kills.py` does 20 times; it says what is wrong."""
    script = Path(__file__).parents[2] / "benchmarks/random_kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), "--kills", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "as if never killed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes_do_what_one_does(train: Train, project: Path) -> None:
    """DDP over two processes sees the same global batches: losses, loads and weights agree up to rounding."""
    options = (*SHARED_AND_AHEAD, *ADAPTIVE)
    two = ["fit", "--config", "tiny.yaml", "--trainer.strategy", "ddp", *options]
    start(2, [{"folder": "runs/two/it", "args": two}], project)
    folders = [train("fit", "--run.name", "one", "--data.batch_size", "8", *options), Path("runs/two/it")]
    states = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in folders]
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], atol=1e-6, rtol=1e-5, msg=key)
    twice = []  # both processes orthogonalize all updates, so these FLOPs are spent twice
    for one, other in zip(history(folders[0]), history(folders[1]), strict=True):
        twice += [(other.pop("cost/flops") - one.pop("cost/flops")) / (one["step"] + 1)] if "cost/flops" in one else []
        assert one == pytest.approx(other, rel=1e-5)
    assert twice and twice == pytest.approx([twice[0]] * len(twice)) and twice[0] > 0
    assert read_lines(folders[0] / "expert_load.jsonl") == read_lines(folders[1] / "expert_load.jsonl")
    ours, theirs = (read_lines(folder / "curriculum.jsonl") for folder in folders)
    assert len(ours) == 6 and [row["effective"] for row in ours] == [row["effective"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["share"] == pytest.approx(other["share"], rel=1e-4)


def test_a_resumed_run_obeys_the_config_it_is_given(train: Train) -> None:
    train("fit", "--trainer.max_steps", "6")
    options = [
        "--model.optimizer.lr",
        "0.01",
        "--model.optimizer.adamw_lr",
        "0.01",
        "--model.optimizer.weight_decay",
        "0.7",
        "--trainer.log_every_n_steps",
        "1",
    ]
    folder = train("fit", "--trainer.max_steps", "12", "--ckpt_path", "last", *options)
    rates = {row["step"]: row["optim/lr"] for row in read_lines(folder / "metrics.jsonl") if "optim/lr" in row}
    schedule = WarmupStableDecay(warmup_steps=2, decay_fraction=0.5)
    for step in range(6, 12):
        assert rates[step] == pytest.approx(0.01 * schedule.factor(step, 12), rel=1e-5)
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    decays = {group["name"]: group["weight_decay"] for group in state["param_groups"]}
    assert decays.pop("vectors") == 0 and set(decays.values()) == {0.7}


def test_a_moved_project_keeps_the_best_checkpoint(train: Train) -> None:
    folder = train("fit", "--trainer.max_steps", "8", "--model.optimizer.lr", "0.02")
    best = (folder / "checkpoints/best.ckpt").read_bytes()
    last = str((folder / "checkpoints/last.ckpt").resolve())
    worse = ["--model.optimizer.lr", "30", "--model.optimizer.adamw_lr", "30"]
    train("fit", "--trainer.max_steps", "12", "--ckpt_path", last, *worse)
    assert (folder / "checkpoints/best.ckpt").read_bytes() == best


def test_another_batch_size_after_a_resume_neither_repeats_nor_skips(train: Train) -> None:
    def seen(folder: Path) -> int:
        state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        return state["TextDataModule"]["samples_seen"]

    assert seen(train("fit", "--trainer.max_steps", "6")) == 24
    assert seen(train("fit", "--trainer.max_steps", "12", "--ckpt_path", "last", "--data.batch_size", "2")) == 36


def test_balancing_moves_the_biases_and_best_is_the_lowest(train: Train) -> None:
    folder = train("fit", "--model.optimizer.lr", "0.02")
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    (bias,) = (value for key, value in state["state_dict"].items() if key.endswith("expert_bias"))
    assert bias.abs().max() > 0
    val = {row["step"] + 1: row["val/loss"] for row in read_lines(folder / "metrics.jsonl") if "val/loss" in row}
    assert state["global_step"] == min(val, key=val.__getitem__)
    summary = json.loads((folder / "summary.json").read_text())
    train_seconds = summary["seconds_by_phase"]["train"]
    assert summary["mfu"] == pytest.approx(summary["flops"] / train_seconds / 0.1e12, rel=1e-6)
    assert 0 < summary["seconds_by_phase"]["validation"] < summary["seconds"]
    assert summary["joules"] == pytest.approx(summary["seconds"] * 10 * len(os.sched_getaffinity(0)), rel=1e-3)


def test_a_run_shorter_than_the_logging_interval_ends_without_a_warning(train: Train) -> None:
    with warnings.catch_warnings(record=True) as caught:
        train("fit", "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "20")
    assert not [str(warning.message) for warning in caught if "logging interval" in str(warning.message)]


def test_fast_dev_run_leaves_nothing(train: Train) -> None:
    from frugal.cli.train import main

    main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "4", "--samples.prompts", '[""]'])
    assert not list(Path("runs").rglob("*.ckpt"))


def test_validate_and_predict_agree_with_the_run(train: Train) -> None:
    folder = train("fit")
    train("validate", "--ckpt_path", "last")
    last = [row for row in read_lines(folder / "metrics.jsonl") if "val/loss" in row][-1]
    figures = json.loads((folder / "validate.json").read_text())
    assert figures["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    train("predict", "--ckpt_path", str(folder / "checkpoints/last.ckpt"))
    rows = read_lines(folder / "predictions.jsonl")
    mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert mean == pytest.approx(last["val/loss"], rel=1e-5)


def test_the_last_step_is_always_validated(train: Train) -> None:
    folder = train("fit", "--trainer.max_steps", "5", "--trainer.val_check_interval", "100")
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl") if "val/loss" in row] == [4]
    folder = train("fit", "--trainer.max_steps", "8", "--trainer.val_check_interval", "4")
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl") if "val/loss" in row] == [3, 7]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["global_step"] == 8 and summary["val_loss"] is not None


def test_options_win_over_overlays_wherever_they_stand(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal.cli.train import main

    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--trainer.max_steps", "3", "--config", "tiny.yaml"])
    main()
    (folder,) = Path("runs/base").iterdir()
    assert json.loads((folder / "summary.json").read_text())["global_step"] == 3
    assert overlays_first(["fit", "--a", "1", "-c", "x", "--config=y", "--b"]) == [
        "fit", "-c", "x", "--config=y", "--a", "1", "--b",
    ]  # fmt: skip


def test_a_nested_group_is_switched_off_on_the_command_line() -> None:
    args = ["fit", "--model.transformer.moe", "null", "--model.init_args.transformer.sharing=None", "--model.x", "null"]
    assert null_as_mapping(args) == [
        "fit", '--model.transformer={"moe": null}', '--model.init_args.transformer={"sharing": null}', "--model.x=null",
    ]  # fmt: skip


def test_another_checkpoint_than_last_begins_a_new_run(train: Train) -> None:
    first = train("fit", "--trainer.max_steps", "8")
    before = (first / "metrics.jsonl").read_text()
    second = train("fit", "--trainer.max_steps", "12", "--ckpt_path", "best")
    assert second != first and (first / "metrics.jsonl").read_text() == before
    assert read_lines(second / "metrics.jsonl")[0]["step"] >= 8


FAULTS = {
    "a misspelt key": (["--model.transformer.d_modell", "8"], "model.transformer.d_modell: there is no such key"),
    "the beginning of a key": (
        ["--trainer.max_step", "1"],
        "trainer.max_step: there is no such key",
    ),
    "the beginning of a class's key": (
        ["--model.transformer.n_layer", "1"],
        "did you mean model.transformer.n_layers?",
    ),
    "a misspelt key in an overlay": (["--config", "typo.yaml"], "did you mean trainer.max_steps?"),
    "a wrong type": (["--model.optimizer.lr", "fast"], "model.optimizer.lr: must be a number, got fast"),
    "top_k too large": (["--model.transformer.moe.top_k", "9"], "top_k: must lie between 1 and n_experts (4), got 9"),
    "a wrong choice": (
        ["--run.wandb", "maybe"],
        "run.wandb: must be one of auto, online, offline, disabled; got maybe",
    ),
    "a choice among several types": (
        ["--trainer.precision", "fp8"],
        "trainer.precision: must be one of 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16; got fp8",
    ),
    "no list": (["--data.lengths", "[3]"], "data.lengths: must be a LengthStage, got 3"),
    "a missing shape": (["--model.transformer", "none.yaml"], "error: model.transformer: no file none.yaml"),
    "a missing model": (["--model", "configs/none.yaml"], "error: model: no file configs/none.yaml"),
    "a missing datamodule": (["--data", "configs/none.yaml"], "error: data: no file configs/none.yaml"),
    "a shape that is a list": (["--model.transformer", "list.yaml"], "list.yaml is no YAML file that holds keys"),
    "a misspelt class": (
        ["--data.source.class_path", "frugal.data.sources.KingJame"],
        "error: data.source.class_path: there is no class frugal.data.sources.KingJame; did you mean "
        "frugal.data.sources.KingJames?",
    ),
    "a misspelt optimizer": (
        ["--model.optimizer", "torch.optim.AdanW"],
        "error: model.optimizer.class_path: there is no class torch.optim.AdanW; did you mean torch.optim.AdamW?",
    ),
    "a misspelt key of a source": (["--data.source.pth", "x"], "did you mean data.source.path?"),
    "an unknown strategy": (["--trainer.strategy", "magic"], "trainer.strategy: magic is none"),
    "a config that is a list": (["--config", "list.yaml"], "list.yaml: must hold keys, not a list"),
    "a config not in UTF-8": (["--config", "latin.txt"], "latin.txt: is no YAML"),
    "a missing config": (["--config", "none.yaml"], "error: --config: no file none.yaml"),
    "a missing text": (["--data.source.path", "none.txt"], "data.source.path: no such file"),
    "an empty text": (["--data.source.path", "empty.txt"], "data.source: there is no text in it"),
    "a short text": (["--data.source.path", "short.txt", "--data.seq_len", "512"], "data.seq_len: 512 is too long"),
    "a text not in UTF-8": (["--data.source.path", "latin.txt"], "latin.txt: not UTF-8 at byte 3"),
    "no checkpoint": (["--ckpt_path", "none.ckpt"], "ckpt_path: no file none.ckpt"),
    "another shape": (
        ["--ckpt_path", "good.ckpt", "--model.transformer.d_model", "32"],
        "model.transformer.d_model is 16 in the checkpoint, 32 in the config",
    ),
    "a truncated checkpoint": (["--ckpt_path", "cut.ckpt"], "cut.ckpt is damaged or no checkpoint"),
    "a pickle that runs code": (["--ckpt_path", "evil.ckpt"], "evil.ckpt is no checkpoint, or holds more than"),
    "another tokenizer": (["--ckpt_path", "good.ckpt", "--data.source.path", "other.txt"], "another tokenizer"),
    "no steps": (["--trainer.max_steps", "-1"], "trainer.max_steps: must be positive"),
    "no pytorch file": (["--ckpt_path", "text.txt"], "text.txt is no checkpoint"),
    "another kind of checkpoint": (["--ckpt_path", "dict.ckpt"], "dict.ckpt is no checkpoint of train.py"),
    "validation inside a step": (
        ["--trainer.accumulate_grad_batches", "3"],
        "trainer.val_check_interval: 4 micro-batches do not end with an optimizer step",
    ),
    "another accumulation": (
        ["--ckpt_path", "good.ckpt", "--trainer.accumulate_grad_batches", "2"],
        "trainer.accumulate_grad_batches: the checkpoint's steps have 1 micro-batches",
    ),
    "another seed": (["--ckpt_path", "good.ckpt", "--seed_everything", "7"], "belongs to seed 1234"),
    "no key heads": (["--model.transformer.attention.n_kv_heads", "0"], "n_kv_heads: must be positive, got 0"),
    "no accumulation": (
        ["--trainer.accumulate_grad_batches", "0"],
        "trainer.accumulate_grad_batches: must be at least 1",
    ),
    "a misspelt option of a callback": (["--samples.temprature", "1"], "did you mean samples.temperature?"),
    "a root that is a file": (["--run.root", "text.txt"], "run.root: cannot write text.txt"),
    "impossible betas": (["--model.optimizer.betas", "[2, 3]"], "model.optimizer: Invalid momentum or betas"),
    "a bad run name": (["--run.name", "a/b"], "run.name: use letters"),
}


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.write_text, (Path("executed"), "yes"))


@pytest.fixture
def broken(project: Path, train: Train) -> None:
    folder = train("fit", "--run.name", "good", "--trainer.max_steps", "4")
    good = project / "good.ckpt"
    (project / "list.yaml").write_text("- 1\n")
    shutil.copy(folder / "checkpoints/last.ckpt", good)
    (project / "cut.ckpt").write_bytes(good.read_bytes()[:-5000])
    torch.save({"state_dict": Evil()}, project / "evil.ckpt")
    torch.save({"a": 1}, project / "dict.ckpt")
    (project / "typo.yaml").write_text("trainer: {max_stepz: 3}\n")
    (project / "empty.txt").write_text("")
    (project / "short.txt").write_text("one line\nand another\n" * 30)
    (project / "latin.txt").write_bytes("abcé abc\n".encode("latin-1") * 1000)
    (project / "other.txt").write_text("".join(f"{i} {i * i} numbers\n" for i in range(2000)))


def test_faults_are_one_line_that_names_the_key(broken: None, train: Train, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    before = sorted(Path("runs").rglob("*"))
    for name, (args, expected) in FAULTS.items():
        with pytest.raises(SystemExit) as stopped:
            train("fit", *args)
        err = capsys.readouterr().err.strip()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2, name
        assert len(errors) == 1 and expected in errors[0], f"{name}: {err}"
        assert "Traceback" not in err, name
    assert not Path("executed").exists()
    left = sorted(path for path in Path("runs").rglob("*") if path.is_file() and path not in before)
    assert {path.name for path in left} <= {"meter.json"}  # what a start cost that was refused late


OWN_TEXT = "reads no file; --config configs/experiments/001_own_text.yaml reads your text"
WRONG_WAYS = {
    "a text for what reads none": (["--data.source.path", "text.txt"], f"data.source.path: KingJames {OWN_TEXT}"),
    "a shape as an overlay": (
        ["--config", "configs/model/olmoe_1b_7b.yaml"],
        "configs/model/olmoe_1b_7b.yaml: is no overlay but a value of model.transformer; pass it as "
        "--model.transformer configs/model/olmoe_1b_7b.yaml",
    ),
    "images' shape as an overlay": (
        ["--config=configs/model/vit_moe_digits.yaml"],
        "configs/model/vit_moe_digits.yaml: is no overlay but a value of model.transformer; pass it as "
        "--model.transformer configs/model/vit_moe_digits.yaml",
    ),
    "data as an overlay": (
        ["--config", "configs/data/kjv.yaml"],
        "configs/data/kjv.yaml: is no overlay but a value of data; pass it as --data configs/data/kjv.yaml",
    ),
    "an overlay as a value": (
        ["--model.optimizer", "configs/optim/adamw.yaml"],
        "model.optimizer: configs/optim/adamw.yaml is an overlay (it sets model); pass it as --config "
        "configs/optim/adamw.yaml",
    ),
    "an experiment as a shape": (
        ["--model.init_args.transformer=configs/experiments/006_adamw.yaml"],
        "model.init_args.transformer: configs/experiments/006_adamw.yaml is an overlay (it sets run, data, "
        "model, trainer, checkpoint); pass it as --config configs/experiments/006_adamw.yaml",
    ),
    "a shape as a model": (
        ["--model", "configs/model/kjv_moe.yaml"],
        "model: configs/model/kjv_moe.yaml is a value of model.transformer; pass it as --model.transformer "
        "configs/model/kjv_moe.yaml",
    ),
    "data as a source": (
        ["--data.source", "configs/data/kjv.yaml"],
        "data.source: configs/data/kjv.yaml is a value of data; pass it as --data configs/data/kjv.yaml",
    ),
    "a misspelt key beside a right file": (
        ["--model.transformer", "configs/model/kjv_moe.yaml", "--trainer.max_stepz", "3"],
        "trainer.max_stepz: there is no such key; did you mean trainer.max_steps?",
    ),
}


@pytest.mark.parametrize("name", WRONG_WAYS)
def test_what_belongs_elsewhere_is_sent_there(name: str, project: Path, capsys: pytest.CaptureFixture) -> None:
    from frugal.cli.train import main

    args, line = WRONG_WAYS[name]
    with pytest.raises(SystemExit):
        main(["fit", *args])
    assert capsys.readouterr().err == f"error: {line}\n"


def test_shipped_values_open_with_how_they_are_passed() -> None:
    root = Path(__file__).parents[2]
    files = [file for folder in ("model", "data") for file in sorted((root / "configs" / folder).glob("*.yaml"))]
    assert len(files) > 15
    for file in files:
        told = passed_the_wrong_way(["--config", str(file)], ["run", "data", "model", "trainer"])
        option = "--model.transformer" if file.parent.name == "model" else "--data"
        assert told and told.endswith(f"; pass it as {option} {file}"), told
        assert file.read_text().startswith(f"# Pass it as {option} {file.relative_to(root)}"), file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a misspelt key", "a truncated checkpoint", "a short text"])
def test_faults_on_the_real_command_line(broken: None, project: Path, name: str) -> None:
    args, expected = FAULTS[name]
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "train.py"), "fit", "--config", "tiny.yaml", *args]
    result = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr + result.stdout
