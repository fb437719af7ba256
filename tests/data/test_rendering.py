"""Chat templates render in another process, which ends with a rendering that takes too long."""

import json
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.goals import GOAL_FILE
from gcrm_fast.common.errors import UserError
from gcrm_fast.data import rendering
from gcrm_fast.data.records import read_pairs
from gcrm_fast.data.rendering import EndlessTemplate, render
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.data.tokenization import load_tokenizer
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import CHATML, TEMPLATES, chat_tokenizer
from support.serving import running, write_served_model

RANGE = "range(99999)"
LOOP = f"{{% for a in {RANGE} %}}{{% for b in {RANGE} %}}{{% endfor %}}{{% endfor %}}"
LOOPS = f"{{% if 'loop' in messages[0]['content'] %}}{LOOP}{{% endif %}}{CHATML}"
DOUBLED = "{% set n = namespace(x='x') %}{% for i in range(TIMES) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
QUESTION, ANSWER = {"role": "user", "content": "naïve\n漢字?"}, {"role": "assistant", "content": " yes."}


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair(text: str) -> str:
    sides = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return json.dumps({"prompt": asked(text), **sides}) + "\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), "{{ messages | tojson }}{{ tools | tojson }}{{ eos_token }}"]
)
def test_text_is_that_of_transformers(template: str, ask: bool, tools: list[dict[str, object]] | None) -> None:
    tokenizer = chat_tokenizer(template)
    messages = [QUESTION] if ask else [QUESTION, {**ANSWER, "reasoning_content": None}]
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    assert render(tokenizer, messages, tools, ask=ask) == expected


def test_one_of_several_templates() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert render(tokenizer, [QUESTION]) == "plain"
    assert render(tokenizer, [QUESTION], TOOLS) == "with tools"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('first\nsecond') }}", "^first$"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' .*unsafe"),
        ("{% for m in messages %}", "Unexpected end of template"),
        (DOUBLED.replace("TIMES", "27"), "writes more than 64 Mi"),
        (DOUBLED.replace("TIMES", "60"), "MemoryError"),
    ],
)
def test_what_a_template_raises_is_one_line(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 60.0)
    with pytest.raises(ValueError, match=message):
        render(chat_tokenizer(template), [QUESTION])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("endless", [LOOP, "{{ (9 ** 9) ** (9 ** 9) }}"])  # the second one within a single instruction
def test_a_rendering_ends_in_time_and_the_next_one_is_right(endless: str) -> None:
    looping, good = chat_tokenizer(endless), chat_tokenizer(CHATML)
    looping.name_or_path = "some/model"
    render(good, [QUESTION])
    begun = time.monotonic()
    with pytest.raises(EndlessTemplate, match=r"^some/model: the chat template takes more than 0\.5 s: correct it"):
        render(looping, [QUESTION])
    assert time.monotonic() - begun < 60, "it would take years"
    assert render(good, [QUESTION]) == good.apply_chat_template([QUESTION], tokenize=False)


def test_an_interrupted_rendering_is_not_the_answer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(connection: Connection) -> bytes:
        raise KeyboardInterrupt

    tokenizer = chat_tokenizer(CHATML)
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "recv_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(tokenizer, asked("first"))
    assert "second" in render(tokenizer, asked("second"))


@pytest.mark.usefixtures("impatient")
def test_a_record_without_an_end(tmp_path: Path) -> None:
    """It is a bad record like others, unless there are many of them."""
    tokenizer, path = chat_tokenizer(LOOPS), tmp_path / "pairs.jsonl"
    path.write_text(pair("one") + pair("loop") + pair("two"))
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: .*the chat template takes more than"):
        read_pairs([str(path)], tokenizer=tokenizer)
    rendering._renderer.endless = 0
    bad = BadRecords(skip=True)
    assert len(read_pairs([str(path)], tokenizer=tokenizer, bad=bad)) == 2
    assert len(bad.skipped) == 1
    path.write_text(pair("one") + pair("loop") * 10)
    with pytest.raises(UserError, match=rf"jsonl:{rendering.TOLERATED + 1}: .*the chat template takes more than"):
        read_pairs([str(path)], tokenizer=tokenizer, bad=bad)


@pytest.mark.usefixtures("impatient")
def test_requests_and_trainers_get_the_same_line(tmp_path: Path) -> None:
    folder = write_served_model(tmp_path / "model", LOOPS)
    model = RewardModel.from_pretrained(folder)
    message = f"{folder}: the chat template takes more than 0.5 s: correct it, or omit these messages"
    with pytest.raises(UserError, match=message):
        RewardFunction(model)([asked("loop")], [[ANSWER]])
    with running(model) as server:
        for question, status in (("loop", 422), ("one", 200)):
            answer = server.ask("/score", {"prompts": [asked(question)], "completions": [[ANSWER]]})
            assert answer.status == status
            assert status == 200 or answer.body == {"error": f"completion 0: {message}"}


@pytest.mark.usefixtures("impatient")
def test_a_model_whose_template_never_ends_is_refused(tmp_path: Path) -> None:
    folder = write_served_model(tmp_path / "model", CHATML)
    (folder / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(EndlessTemplate, match="the chat template takes more than"):
        load_tokenizer(folder)
    with pytest.raises(EndlessTemplate, match="the chat template takes more than"):
        RewardModel.from_pretrained(folder)
    assert (folder / GOAL_FILE).is_file()
