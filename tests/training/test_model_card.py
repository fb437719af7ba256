"""The card in a saved model: a header that the Hub takes, and a command that gives the same configuration."""

import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gcrm_fast.train import main
from gcrm_fast.training.config import TrainConfig, parse
from gcrm_fast.training.model_card import command, model_card

DATA = [("training pairs", "3 (0 dropped)")]
RESULTS = [("held-out AUROC", "0.500 -> 0.800")]
METRICS = {"eval/accuracy": 0.76543, "eval/auroc": 0.8, "eval/loss/ranking": 0.6}


def card(config: TrainConfig, metrics: dict[str, float] = METRICS) -> ModelCard:
    found = ModelCard(model_card(config, DATA, RESULTS, metrics, 1))
    assert "| training pairs | 3 (0 dropped) |" in found.text
    assert "| held-out AUROC | 0.500 -> 0.800 |" in found.text
    return found


def test_header_of_a_model_from_the_hub() -> None:
    config = TrainConfig(model="some/llama", data=("owner/pairs/main:train", "owner/pairs:test"), output="runs/x")
    data = card(config).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "text-classification",
        "some/llama",
    )
    assert data.datasets == ["owner/pairs"]
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.7654), ("roc_auc", 0.8)]


def test_header_of_a_model_from_files(tmp_path: Path) -> None:
    for name in ("pairs.jsonl", "saved"):
        (tmp_path / name).mkdir()
    config = TrainConfig(model=str(tmp_path), data=(str(tmp_path / "pairs.jsonl"), f"{tmp_path / 'saved'}:train"))
    data = card(config, {}).data
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert card(TrainConfig()).data.datasets is None  # generated


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--steps", "7", "--eval-by", "steps", "--head", "mlp", "--output", "runs/a name"],
        ["--hidden-size", "128", "--data", "arithmetic"],  # the default without the preset
        ["--preset", "hh", "--data", "a.jsonl", "b.jsonl", "--allow-overlap", "--lr", "1e-5", "--clip", "0.5"],
    ],
)
def test_the_command_gives_the_same_configuration(arguments: list[str]) -> None:
    config = parse(arguments)
    assert parse(shlex.split(command(config, 1))[2:]) == config
    assert command(config, 4).startswith("torchrun --standalone --nproc-per-node 4 gcrm_fast/train.py")


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_run_writes_it(tmp_path: Path, head: str) -> None:
    out = tmp_path / "run"
    assert (
        main(
            [
                "--output",
                str(out),
                "--steps",
                "1",
                "--train-pairs",
                "50",
                "--eval-pairs",
                "20",
                "--head",
                head,
                "--hidden-size",
                "32",
                "--layers",
                "1",
                "--global-batch-pairs",
                "8",
            ]
        )
        == 0
    )
    found = ModelCard.load(out / "model" / "README.md")
    assert {r.metric_type for r in found.data.eval_results} == {"accuracy", "roc_auc"}
    assert ("AutoModelForSequenceClassification" in found.text) == (head == "linear")
    assert "| training pairs | 50 " in found.text
    assert "| held-out pair accuracy | " in found.text
    assert f'head = "{head}"' in found.text
