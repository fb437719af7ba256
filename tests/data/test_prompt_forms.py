"""How the prompts of the training data were written: saved with the model, which then warns only of the other form."""

import json
from pathlib import Path
from typing import Any

import pytest

from gcrm_fast import RewardModel
from gcrm_fast.cli import main
from gcrm_fast.common.notes import warn_once
from support.serving import write_served_model

ASKED = [{"role": "user", "content": "q"}]
OF_TEXT = {"prompt": "q", "chosen": "yes", "rejected": "no"}
OF_MESSAGES = {"prompt": ASKED, "chosen": "yes", "rejected": "no"}
TEXT_WARNING, MESSAGES_WARNING = "prompts are plain text", "prompts are messages"


def warnings(capsys: Any, folder: Path, prompt: Any) -> list[str]:
    """The lines on stderr while a prompt is scored by a model that has just been loaded."""
    warn_once.cache_clear()
    capsys.readouterr()
    RewardModel.from_pretrained(folder).score(prompt, "yes")
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("records", "forms", "on_text", "on_messages"),
    [
        ([OF_TEXT], ["text"], None, MESSAGES_WARNING),
        ([OF_MESSAGES], ["messages"], TEXT_WARNING, None),
        ([OF_TEXT, OF_MESSAGES], ["messages", "text"], None, None),
    ],
)
def test_a_trained_model_warns_only_of_the_other_form(
    tmp_path: Path, capsys: Any, records: list[Any], forms: list[str], on_text: str | None, on_messages: str | None
) -> None:
    base, files = write_served_model(tmp_path / "base"), []
    for number, record in enumerate(records):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text((json.dumps(record) + "\n") * 2)
    run = ["--cache", "none", "--steps", "1", "--dtype", "float32", "--output", str(tmp_path / "run")]
    assert main(["train", "--data", *files, "--model", str(base), *run]) == 0
    trained, exported = tmp_path / "run" / "model", tmp_path / "exported"
    pairs = tmp_path / "other.jsonl"  # --standardize reads pairs in the other form, which changes nothing
    pairs.write_text((json.dumps(OF_MESSAGES if forms == ["text"] else OF_TEXT) + "\n") * 2)
    assert main(["export", str(trained), "-o", str(exported), "--standardize", str(pairs)]) == 0
    for folder in (trained, exported):
        assert json.loads((folder / "gcrm.json").read_text())["prompts"] == forms
        for prompt, expected in (("q", on_text), (ASKED, on_messages)):
            lines = warnings(capsys, folder, prompt)
            assert [expected in line for line in lines] == ([True] if expected else [])


@pytest.mark.parametrize("saved", [None, 1, {"text": 1}, ["prose", []]])
def test_unknown_forms_count_as_messages(tmp_path: Path, capsys: Any, saved: Any) -> None:
    folder = write_served_model(tmp_path / "model")
    path = folder / "gcrm.json"
    about = json.loads(path.read_text())
    assert "prompts" not in about
    path.write_text(json.dumps(about | {"prompts": saved}))
    [line] = warnings(capsys, folder, "q")
    assert TEXT_WARNING in line
    assert warnings(capsys, folder, ASKED) == []
