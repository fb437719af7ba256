"""A saved folder in other people's programs: the same rewards in transformers however it is batched and padded."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from chat import TEMPLATES, chat_tokenizer
from conftest import small_config, small_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from gcrm_fast import checkpoint
from gcrm_fast.data import ADDED_END, CUT, OWN_END, Completion, TokenizedPair, encode_completions
from gcrm_fast.model import LlamaRewardModel
from gcrm_fast.packing import Sampling, build_pack
from gcrm_fast.tokenization import choose_pad

QUESTIONS = ("hello?", "", "world café hello 1 2 3")
ANSWERS = ("yes.", "hello world 123 yes yes yes.", "漢字", "no no no no no no no no no no no.")
EOS = "<|eos|>"
TEXTS = {  # prompt, completion, cut
    OWN_END: [(q, a + EOS, False) for q in QUESTIONS for a in ANSWERS],
    ADDED_END: [(q, a, False) for q in QUESTIONS for a in ANSWERS],
    CUT: [(q, a, True) for q in QUESTIONS for a in ANSWERS],
}


class Saved(NamedTuple):
    """A model saved by us and its tokenizer, with a chat template."""

    folder: Path
    model: LlamaRewardModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module", params=TEMPLATES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    tokenizer = chat_tokenizer(TEMPLATES[request.param])
    config = small_config(vocab_size=len(tokenizer))
    model = small_model(config, torch.float32)
    choose_pad(tokenizer, config.vocab_size, "test")
    folder = tmp_path_factory.mktemp("saved") / "model"
    state = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.save_model(folder, state, config, tokenizer, torch.ones(config.hidden_size), 1)
    return Saved(folder, model, tokenizer)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rewards_here(model: LlamaRewardModel, encoded: list[Completion]) -> torch.Tensor:
    """[N], each sequence alone."""
    with torch.no_grad():
        return torch.cat([model(build_pack([[TokenizedPair(0, c.ids, c.ids, c.start, c.start, 0.0, 0, {})]],
                                           Sampling(), 0)).reward_2N[0] for c in encoded])  # fmt: skip


@pytest.mark.parametrize("ending", TEXTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rewards_in_transformers_whatever_the_batch(saved: Saved, ending: int, side: str) -> None:
    encoded = encode_completions(saved.tokenizer, *zip(*TEXTS[ending], strict=True))
    assert {c.ending for c in encoded} == {ending}
    expected = rewards_here(saved.model, encoded)
    theirs = AutoModelForSequenceClassification.from_pretrained(saved.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved.folder, padding_side=side)
    for size in range(1, 9):
        found = []
        for a in range(0, len(encoded), size):
            batch = tokenizer.pad({"input_ids": [c.ids.tolist() for c in encoded[a : a + size]]}, return_tensors="pt")
            with torch.no_grad():
                found.append(theirs(**batch).logits[:, 0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


def test_text_gives_the_same_tokens_in_transformers(saved: Saved) -> None:
    """With the end token in the text, as README says; a cut completion without."""
    tokenizer = AutoTokenizer.from_pretrained(saved.folder)
    for ending, texts in TEXTS.items():
        for (prompt, completion, _), ours in zip(
            texts, encode_completions(saved.tokenizer, *zip(*texts, strict=True)), strict=True
        ):
            theirs = tokenizer(prompt + completion + (EOS if ending == ADDED_END else ""))["input_ids"]
            assert theirs == ours.ids.tolist()


def test_conversations_in_transformers(saved: Saved) -> None:
    """Through the chat template, without the white space that some write after the last end token."""
    tokenizer = AutoTokenizer.from_pretrained(saved.folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(saved.folder, dtype=torch.float32).eval()
    for question in QUESTIONS:
        for answer in ANSWERS:
            text = tokenizer.apply_chat_template(conversation(question, answer), tokenize=False).rstrip()
            prompt = tokenizer.apply_chat_template(
                conversation(question, answer)[:1], tokenize=False, add_generation_prompt=True
            )
            assert text.startswith(prompt)
            (ours,) = encode_completions(saved.tokenizer, [prompt], [text.removeprefix(prompt)])
            assert ours.ending == OWN_END
            bos = tokenizer.bos_token or ""
            ids = tokenizer(text.removeprefix(bos), return_tensors="pt")["input_ids"]
            np.testing.assert_array_equal(ids[0], ours.ids)
            with torch.no_grad():
                reward = theirs(ids).logits[0]
            torch.testing.assert_close(reward, rewards_here(saved.model, [ours]), rtol=1e-4, atol=1e-5)
