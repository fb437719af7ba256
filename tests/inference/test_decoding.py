"""Methods that choose or steer text by a reward model: whom they drop, what they choose, and what they report."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gcrm_fast import Policy, RewardModel
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import CUT, OWN_END, Completion
from gcrm_fast.data.ends import End
from gcrm_fast.data.sources import BadRecords
from gcrm_fast.inference.decoding import Result, Text, Update, decode
from gcrm_fast.inference.generation import Row, Sampling, Writer
from gcrm_fast.inference.judging import Goals, Judge, goals_of
from gcrm_fast.inference.methods import UNJUDGED, Method
from support import models, policies
from support.small import small_config, small_model

PROMPTS = ["one two", "three, four", "five", "six; seven one"]
SAMPLING = Sampling(max_new_tokens=40, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return policies.save(tmp_path_factory.mktemp("policies") / "llama", ends=0.7)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy.from_pretrained(folder, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return RewardModel.from_pretrained(path, device="cpu")


@pytest.fixture(scope="module")
def goals() -> Goals:
    return Goals.of([(torch.randn(32, generator=torch.Generator().manual_seed(1)), 1.0)])


def results(policy: Policy, reward: RewardModel | None, method: Method, **more: object) -> list[Result]:
    found = decode(policy, PROMPTS, reward=reward, method=method, **{"sampling": SAMPLING, **more})
    return sorted((one for one in found if isinstance(one, Result)), key=lambda one: one.prompt)


def judged(reward: RewardModel, goals: Goals, prompt: str, text: Text) -> tuple[float, np.ndarray]:
    """Reward and Q-values of a sample's ids, by one forward."""
    [start] = reward.encode([prompt], [""], [True])
    ended = text.ids[-1] == policies.EOS
    ids = [*start.ids, *text.ids, *([] if ended or text.ending != "stop" else [policies.EOS])]
    completion = Completion(np.array(ids, dtype=np.int32), len(start.ids), OWN_END if ended else CUT)
    [one] = reward.judge([completion], goals_GD=goals.states_GD)
    assert one.q_Gn is not None
    return one.reward, (goals.weights_G @ one.q_Gn)[: len(text.ids)]


def plain(policy: Policy, samples: int) -> list[list[tuple[int, ...]]]:
    ids = policy.generate_ids(
        [ids for ids in policy.encode(PROMPTS) for _ in range(samples)], max_new_tokens=40, temperature=1.0, seed=3
    )
    return [[tuple(one) for one in ids[a : a + samples]] for a in range(0, len(ids), samples)]


def test_samples_need_no_reward_model(policy: Policy, folder: Path) -> None:
    found = results(policy, None, Method(kind="sample", samples=3))
    assert [[text.ids for text in one.texts] for one in found] == plain(policy, 3)
    assert [one.chosen for one in found] == [0] * 4
    theirs = LlamaForCausalLM.from_pretrained(folder).double()
    for prompt, one in zip(policy.encode(PROMPTS), found, strict=True):
        assert one.policy_tokens == sum(len(text.ids) for text in one.texts)
        assert (one.reward_tokens, one.saved_tokens) == (0, 0)
        for text in one.texts:
            assert text.ending == ("stop" if text.ids[-1] == policies.EOS else "length")
            whole = torch.tensor([[*prompt, *text.ids]])
            log_p = theirs(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = log_p.gather(1, whole[0, len(prompt) :, None]).sum().detach()
            assert text.log_p == pytest.approx(float(chosen), abs=1e-5)


@pytest.mark.parametrize("every", [0, 1, 7])
def test_best_of_n_is_the_greatest_reward_of_a_whole_text(
    policy: Policy, reward: RewardModel, goals: Goals, every: int
) -> None:
    found = results(policy, reward, Method(samples=6, every=every), goals=goals)
    assert [[text.ids for text in one.texts] for one in found] == plain(policy, 6)
    for prompt, one in zip(PROMPTS, found, strict=True):
        for text in one.texts:
            expected, q_n = judged(reward, goals, prompt, text)
            assert text.reward == pytest.approx(expected, abs=1e-5)
            np.testing.assert_allclose(text.q_n, q_n, rtol=0, atol=1e-5)
            assert "".join(text.texts_n).removesuffix("<|eos|>") == text.text
        whole = [text for text in one.texts if text.ending == "stop"]
        if whole:
            assert one.texts[one.chosen] == max(whole, key=lambda text: text.reward or 0.0)
        else:
            assert one.texts[one.chosen] == max(one.texts, key=lambda text: text.q_n[-1])
    assert {text.ending for one in found for text in one.texts} == {"stop", "length"}


def first_low(text: Text, q_n: Sequence[float], threshold: float) -> int | None:
    return next((i for i, q in enumerate(q_n) if i >= UNJUDGED and q < threshold), None)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.9])
def test_filter_drops_whom_it_should_when_it_should(
    policy: Policy, reward: RewardModel, goals: Goals, every: int, threshold: float
) -> None:
    whole = results(policy, reward, Method(samples=8), goals=goals)
    found = results(policy, reward, Method(kind="filter", samples=8, threshold=threshold, every=every), goals=goals)
    dropped = 0
    for unfiltered, one in zip(whole, found, strict=True):
        survivors = [text for text in one.texts if text.ending != "dropped"]
        assert survivors
        for before, text in zip(unfiltered.texts, one.texts, strict=True):
            low = first_low(before, before.q_n, threshold)
            assert text.ids == before.ids[: len(text.ids)]
            if text.ending == "dropped":
                dropped += 1
                assert low is not None
                look = min(-(-(low + 1) // every) * every, len(before.ids))
                assert len(text.ids) == look
                assert text.reward is None
            else:
                assert text.ids == before.ids
                assert text.reward == pytest.approx(before.reward, abs=1e-5)
                assert low is None or len(survivors) == 1
        assert one.policy_tokens == sum(len(text.ids) for text in one.texts)
        assert one.texts[one.chosen] in survivors
        usual = np.mean([len(text.ids) for text in survivors])
        lost = [max(0, usual - len(text.ids)) for text in one.texts if text.ending == "dropped"]
        assert one.saved_tokens == round(sum(lost))
    assert dropped > (20 if threshold == 0.9 else 0)


def test_the_last_row_of_a_filter_has_the_greatest_minimum(policy: Policy, reward: RewardModel, goals: Goals) -> None:
    """All fall below 1 at once: the one with the best running minimum at that look stays to the end."""
    whole = results(policy, reward, Method(samples=8), goals=goals)
    found = results(policy, reward, Method(kind="filter", samples=8, threshold=1.0, every=8), goals=goals)
    for unfiltered, one in zip(whole, found, strict=True):
        lowest = [
            min((text.q_n[UNJUDGED:8] if len(text.ids) > UNJUDGED else ()), default=np.inf) for text in unfiltered.texts
        ]
        [survivor] = [text for text in one.texts if text.ending != "dropped"]
        assert lowest[survivor.number] == pytest.approx(max(lowest), abs=1e-5)
        assert survivor.ids == unfiltered.texts[survivor.number].ids


@pytest.mark.parametrize("seed", [3, 7])
def test_rejection_halves_at_checkpoints(policy: Policy, reward: RewardModel, goals: Goals, seed: int) -> None:
    sampling = replace(SAMPLING, seed=seed)
    whole = results(policy, reward, Method(samples=9), goals=goals, sampling=sampling)
    method = Method(kind="reject", samples=9, checkpoints=(6, 12, 20), every=0)
    kept_of = results(policy, reward, method, goals=goals, sampling=sampling)
    for unfiltered, one in zip(whole, kept_of, strict=True):
        alive = list(unfiltered.texts)
        for checkpoint in (6, 12, 20):
            if all(len(text.ids) < checkpoint or text.ids[checkpoint - 1] == policies.EOS for text in alive):
                break  # nobody is writing any more
            q = {}
            for text in alive:
                n = min(checkpoint, len(text.ids))
                q[text.number] = text.q_n[n - 1 - (text.ids[n - 1] == policies.EOS)]  # never the end token
            alive = sorted(alive, key=lambda text: q[text.number], reverse=True)[: -(-len(alive) // 2)]
        kept = [text for text in one.texts if text.ending != "dropped"]
        assert {text.number for text in kept} == {text.number for text in alive}
        ended = [text for text in kept if text.ending == "stop"]
        if ended:
            assert one.texts[one.chosen] == max(ended, key=lambda text: text.reward or 0.0)


def step_start(policy: Policy, text: Text, longest: int) -> int:
    """Where the last step of a text begins: each ends with a line feed or after ``longest`` tokens."""
    start = 0
    for i in range(1, len(text.ids)):
        if i - start == longest or "\n" in policy.tokenizer.decode(text.ids[start:i]).lstrip("\n"):
            start = i
    return start


@pytest.mark.parametrize("step_q", ["last", "mean"])
def test_beams_continue_those_with_the_best_scores(
    policy: Policy, reward: RewardModel, goals: Goals, step_q: str
) -> None:
    """Replays the selection from what every beam, dropped ones included, had written at the end of each step."""
    method = Method(kind="beams", beams=3, per_beam=2, step_tokens=6, steps=4, alpha=2.0, step_q=step_q)
    for prompt, one in zip(PROMPTS, results(policy, reward, method, goals=goals), strict=True):
        texts = {text.number: text for text in one.texts}
        assert max(len(text.ids) for text in one.texts) <= 24
        assert set(range(6)) <= texts.keys()
        for text in one.texts:
            _, q_n = judged(reward, goals, prompt, text)
            np.testing.assert_allclose(text.q_n, q_n, rtol=0, atol=1e-5)
            if text.parent:
                number, tokens = text.parent
                assert text.ids[:tokens] == texts[number].ids[:tokens]
                assert text.ids != texts[number].ids or len(text.ids) == tokens
                assert len(texts[number].ids) >= tokens
        finished = [text for text in one.texts if text.ending != "dropped"]
        assert len(finished) <= 3

        def score(text: Text) -> float:
            content = text.q_n[: len(text.q_n) - (text.ids[-1] == policies.EOS)]
            start = step_start(policy, text, 6)
            step = content[start:] or content[-1:]
            return text.log_p / len(text.ids) + 2.0 * (step[-1] if step_q == "last" else float(np.mean(step)))

        best = max(finished, key=score)
        assert score(one.texts[one.chosen]) == pytest.approx(score(best), abs=1e-9)
        worst = min(map(score, finished))
        for text in one.texts:  # a text that was dropped in the last step is worse than those that were kept
            if text.ending == "dropped" and len(text.ids) > 18 and text.text not in {kept.text for kept in finished}:
                assert score(text) <= worst + 1e-9


def test_beams_without_q_follow_the_likelihood_and_merge_duplicates(policy: Policy, reward: RewardModel) -> None:
    greedy = Sampling(max_new_tokens=24)
    method = Method(kind="beams", step_tokens=6, steps=4, alpha=0.0)
    found = results(policy, reward, method, sampling=greedy)
    expected = policy.generate_ids(policy.encode(PROMPTS), max_new_tokens=24)
    for one, ids in zip(found, expected, strict=True):
        assert list(one.texts[one.chosen].ids) == ids
        assert sum(text.ending != "dropped" for text in one.texts) == 1  # all wrote the same


def test_a_step_ends_at_a_line_feed(policy: Policy, reward: RewardModel) -> None:
    method = Method(kind="beams", beams=2, per_beam=2, step_tokens=12, steps=3)
    found = results(policy, reward, method, sampling=replace(SAMPLING, max_new_tokens=36))
    forks = [text for one in found for text in one.texts if text.parent]
    assert forks
    at_line_feed = [text for text in forks if text.parent and text.parent[1] % 12]
    assert at_line_feed
    for text in at_line_feed:
        assert text.parent is not None
        assert "\n" in policy.tokenizer.decode(text.ids[: text.parent[1]][-1:])


KINDS = [("best-of-n", 0.0), ("filter", -0.2), ("filter", 0.0), ("filter", 1.0), ("reject", 0.0), ("beams", 0.0)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("kind", "threshold"), KINDS)
def test_texts_do_not_depend_on_the_batch(
    policy: Policy, reward: RewardModel, goals: Goals, kind: Any, threshold: float, rows: int
) -> None:
    steps = {"beams": 2, "step_tokens": 5, "steps": 5, "checkpoints": (8, 16), "every": 4}
    method = Method(kind=kind, samples=4, threshold=threshold, **steps)
    for seed, stop in ((3, ()), (36, (" ",))):
        more: dict[str, Any] = {"goals": goals, "sampling": replace(SAMPLING, seed=seed, stop=stop)}
        both = (results(policy, reward, method, **more, rows=count) for count in (64, rows))
        check_equal(*both)


def check_equal(together: list[Result], few: list[Result]) -> None:
    for a, b in zip(together, few, strict=True):
        assert [text.ids for text in a.texts] == [text.ids for text in b.texts]
        assert [text.ending for text in a.texts] == [text.ending for text in b.texts]
        assert (a.chosen, a.policy_tokens, a.reward_tokens) == (b.chosen, b.policy_tokens, b.reward_tokens)


@pytest.mark.parametrize(("kind", "threshold"), KINDS[:4])
def test_a_cache_of_two_rows_is_enough(
    policy: Policy, reward: RewardModel, goals: Goals, monkeypatch: pytest.MonkeyPatch, kind: Any, threshold: float
) -> None:
    method = Method(kind=kind, samples=10, threshold=threshold, every=4)
    expected = results(policy, reward, method, goals=goals)
    longest = max(len(ids) for ids in policy.encode(PROMPTS))
    monkeypatch.setattr(policy, "cache_tokens", longest + 2 * SAMPLING.max_new_tokens)
    found = results(policy, reward, method, goals=goals)
    for a, b in zip(found, expected, strict=True):
        assert [(text.ids, text.ending) for text in a.texts] == [(text.ids, text.ending) for text in b.texts]
    monkeypatch.setattr(policy, "cache_tokens", 60)
    if kind == "filter":  # one may wait
        with pytest.raises(UserError, match="with 2 texts of 40 tokens more than the cache of 60 tokens"):
            results(policy, reward, method, goals=goals)
    else:
        assert [one.chosen for one in results(policy, reward, method, goals=goals)] == [one.chosen for one in expected]


@pytest.mark.parametrize(("kind", "most"), [("filter", 0.0), ("best-of-n", 0.0), ("reject", 0.5)])
def test_places_of_dropped_samples_are_taken_by_those_that_wait(
    policy: Policy, reward: RewardModel, goals: Goals, monkeypatch: pytest.MonkeyPatch, kind: Any, most: float
) -> None:
    """In how many steps in which rows may start, while samples still wait, are places free all the same?"""
    running: list[int] = []
    waiting: list[bool] = []
    step = Writer.step

    def noted(writer: Writer) -> list[Row]:
        written = step(writer)
        if (writer.steps - 1) % 4 == 0:
            running.append(len(written))
            waiting.append(bool(writer.waiting))
        return written

    monkeypatch.setattr(Writer, "step", noted)
    results(policy, reward, Method(kind=kind, samples=4, every=4, checkpoints=(8,)), goals=goals, rows=6)
    short = [count < 6 for count, more in zip(running, waiting, strict=True) if more]
    assert len(short) > 3
    assert (np.mean(short) > most) == (kind == "reject")


def test_updates_tell_the_whole_story(policy: Policy, reward: RewardModel, goals: Goals) -> None:
    method = Method(kind="filter", samples=5, every=3, threshold=0.0)
    story: dict[tuple[int, int], tuple[str, list[float], bool]] = {}
    for one in decode(policy, PROMPTS, reward=reward, method=method, sampling=SAMPLING, goals=goals):
        if isinstance(one, Update):
            text, q_n, _ = story.get((one.prompt, one.number), ("", [], False))
            story[one.prompt, one.number] = text + one.text, [*q_n, *one.q_m], one.dropped
        else:
            for text in one.texts:
                assert story[one.prompt, text.number] == (text.text, list(text.q_n), text.ending == "dropped")


@pytest.fixture(scope="module")
def other_reward(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """A reward model with another tokenizer than the policy's."""
    path, config = tmp_path_factory.mktemp("models") / "other", small_config(vocab_size=320, num_hidden_layers=2)
    model = small_model(config, torch.float32)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_model(path, state, config, policies.other_tokenizer(), torch.ones(32), 3)
    return RewardModel.from_pretrained(path, device="cpu")


def judged_row(policy: Policy, reward: RewardModel, prompt: str) -> tuple[Row, Judge]:
    """A row of the prompt, whose text a test may set, and the judge that reads it."""
    writer = Writer(policy, SAMPLING, rows=1, with_text=True)
    writer.add(policy.encode([prompt])[0], 1, "prompt 0")
    [row] = writer.step()
    judge = Judge(reward, goals_of(reward, {}), policy, limit=1000)
    judge.add([row], judge.open(judge.read(prompt)), room=0)
    return row, judge


def test_text_that_grows_is_encoded_again_where_tokens_merge(policy: Policy, other_reward: RewardModel) -> None:
    row, judge = judged_row(policy, other_reward, "one")
    lengths = []
    for text in ("", "; se", "; sev", "; seven s", "; seven six", "; seven six f", "; seven six four"):
        row.text = text
        judge.look([row])
        [q_n] = other_reward.q_values(["one"], [text])
        np.testing.assert_allclose(judge.q_n(row), q_n[:-1], rtol=0, atol=1e-5)
        assert "".join(judge.token_texts(row)) == text
        lengths.append(len(q_n))
    assert judge.tokens > lengths[-1] + 3  # some were read again


def test_a_token_that_no_longer_joins_prompt_and_text_is_the_prompts(policy: Policy, other_reward: RewardModel) -> None:
    prompt, texts = "one tw", ("", "o", "one")
    starts = [other_reward.encode([prompt], [text], [True])[0].start for text in texts]
    assert starts[1] < starts[0] == starts[2]
    row, judge = judged_row(policy, other_reward, prompt)
    for text in texts:
        row.text = text
        judge.look([row])
        [q_n] = other_reward.q_values([prompt], [text])
        np.testing.assert_allclose(judge.q_n(row), q_n[:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("end", [None, End("transformers", policies.EOS)])
def test_a_cut_row_without_text_gets_the_reward_of_an_empty_one(
    policy: Policy, other_reward: RewardModel, monkeypatch: pytest.MonkeyPatch, end: End | None
) -> None:
    monkeypatch.setattr(other_reward, "end", end or other_reward.end)
    row, judge = judged_row(policy, other_reward, "one")
    row.text, row.ending = "", "length"  # a part of a character, which has no text yet
    judge.look([row])
    assert judge.rewards([row]) == [pytest.approx(float(other_reward.score(["one"], [""])[0]), abs=1e-5)]


def test_two_tokenizers_meet_in_the_text(policy: Policy, other_reward: RewardModel) -> None:
    reward = other_reward
    for method in (Method(samples=4, every=3), Method(kind="beams", beams=2, step_tokens=5, steps=4)):
        for prompt, one in zip(PROMPTS, results(policy, reward, method), strict=True):
            for text in one.texts:
                [q_n] = reward.q_values([prompt], [text.text])
                np.testing.assert_allclose(text.q_n, q_n[:-1], rtol=0, atol=1e-5)  # without the end token
                assert "".join(text.texts_n) == text.text
                if text.ending == "stop":
                    assert text.reward == pytest.approx(float(reward.score([prompt], [text.text])[0]), abs=1e-5)


def test_a_reward_model_of_another_project_is_read_where_its_trainer_read_it(
    policy: Policy, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "end", End("transformers", policies.EOS))
    for prompt, one in zip(PROMPTS, results(policy, reward, Method(samples=3)), strict=True):
        for text in one.texts:
            if text.ending == "stop":
                assert text.reward == pytest.approx(float(reward.score([prompt], [text.text])[0]), abs=1e-5)


def test_a_stop_token_of_the_policy_alone_is_not_read(
    policy: Policy, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = frozenset(range(60, 90))
    monkeypatch.setattr(policy, "stop_ids", stops | {policies.EOS})
    ended = 0
    for prompt, one in zip(PROMPTS, results(policy, reward, Method(samples=4)), strict=True):
        [start] = reward.encode([prompt], [""], [True])
        for text in one.texts:
            if text.ids[-1] not in stops:
                continue
            ended += 1
            ids = [*start.ids, *text.ids[:-1], policies.EOS]
            [own] = reward.judge([Completion(np.array(ids, dtype=np.int32), len(start.ids), OWN_END)])
            assert text.reward == pytest.approx(own.reward, abs=1e-5)
            assert "".join(text.texts_n) == text.text
    assert ended > 4


def test_messages_to_a_reward_model_of_another_project(
    policy: Policy, reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template writes a line feed after each turn, where rewards are read."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(reward, "end", End("transformers", policies.EOS))
    for tokenizer in (policy.tokenizer, reward.tokenizer):
        monkeypatch.setattr(tokenizer, "chat_template", template)
    asked = [{"role": "user", "content": "one two"}]
    sampling = replace(SAMPLING, stop=("e", "o"))
    found = list(decode(policy, [asked], reward=reward, method=Method(samples=8), sampling=sampling))
    assert isinstance(found[-1], Result)
    ended = [text for text in found[-1].texts if text.ending == "stop"]
    assert ended
    expected = reward.score(asked, [text.text for text in ended])
    np.testing.assert_allclose([text.reward for text in ended], expected, rtol=0, atol=1e-5)


def test_several_goals_and_controls(policy: Policy, reward: RewardModel) -> None:
    a, b = torch.randn(2, 32)
    both = Goals.of([(a, 3.0), (b, -1.0)])
    np.testing.assert_allclose(both.weights_G, [0.75, -0.25])
    method = Method(samples=2)

    def q_of(goals: Goals) -> list[np.ndarray]:
        return [np.array(text.q_n) for one in results(policy, reward, method, goals=goals) for text in one.texts]

    only_a, only_b = q_of(Goals.of([(a, 1.0)])), q_of(Goals.of([(b, 2.0)]))
    for mixed, opposite, of_a, of_b in zip(q_of(both), q_of(both.opposite()), only_a, only_b, strict=True):
        np.testing.assert_allclose(mixed, 0.75 * of_a - 0.25 * of_b, atol=1e-6)
        np.testing.assert_allclose(opposite, -mixed, atol=1e-6)
    shuffled = both.shuffled(seed=4)
    assert not torch.equal(shuffled.states_GD, both.states_GD)
    torch.testing.assert_close(shuffled.states_GD.sort(1).values, both.states_GD.sort(1).values)
    torch.testing.assert_close(shuffled.states_GD @ shuffled.states_GD.T, both.states_GD @ both.states_GD.T)
    with pytest.raises(UserError, match="the weights of the goals are 0"):
        Goals.of([(a, 0.0)])


def test_errors_name_the_prompt(policy: Policy, reward: RewardModel) -> None:
    with pytest.raises(UserError, match="the method filter needs a reward model"):
        results(policy, None, Method(kind="filter"))
    with pytest.raises(UserError, match=r"prompt 0 has \d+ tokens: with 9999 texts of 40 tokens more than the cache"):
        results(policy, reward, Method(kind="reject", samples=9999))
    named = ["a:1", "b:7", "c:2", "d:9"]
    with pytest.raises(UserError, match=r"a:1 has \d+ tokens: with 9999 texts of 40 tokens more than the cache"):
        results(policy, reward, Method(kind="reject", samples=9999), names=named)
    with pytest.raises(ValueError, match="3 names for 4 prompts: must be equally many"):
        decode(policy, PROMPTS, reward=reward, names=named[:3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "best_of_n"}, "kind is 'best_of_n': must be one of sample, best-of-n, filter, reject, beams"),
        ({"samples": 0}, "samples is 0: must be at least 1"),
        ({"every": -4}, "every is -4: must be 0 or more"),
        ({"keep": 0.0}, "keep is 0.0: must be more than 0 and at most 1"),
        ({"keep": 1.5}, "keep is 1.5: must be more than 0 and at most 1"),
        ({"checkpoints": (8, 0)}, "checkpoints is (8, 0): must be numbers of tokens, each at least 1"),
        ({"beams": 0}, "beams is 0: must be at least 1"),
        ({"per_beam": 0}, "per_beam is 0: must be at least 1"),
        ({"step_tokens": 0}, "step_tokens is 0: must be at least 1"),
        ({"steps": 0}, "steps is 0: must be at least 1"),
        ({"step_q": "max"}, "step_q is 'max': must be one of last, mean"),
    ],
)
def test_values_that_no_method_accepts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Method(**values)
    assert str(raised.value) == message
    assert Method(every=0, keep=1.0, checkpoints=(1,), samples=1, beams=1, per_beam=1, step_tokens=1, steps=1).rows == 1


def test_prompts_too_long_for_the_reward_model_are_found_before_the_first_token(
    policy: Policy, reward: RewardModel, other_reward: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sliding window with the tokens that follow, and a cache that the prompt alone fills in another tokenizer."""

    def skipped(model: RewardModel, prompt: str) -> str:
        bad = BadRecords(skip=True)
        sampling = replace(SAMPLING, max_new_tokens=4)
        found = decode(policy, ["six", prompt], reward=model, method=Method(samples=2), sampling=sampling, bad=bad)
        assert [one.prompt for one in found if isinstance(one, Result)] == [0]
        return bad.skipped[0]

    monkeypatch.setattr(reward, "config", replace(reward.config, sliding_window=8))
    assert re.search(
        "prompt 1: .* with 4 new ones more than its sliding window of 8", skipped(reward, "one two three four")
    )
    long = "one two three four, five six; seven" * 12
    count = len(policy.encode([long])[0])
    assert count + 8 < len(other_reward.encode([long], [""], [True])[0].ids)
    monkeypatch.setattr(policy, "cache_tokens", count + 8)
    assert "tokens to the reward model, whose cache has" in skipped(other_reward, long)


def test_one_prompt_is_no_list(policy: Policy) -> None:
    with pytest.raises(TypeError, match="prompts must be a list: put a single prompt into a list"):
        decode(policy, "one", method=Method(kind="sample", samples=1))
