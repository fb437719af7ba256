"""Rewards in a trainer's process: what TRL passes."""

import numpy as np
import pytest
import torch

from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.notes import warn_once
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import CHATML, LLAMA2, chat_tokenizer
from support.small import small_config, small_model

PROMPTS = ["hello?", "hello?", "1 2 3"]
COMPLETIONS = [" yes.", "", " world 漢字"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    tokenizer = chat_tokenizer(CHATML)
    config = small_config(vocab_size=len(tokenizer), num_hidden_layers=1)
    choose_pad(tokenizer, config.vocab_size, "test")
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save_model(folder, state, config, tokenizer, torch.arange(32.0), 1)
    return RewardModel.from_pretrained(folder)


def test_text_and_columns(model: RewardModel) -> None:
    """As TRL calls it: by name, with the ids of the completions and every other column of the data."""
    found = RewardFunction(model)(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[5], [], [6, 7]], answer=[1, 2, 3], trainer_state=None
    )
    assert all(type(reward) is float for reward in found)
    np.testing.assert_allclose(found, model.score(PROMPTS, COMPLETIONS), rtol=1e-6)


def test_the_end_state_as_a_second_signal(model: RewardModel) -> None:
    ends = np.array([q[-1] for q in model.q_values(PROMPTS, COMPLETIONS)])
    found = RewardFunction(model, q_weight=2.5)(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(found, model.score(PROMPTS, COMPLETIONS) + 2.5 * ends, rtol=1e-5)
    with pytest.raises(UserError, match="no goal 'nix'"):
        RewardFunction(model, q_weight=1.0, goal="nix")


def test_completions_that_the_length_limit_cut(model: RewardModel) -> None:
    """Without one of the policy's end tokens at their end; one without any text counts as ended."""
    found = RewardFunction(model, ends=[1, 2])(PROMPTS, COMPLETIONS, completion_ids=[[5, 1], [9], [6, 1, 7]])
    judged = model.judge(model.encode(PROMPTS, COMPLETIONS, [False, False, True]))
    np.testing.assert_allclose(found, [j.reward for j in judged], rtol=1e-6)


def test_messages(model: RewardModel) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS]
    expected = model.score(texts, [f"{completion}<|im_end|>\n" for completion in COMPLETIONS])
    np.testing.assert_allclose(RewardFunction(model)(prompts, answers), expected, rtol=1e-6)


def test_tools_and_system_messages_are_columns(model: RewardModel) -> None:
    prompts = [[{"role": "user", "content": "hello?"}]] * 2
    answers = [[{"role": "assistant", "content": " yes."}]] * 2
    found = RewardFunction(model)(prompts, answers, system=["world", None], tools=None)
    system = "<|im_start|>system\nworld<|im_end|>\n"
    asked = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    np.testing.assert_allclose(found, model.score([system + asked, asked], [" yes.<|im_end|>\n"] * 2), rtol=1e-6)


def test_more_tokens_than_positions_are_warned_of_once(model: RewardModel, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    known = model.config.max_position_embeddings
    for words in (1, known):
        prompts = [[{"role": "user", "content": "1 " * words}]] * 2
        RewardFunction(model)(prompts, [[{"role": "assistant", "content": "yes"}]] * 2)
        warned = [f"gcrm: warning: some completions have more tokens than the {known} positions"] * (words > 1)
        assert [line.split(" that the")[0] for line in capsys.readouterr().err.splitlines()] == warned


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "message"),
    [
        (None, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], "chat template"),
        (CHATML, "a", [{"role": "assistant", "content": "b"}], "both"),
        (CHATML, "a", "\ud800", "surrogate"),
        (LLAMA2, [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], "'user': the last"),
        (LLAMA2, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], "must alternate"),
        (
            "{{ messages | length }}",
            [{"role": "user", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
            "no start",
        ),
    ],
)
def test_what_is_no_text(template: str | None, prompt: object, completion: object, message: str) -> None:
    tokenizer = chat_tokenizer(template or CHATML)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        as_text(tokenizer, prompt, completion)
