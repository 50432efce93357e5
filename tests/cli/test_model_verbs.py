"""`frugal count` end to end."""

import json
from pathlib import Path

import pytest
import yaml

from frugal.cli.verbs import main

FOLDER = Path(__file__).parent.parent.parent / "configs" / "model"
DEEPSEEK_V3 = 671_026_419_200


def test_count_prints_a_table_and_json(capsys: pytest.CaptureFixture) -> None:
    path = str(FOLDER / "deepseek_v3.yaml")
    main(["count", path])
    table = capsys.readouterr().out
    assert "671,026,419,200" in table and "70,272 bytes" in table and "250.46 GFLOP" in table
    main(["count", path, "--json"])
    card = json.loads(capsys.readouterr().out)
    assert card["parameters"]["total"] == DEEPSEEK_V3
    assert card["state_bytes"]["total"] == 16 * DEEPSEEK_V3 - 12 * 58 * 256  # biases have no gradient
    main(["count", path, "--json", "true", "--seq_len", "1"])
    assert json.loads(capsys.readouterr().out)["flops_per_token"]["seq_len"] == 1


def test_count_reads_a_whole_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    transformer = yaml.safe_load((FOLDER / "llama2_7b.yaml").read_text())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "x", "init_args": {"transformer": transformer}}}))
    main(["count", str(path)])
    assert "6,738,415,616" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "error: shape: no file"),
        ("- 1", "must hold keys, not a list"),
        ("", "holds no transformer"),
        ("{vocab_size: 8, d_model: 8, n_layers: 1, d_ff: 8, attention: {n_heads: 3}}", "transformer.d_model: 8 is no"),
        ("{vocab_size: 8, d_model: 8, n_layers: 1, d_ff: 8, attention: {n_head: 2}}", "n_head"),
        ("{vocab_size: x, d_model: 8, n_layers: 1, d_ff: 8, attention: {n_heads: 2}}", "vocab_size"),
        ("{d_model: 8, n_layers: 1, d_ff: 8, attention: {n_heads: 2}}", "vocab_size"),
        ("{", "is no YAML"),
    ],
)
def test_count_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str | None, expected: str
) -> None:
    path = tmp_path / "shape.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["count", str(path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1, error


def test_a_run_is_counted_at_its_own_length_and_a_shape_at_4096(capsys: pytest.CaptureFixture) -> None:
    lengths = []
    for path, options in (
        ("configs/base.yaml", []),
        ("configs/model/deepseek_v3.yaml", []),
        ("configs/base.yaml", ["9"]),
    ):
        main(
            [
                "count",
                str(Path(__file__).parents[2] / path),
                "--json",
                "true",
                *(["--seq_len", *options] if options else []),
            ]
        )
        lengths.append(json.loads(capsys.readouterr().out)["flops_per_token"]["seq_len"])
    assert lengths == [256, 4096, 9]


def test_an_imported_model_is_counted_at_its_own_length(project: Path, capsys: pytest.CaptureFixture) -> None:
    Path("hf").mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    values = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 256, **sizes}
    Path("hf/config.json").write_text(json.dumps(values))
    main(["import", "hf", "mine.yaml"])
    told = capsys.readouterr().out
    assert "FLOPs per token, forward, 256 tokens" in told and "4,096" not in told
    main(["count", "mine.yaml"])
    assert told.startswith(capsys.readouterr().out.rstrip("\n"))
