"""``gcrm evaluate`` end to end: what it writes is what the model's scores give, and bad input leaves nothing."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gcrm_fast import cli
from gcrm_fast.commands import evaluate, shared
from gcrm_fast.commands.options import EvaluateOptions
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation import results
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.judged import samples, write

PAIRS = [
    {
        "prompt": f"one {'two ' * (i // 2)}",
        "chosen": "three " * (i + 1),
        "rejected": "four " * (9 - i),
        "family": "ab"[i % 2],
        "class": "both",
    }
    for i in range(8)
]


def labeled() -> list[dict[str, Any]]:
    """Of the field 'class' each value has one class alone."""
    return [record | {"class": "right" if record["is_correct"] else "wrong"} for record in samples()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    models.save(folder)
    return folder


def test_evaluate_reports_labeled_completions_and_pairs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = labeled()
    files = [str(write(tmp_path / "labeled.jsonl", records)), str(write(tmp_path / "pairs.jsonl", PAIRS))]
    out = tmp_path / "out"
    assert cli.run("evaluate", [str(model), *files, "-o", str(out), "--by", "family", "class"]) == 0
    plots = ["histograms.png", "partial.png", "roc.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*plots, "results.csv", "results.json"])
    with (out / "results.csv").open() as file:
        rows = {(Path(row["source"]).stem, row["group"], row["measure"]): row for row in csv.DictReader(file)}
    scored = RewardModel.from_pretrained(model)
    prompts, completions = [r["question"] for r in records], [r["completion"] for r in records]
    right, family = np.array([r["is_correct"] for r in records]), np.array([r["family"] for r in records])
    reward = scored.score(prompts, completions)
    last_q = [q[-1] for q in scored.q_values(prompts, completions)]
    for group, name, expected in (
        ("all", "auroc_reward", roc_auc_score(right, reward)),
        ("all", "auroc_q", roc_auc_score(right, last_q)),
        ("family=b", "auroc_reward", roc_auc_score(right[family == "b"], reward[family == "b"])),
        ("all", "baseline_identity:class", 1),
    ):
        assert float(rows["labeled", group, name]["value"]) == pytest.approx(expected, abs=1e-6)
    one_class = rows["labeled", "class=right", "auroc_reward"]
    assert one_class["value"] == one_class["low"] == ""
    chosen, rejected = (
        scored.score([str(pair["prompt"]) for pair in PAIRS], [str(pair[side]) for pair in PAIRS])
        for side in ("chosen", "rejected")
    )
    assert float(rows["pairs", "all", "pair_accuracy"]["value"]) == np.mean(chosen > rejected)
    assert float(rows["pairs", "family=a", "completions"]["value"]) == 8
    table = capsys.readouterr().out
    assert re.search(r"class=right +16 +100% +one class", table), table
    saved = json.loads((out / "results.json").read_text())
    assert len(saved["rows"]) == len(rows)
    assert saved["fingerprint"] == scored.fingerprint


def test_a_limit_draws_the_same_whole_records_every_time() -> None:
    of_records = [Candidate(prompt="", completion="", where="", row=i // 2, name="") for i in range(20)]
    rows = [candidate.row for candidate in of_records]
    drawn = [candidate.row for candidate in shared.limited(of_records, rows, 4)]
    assert len(drawn) == 8
    assert drawn == sorted(drawn)
    assert drawn[::2] == drawn[1::2]
    assert drawn == [candidate.row for candidate in shared.limited(of_records, rows, 4)]
    assert shared.limited(of_records, rows, 0) == shared.limited(of_records, rows, 99) == of_records


def test_records_without_what_is_asked_are_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = labeled()
    records[3]["is_correct"] = None
    del records[7]["family"]
    (tmp_path / "good").mkdir()
    file, out = str(write(tmp_path / "labeled.jsonl", records)), tmp_path / "out"
    call = [str(model), file, "-o", str(out), "--by", "family"]
    assert cli.run("evaluate", call) == 2
    assert "labeled.jsonl:4: field 'is_correct' is 'None', not true or false" in capsys.readouterr().err
    assert cli.run("evaluate", [*call, "--on-bad-record", "skip"]) == 0
    assert "bad records skipped: 2; the first: " in capsys.readouterr().err
    good = [record for i, record in enumerate(records) if i not in (3, 7)]
    call[1:4] = [str(write(tmp_path / "good" / "labeled.jsonl", good)), "-o", str(tmp_path / "without")]
    assert cli.run("evaluate", call) == 0
    tables = []
    for folder in (out, tmp_path / "without"):
        with (folder / "results.csv").open() as table:
            tables.append([row | {"source": ""} for row in csv.DictReader(table)])
    assert tables[0] == tables[1]


def test_results_replace_nothing_unless_forced(tmp_path: Path) -> None:
    results.check_folder(tmp_path, overwrite=False)
    results.check_folder(tmp_path / "new", overwrite=False)
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match="contains files"):
        results.check_folder(tmp_path, overwrite=False)
    results.check_folder(tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is not a result file"):
        results.check_folder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is not a folder"):
        results.check_folder(tmp_path / "file", overwrite=True)


def test_lists_of_labels_go_with_lists_of_completions_and_whole_records(model: Path, tmp_path: Path) -> None:
    texts = ["one", "two", "three"]
    records = [{"prompt": "", "completions": texts, "is_correct": [True, 0, i == 0]} for i in (0, 1)]
    options = EvaluateOptions(model=str(model), data=("-",), output=tmp_path)
    loaded, _ = shared.open_model(options)
    source = evaluate.read_source(str(write(tmp_path / "lists.jsonl", records)), loaded, options)
    assert source.right_N.tolist() == [True, False, True, True, False, False]
    one = replace(options, limit=1)
    assert len(evaluate.read_source(str(tmp_path / "lists.jsonl"), loaded, one).candidates) == 3


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            {"is_correct": ...},
            [],
            r"bad\.jsonl:3: field 'is_correct', which labels completions \(--label\), is missing",
        ),
        ({"is_correct": "yes"}, [], r"bad\.jsonl:3: field 'is_correct' is 'yes', not true or false"),
        ({"is_correct": None}, [], r"bad\.jsonl:3: field 'is_correct' is 'None', not true or false"),
        ({"family": {}}, ["--by", "family"], r"bad\.jsonl:3: field 'family', named by --by, is dict, not a string"),
        ({}, ["--by", "size"], r"bad\.jsonl:1: field 'size', named by --by, is missing"),
        ({}, ["--label", "right"], r"bad\.jsonl:1: field 'right', which labels completions \(--label\), is missing"),
        ({}, ["--limit", "1"], r"bad\.jsonl: all 1 completions are (right|wrong): AUROC needs both kinds"),
        ({}, ["--limit", "-1"], r"--limit -1: must be at least 0"),
        ({"completion": ""}, [], r"bad\.jsonl:3: field 'completion' is empty"),
        ({}, ["--goal", "none.safetensors"], r"none\.safetensors: not a readable goal file"),
        ({}, ["--tokens-per-batch", "4"], r"bad\.jsonl:1: field 'completion'"),
    ],
)
def test_bad_input_of_evaluate(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    arguments: list[str],
    message: str,
) -> None:
    records = samples()
    records[2] = {k: v for k, v in (records[2] | change).items() if v is not ...}
    file = write(tmp_path / "bad.jsonl", records)
    assert cli.run("evaluate", [str(model), str(file), "-o", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"gcrm evaluate: .*", err), err
    assert re.search(message, err), err
    assert sorted(tmp_path.iterdir()) == [file]


def test_what_cannot_be_read_or_written_is_said_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, empty = write(tmp_path / "good.jsonl", samples()), write(tmp_path / "empty.jsonl", [])
    for arguments, message in (
        ([str(empty), "-o", str(tmp_path / "out")], "empty.jsonl: contains no records"),
        (["-o", str(tmp_path / "out")], "FILE is missing"),
        ([str(file), "-o", str(empty)], "empty.jsonl: is not a folder"),
    ):
        assert cli.run("evaluate", [str(model), *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == [empty, file]
