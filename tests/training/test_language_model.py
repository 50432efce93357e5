"""The loss is a mean over the step's valid tokens, however the step is cut up."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.schedule import WarmupStableDecay
from frugal.training.language_model import LanguageModel
from frugal.training.optim import build_optimizer, parameter_groups

CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    d_ff=24,
    attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1),
    max_seq_len=12,
    init_std=0.3,
)


class Sequences(pl.LightningDataModule):
    """Eight sequences of which several are partly masked, in micro-batches of a given size."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 32, (8, 12), generator=generator)
        self.labels = torch.randint(0, 32, (8, 12), generator=generator)
        self.labels[1, 3:] = -100
        self.labels[2, :] = -100
        self.labels[6, 8:] = -100
        self.micro_batch = micro_batch
        self.token_bytes = torch.ones(32, dtype=torch.int64)

    def train_dataloader(self) -> DataLoader:
        pairs = zip(self.ids.split(self.micro_batch), self.labels.split(self.micro_batch), strict=True)
        return DataLoader([{"input_ids": ids, "labels": labels} for ids, labels in pairs], batch_size=None)  # type: ignore


class Spy(pl.Callback):
    """Keep the gradients that the optimizer is about to use, and the experts' loads of the step."""

    grads: dict[str, Tensor]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.load = module.model.moe_layers()[1].load.clone()


def one_step(micro_batch: int, accumulate: int, config: TransformerConfig = CONFIG) -> tuple[LanguageModel, Spy, float]:
    torch.manual_seed(0)
    module = LanguageModel(config, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    module.train()
    spy = Spy()
    trainer = pl.Trainer(
        max_steps=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[spy],
        log_every_n_steps=1,
    )
    grads = {}

    def keep(optimizer: Any, *args: Any) -> None:
        grads.update({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    original = module.configure_gradient_clipping
    module.configure_gradient_clipping = lambda *a, **k: (keep(a[0]), original(*a, **k))[1]  # type: ignore
    trainer.fit(module, datamodule=Sequences(micro_batch))
    spy.grads = grads
    return module, spy, float(trainer.callback_metrics["train/loss"])


def plain_gradients() -> tuple[dict[str, Tensor], float]:
    """The oracle: one mean over all valid tokens in plain PyTorch."""
    torch.manual_seed(0)
    module = LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    data = Sequences(8)
    loss = F.cross_entropy(module(data.ids).flatten(0, 1), data.labels.flatten(), ignore_index=-100)
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(8, 1), (1, 8), (2, 4), (4, 2)])
def test_accumulation_does_not_change_the_gradients(micro_batch: int, accumulate: int) -> None:
    expected, expected_loss = plain_gradients()
    module, spy, loss = one_step(micro_batch, accumulate)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert spy.grads.keys() == expected.keys()
    for name, grad in spy.grads.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert spy.load.sum() == 8 * 12 * 2  # every position of every micro-batch, top_k times
    assert module.model is not None and module.model.moe_layers()[1].load.sum() == 0  # cleared after the step


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(8, 1), (1, 8), (2, 4)])
def test_router_losses_are_per_position_however_the_step_is_cut_up(micro_batch: int, accumulate: int) -> None:
    assert CONFIG.moe
    config = replace(CONFIG, moe=replace(CONFIG.moe, sequence_loss_coef=0.3, z_loss_coef=0.1))
    torch.manual_seed(0)
    module = LanguageModel(config, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    module.train()
    assert module.model is not None
    data = Sequences(8)
    nats = F.cross_entropy(module(data.ids).flatten(0, 1), data.labels.flatten(), ignore_index=-100, reduction="sum")
    router_loss = module.model.take_router_loss()
    assert router_loss is not None and module.model.take_router_loss() is None
    ((nats + router_loss * data.labels.numel()) / (data.labels != -100).sum()).backward()
    _, spy, loss = one_step(micro_batch, accumulate, config)
    assert loss == pytest.approx(nats.item() / (data.labels != -100).sum().item(), abs=1e-5)  # train/loss is the text's
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(spy.grads[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)
    plain, _ = plain_gradients()
    assert (
        spy.grads["model.blocks.1.ffn.router.weight"] - plain["model.blocks.1.ffn.router.weight"]
    ).abs().max() > 1e-3


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(8, 1), (1, 8), (4, 2)])
def test_multi_token_prediction_is_weighed_as_in_the_paper(micro_batch: int, accumulate: int) -> None:
    """DeepSeek-V3, eq. 24 and 25: each module's sum over the number of all tokens, times lambda / D."""
    config = replace(CONFIG, n_mtp=2)
    torch.manual_seed(0)
    module = LanguageModel(config, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    module.train()
    model, data = module.model, Sequences(8)
    assert model is not None
    valid = (data.labels != -100).sum()
    hidden = model.hidden(data.ids)
    main = F.cross_entropy(model.head(hidden).flatten(0, 1), data.labels.flatten(), ignore_index=-100)
    total = main
    for k, ahead in enumerate(model.mtp_hidden(hidden, data.ids), start=1):
        logits = model.head(ahead)
        nats = sum(
            -logits[b, i].log_softmax(dim=-1)[data.labels[b, i + k]]
            for b in range(8)
            for i in range(12 - k)
            if data.labels[b, i + k] != -100
        )
        total = total + 0.3 / 2 * nats / valid
    total.backward()
    trained, spy, loss = one_step(micro_batch, accumulate, config)
    assert loss == pytest.approx(main.item(), abs=1e-5)  # train/loss is the main model's
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(spy.grads[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)
    assert spy.grads["model.mtp.1.proj.weight"].abs().max() > 0
    assert trained.trainer.callback_metrics["train/mtp_loss_2"] > 1


def test_the_balance_loss_of_the_step_counts_earlier_micro_batches() -> None:
    assert CONFIG.moe
    config = replace(CONFIG, moe=replace(CONFIG.moe, global_loss_coef=1.0))
    torch.manual_seed(0)
    module = LanguageModel(config, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    module.train()
    assert module.model is not None
    data = Sequences(4)
    moe = module.model.moe_layers()[1]
    losses = []
    for ids in data.ids.split(4):
        hidden: list[Tensor] = []
        handle = moe.register_forward_pre_hook(lambda _, args, seen=hidden: seen.append(args[0].flatten(0, 1)))
        module(ids)
        handle.remove()
        share = moe.router.logits(hidden[0]).sigmoid()
        share = (share / share.sum(dim=1, keepdim=True)).mean(dim=0)
        losses.append(module.model.take_router_loss())
        # Every position uses two experts, so the fractions so far are the loads over twice the positions so far.
        expected = 4 * (moe.load / (2 * 12 * 4 * len(losses)) * share).sum()
        torch.testing.assert_close(losses[-1], expected)
    assert moe.load.sum() == 2 * 12 * 8


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    module = LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    groups = parameter_groups(module)
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in module.parameters())
    assert all((p.ndim < 2) == (group.get("weight_decay") == 0) for group in groups for p in group["params"])


def test_a_checkpoint_of_another_shape_names_the_keys() -> None:
    module = LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    del checkpoint["transformer"]["norm_eps"]  # as if the key had not existed yet
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="unheard_of is 1 in the checkpoint, None in the config"):
        module.on_load_checkpoint({"transformer": {**checkpoint["transformer"], "unheard_of": 1}})
    checkpoint["transformer"]["d_model"] = 32
    checkpoint["transformer"]["moe"]["top_k"] = 1
    with pytest.raises(UserError, match=r"d_model is 32 in the checkpoint, 16 .*moe\.top_k is 1"):
        module.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="no frugal"):
        module.on_load_checkpoint({})


def test_clipping_limits_the_norm_or_each_value() -> None:
    module = LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    parameters = list(module.parameters())

    def norm() -> float:
        return torch.cat([p.grad.flatten() for p in parameters]).norm().item()

    for p in parameters:
        p.grad = torch.ones_like(p)
    module.configure_gradient_clipping(optimizer, 0.5)
    assert norm() == pytest.approx(0.5, rel=1e-4)
    for p in parameters:
        p.grad = torch.full_like(p, 3.0)
    module.configure_gradient_clipping(optimizer, 0.5, "value")
    assert all(p.grad.max() == 0.5 for p in parameters)
    before = norm()
    module.configure_gradient_clipping(optimizer, None)
    assert norm() == before


def test_the_optimizer_gets_what_the_config_says() -> None:
    module = LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay())
    module.configure_model()
    config = partial(torch.optim.AdamW, lr=0.3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    groups = build_optimizer(config, parameter_groups(module)).param_groups
    for group in groups:
        decay = 0.0 if group["name"] == "vectors" else 0.7
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.6), 1e-3, decay)


def test_ngrams_can_be_added_to_a_trained_model_and_not_taken_away(
    train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    """They begin at zero, so the first loss is that of the model without them; less is another shape."""
    base = str(train("fit", "--run.name", "base", "--trainer.max_steps", "4"))
    onward = ("fit", "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", "--model.init_from")
    ngrams = ("--model.transformer.ngrams", '{"n_slots": 16, "n_hashes": 2}')
    plain = train(*onward, base, "--run.name", "plain")
    more = train(*onward, base, "--run.name", "more", *ngrams)
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["train/loss"] for run in (plain, more)]
    assert first[0] == first[1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(*onward, str(more), "--run.name", "less")
    assert "model.transformer.ngrams" in capsys.readouterr().err
