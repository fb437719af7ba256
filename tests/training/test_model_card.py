"""The card in a saved model: a header that the Hub takes, and a command that gives the same configuration."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gcrm_fast.train import main
from gcrm_fast.training.config import TrainConfig, parse
from gcrm_fast.training.model_card import Example, command, model_card
from support.chat import TEMPLATES, chat_tokenizer
from support.training_runs import TINY, arguments

DATA = [("training pairs", "3 (0 dropped)")]
RESULTS = [("held-out AUROC", "0.500 -> 0.800")]
METRICS = {"eval/accuracy": 0.76543, "eval/auroc": 0.8, "eval/loss/ranking": 0.6, "eval/pairs": 30}
EXAMPLE = Example("my question", " my answer", False)


def card(config: TrainConfig, metrics: dict[str, float] = METRICS) -> ModelCard:
    found = ModelCard(model_card(config, DATA, RESULTS, metrics, 1, EXAMPLE, chats=False))
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


@pytest.mark.parametrize(
    ("options", "held_out"),
    [({"eval_data": ("a", "b")}, "a b"), ({"eval_split": 0.02}, "0.02 of the prompts"), ({}, "-")],
)
def test_the_card_says_what_is_held_out(options: dict[str, Any], held_out: str) -> None:
    assert f"| held out | {held_out} |" in card(TrainConfig(data=("pairs.jsonl",), **options)).text


def test_license_and_languages_are_those_of_the_options_or_of_the_base_model(tmp_path: Path) -> None:
    base = ModelCard("---\nlicense: mit\nlanguage: [de]\n---\n# Base\n")
    base.save(tmp_path / "README.md")
    data = card(TrainConfig(model=str(tmp_path))).data
    assert (data.license, data.language) == ("mit", ["de"])
    data = card(TrainConfig(model=str(tmp_path), license="apache-2.0", language=("en", "fr"))).data
    assert (data.license, data.language) == ("apache-2.0", ["en", "fr"])
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert card(TrainConfig(model=str(tmp_path))).data.license is None
    assert card(TrainConfig()).data.eval_results[0].dataset_args == {"held-out pairs": 30}


@pytest.mark.parametrize("template", [*TEMPLATES, ""])
def test_the_example_of_the_card_is_from_the_data_and_runs(tmp_path: Path, template: str) -> None:
    """Its two programs agree; with a chat template the texts contain its tokens."""
    lines = []
    for i in range(12):
        chosen, rejected = (f"{word} 123." for word in ("yes", "hello"))
        record: dict[str, Any] = {"prompt": f"world {i}? ", "chosen": chosen, "rejected": rejected}
        if template:
            record["prompt"] = [{"role": "user", "content": record["prompt"]}]
            for side in ("chosen", "rejected"):
                record[side] = [{"role": "assistant", "content": record[side]}]
        lines.append(json.dumps(record))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    few = [*TINY, "--steps", "1", "--global-batch-pairs", "4", "--cache", "none", "--output", str(tmp_path / "run")]
    if template:
        chat_tokenizer(TEMPLATES[template]).save_pretrained(tmp_path / "tokenizer")
        few += ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["--data", str(tmp_path / "pairs.jsonl"), "--vocab-size", "300", *few]) == 0
    found = ModelCard.load(tmp_path / "run" / "model" / "README.md").text
    assert "world 0?" in found
    assert ("and messages" in found) == bool(template)
    ours, theirs = re.findall(r"^```python\n(.+?)^```", found, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(ours.replace("path/to/this/folder", str(tmp_path / "run" / "model")), names)
    reward = names["reward"]
    exec(theirs.replace("path/to/this/folder", str(tmp_path / "run" / "model")), names)
    assert names["reward"].item() == pytest.approx(reward, rel=1e-4, abs=1e-6)


def test_the_example_is_a_training_pair_where_every_held_out_completion_is_cut(tmp_path: Path) -> None:
    whole = {"prompt": "train? ", "chosen": "yes 1.", "rejected": "no 1."}
    cut = {"prompt": "held out? ", "chosen": "yes 2", "rejected": "no 2", "chosen_cut": True, "rejected_cut": True}
    for name, record in (("train", whole), ("held_out", cut)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    sources = ["--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "held_out.jsonl")]
    few = [*TINY, "--vocab-size", "300", "--steps", "1", "--cache", "none", "--output", str(tmp_path / "run")]
    assert main([*sources, *few]) == 0
    assert "train?" in ModelCard.load(tmp_path / "run" / "model" / "README.md").text


def test_the_card_has_the_number_of_pairs_and_intervals(pair_file: Path, tmp_path: Path) -> None:
    assert main(arguments(pair_file, tmp_path)) == 0
    found = ModelCard.load(tmp_path / "model" / "README.md").text
    assert re.search(r"\| held-out AUROC \| 0\.\d{3} -> [01]\.\d{3} \[[01]\.\d{3}, [01]\.\d{3}\] \|", found)
    assert re.search(r"\| held-out pairs \| 21 \(", found)


def test_header_of_a_model_from_files(tmp_path: Path) -> None:
    for name in ("pairs.jsonl", "saved"):
        (tmp_path / name).mkdir()
    config = TrainConfig(model=str(tmp_path), data=(str(tmp_path / "pairs.jsonl"), f"{tmp_path / 'saved'}:train"))
    data = card(config, {}).data
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)
    assert card(TrainConfig()).data.datasets is None  # generated


def test_the_configuration_in_the_card_has_no_option_that_does_not_apply(tmp_path: Path) -> None:
    def listed(**options: Any) -> set[str]:
        return set(re.findall(r"^(\w+) = ", card(TrainConfig(**options)).text, re.MULTILINE))

    scratch, tuned = listed(), listed(model=str(tmp_path), data=("pairs.jsonl",), lora_rank=8)
    assert scratch - tuned == {
        *("hidden_size", "layers", "heads", "kv_heads", "head_size", "intermediate_size", "vocab_size"),
        "arithmetic_steps",
    }
    assert tuned - scratch == {"lora_alpha", "lora_targets", "lora_dropout"}
    assert scratch - listed(objective="ranking") >= {"contrastive_weight", "sampling", "temperature"}
    assert listed(head="bottleneck") - scratch == {"bottleneck_size", "bottleneck_weight"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--steps", "7", "--eval-by", "steps", "--head", "mlp", "--output", "runs/a name"],
        ["--hidden-size", "128", "--data", "arithmetic"],  # the default without the preset
        ["--preset", "hh", "--data", "a.jsonl", "b.jsonl", "--allow-overlap", "--lr", "1e-5", "--clip", "0.5"],
        ["--data", "a.jsonl", "b.jsonl", "--data-weights", "0.7", "0.3"],
    ],
)
def test_the_command_gives_the_same_configuration(arguments: list[str]) -> None:
    config = parse(arguments)
    assert parse(shlex.split(command(config, 1))[2:]) == config
    assert command(config, 4).startswith("torchrun --standalone --nproc-per-node 4 -m gcrm_fast.train")


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
