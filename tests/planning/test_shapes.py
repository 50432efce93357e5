"""Shapes of equal cost: within the budget, of one family, the given one among them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, SharingConfig, TransformerConfig
from frugal.model.transformer import Transformer
from frugal.planning.model_card import read_transformer
from frugal.planning.shapes import Budget, cost, equal_shapes, shape_row

ROOT = Path(__file__).parents[2]


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["params", "active", "flops"]),
    heads=st.sampled_from([(8, None), (8, 2)]),
    latent=st.booleans(),
    moe=st.booleans(),
    shared=st.booleans(),
    factor=st.floats(0.5, 20),
)
def test_every_shape_meets_the_budget(
    kind: str, heads: tuple[int, int | None], latent: bool, moe: bool, shared: bool, factor: float
) -> None:
    attention = AttentionConfig(heads[0], None if latent else heads[1], latent=LatentConfig(64) if latent else None)
    experts = MoEConfig(8, 2, 128, n_shared_experts=1, first_k_dense=1) if moe else None
    sharing = SharingConfig(n_blocks=2, prelude=1, coda=1) if shared else None
    base = TransformerConfig(512, 8, 1024, attention, experts, vocab_size=4096, sharing=sharing)
    budget = Budget(kind, factor * cost(base, kind, 1024))  # type: ignore[arg-type]
    try:
        found = equal_shapes(base, budget, 1024, 0.05)
    except UserError:
        assert factor < 2  # heads come in steps of a quarter of the width, too coarse below the given shape
        return
    for config in found:
        assert abs(cost(config, kind, 1024) / budget.value - 1) <= 0.05  # type: ignore[arg-type]
        assert config.d_model * base.attention.n_heads == base.d_model * config.attention.n_heads
        assert config.attention.n_heads * base.attention.kv_heads == base.attention.n_heads * config.attention.kv_heads
        assert config.vocab_size == base.vocab_size and config.sharing == base.sharing
    depths = [config.n_layers for config in found]
    assert depths == sorted(set(depths)) and min(depths) >= 2 and max(depths) <= 32
    widths = [config.d_model for config in found]
    assert widths == sorted(widths, reverse=True)  # the deeper the narrower


def test_the_given_shape_is_among_its_equals() -> None:
    base = read_transformer(str(ROOT / "configs/base.yaml"))
    for kind in ("params", "active", "flops"):
        found = equal_shapes(base, Budget.parse(kind, base, 256), 256, 0.05)
        assert base in found and len(found) >= 4
    row = shape_row(found[0], Budget("params", 1e6), 256, 2e12, 1000)
    with torch.device("meta"):
        built = Transformer(found[0])
    biases = sum(b.numel() for name, b in built.named_buffers() if name.endswith("expert_bias"))
    assert row["parameters"] == sum(p.numel() for p in built.parameters()) + biases
    assert row["step_seconds"] == row["training_flops_per_token"] * 1000 / 2e12


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("100M", "params", 1e8), ("1.5b", "params", 1.5e9), ("2GFLOP", "flops", 2e9), ("1,000 FLOPs", "flops", 1e3)],
)
def test_budgets_by_name(text: str, kind: str, value: float) -> None:
    base = read_transformer(str(ROOT / "configs/base.yaml"))
    assert Budget.parse(text, base, 256) == Budget(kind, value)  # type: ignore[arg-type]


def test_bad_requests_are_refused() -> None:
    base = read_transformer(str(ROOT / "configs/base.yaml"))
    for text in ("x", "-3M", "0", "1.2.3M", ""):
        with pytest.raises(UserError, match=r"budget: .*100M"):
            Budget.parse(text, base, 256)
    with pytest.raises(UserError, match=r"budget: no shape of this family"):
        equal_shapes(base, Budget("params", 10), 256, 0.05)
    with pytest.raises(UserError, match=r"sharing\.layers fixes the depth"):
        mapped = replace(base, sharing=SharingConfig(layers=(0, 1, 1, 1)))
        equal_shapes(mapped, Budget("params", 1e6), 256, 0.05)


def test_the_verb(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main(["shapes", "configs/experiments/004_layer_sharing.yaml", "--seq_len", "256", "--tolerance", "0.1"])
    table = capsys.readouterr().out
    assert "4*" in table and "h100-80gb, 30% of its bfloat16 peak" in table
    main(["shapes", "configs/base.yaml", "--budget", "flops", "--hardware", "cpu"])
    assert "unknown, cpu has no peak for bfloat16" in capsys.readouterr().out
    main(["shapes", "configs/base.yaml", "--tflops", "0.05", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["budget"]["value"] == 1_326_480 and any(row["off_budget"] == 0 for row in content["shapes"])
    for arguments, message in (
        (["--budget", "x"], "budget: 'x'"),
        (["--mfu", "0"], "mfu"),
        (["--hardware", "abacus"], "error: hardware: no row 'abacus'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["shapes", "configs/base.yaml", *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_the_length_is_the_config_s_own_and_depth_takes_its_time(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def listed(*options: str) -> dict:
        main(["shapes", *options, "--json"])
        return json.loads(capsys.readouterr().out)

    base, preset = read_transformer("configs/base.yaml"), "configs/model/olmoe_1b_7b.yaml"
    content = listed("configs/base.yaml", "--budget", "flops")
    assert content["budget"]["value"] == cost(base, "flops", 256)
    assert listed(preset, "--budget", "flops")["budget"]["value"] == cost(read_transformer(preset), "flops", 4096)
    # So small that launching kernels is all: 25 ms, 2.2 for the dense layer (if any) and 7 for each mixture.
    assert base.moe
    dense = base.moe.first_k_dense
    for row in content["shapes"]:
        assert row["step_seconds"] == pytest.approx(0.025 + 0.0022 * dense + 0.007 * (row["n_layers"] - dense))
    for speed in (["--mfu", "0.3"], ["--tflops", "300"]):  # all overheads are in it
        for row in listed("configs/base.yaml", *speed)["shapes"]:
            assert row["step_seconds"] < 0.01
    main(["shapes", "configs/base.yaml"])
    assert "FLOP/token: at 256 tokens" in capsys.readouterr().out


def test_shapes_need_no_torch() -> None:
    code = (
        "import sys; from frugal.cli.verbs import main; main(['shapes', 'configs/base.yaml']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
