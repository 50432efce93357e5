"""train.py under each strategy on 2 and 4 gloo processes has the losses, gradients and checkpoints of one process."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, history, made_once, prepare_project, same
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from ranks import run
from torchmetrics import MeanMetric

from frugal.callbacks.freezing import Freezing
from frugal.cli.checkpoint_card import checkpoint_card
from frugal.cli.checkpoints import consolidate
from frugal.cli.train import build
from frugal.errors import UserError
from frugal.model.config import orthogonalize_flops
from frugal.model.parallelize import SEVERAL_MESHES, ParallelSizes
from frugal.tracking.run_folder import RunFolder
from frugal.training.checkpointing import checkpoint_file, good_checkpoint, read_checkpoint
from frugal.training.checksums import META, damage, is_sealed
from frugal.training.freezing import ExpertChoice, Prefix
from frugal.training.strategies import FSDP2Strategy

OVERLAY = """
model:
  transformer: {attention: {n_kv_heads: 2}, ngrams: {n_slots: 64, n_hashes: 2}}
  schedule: {warmup_steps: 2, decay_fraction: 0.0}
  optimizer: {class_path: frugal.training.muon.Muon, init_args: {lr: 8.0e-3, adamw_lr: 4.0e-3}}
trainer:
  {max_steps: 12, val_check_interval: 12, log_every_n_steps: 1, accumulate_grad_batches: 2, gradient_clip_val: 0.5}
checkpoint: {every_n_steps: 6}
freezing:
  windows:
    - {layers: [0], embedding: true, start: 2, stop: 6}
    - {parameters: [blocks.1.ffn.router], start: 4, stop: 8}
expert_bias: {rate: 0.01}
"""
STRATEGIES = {"ddp": ("ddp", 1), "fsdp2": ("fsdp2", 1), "tensor": ("fsdp2_tensor", 2), "expert": ("fsdp2_expert", 1)}
MIXED = (("expert", "bf16-mixed", 4), ("tensor", "16-mixed", 4), ("ddp", "16-mixed", 2))
HALF = "runs/half/it/checkpoints/last.ckpt"
GLOBAL_BATCH = 8


def arguments(name: str, n: int, *options: str) -> list[str]:
    fragment, sharing = STRATEGIES[name]
    batch = GLOBAL_BATCH * sharing // n
    files = (f"configs/strategy/{fragment}.yaml", "tiny.yaml", "overlay.yaml")
    command = ["fit", *(part for file in files for part in ("--config", file))]
    return [*command, "--data.batch_size", str(batch), *options]


def job(name: str, n: int, folder: str, *options: str) -> dict[str, Any]:
    return {"folder": f"runs/{folder}/it", "args": arguments(name, n, "--run.name", folder, *options)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds all runs of this file."""
    if not SEVERAL_MESHES:
        pytest.skip("this torch cannot keep experts and matrices apart")
    return made_once(tmp_path_factory, "strategies", train_all)


def train_all(here: Path) -> None:
    """Each number of processes is started once."""
    prepare_project(here)
    (here / "overlay.yaml").write_text(OVERLAY)
    four = [job(name, 4, f"{name}-4") for name in STRATEGIES]
    four.append(job("expert", 4, "half", "--trainer.max_steps", "6"))
    mixed = {
        n: [job(name, n, f"{name}-{p}", "--trainer.precision", p) for name, p, k in MIXED if k == n] for n in (2, 4)
    }
    four += mixed[4]
    four.append(job("fsdp2", 4, "one-file", "--trainer.strategy.save_distributed_checkpoint", "false"))
    run(4, four, here)
    two = [job(name, 2, f"{name}-2") for name in STRATEGIES]
    two += [job(name, 2, f"resumed-{name}", "--ckpt_path", HALF) for name in ("tensor", "expert")]
    run(2, two + mixed[2], here)
    whole = ["fit", "--config", "tiny.yaml", "--config", "overlay.yaml", "--data.batch_size", str(GLOBAL_BATCH)]
    one = [{"folder": "runs/one/it", "args": [*whole, "--run.name", "one"]}]
    for precision in sorted({precision for _, precision, _ in MIXED}):
        options = ["--run.name", precision, "--trainer.precision", precision]
        one.append({"folder": f"runs/{precision}/it", "args": [*whole, *options]})
    one.append({"folder": "runs/resumed-one/it", "args": [*whole, "--run.name", "resumed-one", "--ckpt_path", HALF]})
    run(1, one, here)


def checkpoint(runs: Path, name: str) -> dict[str, Any]:
    return read_checkpoint(runs / "runs" / name / "it/checkpoints/last.ckpt")


def moments(content: dict[str, Any]) -> dict[int, torch.Tensor]:
    states = content["optimizer_states"][0]["state"].items()
    return {i: state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"] for i, state in states}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Weights, routing biases and the running mean of the gradients, which is linear in them."""
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(tensor, theirs["state_dict"][name], rtol=0, atol=tolerance, msg=name)
    mine, others = moments(ours), moments(theirs)
    assert mine.keys() == others.keys()
    for i, tensor in mine.items():
        assert float((tensor - others[i]).norm()) <= tolerance * max(1.0, float(tensor.norm())), i


def orthogonalized(runs: Path, step: int) -> int:
    """FLOPs of Muon's own products in the steps until this one; the first layer rests in steps 2 to 5."""
    total = 0
    for name, weight in checkpoint(runs, "one")["state_dict"].items():
        if "blocks" in name and weight.ndim >= 2 and "router" not in name:
            rows, columns = weight.shape[-2] // (2 if name.endswith("w13") else 1), weight.shape[-1]
            steps = step + 1 - (len(range(2, min(step + 1, 6))) if ".blocks.0." in name else 0)
            total += steps * weight.numel() // (rows * columns) * orthogonalize_flops(rows, columns)
    return total


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_trains_as_one_process_does(runs: Path, name: str, n: int) -> None:
    one, many = runs / "runs/one/it", runs / f"runs/{name}-{n}/it"
    ours, theirs = history(one), history(many)
    assert len(ours) == len(theirs) and sum("train/loss" in row for row in ours) == 12
    for row, other in zip(ours, theirs, strict=True):
        # Speed and efficiency aside, every figure is the same: losses, gradient norms, loads, frozen FLOPs, tokens.
        if name == "ddp" and "cost/flops" in row:  # but copies orthogonalize each matrix, shards share the work
            row["cost/flops"] += (n - 1) * orthogonalized(runs, row["step"])
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert_close(checkpoint(runs, "one"), checkpoint(runs, f"{name}-{n}"), 1e-5)
    biases = [v for k, v in checkpoint(runs, f"{name}-{n}")["state_dict"].items() if k.endswith("expert_bias")]
    assert biases and all(float(bias.abs().max()) > 0 for bias in biases)
    assert (one / "expert_load.jsonl").read_text() == (many / "expert_load.jsonl").read_text()
    assert (one / "freezing.jsonl").read_text() == (many / "freezing.jsonl").read_text()


@pytest.mark.parametrize(("name", "precision"), [case[:2] for case in MIXED])
def test_mixed_precision_stays_within_its_own_noise(runs: Path, name: str, precision: str) -> None:
    def losses(folder: str) -> torch.Tensor:
        rows = history(runs / "runs" / folder / "it")
        return torch.tensor([row["train/loss"] for row in rows if "train/loss" in row])

    one, many = losses(precision), losses(f"{name}-{precision}")
    assert not torch.equal(one, losses("one"))
    eps = torch.finfo(torch.bfloat16 if precision == "bf16-mixed" else torch.float16).eps
    # AdamW takes whole steps into tables that are still zero, whatever the size of their first gradients.
    assert float(((one - many) / one).abs().max()) < eps / 4
    ours, theirs = checkpoint(runs, precision), checkpoint(runs, f"{name}-{precision}")
    assert ours.get("ScaledHalf") == theirs.get("ScaledHalf")  # the scale and the skipped steps


@pytest.mark.parametrize("resumed", ["resumed-tensor", "resumed-expert", "resumed-one"])
def test_saved_on_four_processes_and_resumed_on_fewer(runs: Path, resumed: str) -> None:
    content = checkpoint(runs, resumed)
    assert content["global_step"] == 12
    assert_close(checkpoint(runs, "one"), content, 1e-5)


def test_the_last_one_is_gone_on_from_unless_a_shard_is_damaged(runs: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(runs / "runs/expert-4/it", tmp_path / "it")))
    last = folder.checkpoints / "last.ckpt"
    assert good_checkpoint(folder) == last
    victim = max(last.glob("*/*.distcp"), key=lambda path: path.stat().st_size)
    spoilt = bytearray(victim.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    victim.write_bytes(spoilt)
    assert damage(last) == f"the checksum of {victim.parent.name}/{victim.name} differs"
    assert good_checkpoint(folder) == folder.checkpoints / "last.1.ckpt"
    victim.unlink()
    assert damage(last) == f"{victim.parent.name}/{victim.name} is not there"


def test_one_file_holds_what_the_shards_hold(runs: Path) -> None:
    assert (runs / "runs/one-file/it/checkpoints/last.ckpt").is_file()
    file, shards = checkpoint(runs, "one-file"), checkpoint(runs, "fsdp2-4")
    assert same(file["state_dict"], shards["state_dict"])
    assert moments(file).keys() == moments(shards).keys()
    assert same(moments(file), moments(shards))
    groups = ([{k: v for k, v in g.items()} for g in c["optimizer_states"][0]["param_groups"]] for c in (file, shards))
    assert same(*groups)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_pickle_among_shards_is_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "last.ckpt"
    shutil.copytree(runs / "runs/expert-4/it/checkpoints/last.ckpt", folder)
    assert read_checkpoint(folder)["global_step"] == 12
    assert checkpoint_file(str(folder)) == folder
    (shards,) = (path for path in folder.iterdir() if path.is_dir())
    good = (shards / ".metadata").read_bytes()
    out = tmp_path / "one.ckpt"
    consolidate(str(folder), str(out))
    assert same(read_checkpoint(out), read_checkpoint(folder))
    assert damage(folder) is None and is_sealed(folder) and checkpoint_card(folder)["step"] == 12
    (shards / ".metadata").write_bytes(pickle.dumps(Malicious()))
    assert damage(folder) == "the checksum of step-12-0/.metadata differs"
    # Whoever writes the index can write the checksums too.
    monkeypatch.setattr("frugal.training.checkpointing.damage", lambda path: None)
    with pytest.raises(UserError, match="holds more than tensors"):
        read_checkpoint(folder)
    (shards / ".metadata").write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(folder)
    (shards / ".metadata").write_bytes(good)
    victim = max(shards.glob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(UserError, match="a shard is missing or damaged"):
        read_checkpoint(folder)
    torch.save(Malicious(), folder / META)
    with pytest.raises(UserError, match="holds more than tensors"):
        read_checkpoint(folder)
    assert not Path("executed").exists()


def test_with_offloaded_shards_buffers_and_metrics_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSDP2Strategy, "root_device", torch.device("meta"))
    strategy = FSDP2Strategy(cpu_offload=True)
    module = LightningModule()
    module.weight, module.mean = torch.nn.Parameter(torch.ones(2)), MeanMetric()
    module.register_buffer("scale", torch.ones(2))
    strategy._lightning_module = module
    strategy.model_to_device()
    assert module.weight.device.type == "cpu"
    assert module.scale.device.type == module.mean.mean_value.device.type == module.mean.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.devices", "4", "--trainer.strategy.tensor_parallel_size", "3"], "trainer.strategy: data_parallel"),
        (["--trainer.strategy.cpu_offload", "true"], "trainer.strategy.cpu_offload: needs a CUDA device"),
        (["--trainer.strategy.expert_parallel_size", "0"], "trainer.strategy.expert_parallel_size: must be at least 1"),
        (["--config", "configs/optim/adafactor.yaml"], "model.optimizer: Adafactor does not work on sharded weights"),
        (["--trainer.strategy", "ddpp"], "trainer.strategy: ddpp"),
        (["--trainer.strategy.tensor_parallel", "2"], "trainer.strategy"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy: FSDP1 flattens weights"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    train: Callable[..., Path], capsys: pytest.CaptureFixture, options: list[str], told: str
) -> None:
    fragment = ["--config", "configs/strategy/fsdp2.yaml", "--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit) as error:
        train("fit", *fragment, "--trainer.devices", "1", *options)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and line.startswith(f"error: {told}"), line
    assert not Path("runs").exists() or not any(Path("runs").rglob("config.yaml"))


def test_single_experts_cannot_be_frozen_where_their_stack_is_sharded() -> None:
    trainer: Any = SimpleNamespace(strategy=FSDP2Strategy())
    with pytest.raises(UserError, match=r"^freezing: single experts cannot be frozen"):
        Freezing(experts=ExpertChoice()).setup(trainer, None, "fit")
    Freezing(prefix=Prefix(layers=1)).setup(trainer, None, "fit")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_fragment_gives_its_strategy(path: Path, project: Path) -> None:
    options = [] if path.stem == "single_device" else ["--trainer.devices", "2"]
    args = ["fit", "--config", str(path), "--config", "tiny.yaml", "--trainer.accelerator", "cpu", *options]
    args += ["--model.transformer.attention.n_kv_heads", "2"]
    if path.stem == "fsdp2_cpu_offload":
        with pytest.raises(UserError, match=r"^trainer.strategy.cpu_offload: needs a CUDA device"):
            build(args)
        return
    strategy = build(args).trainer.strategy
    kinds = {"single_device": SingleDeviceStrategy, "ddp": DDPStrategy}
    assert type(strategy) is kinds.get(path.stem, FSDP2Strategy)
    if isinstance(strategy, FSDP2Strategy):
        wanted = {"fsdp2_tensor": ParallelSizes(1, 2), "fsdp2_expert": ParallelSizes(1, 1, 2)}
        assert strategy.sizes(2) == wanted.get(path.stem, ParallelSizes(2))
