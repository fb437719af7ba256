"""Where rewards are read: models of other projects as their trainers read them, this project's as they were trained."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.goals import GOAL_FILE, read_goals, write_goals
from gcrm_fast.cli import main
from gcrm_fast.data.tokenization import BOS, EOS, PAD
from gcrm_fast.inference.protocols import Chunk, OpenRequest, PushRequest
from gcrm_fast.inference.sessions import Sessions
from gcrm_fast.rlhf.trl import RewardFunction
from support import models
from support.chat import CHATML, LLAMA3, chat_tokenizer

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # no end of turn at all
PROMPTS = ("hello world?", "naïve 123, ", "yes. ")
ANSWERS = ("yes.", "hello hello 3", "café")
Records = tuple[Sequence[Any], Sequence[Any]]


def texts() -> Records:
    return PROMPTS, ANSWERS


def messages() -> Records:
    return (
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        [[{"role": "assistant", "content": answer}] for answer in ANSWERS],
    )


def foreign(folder: Path, *, template: str = CHATML, eos: str = EOS, pad: str | None = PAD) -> Path:
    """A sequence classifier as transformers' trainers save it, with weights large enough to tell tokens apart."""
    tokenizer = chat_tokenizer(template)
    tokenizer.eos_token = eos
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_labels=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_transformers(folder: Path, records: Records) -> np.ndarray:
    """Rewards as TRL's RewardTrainer computes them: text ends with eos, messages as the template writes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rewards = []
    for prompt, answer in zip(*records, strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
        padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id] * 3  # as in a batch
        with torch.no_grad():
            rewards.append(model(torch.tensor([ids + padding])).logits.item())
    return np.array(rewards)


@pytest.mark.parametrize("records", [texts, messages])
@pytest.mark.parametrize(
    "model",
    [
        {"pad": EOS},
        {"pad": PAD},
        {"pad": None},
        {"pad": "<|im_end|>", "eos": "<|im_end|>"},
        {"pad": PAD, "eos": "<|im_end|>"},
        {"pad": "<|eot_id|>", "eos": "<|eot_id|>", "template": LLAMA3},
        {"pad": PAD, "eos": "<|eot_id|>", "template": LLAMA3},
        {"pad": EOS, "template": PLAIN},
        {"pad": PAD, "template": PLAIN},
    ],
    ids=str,
)
def test_foreign_models_are_read_as_in_transformers(model: dict[str, Any], records: Any, tmp_path: Path) -> None:
    """Text and messages, pad that is eos, the end of a turn, another token, or none; also after an export."""
    folder = foreign(tmp_path / "m", **model)
    expected = in_transformers(folder, records())
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(RewardFunction(folder)(*records()), expected, rtol=0, atol=1e-5)
    assert main(["export", str(folder), "-o", str(tmp_path / "out")]) == 0
    np.testing.assert_allclose(RewardFunction(tmp_path / "out")(*records()), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(in_transformers(tmp_path / "out", records()), expected, rtol=0, atol=1e-5)


def test_models_of_this_project_are_read_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models.save(tmp_path / "m")
    model = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    assert model.end == ("eos", None)
    assert not caplog.messages
    [completion] = model.encode(["one"], ["two"])
    assert completion.ids[-1] == model.tokenizer.eos_token_id


def test_one_line_says_where_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = foreign(tmp_path / "m", pad=EOS)
    with caplog.at_level(logging.WARNING):
        RewardModel.from_pretrained(folder, device="cpu")
        RewardModel.from_pretrained(folder, device="cpu", end="eos")
    first, second = caplog.messages
    assert "the one before eos: there is no gcrm.json" in first
    assert "pad_token_id = eos_token_id" in first
    assert second.endswith("at an end token, appended where there is none: --end eos (see --end)")


def test_end_is_chosen(tmp_path: Path) -> None:
    """--end as-is adds and drops nothing; eos reads an end token, also of a model that was read elsewhere."""
    folder = foreign(tmp_path / "m", pad=PAD)
    given = {
        end: RewardModel.from_pretrained(folder, device="cpu", end=end).encode(["yes."] * 2, ["hello", "hello <|eos|>"])
        for end in ("auto", "eos", "as-is")
    }
    eos = RewardModel.from_pretrained(folder, device="cpu").tokenizer.eos_token_id
    assert [[c.ids[-1] == eos for c in completions] for completions in given.values()] == [
        [True, True],
        [True, True],
        [False, True],
    ]
    assert [c.start for c in given["as-is"]] == [c.start for c in given["eos"]]


def test_the_choice_is_saved_with_an_export(tmp_path: Path) -> None:
    models.save(tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), "-o", str(tmp_path / "out"), "--end", "as-is"]) == 0
    model = RewardModel.from_pretrained(tmp_path / "out", device="cpu")
    assert model.end.kind == "as-is"
    [completion] = model.encode(["one"], ["two"])
    assert completion.ids[-1] != model.tokenizer.eos_token_id
    assert json.loads((tmp_path / "out" / "gcrm.json").read_text())["end_policy"].startswith("last token")


def test_cut_and_empty_completions_of_a_foreign_model(tmp_path: Path) -> None:
    """A cut one is read at its last token. One without a token left is read at the last one that there is."""
    model = RewardModel.from_pretrained(foreign(tmp_path / "m", pad=EOS), device="cpu")
    cut, whole, empty = model.encode(["yes. "] * 3, ["hello", "hello", ""], [True, False, False])
    assert cut.ids.tolist() == whole.ids.tolist()
    assert (cut.ending, empty.start) == (2, len(empty.ids) - 1)
    assert np.isfinite(model.score(["yes."], [""])).all()


def test_the_template_writes_bos_or_nobody_does(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(folder)("text")["input_ids"][0] == 0, "the tokenizer adds bos to text"
    function = RewardFunction(folder)
    assert function.model.encode(["yes"], ["no"])[0].ids[0] == function.model.tokenizer.convert_tokens_to_ids(BOS)
    [reward] = function(*([side[:1] for side in messages()]))
    assert reward == pytest.approx(in_transformers(folder, messages())[0], abs=1e-5)


def test_goals_say_how_their_completions_ended(tmp_path: Path) -> None:
    write_goals(tmp_path / GOAL_FILE, {"default": torch.ones(3)}, {"default": 1}, "abc", "transformers")
    with safe_open(tmp_path / GOAL_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["gcrm"])["end_policy"].startswith("last token that is not pad_token_id")
    assert read_goals(tmp_path / GOAL_FILE, "abc", 3)[1] == {"default": 1}


@pytest.mark.parametrize("records", [texts(), messages()], ids=["texts", "messages"])
def test_a_stream_of_a_foreign_model_is_read_as_its_scores_are(records: Records, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(foreign(tmp_path / "m", template=PLAIN), device="cpu")
    model.goals["default"] = torch.ones(model.config.state_size)
    sessions = Sessions(model, limit=len(PROMPTS), tokens=1000, idle=60)
    rewards = []
    for prompt, answer in zip(records[0], ANSWERS, strict=True):
        opened = sessions.open(OpenRequest(prompt=prompt, rows=1))
        pushed = sessions.push(opened["id"], PushRequest(chunks=[Chunk(row=0, text=answer, end="stop")]))
        rewards.append(pushed["rows"][0]["reward"])
    np.testing.assert_allclose(rewards, model.score(*records), rtol=1e-4)
