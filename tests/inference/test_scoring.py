"""RewardModel: rewards, Q-values and states of completions."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import gcrm_fast
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.packing import Item, build_score_pack, common_prefix
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.folders import VOCAB, llama, trunk
from support.serving import write_served_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def completions() -> tuple[list[str], list[str]]:
    return models.texts(29, prompts=4)


def test_a_reward_does_not_depend_on_company_order_or_packs(
    model: RewardModel, folder: Path, completions: tuple[list[str], list[str]]
) -> None:
    prompts, answers = completions
    goals = torch.randn(2, 32)
    encoded = model.encode(prompts, answers)
    alone = [model.judge([one], goals_GD=goals, per_token=True)[0] for one in encoded]
    assert np.std([j.reward for j in alone]) > 0.1
    small = RewardModel.from_pretrained(folder, device="cpu", tokens_per_batch=max(len(e.ids) for e in encoded))
    order = np.random.default_rng(0).permutation(len(encoded))
    for where in (model, small):
        together = where.judge([encoded[i] for i in order], goals_GD=goals, per_token=True)
        for i, judged in zip(order, together, strict=True):
            n = len(encoded[i].ids) - encoded[i].start
            assert judged.rewards_n is not None
            assert judged.q_Gn is not None
            assert judged.rewards_n.shape == (n,)
            assert judged.q_Gn.shape == (2, n)
            assert judged.reward == judged.rewards_n[-1]
            for ours, theirs in zip(judged[:3], alone[i][:3], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        ends_only = where.judge(encoded)
        assert all(j.rewards_n is None and j.q_Gn is None for j in ends_only)
        np.testing.assert_allclose([j.reward for j in ends_only], [j.reward for j in alone], rtol=0, atol=1e-5)


def test_rewards_are_those_of_transformers_on_the_same_text(
    model: RewardModel, folder: Path, completions: tuple[list[str], list[str]]
) -> None:
    prompts, answers = completions
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [p + a + tokenizer.eos_token for p, a in zip(*completions, strict=True)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0].numpy()
    rewards = model.score(prompts, answers)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=2e-5)


def test_states_and_q_values_are_what_they_say(
    model: RewardModel, folder: Path, completions: tuple[list[str], list[str]]
) -> None:
    prompts, answers = completions
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    goal = torch.randn(32)
    encoded, states = model.encode(prompts, answers), model.representations(prompts, answers)
    own, default = model.q_values(prompts, answers, goal), model.q_values(prompts, answers)
    named = model.q_values(prompts, answers, "default")
    for i, completion in enumerate(encoded):
        with torch.no_grad():
            ids = torch.from_numpy(completion.ids.astype(np.int64))[None]
            hidden = theirs.model(ids).last_hidden_state[0, completion.start :]
        np.testing.assert_allclose(states[i], hidden.numpy(), rtol=1e-4, atol=1e-4)
        cosine = torch.cosine_similarity(torch.from_numpy(states[i]), goal[None])
        np.testing.assert_allclose(own[i], cosine.numpy(), rtol=0, atol=1e-6)
        assert own[i].dtype == np.float32
        np.testing.assert_array_equal(default[i], named[i])
    assert np.abs(default[0] - own[0]).max() > 0.01
    expected = np.mean([state[-1] for state in states], axis=0)
    np.testing.assert_allclose(model.goal_state(encoded).numpy(), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no goal 'other': it has default"):
        model.q_values(prompts, answers, "other")


def test_a_head_and_projection_of_their_own_are_loaded(
    tmp_path: Path, completions: tuple[list[str], list[str]]
) -> None:
    network = models.save(tmp_path / "m", head="mlp", projection_size=5)
    model = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    prompts, answers = completions[0][:5], completions[1][:5]
    encoded = model.encode(prompts, answers)
    pack = build_score_pack([[Item(i, e.ids, e.start, "")] for i, e in enumerate(encoded)], per_token=True)
    with torch.no_grad():
        hidden_RH = network.model(pack, "auto")
        reward_R, z_RD = network.rewards(hidden_RH).numpy(), network.compared(hidden_RH).numpy()
    states = model.representations(prompts, answers)
    for i, rows in zip(pack.indices, pack.rows_of, strict=True):
        assert states[i].shape == (len(rows), 5)
        np.testing.assert_allclose(states[i], z_RD[rows], rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.score(prompts, answers)[i], reward_R[rows[-1]], rtol=0, atol=1e-5)


def test_the_prompt_of_many_completions_is_computed_once(
    model: RewardModel, completions: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, answers = completions
    encoded = model.encode(prompts, answers)
    computed: list[int] = []
    forward = model.network.model.forward
    monkeypatch.setattr(
        model.network.model,
        "forward",
        lambda axis, backend: computed.append(len(axis.input_ids_T)) or forward(axis, backend),
    )
    model.judge(encoded)
    expected = 0
    for prompt in dict.fromkeys(prompts):
        own = {e.ids.tobytes(): e.ids for p, e in zip(prompts, encoded, strict=True) if p == prompt}
        shared = common_prefix(list(own.values()))
        assert shared >= min(e.start for p, e in zip(prompts, encoded, strict=True) if p == prompt)
        expected += shared + sum(len(ids) - shared for ids in own.values())
    assert sum(computed) == expected < sum(len(e.ids) for e in encoded) / 1.3


@pytest.mark.parametrize("per_token", [False, True])
def test_a_prompt_is_computed_once_where_its_completions_need_several_forwards(
    folder: Path, per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(3, VOCAB, size=60)
    answers = [random.integers(3, VOCAB, size=n) for n in (20, 30, 1, 30, 25, 7)]
    encoded = [Completion(np.concatenate([prompt, a]).astype(np.int32), 60, CUT) for a in [*answers, answers[1]]]
    expected = RewardModel.from_pretrained(folder, device="cpu").judge(encoded, per_token=per_token)
    model = RewardModel.from_pretrained(folder, device="cpu", tokens_per_batch=100)
    computed: list[int] = []
    forward = model.network.model.forward
    monkeypatch.setattr(
        model.network.model,
        "forward",
        lambda axis, *rest: computed.append(len(axis.input_ids_T)) or forward(axis, *rest),
    )
    for one, other in zip(model.judge(encoded, per_token=per_token), expected, strict=True):
        np.testing.assert_allclose(one.reward, other.reward, rtol=0, atol=1e-5)
        if per_token:
            np.testing.assert_allclose(one.rewards_n, other.rewards_n, rtol=0, atol=1e-5)
    assert sum(computed) == 60 + sum(map(len, answers))  # the answer that occurs twice is computed once
    assert computed == [60, 50, 31, 32]  # at most 200 keys, of which 60 per answer are the prompt's
    model.judge(encoded[:2], per_token=per_token)
    assert computed[4:] == [60, 50]
    model.judge([Completion(one.ids[60:], 0, CUT) for one in encoded[:6]], per_token=per_token)  # no prompt to share
    assert sum(computed[6:]) == sum(map(len, answers))


def test_a_group_over_the_budget_is_split_and_a_completion_over_it_is_an_error(
    folder: Path, completions: tuple[list[str], list[str]]
) -> None:
    model = RewardModel.from_pretrained(folder, device="cpu", tokens_per_batch=40)
    encoded = model.encode(["one two three"] * 20, completions[1][:20])
    items = [Item(i, e.ids, e.start, f"completion {i}") for i, e in enumerate(encoded) if len(e.ids) <= 40]
    plan = plan_packs([items], Budget(40, 32), 1)
    assert len(plan) > 1
    assert sorted(item.index for pack in plan for group in pack for item in group) == [item.index for item in items]
    longest = int(np.argmax([len(e.ids) for e in encoded]))
    assert len(encoded[longest].ids) > 40
    with pytest.raises(UserError, match=r"completion \d+ needs \d+ tokens, more than --tokens-per-batch 40: raise"):
        model.judge(encoded)


def test_texts_of_tokens_are_the_completion(model: RewardModel) -> None:
    [completion] = model.encode(["one"], [" two é漢 three"])
    pieces = model.texts(completion)
    assert len(pieces) == len(completion.ids) - completion.start
    assert "".join(pieces) == " two é漢 three<|eos|>"


def test_no_completions_and_completions_without_tokens(model: RewardModel) -> None:
    assert model.score([], []).shape == (0,)
    assert model.judge([]) == []
    empty = Completion(np.array([0, 5], dtype=np.int32), 2, CUT)
    with pytest.raises(UserError, match="completion 0 is cut and has no token"):
        model.judge([empty])


def test_prompts_completions_and_cuts_go_together(model: RewardModel) -> None:
    """Lists of the length of a chunk too, which a chunk by chunk comparison would take for whole."""
    many = ["one"] * 1024
    for arguments in ((many[:512], many), (many, many[:512]), (many, many, [True] * 512), (["one"], [])):
        with pytest.raises(ValueError, match="must be equally many"):
            model.encode(*arguments)


def test_a_text_is_no_list_of_texts(model: RewardModel) -> None:
    """Texts of one length would be encoded character by character."""
    for arguments in (("yes", "no!"), (["yes"], "n"), ("y", ["no"])):
        with pytest.raises(TypeError, match="must be lists of texts"):
            model.encode(*arguments)


def test_single_texts_and_one_prompt_for_all(model: RewardModel) -> None:
    both = model.score(["one", "one"], ["two", "three"])
    assert isinstance(model.score("one", "two"), float)
    assert model.score("one", "two") == pytest.approx(both[0], rel=1e-5)
    np.testing.assert_allclose(model.score("one", ["two", "three"]), both, rtol=1e-5)
    np.testing.assert_allclose(model.q_values("one", "two"), model.q_values(["one"], ["two"])[0], atol=1e-6)
    np.testing.assert_allclose(
        model.representations("one", "two"), model.representations(["one"], ["two"])[0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="3 prompts, 2 completions: must be equally many, or one prompt"):
        model.score(["one"] * 3, ["two", "three"])
    with pytest.raises(TypeError, match="completions are missing"):
        model.score("one two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1+1=", 2), "completions is int: give a string, a list of messages, or a list of either"),
        ((None, "2"), "prompts is NoneType: give a string"),
        ((b"1+1=", "2"), "prompts is bytes: give a string"),
        (("1+1=", ["2", 3]), r"completions\[1\] is int: give a string"),
        ((["1+1=", None], ["2", "3"]), r"prompts\[1\] is NoneType: give a string"),
        ((["1+1=", 5],), r"prompts\[1\] is int: give a string"),
    ],
)
def test_what_is_no_text_is_named(model: RewardModel, arguments: tuple[Any, ...], message: str) -> None:
    for method in (model.score, model.q_values, model.representations, model.inspect):
        with pytest.raises(TypeError, match=message):
            method(*arguments)


def test_messages_are_written_by_the_chat_template(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(write_served_model(tmp_path / "model"), device="cpu")
    asked, answer = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "yes."}]
    plain = model.score("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "yes.<|im_end|>")
    assert plain == pytest.approx(model.score(asked, answer), rel=1e-5)
    assert plain == pytest.approx(model.score([*asked, *answer]), rel=1e-5)
    assert plain == pytest.approx(model.score(asked, "yes."), rel=1e-5)
    assert plain == pytest.approx(model.score(asked[0], answer[0]), rel=1e-5)
    assert plain != pytest.approx(model.score("hello", "yes."), rel=1e-3)
    conversations = [[*asked, *answer], [*asked, {"role": "assistant", "content": "world"}]]
    assert model.score(conversations).tolist() == pytest.approx([plain, model.score(asked, "world")], rel=1e-5)
    assert "hello" in model.inspect([*asked, *answer]).html
    with pytest.raises(UserError, match="must be by the 'assistant'"):
        model.score(asked)


def test_a_model_says_what_it_is(model: RewardModel) -> None:
    assert re.fullmatch(
        r"RewardModel\(Llama: 0\.0\d+M parameters; \d layers, width 32; linear head; float32 on cpu; goals: default\)",
        repr(model),
    )


def test_it_is_exported_without_loading_torch() -> None:
    assert gcrm_fast.RewardModel is RewardModel
    code = "import sys, gcrm_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "half"}, "--dtype half: must be one of auto, bfloat16, float16, float32"),
        ({"dtype": torch.int8}, "--dtype int8: must be one of"),
        ({"tokens_per_batch": 0}, "--tokens-per-batch 0: must be at least 1"),
        ({"tokens_per_batch": "9"}, "--tokens-per-batch 9: must be a whole number"),
        (
            {"attention": "flash"},
            r"--attention flash: must be one of auto, flash_attn, torch_varlen, eager \(did you mean",
        ),
        ({"end": "bos"}, "--end bos: must be one of auto, eos, as-is"),
        ({"special_tokens": True}, "--special-tokens True: must be one of auto or one of tokens, text"),
    ],
)
def test_wrong_arguments_are_one_line(folder: Path, wrong: dict[str, Any], message: str) -> None:
    """Python's arguments are checked as the command line's options are."""
    with pytest.raises(UserError, match=message):
        RewardModel.from_pretrained(folder, **wrong)


def test_models_that_must_not_score(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no reward head: train one with gcrm train --model"):
        RewardModel.from_pretrained(llama(tmp_path / "language"), device="cpu")
    models.save(tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "nan" / "goal.safetensors").unlink()
    with pytest.raises(UserError, match=r"completion 0 has a reward or Q-value that is not finite: fix"):
        RewardModel.from_pretrained(tmp_path / "nan", device="cpu").score(["one"], ["two"])
    broken = RewardModel.from_pretrained(tmp_path / "nan", device="cpu")
    with pytest.raises(UserError, match="hidden states are not finite: fix"):
        broken.goal_state(broken.encode(["one"], ["two"]))
    with pytest.raises(UserError, match="completion 0 has latents that are not finite: fix"):
        broken.latents(broken.encode(["one"], ["two"]))
    models.save(tmp_path / "cut", projection_size=4)
    (tmp_path / "cut" / "gcrm.safetensors").unlink()
    with pytest.raises(UserError, match="holds no projection: train one"):
        RewardModel.from_pretrained(tmp_path / "cut", device="cpu")
    models.save(tmp_path / "bad")
    (tmp_path / "bad" / "gcrm.json").write_text('{"head": "tree", "projection_size": 0}')
    with pytest.raises(UserError, match=r"gcrm\.json: field 'head' is 'tree': must be"):
        RewardModel.from_pretrained(tmp_path / "bad", device="cpu")
    for wrong, message in (
        ({"bottleneck_size": 0}, "field 'bottleneck_size' is 0 with head 'bottleneck': it must be positive"),
        ({"bottleneck_size": "6"}, "field 'bottleneck_size' is '6': must be 0 or a positive integer"),
        ({"compare": "rewards"}, "field 'compare' is 'rewards': must be one of states, latents"),
    ):
        good = {"head": "bottleneck", "projection_size": 0, "bottleneck_size": 6}
        (tmp_path / "bad" / "gcrm.json").write_text(json.dumps(good | wrong))
        with pytest.raises(UserError, match=message):
            RewardModel.from_pretrained(tmp_path / "bad", device="cpu")


def test_a_reward_model_of_another_program_scores_without_goals(tmp_path: Path) -> None:
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.ones(1)}
    model = RewardModel.from_pretrained(llama(tmp_path / "m", trunk() | head), device="cpu")
    [state] = model.representations(["one"], ["two"])
    np.testing.assert_allclose(
        model.score(["one"], ["two"]), state[-1] @ head["v_head.summary.weight"].numpy()[0], rtol=1e-5
    )
    with pytest.raises(UserError, match=r"the model has no goal state \(goal.safetensors\): make one with gcrm goals"):
        model.q_values(["one"], ["two"])
