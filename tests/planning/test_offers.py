"""Plans against published arithmetic and by hand."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.cli.plan import _plain
from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.model.config import flops_per_token, muon_flops
from frugal.planning.audit import audit
from frugal.planning.calibration import Calibration, calibrate, recall, remember
from frugal.planning.hardware import load_hardware
from frugal.planning.offers import Offer, make_offer, marks
from frugal.planning.run_config import read_run

ROOT = Path(__file__).parents[2]
TABLE = str(ROOT / "configs/hardware.yaml")
ENOUGH = ("--trainer.max_steps", "50", "--trainer.val_check_interval", "25")  # for a calibration
OWN = "is one of the runs of the calibration: its time, energy and price are no predictions"
ROWS = {row.name: row for row in load_hardware(TABLE)}


def test_deepseek_v3_as_published() -> None:
    """DeepSeek-V3 (arXiv 2412.19437, table 1): 180K H800 hours per trillion tokens, 2,664K for 14.8T, $5.576M in all.

    The MFU of 39.1% counts causal attention once (Zhao et al. 2025, arXiv 2505.09343, table 4).
    """
    path = str(ROOT / "configs/model/deepseek_v3.yaml")

    def hours_and_dollars(tokens: float, extra: float = 0.0) -> tuple[float, float]:
        offer = make_offer(read_run(path, tokens), ROWS["h800"], 2048, mfu=0.391, extra_hours=extra)
        assert offer.seconds and offer.dollars
        return offer.seconds * 2048 / 3600, offer.dollars

    assert hours_and_dollars(1e12)[0] == pytest.approx(180e3, rel=1e-3)
    hours, dollars = hours_and_dollars(14.8e12)
    assert hours == pytest.approx(2664e3, rel=1e-3) and dollars == pytest.approx(5.328e6, rel=1e-3)
    hours, dollars = hours_and_dollars(14.8e12, extra=119e3 + 5e3)
    assert hours == pytest.approx(2788e3, rel=1e-3) and dollars == pytest.approx(5.576e6, rel=1e-3)


def test_the_default_run_counts_as_the_meter_counted_it(project: Path) -> None:
    run = read_run("configs/base.yaml")
    assert (run.steps, run.tokens, run.validations, run.optimizer) == (2800, 5_734_400, 8, "Muon")
    assert run.flops == pytest.approx(28.05e12, rel=1e-3)  # as on the card in the README
    tiny = read_run("tiny.yaml")  # which leaves `init_args` out
    assert (tiny.steps, tiny.seq_len, tiny.model.vocab_size, tiny.model.d_model) == (12, 16, 300, 16)
    short = read_run("configs/experiments/021_short_first.yaml")
    stages = ((350, 64), (350, 128), (700, 256))  # as many tokens per step throughout
    assert short.lengths == ((0, 64), (350, 128), (700, 256)) and short.tokens == 1400 * 2048
    passes = sum(n * 2048 * flops_per_token(run.model, length).training for n, length in stages)
    assert short.flops == passes + 1400 * muon_flops(run.model)
    adamw = read_run(
        "configs/experiments/006_adamw.yaml+configs/experiments/021_short_first.yaml"
    )  # the second upon the first
    assert (adamw.steps, adamw.tokens, adamw.optimizer, adamw.eval_batch) == (1400, 1400 * 1024, "AdamW", 16)


def test_an_experiment_with_its_own_shape_lies_on_the_base_and_a_whole_config_does_not(project: Path) -> None:
    base = read_run("configs/base.yaml")
    shape = "{d_model: 64, n_layers: 2, d_ff: 128, attention: {n_heads: 4}}"
    Path("own.yaml").write_text(
        f"model: {{transformer: {shape}}}\ntrainer: {{max_steps: 10}}\ndata: {{batch_size: 4}}\n"
    )
    own = read_run("own.yaml")
    assert (own.optimizer, own.seq_len, own.steps, own.tokens_per_step) == ("Muon", 256, 10, 1024)
    assert own.model.moe == base.model.moe and own.model.d_model == 64 and own.model.vocab_size == 2048
    Path("wide.yaml").write_text("model: {transformer: {d_model: 128}}\n")
    assert read_run("wide.yaml") == replace(base, model=replace(base.model, d_model=128))
    Path("muon.yaml").write_text("model: {optimizer: {ns_steps: 3}}\n")
    assert read_run("muon.yaml").optimizer_flops * 5 == base.optimizer_flops * 3
    Path("two.yaml").write_text("trainer: {devices: '2'}\n")
    assert read_run("two.yaml").tokens_per_step == 2 * base.tokens_per_step
    by_index = (("[0, 1, 2]", 3), ("'[0, 1, 2]'", 3), ("'0,1,'", 2), ("[5]", 1))
    for devices, count in (*by_index, ("'4'", 4), ("auto", 0.5), ("'-1'", 0.5), ("-1", 0.5)):  # auto: 1 of all nodes
        Path("some.yaml").write_text(f"trainer: {{num_nodes: 2, devices: {devices}}}\n")
        assert read_run("some.yaml").tokens_per_step == 2 * count * base.tokens_per_step, devices
    assert read_run("some.yaml", processes=6).tokens_per_step == 6 * base.tokens_per_step
    tensor = read_run(str(ROOT / "configs/strategy/fsdp2_tensor.yaml"), processes=8)  # pairs that share a batch
    assert tensor.tokens_per_step == 4 * base.tokens_per_step and tensor.sharded
    assert tensor.left_out == ("tensor parallelism (memory and time are those without)",)
    Path("lora.yaml").write_text("model: {lora: {rank: 4}}\n")
    lora = read_run("lora.yaml")
    assert lora.optimizer_flops == 0
    assert lora.left_out == ("low-rank adapters (the base counts as if it trained: the plan is an upper bound)",)
    Path("named.yaml").write_text("model: {optimizer: torch.optim.AdamW}\n")
    assert read_run("named.yaml") == replace(base, optimizer="AdamW")
    shape = f"{shape[:-1]}, vocab_size: 300, max_seq_len: 16}}"
    whole = f"model: {{class_path: LanguageModel, init_args: {{transformer: {shape}}}}}\nseed_everything: 1\n"
    Path("whole.yaml").write_text(whole + "trainer: {max_steps: 10, max_epochs: -1}\n")
    assert read_run("whole.yaml").model.moe is None and read_run("whole.yaml").optimizer == "AdamW"


def test_measured_speed_by_hand() -> None:
    run = read_run(str(ROOT / "configs/base.yaml"))
    known = Calibration("cpu", "32-true", 25e9, 1000.0, 12.0, ("a",))
    offer = make_offer(run, ROWS["cpu"], 2, calibrations=[known])
    forward = flops_per_token(run.model, run.seq_len).forward
    assert offer.seconds == pytest.approx((run.flops + 8 * 1000 * forward) / 50e9 + 12)
    assert offer.dollars == pytest.approx(offer.seconds * 2 * 0.05 / 3600) and offer.basis == "measured"
    assert offer.joules == pytest.approx(offer.seconds * 2 * 10)
    assert make_offer(replace(run, precision="bf16-mixed"), ROWS["t4"]).seconds is None  # it has no bfloat16
    assert make_offer(run, ROWS["h100-80gb"]).basis == "kernel launches, assumed"  # far too small for it


def test_tensorfloat32_is_planned_by_its_own_peak() -> None:
    run = replace(read_run(str(ROOT / "configs/model/llama2_7b.yaml"), 1e9), precision="32-true")
    exact, tf32 = (make_offer(replace(run, precision=p), ROWS["h100-80gb"], 8) for p in ("32-true", "tf32"))
    assert exact.seconds and tf32.seconds and exact.seconds / tf32.seconds == pytest.approx(494 / 67, rel=5e-3)
    assert exact.memory == tf32.memory
    assert make_offer(replace(run, precision="tf32"), ROWS["t4"]).seconds is None  # it has none


def test_a_model_too_large_for_one_device_is_sharded() -> None:
    run = read_run(str(ROOT / "configs/model/llama2_7b.yaml"), 1e9)
    one, many = (make_offer(run, ROWS["a100-80gb"], n) for n in (1, 8))
    assert not one.fits and one.strategy == "replicated"
    assert many.fits and many.strategy == "sharded"


def test_what_devices_send_by_hand() -> None:
    run = read_run(str(ROOT / "configs/model/llama2_7b.yaml"), 1e9)
    n, rounds = 6_738_415_616, 2**22 // (4096 * 8)  # a step's micro-batches on each of 8 devices
    row = replace(ROWS["a100-80gb"], link_gb_s=1.0)  # so slow that weights and gradients set the time
    offer = make_offer(run, row, 8)
    sent = (2 * rounds + 1) * 7 / 8 * n * 4  # gathered in float32 for each pass, summed once
    assert offer.strategy == "sharded" and offer.sent_bytes == sent
    assert offer.seconds == pytest.approx(run.steps * sent / 1e9 + 20) and offer.basis == "links at full speed"
    fast = make_offer(run, replace(row, link_gb_s=1e9), 8)
    assert fast.basis == "MFU 30% assumed" and fast.seconds and fast.seconds < offer.seconds
    assert make_offer(run, replace(row, link_gb_s=None), 8).seconds == fast.seconds
    assert make_offer(run, replace(row, network_gb_s=2.0), 16).seconds < offer.seconds  # beyond one machine
    assert make_offer(run, row, 8, mfu=0.3).seconds == make_offer(run, replace(row, link_gb_s=0.1), 8, mfu=0.3).seconds
    # Muon exchanges matrices, which a device waits for, and shares the work; copies would all do all of it.
    muon = make_offer(replace(run, optimizer="Muon"), row, 8)
    matrices = n - 2 * 32_000 * 4096 - 65 * 4096
    assert muon.sent_bytes == sent + 2 * 7 / 8 * matrices / 8 * 4
    known = [Calibration("t4", "32-true", 1e9, 0.0, 0.0, ("a",))]
    small = replace(read_run(str(ROOT / "configs/base.yaml")), optimizer="Muon")
    plain = replace(small, optimizer="AdamW")
    for count in (1, 4):
        t4 = replace(ROWS["t4"], link_gb_s=1e9)
        seconds = [make_offer(which, t4, count, calibrations=known).seconds for which in (small, plain)]
        assert seconds[0] - seconds[1] == pytest.approx(small.steps * small.optimizer_flops / 1e9 / count, rel=1e-4)


def test_marks() -> None:
    def offer(seconds: float | None, dollars: float | None, fits: bool = True, basis: str = "") -> Offer:
        memory = make_offer(read_run(str(ROOT / "configs/base.yaml")), ROWS["cpu"]).memory
        return Offer("x", 1, "replicated", False, memory, 1e12 if fits else 0.0, seconds, dollars, 1.0, basis)

    rows = [offer(10, 5), offer(100, 1), offer(50, 2), offer(60, 3), offer(1, 1, fits=False), offer(None, None)]
    assert marks(rows) == ["fastest", "cheapest", "Pareto", "", "", ""]
    assert marks(rows[:1]) == ["cheapest, fastest"] and marks(rows[4:]) == ["", ""]
    tie = [offer(10.0, 5), offer(10.1, 4), offer(9.99, 6), offer(100, 1)]
    assert marks(tie) == ["", "fastest", "", "cheapest"]  # not the dearer ones that are as fast
    bound = offer(1, 1, basis="MFU 30% assumed; links unknown")
    assert marks([bound, *rows[:2]]) == ["", "fastest", "cheapest"] and marks([bound]) == ["cheapest, fastest"]


def test_figures_are_written_out(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert [_plain(v) for v in (0.0, 5.576e6, 15123.4, 999.96, 12.3456, 0.0430617)] == [
        "0", "5,576,000", "15,123", "1,000.0", "12.35", "0.04306"
    ]  # fmt: skip
    known = ["--tokens", "14.8T", "--devices", "2048", "--hardware", "h800", "--mfu", "0.391"]
    main(["plan", "configs/model/deepseek_v3.yaml", *known])
    out = capsys.readouterr().out
    assert re.search(r" 2,66\d,\d{3} +\$5,3\d\d,\d{3} ", out) and "e+0" not in out
    assert "fastest: the cheapest of all within 2% of the least time" in out


def test_plan_calibrate_and_audit(train: object, capsys: pytest.CaptureFixture) -> None:
    folder = train("fit", *ENOUGH)  # type: ignore[operator]
    capsys.readouterr()
    main(["plan", "--calibrate", str(folder)])
    told = capsys.readouterr().out
    assert "GFLOP/s per core by runs/base" in told and ".cache/calibration.json; delete it to forget" in told
    summary = json.loads((folder / "summary.json").read_text())
    (known,) = recall()
    assert known == calibrate([str(folder)])[0] and known.hardware == "cpu"
    main(["plan", "--audit", str(folder), "--json"])
    out, err = capsys.readouterr()
    rows = {row["quantity"]: row for row in json.loads(out)}
    assert err == f"audit: {folder} {OWN}\n"
    assert rows["FLOPs"]["predicted"] == pytest.approx(summary["flops"], rel=1e-9)
    assumed = {row["quantity"]: row["predicted"] for row in audit(str(folder), [])}  # without a calibration
    assert assumed["training time"] == pytest.approx(assumed["wall time"] - 15)  # validation at no known size
    # Of two copies of the weights each orthogonalizes every matrix; sharded weights are shared work.
    config, run = (folder / "config.yaml").read_text(), read_run(str(folder / "config.yaml"))
    (folder / "summary.json").write_text(json.dumps(summary | {"devices": 2}))
    for strategy, times in (("ddp", 1), ("{class_path: frugal.training.strategies.FSDP2Strategy}", 0)):
        (folder / "config.yaml").write_text(config.replace("  strategy: auto\n", f"  strategy: {strategy}\n"))
        row = audit(str(folder), [known])[0]
        more = times * summary["global_step"] * run.optimizer_flops
        assert run.optimizer_flops > 0 and row["predicted"] == pytest.approx(summary["flops"] + more, rel=1e-9)
    # Where a config leaves the number of devices to the machine, the receipt has it.
    (folder / "config.yaml").write_text(re.sub("  devices: .*", "  devices: auto", config))
    row = audit(str(folder), [known])[0]
    assert row["predicted"] == pytest.approx(2 * summary["flops"], rel=1e-9)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(config)
    # A plan calibrated by the very run gives its own figures back.
    assert rows["training time"]["predicted"] == pytest.approx(rows["training time"]["actual"], rel=1e-6)
    assert rows["wall time"]["predicted"] <= rows["wall time"]["actual"] * 1.000001
    main(["plan", str(folder / "config.yaml"), "--devices", "1", "8", "--hardware", "cpu", "t4", "--png", "plan.png"])
    out = capsys.readouterr().out
    assert "measured" in out and "cheapest" in out and Path("plan.png").read_bytes().startswith(b"\x89PNG")
    main(["plan", "--audit", str(folder)])
    told = capsys.readouterr().out
    assert "planned with calibration" in told and told.endswith(f"audit: {folder} {OWN}\n")
    remember([replace(known, runs=(str(folder.with_name("another")),))])
    main(["plan", "--audit", str(folder)])
    assert OWN not in capsys.readouterr().out


def test_unfinished_and_short_runs_are_left_out_of_a_calibration(
    train: object, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    short = train("fit")  # type: ignore[operator]
    stopped, long, eight = (short.with_name(name) for name in ("stopped", "long", "eight"))
    stopped.mkdir()
    shutil.copytree(short, long)
    shutil.copytree(short, eight)
    config = eight / "config.yaml"
    config.write_text(re.sub("fp8: null", "fp8: {recipe: tensorwise}", config.read_text()))
    assert read_run(str(config)).left_out == ("fp8 (planned as 32-true)",)
    for folder, steps in ((short, 49), (long, 50), (eight, 50)):
        summary = json.loads((folder / "summary.json").read_text()) | {"global_step": steps}
        (folder / "summary.json").write_text(json.dumps(summary))
    left_out = (
        f"left out: {stopped} (no summary.json; it is written when a run ends), {short} (49 steps), {eight} (model.fp8)"
    )
    main(["plan", "--calibrate", str(stopped), str(short), str(eight), str(long)])
    (known,) = recall()
    assert known.runs == (str(long),)
    (note,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert note == f"calibrate: needed are 50 steps of a finished run; {left_out}"
    Path(".cache/calibration.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["plan", "--calibrate", str(stopped), str(short), str(eight)])
    told = f"calibrate: no run to measure by: needed are 50 steps of a finished run; {left_out}"
    assert capsys.readouterr().err == f"error: {told}\n" and recall() == []


def test_bad_requests_are_one_line(project: Path, capsys: pytest.CaptureFixture) -> None:
    Path("half.yaml").write_text("model: {tf32: true}\ntrainer: {precision: bf16-mixed, max_steps: 10}\n")
    for arguments, message in (
        ([], "experiment: name an experiment"),
        (["configs/base.yaml+nothing.yaml"], "experiment: no file nothing.yaml"),
        (["configs/model/deepseek_v3.yaml"], "tokens: configs/model/deepseek_v3.yaml is a shape without a run"),
        (["configs/base.yaml", "--tokens", "many"], "tokens: 'many' is no number"),
        (["configs/base.yaml", "--tokens", "1e400"], "tokens: '1e400' is no number"),
        (["configs/base.yaml", "--tokens", "100"], "tokens: 100 are less than a step of configs/base.yaml, 2048;"),
        (["configs/base.yaml", "--seq_len", "0"], "seq_len: must be positive, got 0"),
        (["configs/base.yaml", "--png", "no/x.png"], "png: cannot write no/x.png (No such file or directory)"),
        (["configs/base.yaml", "--png", "x.doc"], "png: x.doc must end in .png, .svg or .pdf"),
        (["configs/base.yaml", "--mfu", "3"], "mfu: must lie between 0 and 1"),
        (["half.yaml"], "model.tf32: trainer.precision bf16-mixed leaves no products in float32"),
        (["configs/base.yaml", "--precision", "8-true"], "precision: 8-true is not planned for"),
        (["configs/base.yaml", "--hardware", "abacus"], "error: hardware: no row 'abacus'"),
        (["configs/studies/quick.yaml"], "experiment: configs/studies/quick.yaml is a savings study"),
        (["--audit", "nowhere"], "audit: no summary.json in nowhere"),
        (["--calibrate", "nowhere"], "calibrate: no folder nowhere"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *arguments])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    remember([Calibration("cpu", "32-true", 1.0, 1.0, 1.0, ("a",))], file)
    remember([Calibration("cpu", "32-true", 2.0, 1.0, 1.0, ("b",)), Calibration("t4", "x", 1.0, 1.0, 1.0, ())], file)
    assert [(c.hardware, c.flops_per_second) for c in recall(file)] == [("cpu", 2.0), ("t4", 1.0)]
    file.write_text("{")
    with pytest.raises(UserError, match="delete it"):
        recall(file)


def test_plans_need_no_torch() -> None:
    code = (
        "import sys; from frugal.cli.verbs import main; main(['plan', 'configs/base.yaml']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_recomputation_takes_its_time_measured_or_assumed() -> None:
    """A forward pass more: a third of the FLOPs, whatever the speed rests on; an MFU that is given has it in it."""
    run = replace(read_run(str(ROOT / "configs/model/llama2_7b.yaml"), 1e9), recompute=True)
    row = replace(ROWS["a100-80gb"], link_gb_s=1e9)
    known = [Calibration("a100-80gb", "bf16-mixed", 1e14, 0.0, 0.0, ("a",))]
    flops = flops_per_token(run.model, run.seq_len)
    for options, times in ((known, 1 + flops.forward / flops.training), ((), 1 + flops.forward / flops.training)):
        plain, again = (
            make_offer(replace(run, recompute=r), row, 8, calibrations=options, as_configured=True)
            for r in (False, True)
        )
        assert again.checkpointing and not plain.checkpointing and again.seconds and plain.seconds
        assert again.seconds / plain.seconds == pytest.approx(times, rel=2e-3)
    given = {make_offer(replace(run, recompute=r), row, 8, mfu=0.4, as_configured=True).seconds for r in (False, True)}
    assert len(given) == 1


def test_a_run_is_audited_by_the_strategy_that_it_had() -> None:
    run = replace(read_run(str(ROOT / "configs/base.yaml")), tokens_per_step=8 * 2048)
    for sharded, apart, strategy in ((False, False, "replicated"), (True, False, "sharded"), (True, True, "expert")):
        had = replace(run, sharded=sharded, experts_apart=apart)
        assert make_offer(had, ROWS["h100-80gb"], 8, as_configured=True).strategy == strategy
        assert make_offer(had, ROWS["h100-80gb"], 1, as_configured=True).strategy == "replicated"
    assert read_run(str(ROOT / "configs/strategy/fsdp2_expert.yaml")).experts_apart
    assert not read_run(str(ROOT / "configs/strategy/fsdp2.yaml")).experts_apart


def test_devices_share_the_micro_batches_of_a_step_before_they_split_one() -> None:
    base = read_run(str(ROOT / "configs/base.yaml"))
    step = replace(base, tokens_per_step=8 * base.tokens_per_step)
    for devices in (1, 2, 8):
        few, many = (make_offer(replace(step, accumulate=n), ROWS["h100-80gb"], devices) for n in (1, 8))
        assert few == many
    eight = make_offer(replace(step, accumulate=8), ROWS["h100-80gb"], 8)  # as long as the base takes on one
    assert eight.seconds and eight.seconds < 1.1 * (make_offer(base, ROWS["h100-80gb"]).seconds or 0.0)


def test_experts_are_offered_places_only_where_they_divide() -> None:
    run = read_run(str(ROOT / "configs/model/deepseek_v3.yaml"), 1e12)
    odd, even = (make_offer(run, ROWS["h800"], n) for n in (257, 256))
    assert odd.strategy == "sharded" and even.strategy == "expert"


def test_devices_beyond_the_sequences_of_a_step_do_nothing() -> None:
    run = replace(read_run(str(ROOT / "configs/model/llama2_7b.yaml"), 1e9), tokens_per_step=4 * 4096, steps=100)
    row = replace(ROWS["a100-80gb"], link_gb_s=None)
    four, eight = (make_offer(run, row, n) for n in (4, 8))
    assert eight.basis == f"{four.basis}; 4 sequences a step" and four.seconds and eight.seconds and eight.dollars
    assert eight.seconds >= 0.98 * four.seconds and eight.dollars >= 1.9 * (four.dollars or 0.0)


def test_a_small_model_waits_for_its_host_and_not_for_its_gpu() -> None:
    """As measured on an H200: the default run takes 52 ms a step there, 38 of them for launching kernels."""
    run = read_run(str(ROOT / "configs/base.yaml"))
    offer = make_offer(run, ROWS["h200-141gb"])
    assert offer.basis == "kernel launches, assumed"
    assert (offer.seconds or 0.0) / run.steps == pytest.approx(0.052 + 20 / run.steps, rel=0.15)
    compiled = make_offer(replace(run, compiled=True), ROWS["h200-141gb"])
    assert ((compiled.seconds or 0.0) - 45) / run.steps == pytest.approx(0.035, rel=0.15)  # by six runs at a time


def test_a_run_of_several_threads_is_timed_by_the_clock(train: object) -> None:
    folder = train("fit")  # type: ignore[operator]
    file = folder / "summary.json"
    summary = json.loads(file.read_text()) | {"train_cpu_seconds": 1e-3, "global_step": 50}
    speeds = []
    for threads, recompute in ((1, False), (2, False), (2, True)):
        file.write_text(json.dumps(summary | {"threads": threads}))
        config = folder / "config.yaml"
        if recompute:
            config.write_text(
                config.read_text().replace("activation_checkpointing: false", "activation_checkpointing: true")
            )
        speeds.append(calibrate([str(folder)])[0].flops_per_second)
    assert speeds[0] > 5 * speeds[1]
    assert speeds[2] == pytest.approx(speeds[1] * 4 / 3, rel=1e-6)  # what it computed in the same time


@pytest.mark.parametrize(
    "content",
    ['{"seconds_by_part"', "[]", "null", "[1]", '{"seconds_by_part": null}', '{"seconds_by_part": {}}', "flops"],
)
@pytest.mark.parametrize("verb", ["--audit", "--calibrate"])
def test_a_damaged_receipt_is_named_in_one_line(
    train: object, content: str, verb: str, capsys: pytest.CaptureFixture
) -> None:
    folder = train("fit")  # type: ignore[operator]
    file = folder / "summary.json"
    if content == "flops":
        summary = json.loads(file.read_text())
        content = json.dumps({key: value for key, value in summary.items() if key != "flops"})
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", verb, str(folder)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "summary.json" in error
