"""Predicted memory against what torch allocates on this CPU, byte by byte, in real training steps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, NgramConfig, SharingConfig, TransformerConfig
from frugal.model.parallelize import ParallelSizes, device_mesh, parallelize
from frugal.model.recompute import recompute_blocks
from frugal.model.transformer import Transformer
from frugal.planning.memory import Load, bytes_of, training_memory
from frugal.planning.model_card import read_transformer
from frugal.training.compilation import compile_blocks
from frugal.training.losses import next_token_nll, sum_and_nll
from frugal.training.muon import Muon
from frugal.training.optim import parameter_groups

ROOT = Path(__file__).parents[2]
LATENT = LatentConfig(kv_lora_rank=24, q_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24)
BASE = read_transformer(str(ROOT / "configs/base.yaml"))
BATCH, SEQ = 2, 128


def peak(work: Callable[[], None]) -> int:
    """Most bytes that torch's CPU allocator had handed out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def train(config: TransformerConfig, optimizer: type = torch.optim.AdamW, accumulate: int = 1) -> None:
    """Two steps in Lightning's order: forward, forget the old gradients, backward, step."""
    model = Transformer(config).train()
    options = {torch.optim.AdamW: {"fused": True}, torch.optim.SGD: {"momentum": 0.9}}.get(optimizer, {})
    groups = parameter_groups(model) if optimizer is Muon else model.parameters()
    stepper = optimizer(groups, lr=1e-3, **options)
    ids = torch.randint(0, config.vocab_size, (BATCH, SEQ))
    for micro in range(2 * accumulate):
        loss = sum_and_nll(model.hidden(ids), model.head.weight, ids)[0]
        if micro % accumulate == 0:
            stepper.zero_grad()
        loss.backward()
        del loss
        if (micro + 1) % accumulate == 0:
            stepper.step()


@pytest.mark.parametrize(
    ("changes", "options", "load"),
    [
        ({}, {}, {}),
        ({"moe": None}, {}, {}),
        ({"d_model": 192}, {}, {}),
        ({"attention": AttentionConfig(n_heads=4, latent=LATENT)}, {}, {}),
        ({"attention": AttentionConfig(n_heads=4, qk_norm="head")}, {}, {}),
        ({"sharing": SharingConfig(n_blocks=1, prelude=1)}, {}, {}),
        ({"ngrams": NgramConfig()}, {}, {}),
        ({}, {"accumulate": 2}, {"accumulate": 2}),
        ({}, {"optimizer": torch.optim.SGD}, {"optimizer": "SGD"}),
        ({}, {"optimizer": Muon}, {"optimizer": "Muon"}),
        ({"moe": None}, {"optimizer": Muon}, {"optimizer": "Muon"}),
    ],
    ids=str,
)
def test_training_peak_within_ten_percent(changes: dict, options: dict, load: dict) -> None:
    config = replace(BASE, **changes)
    predicted = training_memory(config, Load(BATCH, SEQ, device="cpu", **load)).training
    assert predicted == pytest.approx(peak(lambda: train(config, **options)), rel=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("changes", [{}, {"moe": None}], ids=str)
def test_what_autograd_keeps_within_ten_percent(changes: dict, compiled: bool, precision: str) -> None:
    config = replace(BASE, n_layers=2, **changes)
    model, kept = Transformer(config), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    if compiled:
        compile_blocks(model)
    ids = torch.randint(0, config.vocab_size, (8, SEQ))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        hidden = model.hidden(ids)
    # Of the end, the plan counts the norm's gradient as well, which is not there yet.
    later = ids.numel() * config.d_model * 2 * 4
    plan = training_memory(config, Load(8, SEQ, device="cpu", precision=precision, compiled=compiled))
    assert plan.activations - later == pytest.approx(sum(kept.values()), rel=0.1) and hidden.requires_grad


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def kept_beside_weights(config: TransformerConfig, shape: tuple[int, int], sharded: bool, recompute: bool) -> int:
    """Bytes that autograd keeps after a forward pass in bf16-mixed, head and all."""
    model = Transformer(config)
    if recompute:
        recompute_blocks(model)
    if sharded:
        parallelize(model, device_mesh(ParallelSizes(1), "cpu"))
        block = model.all_blocks()[0]
        block.register_forward_pre_hook(lambda *_: gathered.append(block.attention.wq.weight.dtype))
    gathered: list[torch.dtype] = []
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # As Lightning has it. What was gathered for a block is empty again once the block is through.
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(torch.randint(0, config.vocab_size, shape))
    assert set(gathered) <= {torch.float32}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for which, storage in kept.items() if which not in weights)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    "changes", [{}, {"moe": None}, {"moe": None, "n_layers": 4, "sharing": SharingConfig(n_blocks=1)}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_16_bit_copies_of_weights_are_kept_whether_or_not_they_are_gathered(
    changes: dict, sharded: bool, alone: None
) -> None:
    config = replace(BASE, **{"n_layers": 2, "vocab_size": 256, **changes})
    plan = training_memory(
        config,
        Load(2, 32, device="cpu", precision="bf16-mixed", strategy="sharded" if sharded else "replicated", devices=8),
    )
    later = 2 * 32 * config.d_model * 2 * 4
    kept = kept_beside_weights(config, (2, 32), sharded, recompute=False)
    assert plan.activations - later == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recomputing_keeps_no_16_bit_copies(sharded: bool, alone: None) -> None:
    strategy = "sharded" if sharded else "replicated"
    load = Load(2, 32, device="cpu", precision="bf16-mixed", checkpointing=True, strategy=strategy, devices=8)
    short, deep = (replace(BASE, n_layers=n) for n in (2, 4))
    kept = [kept_beside_weights(config, (2, 32), sharded, recompute=True) for config in (short, deep)]
    plans = [training_memory(config, load).activations for config in (short, deep)]
    assert plans[1] - plans[0] == pytest.approx(kept[1] - kept[0], rel=0.01)


def test_validation_peak_within_ten_percent() -> None:
    model = Transformer(BASE)

    def evaluate() -> None:
        ids = torch.randint(0, BASE.vocab_size, (8, SEQ))
        with torch.no_grad():
            next_token_nll(model(ids), ids)

    predicted = training_memory(BASE, Load(BATCH, SEQ, eval_batch=8, device="cpu")).validation
    assert predicted == pytest.approx(peak(evaluate), rel=0.1)


def test_state_by_hand() -> None:
    llama = read_transformer(str(ROOT / "configs/model/llama2_7b.yaml"))
    n = 6_738_415_616
    for optimizer, moments in (("AdamW", 2), ("SGD", 1), ("Adafactor", 0)):
        memory = training_memory(llama, Load(1, 4096, precision="bf16-mixed", optimizer=optimizer))
        assert (memory.weights, memory.gradients, memory.optimizer) == (4 * n, 4 * n, 4 * moments * n)
    rows = 2 * 32_000 * 4096 + (2 * 32 + 1) * 4096  # embedding and head; norms
    muon = training_memory(llama, Load(1, 4096, optimizer="Muon"))
    assert muon.optimizer == 4 * (n + rows)
    assert training_memory(llama, Load(1, 4096, precision="bf16-true")).state == 8 * n
    sharded = training_memory(llama, Load(1, 4096, strategy="sharded", devices=8))
    assert sharded.state == pytest.approx(16 * n / 8)
    block = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    assert sharded.gathered == 2 * 4 * block + 4 * 2 * 32_000 * 4096  # two blocks; embedding and head all the time
    mixed = training_memory(llama, Load(1, 4096, precision="bf16-mixed", strategy="sharded", devices=8))
    assert mixed.gathered == sharded.gathered  # in the format in which weights are stored
    half = training_memory(llama, Load(1, 4096, precision="bf16-true", strategy="sharded", devices=8))
    assert half.gathered == sharded.gathered / 2


def test_experts_that_stay_by_hand() -> None:
    """OLMoE's 64 experts: on 64 devices one each; on 128 two devices share one out, and gather it."""
    config = read_transformer(str(ROOT / "configs/model/olmoe_1b_7b.yaml"))
    expert = 3 * 2048 * 1024
    whole, stay, shared = (
        training_memory(config, Load(1, 4096, precision="bf16-mixed", strategy=strategy, devices=devices))
        for strategy, devices in (("sharded", 64), ("expert", 64), ("expert", 128))
    )
    assert whole.gathered - stay.gathered == 4 * 2 * 64 * expert
    assert shared.gathered - stay.gathered == 4 * 2 * expert
    rows = 2 * 2 * 4096 * 8 * 2048
    assert whole.activations - stay.activations == 2 * 16 * 63 * expert - rows  # each keeps copies of its own
    assert shared.activations == stay.activations


def test_recomputing_keeps_one_layer_and_every_layer_s_input() -> None:
    plain = training_memory(BASE, Load(8, 256))
    saving = training_memory(BASE, Load(8, 256, checkpointing=True))
    tokens = 8 * 256
    assert saving.activations < 0.5 * plain.activations and saving.state == plain.state
    deep = replace(BASE, n_layers=BASE.n_layers + 1)
    more = training_memory(deep, Load(8, 256, checkpointing=True))
    assert more.activations - saving.activations == tokens * 4 * BASE.d_model


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(UserError, match="precision: 8-true is not planned for"):
        bytes_of("8-true")
