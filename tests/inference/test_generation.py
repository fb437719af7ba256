"""Text of a policy: transformers' tokens, sampled tokens that do not depend on the batch, ends, limits and errors."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from gcrm_fast import Policy
from gcrm_fast.common.errors import UserError
from gcrm_fast.inference.generation import Sampling, Writer, next_tokens
from model.test_families import MODELS
from model.test_families import saved as saved_family
from model.test_parity import CONFIGS, theirs_of
from support import models
from support.folders import VOCAB, tokenizer
from support.small import small_config

EOS = 1


def saved(folder: Path, **more: Any) -> PreTrainedModel:
    """A random Llama with an lm_head, by transformers."""
    theirs = theirs_of(small_config(vocab_size=VOCAB), LlamaForCausalLM, eos_token_id=EOS, **more)
    theirs.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("policies") / "llama"
    saved(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy.from_pretrained(folder, device="cpu", dtype="float64")


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[0, *rng.integers(3, VOCAB, size=rng.integers(1, longest)).tolist()] for _ in range(count)]


def greedy(theirs: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """transformers' continuation by its most likely tokens."""
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = EOS, 2
    whole = theirs.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_tokens_are_those_of_transformers(changes: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    theirs = theirs_of(
        small_config(vocab_size=VOCAB, **changes), LlamaForCausalLM, tie_word_embeddings=tied, eos_token_id=EOS
    )
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    asked = prompts(6)
    written = Policy.from_pretrained(tmp_path, device="cpu").generate_ids(asked, max_new_tokens=20, temperature=0)
    assert written == [greedy(theirs, ids, 20) for ids in asked]


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_of_every_family(model: str, tmp_path: Path) -> None:
    theirs = saved_family(tmp_path, model, AutoModelForCausalLM)
    tokenizer().save_pretrained(tmp_path)
    asked = [[token % theirs.config.vocab_size for token in ids] for ids in prompts(5)]
    written = Policy.from_pretrained(tmp_path, device="cpu", dtype="float32").generate_ids(asked, max_new_tokens=12)
    assert written == [greedy(theirs, ids, 12) for ids in asked]


def test_a_stop_token_ends_a_text_and_is_its_last(folder: Path, tmp_path: Path) -> None:
    theirs = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs.lm_head.weight[EOS] = 0.6 * theirs.lm_head.weight[50:90].sum(0)
    shutil.copytree(folder, tmp_path / "m")
    theirs.save_pretrained(tmp_path / "m")
    asked = prompts(16)
    written = Policy.from_pretrained(tmp_path / "m", device="cpu").generate_ids(asked, max_new_tokens=30, rows=3)
    assert written == [greedy(theirs, ids, 30) for ids in asked]
    assert len({len(ids) for ids in written}) > 2
    assert all((len(ids) == 30) != (ids[-1] == EOS) for ids in written)


SAMPLED = {"max_new_tokens": 25, "temperature": 0.9, "seed": 7}


@pytest.mark.parametrize("more", [{}, {"top_p": 0.8}, {"top_k": 9}, {"top_k": 30, "top_p": 0.7}])
def test_a_sample_does_not_depend_on_its_batch(policy: Policy, more: dict[str, Any], folder: Path) -> None:
    asked = [*prompts(4), *prompts(3), prompts(1)[0]]  # some occur several times
    together = policy.generate_ids(asked, **SAMPLED, **more)
    order = [3, 7, 5, 0, 1, 6, 2, 4]
    narrow = Policy.from_pretrained(folder, device="cpu", dtype="float64", tokens_per_batch=16, cache_tokens=200)
    shuffled = narrow.generate_ids([asked[i] for i in order], **SAMPLED, rows=3, **more)
    for i in (2, 3, 1, 6, 5):  # equal prompts are interchangeable: compare them as sets below
        same = [j for j, ids in enumerate(asked) if ids == asked[i]]
        theirs = [shuffled[order.index(j)] for j in same]
        assert sorted(together[j] for j in same) == sorted(theirs)
    assert policy.generate_ids([asked[3]], **SAMPLED, **more) == [together[3]]
    equal = [together[i] for i, ids in enumerate(asked) if ids == asked[0]]
    assert len(equal) == 3
    assert len({tuple(ids) for ids in equal}) == 3  # each another sample
    assert policy.generate_ids(asked, **SAMPLED | {"seed": 8}, **more) != together


def test_prompts_differ_in_their_random_numbers(policy: Policy) -> None:
    writer = Writer(policy, Sampling(temperature=1.0), rows=9)
    groups = [writer.add(ids, 2, "prompt") for ids in prompts(2)]
    writer.step()
    assert len({row.random.random() for group in groups for row in group.rows}) == 4


def test_samples_follow_the_models_probabilities(policy: Policy) -> None:
    """The first token of many samples, against the softmax of transformers' logits."""
    [ids] = prompts(1)
    first = [row[0] for row in policy.generate_ids([ids] * 3000, max_new_tokens=1, temperature=1.3, rows=500)]
    with torch.no_grad():
        hidden = policy.network.logits(_states(policy, ids)[-1:])[0]
    expected = (hidden / 1.3).softmax(-1).numpy()
    observed = np.bincount(first, minlength=VOCAB) / len(first)
    error = np.abs(observed - expected) / np.sqrt(expected * (1 - expected) / len(first))
    assert error.max() < 4.5


def _states(policy: Policy, ids: list[int]) -> torch.Tensor:
    from gcrm_fast.inference.cached import CachedTrunk, Continuation

    trunk = CachedTrunk(policy.network.model, "eager", tokens=1000)
    return trunk.extend([Continuation(trunk.open(), ids)])[0]


def test_top_k_and_top_p_are_those_of_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(4, 1000, dtype=torch.float64)
    logits[3] = 0.01 * torch.randn(1000)  # so flat that top-p looks at more than the shortlist
    for top_k, top_p in ((0, 0.9), (12, 1.0), (40, 0.6), (0, 0.05)):
        kept = TemperatureLogitsWarper(0.7)(None, logits)
        kept = TopKLogitsWarper(top_k)(None, kept) if top_k else kept
        kept = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
        expected = kept.softmax(-1)
        sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
        grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        counts = torch.zeros_like(expected)
        for row in range(4):
            tokens, _ = next_tokens(logits[row].expand(len(grid), -1), sampling, grid)
            counts[row] = torch.bincount(tokens, minlength=1000) / len(grid)
        torch.testing.assert_close(counts, expected, rtol=0, atol=1.01 / 20000)


def test_top_p_of_a_row_does_not_depend_on_the_others() -> None:
    """Equal probabilities, as bfloat16 has many: one order for all rows, whether a flat row needs them all or not."""
    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(60, 2000, generator=random)).to(torch.bfloat16).float()
    uniform = torch.rand(60, dtype=torch.float64, generator=random)
    sampling = Sampling(temperature=1.0, top_p=0.95)
    flat = torch.zeros(1, 2000)
    alone = torch.cat([next_tokens(logits[i : i + 1], sampling, uniform[i : i + 1])[0] for i in range(60)])
    together, _ = next_tokens(torch.cat([flat, logits]), sampling, torch.cat([uniform[:1], uniform]))
    assert torch.equal(together[1:], alone)


def test_the_smallest_temperature_and_top_p_take_the_most_likely_token() -> None:
    logits = 3 * torch.randn(20, 300)
    uniform = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    for given in ({"temperature": 1e-39}, {"temperature": 1e-9}, {"temperature": 1.0, "top_p": 1e-50}):
        tokens, finite = next_tokens(logits, Sampling(**given), uniform)
        assert torch.equal(tokens, logits.argmax(1))
        assert finite.all()


def test_a_text_is_that_of_its_tokens_alone(policy: Policy) -> None:
    """Also after a prompt that ends like a part of a character, and of rows that fork inside of one."""
    for prompt in ("one two", "stop! one \ufffd", "\ufffd"):
        writer = Writer(policy, Sampling(max_new_tokens=24, temperature=1.0, seed=3), rows=64, with_text=True)
        [ids] = policy.encode([prompt])
        group = writer.add(ids, 4, "prompt 0")
        inside = 0
        while written := writer.step():
            for row in [one for one in written if not one.ending][:2]:
                inside += policy.tokenizer.decode(row.ids).endswith("\ufffd")
                if len(row.ids) % 5 == 1 and len(group.rows) < 40:
                    writer.running.append(writer.fork(row, len(group.rows)))
        assert inside > 3
        for row in group.rows:
            own = [token for token in row.ids if token not in policy.stop_ids]
            whole = policy.tokenizer.decode([*ids, *own])[len(policy.tokenizer.decode(ids)) :]
            assert whole.startswith(row.text)
            assert not whole[len(row.text) :].strip("\ufffd")  # not finished at the end


def test_a_finished_row_frees_its_place_at_once(policy: Policy) -> None:
    """Twelve rows of one prompt in a batch of four: no step has fewer rows than there are left."""
    writer = Writer(policy, Sampling(max_new_tokens=40, temperature=1.0, stop=("e", "1")), rows=4)
    [ids] = prompts(1)
    group = writer.add(ids, 12, "prompt 0")
    while written := writer.step():
        left = sum(not row.ending for row in group.rows) + len(group.numbers)
        assert len(written) == min(4, left + sum(bool(row.ending) for row in written))
        assert writer.trunk.cache.taken <= len(ids) + 4 * 40
    assert len(group.rows) == 12
    assert {row.ending for row in group.rows} == {"stop"}
    assert writer.trunk.computed == len(ids) + sum(len(row.ids) - 1 for row in group.rows)
    assert (writer.trunk.cache.taken, writer.reserved) == (0, 0)


def test_stop_texts_end_a_text_that_they_complete(policy: Policy) -> None:
    free = policy.generate(["one two", "three"], max_new_tokens=40, temperature=1.0, seed=5)
    stop = free[0][10:13]
    text, other = policy.generate(["one two", "three"], max_new_tokens=40, temperature=1.0, seed=5, stop=[stop, "§§"])
    assert free[0].startswith(text)
    assert stop in text
    assert text.index(stop) + len(stop) > len(text) - 12  # the token that completes it is the last
    assert other == free[1] or stop in other


def test_messages_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ours = tokenizer().__class__.from_pretrained(tmp_path / "m")
    ours.chat_template = template
    ours.save_pretrained(tmp_path / "m")
    chat = Policy.from_pretrained(tmp_path / "m", device="cpu")
    messages = [{"role": "user", "content": "one"}]
    assert chat.generate([messages]) == chat.generate(["<|bos|>[user]one<|eos|>[assistant]"])
    assert chat.encode([messages]) == [ours.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]]


def test_prompts_that_cannot_be_continued(policy: Policy, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 1 is empty, and the tokenizer adds no start token"):
        policy.generate_ids([[3], []])
    with pytest.raises(UserError, match="prompt 0 has a token that is not between 0 and 299"):
        policy.generate_ids([[VOCAB]])
    with pytest.raises(TypeError, match="must be a list"):
        policy.generate("one")
    assert policy.generate([]) == []
    assert policy.encode([""]) == [[0]]  # the start token
    short = Policy.from_pretrained(folder, device="cpu", cache_tokens=100)
    with pytest.raises(UserError, match="prompt 0 has 90 tokens: with a text of 11 tokens more than the cache of 100"):
        short.generate_ids([[3] * 90], max_new_tokens=11)
    texts = short.generate_ids([[token] * 90 for token in (3, 4, 5)], max_new_tokens=10)  # one after the other
    assert len(texts) == 3
    for wrong, message in (
        ({"temperature": -1.0}, "temperature is -1.0: must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0: must be more than 0 and at most 1"),
        ({"stop": [""]}, "must be a list of texts that are not empty"),
        ({"stop": "end"}, "must be a list of texts that are not empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: must be at least 1"),
        ({"rows": 0}, "rows is 0"),
    ):
        with pytest.raises(UserError, match=message):
            policy.generate_ids([[3]], **wrong)
    with pytest.raises(TypeError, match="top_q"):
        policy.generate(["one"], top_q=0.5)
    models.save(tmp_path / "rm")
    with pytest.raises(UserError, match="holds no lm_head: name a language model"):
        Policy.from_pretrained(tmp_path / "rm")


def test_logits_that_are_not_finite(folder: Path) -> None:
    broken = Policy.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        broken.network.model.embed_tokens.weight[9] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="prompt 1: the policy's logits are not finite"):
            broken.generate_ids([[3], [4, 9]], temperature=temperature)


def test_generation_config_adds_stop_tokens(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [1, 42]}')
    assert Policy.from_pretrained(tmp_path / "m", device="cpu").stop_ids == {1, 42}
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json: not valid JSON"):
        Policy.from_pretrained(tmp_path / "m", device="cpu")
