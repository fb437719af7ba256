"""Samples of a policy: what is read, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.samples import read_samples
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.rlhf.samples import against, encode_samples, rewards_of
from support.judged import write
from support.models import save

RECORD: dict[str, Any] = {"prompt": "one?", "completions": [" two", " three, four"], "reference": " five"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save(folder)
    return RewardModel.from_pretrained(folder)


def test_records(tmp_path: Path) -> None:
    record = RECORD | {"answers": [" 4 ", None], "completions_cut": [False, True], "is_correct": [True, False], "d": 1}
    [one, other] = read_samples([str(write(tmp_path / "s.jsonl", [record, record]))])
    assert (one.prompt, one.completions, one.cuts) == ("one?", [" two", " three, four"], [False, True])
    assert (one.answers, one.correct, one.references) == (["4", None], [True, False], [" five"])
    assert one.rest == {"prompt": "one?", "reference": " five", "d": 1}
    assert other.where.endswith("s.jsonl:2"), "records of one prompt stay apart"


def test_the_output_of_generate(tmp_path: Path) -> None:
    samples = [
        {"text": " two", "ending": "stop", "reward": None},
        {"text": " gone", "ending": "dropped"},
        {"text": " three", "ending": "length"},
    ]
    record = {"question": "one?", "id": 7, "text": " two", "chosen_sample": 0, "samples": samples, "seconds": 0.1}
    record["reference_completions"] = [" five", " six"]
    [one] = read_samples([str(write(tmp_path / "s.jsonl", [record]))])
    assert (one.prompt, one.completions, one.cuts) == ("one?", [" two", " three"], [False, True])
    assert one.references == [" five", " six"]
    assert one.rest == {"prompt": "one?", "id": 7}
    named = {"asked": "two?", "gold": " seven", **record}
    columns = {"prompt": "asked", "reference": "gold"}
    [one] = read_samples([str(write(tmp_path / "n.jsonl", [named]))], columns=columns)
    assert (one.prompt, one.completions, one.reference) == ("two?", [" two", " three"], " seven")


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [{"q": "one?", "outs": ["a", "b"], "completions": "no"}])
    [one] = read_samples([str(path)], columns={"prompt": "q", "completions": "outs"})
    assert (one.prompt, one.completions) == ("one?", ["a", "b"])
    assert one.rest == {"prompt": "one?"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"completions": None}, "field 'completions' is missing: sample the prompt first"),
        ({"completions": []}, "field 'completions' has no entry: several samples of a prompt are compared"),
        ({"completions": [" two"]}, "field 'completions' has 1 entry: several samples of a prompt are compared"),
        ({"completions": [" two", 3]}, r"field 'completions\[1\]' is int, not a string"),
        ({"answers": ["4"]}, "field 'answers' has 1 entries for 2 completions"),
        ({"answers": ["4", [1]]}, r"field 'answers\[1\]' is list, not a string, a number or null"),
        ({"is_correct": [True, "no"]}, r"field 'is_correct\[1\]' is str, not true or false"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = str(write(tmp_path / "s.jsonl", [RECORD, RECORD | change]))
    with pytest.raises(UserError, match=f"s.jsonl:2: {message}"):
        read_samples([path])
    bad = BadRecords(skip=True)
    assert len(read_samples([path], bad=bad)) == 1
    assert len(bad.skipped) == 1


def test_a_file_of_bad_records(tmp_path: Path) -> None:
    path = str(write(tmp_path / "s.jsonl", [{"prompt": "x"}] * 2))
    with pytest.raises(UserError, match=r"every record is bad; the first: .*s.jsonl:1: field 'completions' is missing"):
        read_samples([path], bad=BadRecords(skip=True))


def test_rewards_are_those_of_the_model(model: RewardModel, tmp_path: Path) -> None:
    records = [
        RECORD | {"completions_cut": [True, False]},
        RECORD | {"reference": None, "reference_completions": ["a", "b"]},
    ]
    samples = read_samples([str(write(tmp_path / "s.jsonl", records))])
    (own, reference), (_, references) = rewards_of(samples, model)
    cut = model.judge(model.encode(["one?"], [" two"], [True]))[0].reward
    np.testing.assert_allclose(own, [cut, model.score("one?", " three, four")], rtol=1e-5)
    np.testing.assert_allclose(reference, [model.score("one?", " five")], rtol=1e-5)
    np.testing.assert_allclose(references, model.score("one?", ["a", "b"]), rtol=1e-5)


def test_several_references_count_by_their_best() -> None:
    difference, proxy = against([1.0, 3.0], [-5.0, 2.0, 0.0])
    assert difference == 0.0
    assert proxy == pytest.approx(0.5 * (1 / (1 + np.e) + 1 / (1 + 1 / np.e)))


def test_samples_of_another_tokenizer(model: RewardModel, tmp_path: Path) -> None:
    texts = RECORD["completions"]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    eos = model.tokenizer.eos_token
    good = [RECORD | {"completion_ids": ids}, RECORD | {"completions": [text + eos for text in texts]}]
    for samples in read_samples([str(write(tmp_path / "s.jsonl", good))]):
        encode_samples(samples, model)
    bad = [
        RECORD | {"completion_ids": [[5], [6]]},
        RECORD | {"completions": [" two", " three</other>", " four<|im_end|>\n"]},
    ]
    by_ids, by_end = read_samples([str(write(tmp_path / "s.jsonl", bad))])
    with pytest.raises(
        UserError, match=r"jsonl:1: field 'completions\[0\]': is not what the .* samples of another tok"
    ):
        encode_samples(by_ids, model)
    with pytest.raises(UserError, match=r"jsonl:2: field 'completions\[2\]': ends with '<\|im_end\|>', which is no"):
        encode_samples(by_end, model)
