"""RewardModel and ``gcrm score``: rewards, Q-values and states, and the files that people get."""

import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
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
from gcrm_fast import cli
from gcrm_fast.commands import score
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.encoding import CUT, Completion
from gcrm_fast.data.packing import Item, build_score_pack, common_prefix
from gcrm_fast.data.records import read_completions
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.folders import VOCAB, llama, trunk
from support.judged import write
from support.serving import write_served_model
from support.training_runs import Gcrm

LIST = [{"prompt": "one", "completions": ["two", "three four", "two"], "n": 1}, {"prompt": "x", "completions": ["six"]}]
PAIR = [{"question": "one", "correct": "two", "incorrect": "three", "id": "é"}]
NAMED = [{"instruction": "one", "output": "two", "prompt": 3}]


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


# ------------------------------------------------------------------------------------------------------ RewardModel


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


# ------------------------------------------------------------------------------------------------------- gcrm score


@pytest.fixture
def gcrm(gcrm: Gcrm, folder: Path) -> Gcrm:
    """``gcrm score MODEL ARGUMENTS``."""
    return functools.partial(gcrm, "score", folder)


def many(count: int, prompts: int = 5) -> list[dict[str, Any]]:
    heads, tails = models.texts(count, prompts)
    return [{"prompt": p, "completion": c, "n": i} for i, (p, c) in enumerate(zip(heads, tails, strict=True))]


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "WINDOW_RECORDS", 7)


def test_every_format_gets_its_rewards_beside_its_own_fields(gcrm: Gcrm, model: RewardModel, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert gcrm(write(tmp_path / "a", many(9)), "-o", out).returncode == 0
    rewards = model.score([r["prompt"] for r in many(9)], [r["completion"] for r in many(9)])
    assert [{**r, "reward": None} for r in read(out)] == [{**r, "reward": None} for r in many(9)]
    np.testing.assert_allclose([r["reward"] for r in read(out)], rewards, rtol=0, atol=1e-6)

    def of(prompt: str, *completions: str) -> Any:
        return pytest.approx(model.score([prompt] * len(completions), completions).tolist(), abs=1e-6)

    assert gcrm(write(tmp_path / "b", LIST), "-o", out).returncode == 0
    assert read(out) == [
        LIST[0] | {"rewards": of("one", "two", "three four", "two")},
        LIST[1] | {"rewards": of("x", "six")},
    ]
    assert gcrm(write(tmp_path / "c", PAIR), "-o", out).returncode == 0
    right, wrong = model.score(["one"] * 2, ["two", "three"])
    assert read(out) == [
        PAIR[0] | {"reward_correct": pytest.approx(right, abs=1e-6), "reward_incorrect": pytest.approx(wrong, abs=1e-6)}
    ]
    assert "é" in out.read_text()
    assert gcrm(write(tmp_path / "e", PAIR), "-o", out).stderr.endswith(f"gcrm score: wrote {out}\n")
    assert gcrm(write(tmp_path / "d", NAMED), "-o", out, "--columns", "prompt=instruction,completion=output")[0] == 0
    assert read(out) == [NAMED[0] | {"reward": pytest.approx(right, abs=1e-6)}]


def test_per_token_values(gcrm: Gcrm, model: RewardModel, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    assert gcrm(write(tmp_path / "a", [*LIST]), "-o", out, "--per-token").returncode == 0
    encoded = model.encode(["one"] * 3, LIST[0]["completions"])
    judged = model.judge(encoded, goals_GD=model.goal()[None], per_token=True)
    for found, completion, expected in zip(read(out)[0]["tokens"], encoded, judged, strict=True):
        assert found["ids"] == completion.ids[completion.start :].tolist()
        assert found["texts"] == model.texts(completion)
        np.testing.assert_allclose(found["rewards"], expected.rewards_n, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["q_values"], expected.q_Gn[0], rtol=0, atol=1e-5)
    assert gcrm(write(tmp_path / "b", PAIR), "-o", out, "--per-token").returncode == 0
    [record] = read(out)
    assert record["reward_correct"] == record["tokens_correct"]["rewards"][-1]
    assert record["reward_incorrect"] == record["tokens_incorrect"]["rewards"][-1]


def test_from_a_pipe_into_a_pipe(folder: Path, gcrm: Gcrm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write(tmp_path / "a", many(20))
    assert gcrm(plain, "-o", tmp_path / "out").returncode == 0
    for data in (plain.read_bytes(), gzip.compress(plain.read_bytes())):
        source, target = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))), io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdin", source)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", target)
            assert cli.run("score", [str(folder), "-", "-o", "-"]) == 0
        assert target.buffer.getvalue() == (tmp_path / "out").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot share stdin"):
        read_completions(["-"])


KILLED = """
import os, signal
from gcrm_fast import cli
from gcrm_fast.commands import score
score.WINDOW_RECORDS = 7
whole, count = os.replace, 0
def replace(*paths):
    global count
    count += 1
    if count == 3:  # the third window is written, but not yet counted
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*paths)
os.replace = replace
cli.run("score", {arguments!r})
"""


@pytest.mark.usefixtures("small_windows")
def test_a_killed_run_goes_on_to_the_same_output(
    gcrm: Gcrm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, whole = write(tmp_path / "a", many(40)), tmp_path / "out.gz", tmp_path / "whole.gz"
    assert gcrm(data, "-o", whole).returncode == 0
    code = KILLED.format(arguments=[str(folder), str(data), "-o", str(out)])
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    state = json.loads((tmp_path / "out.gz.partial.json").read_text())
    assert (state["windows"], state["bytes"] < (tmp_path / "out.gz.partial").stat().st_size) == (2, True)
    scored: list[int] = []
    judge = RewardModel.judge
    monkeypatch.setattr(
        RewardModel,
        "judge",
        lambda self, encoded, **options: scored.append(len(encoded)) or judge(self, encoded, **options),
    )
    result = gcrm(data, "-o", out)
    assert (result.returncode, sum(scored)) == (0, 40 - 14)
    assert "resuming after 14 records" in result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out.gz", "whole.gz"}


@pytest.mark.usefixtures("small_windows")
def test_a_partial_output_of_something_else_is_not_continued(gcrm: Gcrm, tmp_path: Path) -> None:
    def interrupted(name: str) -> Path:
        """A run that ended at a bad record: two windows are done."""
        bad = write(tmp_path / name, [*many(17), {"prompt": 1, "completion": "x"}])
        assert gcrm(bad, "-o", tmp_path / "out").returncode == 2
        assert (tmp_path / "out.partial").stat().st_size
        return bad

    fresh = tmp_path / "fresh"
    data = interrupted("a")
    write(data, many(20))
    assert gcrm(data, "-o", fresh).returncode == 0
    result = gcrm(data, "-o", tmp_path / "out")  # the bad record is fixed: nothing else has changed
    assert "resuming after 14 records" in result.stderr
    assert (tmp_path / "out").read_bytes() == fresh.read_bytes()

    interrupted("a")
    write(data, [{**many(1)[0], "n": "other"}, *many(20)[1:]])
    result = gcrm(data, "-o", tmp_path / "out")
    assert "the partial output was made from other records: starting over" in result.stderr
    assert [r["n"] for r in read(tmp_path / "out")] == ["other", *range(1, 20)]

    data = interrupted("a")
    write(data, many(20))
    result = gcrm(data, "-o", tmp_path / "out", "--per-token")
    assert "was made with another goal, --per-token: starting over" in result.stderr
    assert all("tokens" in record for record in read(tmp_path / "out"))

    interrupted("a")
    (tmp_path / "out.partial.json").write_text("{")
    write(data, many(20))
    assert "cannot be resumed: starting over" in gcrm(data, "-o", tmp_path / "out").stderr
    assert (tmp_path / "out").read_bytes() == fresh.read_bytes()


def test_scoring_loads_no_library_for_plots_or_classifiers(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a", [{"prompt": "p", "completion": "c"}])
    program = """
import sys
from gcrm_fast.cli import main
assert main() == 0
print(*sorted({name.split(".")[0] for name in sys.modules} & {"matplotlib", "tensorboard", "sklearn", "gcrm_fast"}))
"""
    arguments = ["score", str(folder), str(data), "-o", str(tmp_path / "b"), "--per-token"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["gcrm_fast"], done.stderr


def test_processes_share_the_work_and_write_one_output(gcrm: Gcrm, folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a", [{"prompt": f"p{i % 40}", "completion": f"{i}"} for i in range(2500)])
    assert gcrm(data, "-o", tmp_path / "one").returncode == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gcrm_fast",
        "score",
        str(folder),
        str(data),
        "-o",
        str(tmp_path / "two"),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = read(tmp_path / "one"), read(tmp_path / "two")
    assert [r["completion"] for r in theirs] == [str(i) for i in range(2500)]
    np.testing.assert_allclose([r["reward"] for r in theirs], [r["reward"] for r in ours], rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "one", "two"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 1, "completion": "x"}', r"a:11: field 'prompt' is int, not a string"),
        ('{"prompt": "p"', r"a:11: not valid JSON"),
        ('{"prompt": "p"}', r"a:11: field 'completion' is missing"),
        ('{"prompt": "p", "completion": " "}', r"a:11: field 'completion' is empty"),
        ('{"prompt": "p", "completion": "x", "reward": 1}', r"a:11: field 'reward' already exists"),
        ("[1]", r"a:11: a record must be a JSON object"),
        ('{"prompt": "p", "chosen": "x", "rejected": "y"}', r"a:11: has the format 'prompt, chosen, rejected', but"),
    ],
)
def test_a_bad_record_ends_the_run_with_its_place_and_no_output(
    gcrm: Gcrm, tmp_path: Path, line: str, message: str
) -> None:
    data = write(tmp_path / "a", many(10))
    data.write_text(data.read_text() + line + "\n" + data.read_text())
    result = gcrm(data, "-o", tmp_path / "out")
    assert result.returncode == 2
    complaint = result.stderr.splitlines()[-1]
    assert complaint.startswith("gcrm score: ")
    assert re.search(message, complaint)
    assert not (tmp_path / "out").exists()
    if "reward" not in line:
        result = gcrm(data, "-o", tmp_path / "out", "--on-bad-record", "skip")
        assert result.returncode == 0
        assert [r["n"] for r in read(tmp_path / "out")] == [*range(10), *range(10)]
        assert "1 bad records skipped; the first: " in result.stderr


def test_records_that_cannot_be_scored_are_skipped_where_asked(
    folder: Path, model: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command."""
    records = [{**r, "is_correct": bool(r["n"] % 2), "predicted_answer": "x", "expected_answer": "x"} for r in many(20)]
    longest = max(len(c.ids) for c in model.encode([r["prompt"] for r in records], [r["completion"] for r in records]))
    too_long = {**records[1], "completion": " one" * 200}
    data = str(write(tmp_path / "a", [*records[:10], too_long, *records[10:]]))
    common = [str(folder), data, "--tokens-per-batch", str(longest), "-o", str(tmp_path / "out")]
    for command in ("score", "goals", "evaluate", "vote"):
        assert cli.run(command, common) == 2
        assert re.search(r"a:11: field 'completion' needs \d+ tokens", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
        assert cli.run(command, [*common, "--on-bad-record", "skip"]) == 0
        assert "1 bad records" in "".join(capsys.readouterr())
        if command == "score":
            assert [r["n"] for r in read(tmp_path / "out")] == list(range(20))
        (shutil.rmtree if (tmp_path / "out").is_dir() else os.remove)(tmp_path / "out")


def test_damaged_gzip_and_wrong_calls(gcrm: Gcrm, tmp_path: Path) -> None:
    packed = gzip.compress(write(tmp_path / "a", many(40)).read_bytes())
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "empty").touch()
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path / "cut.gz", "-o", out], r"cut.gz:\d+: gzip data is damaged"),
        ([tmp_path / "empty", "-o", out], "empty: contains no records"),
        ([tmp_path / "missing", "-o", out], "missing: cannot be read"),
        ([tmp_path, "-o", out], "not a folder that datasets can load"),
        ([tmp_path / "a", "-o", tmp_path / "a"], "--output .*a: is also an input"),
        ([tmp_path / "a", "-o", tmp_path], "--output .*: is a folder"),
        ([tmp_path / "a", "-o", tmp_path / "no" / "out"], "--output .*: there is no folder"),
        ([tmp_path / "a", "-o", out, "--goal", "x"], "--goal: only --per-token writes Q-values"),
        ([tmp_path / "a", "-o", out, "--goal", "x", "--per-token"], "x: not a readable goal file"),
        ([tmp_path / "a", "-o", out, "--tokens-per-batch", "9"], r"a:\d+: field 'completion' needs \d+ tokens, more"),
        ([tmp_path / "a", "-o", out, "--tokens-per-batch", "0"], "--tokens-per-batch 0: must be at least 1"),
        (["-o", out], "FILE is missing"),
    ):
        result = gcrm(*arguments)
        assert result.returncode == 2
        assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
        assert not out.exists()
