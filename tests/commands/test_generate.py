"""``gcrm generate``: the output, its summary, interrupted runs, and what can be wrong."""

import functools
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from gcrm_fast import Policy, RewardModel
from gcrm_fast.checkpoints.goals import write_goals
from gcrm_fast.commands import generate as command
from support import models, policies
from support.training_runs import Gcrm

PROMPTS = [{"prompt": text, "id": i} for i, text in enumerate(["one two", "three, four", "five", "six; seven", "one"])]
SHORT = ("--max-new-tokens", 20, "--samples", 4, "--every", 4, "--dtype", "float32")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return policies.save(tmp_path_factory.mktemp("policies") / "llama", ends=0.7)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "linear"
    models.save(path)
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.splitlines()]


@pytest.mark.parametrize("method", ["best-of-n", "filter", "reject", "beams"])
def test_output_has_answers_samples_and_costs(
    method: str, policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    output = tmp_path / "out.jsonl.gz"
    more = ("--beams", 2, "--step-tokens", 5, "--steps", 4) if method == "beams" else ("--checkpoints", 8)
    done = gcrm("generate", policy, asked, "-o", output, "--reward", reward, "--method", method, *SHORT, *more)
    assert done.returncode == 0, done.stderr
    records = lines(output)
    assert [{name: record[name] for name in ("prompt", "id")} for record in records] == PROMPTS
    model = RewardModel.from_pretrained(reward, device="cpu")
    for record in records:
        chosen = record["samples"][record["chosen_sample"]]
        assert (record["text"], record["reward"]) == (chosen["text"], chosen["reward"])
        assert record["policy_tokens"] >= max(len(sample["ids"]) for sample in record["samples"])
        assert record["reward_tokens"] > 0
        assert record["seconds"] > 0
        for sample in record["samples"]:
            assert len(sample["tokens"]["texts"]) == len(sample["tokens"]["q_values"]) == len(sample["ids"])
            assert (sample["reward"] is None) == (sample["ending"] == "dropped")
            if sample["ending"] == "stop":
                [score] = model.judge(model.encode([record["prompt"]], [sample["text"]]))
                same = model.encode([record["prompt"]], [sample["text"]])[0].ids[-len(sample["ids"]) :].tolist()
                if same == sample["ids"]:  # the tokenizer writes this text as the policy did
                    assert sample["reward"] == pytest.approx(score.reward, abs=1e-5)
    written = sum(record["policy_tokens"] for record in records)
    assert f"5 prompts, {method}: {written} tokens by the policy" in done.stdout
    assert ("saved about" in done.stdout) == (method in ("filter", "reject"))
    assert any(record["saved_tokens"] for record in records) == (method in ("filter", "reject"))
    assert done.stdout.endswith(f"\nwrote {output}\n")


def test_methods_that_act_on_q_say_whether_it_can_be_trusted(
    policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    reward = tmp_path / "reward"
    models.save(reward, verdict=models.VERDICT)
    given = ("generate", policy, asked, "-o", tmp_path / "o.jsonl", "--reward", reward, *SHORT)
    said = f"Found by the model's training run: {models.VERDICT}\n"
    assert said in gcrm(*given, "--method", "filter").stdout
    assert said not in gcrm(*given, "--method", "best-of-n").stdout


@pytest.mark.parametrize("method", ["sample", "filter", "beams"])
def test_progress_moves_while_a_prompt_is_written(
    method: str, policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int, str]] = []

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def update(self, n: int = 1) -> None:
            super().update(n)
            shown.append((self.n, self.total, self.postfix))

    monkeypatch.setattr(command, "progress_bar", functools.partial(Bar, file=io.StringIO()))
    output = tmp_path / "out.jsonl"
    more = ("--beams", 2, "--step-tokens", 3, "--steps", 4) if method == "beams" else ()
    options = ("--reward", reward, "--method", method, *SHORT, *more)
    assert gcrm("generate", policy, asked, "-o", output, *options).returncode == 0
    places = [place for place, _, _ in shown]
    assert places == sorted(places)
    before_the_first = {place for place, _, prompts in shown if prompts == "0 of 5 prompts"}
    assert len(before_the_first) > 1
    assert max(total for _, total, _ in shown) <= 5 * 4 * (12 if method == "beams" else 20)
    written = sum(record["policy_tokens"] for record in lines(output))
    assert shown[-1] == (written, written, "5 of 5 prompts")


def test_the_output_is_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    partial = command.Partial(tmp_path / "out.jsonl", {})
    for i in (2, 0, 1):
        partial.add(i, {"id": i})
    partial.finish(tmp_path / "out.jsonl")
    assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == [0, 1, 2]
    assert not partial.path.exists()


def test_sampling_without_a_reward_model(policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    output = tmp_path / "out.jsonl"
    assert gcrm("generate", policy, asked, "-o", output, *SHORT, "--temperature", 0, "--samples", 1).returncode == 0
    texts = Policy.from_pretrained(policy, device="cpu").generate([r["prompt"] for r in PROMPTS], max_new_tokens=20)
    assert [record["text"] for record in lines(output)] == [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts]
    assert all(record["reward"] is None for record in lines(output))


def test_compare_writes_the_same_samples_without_dropping_any(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    arguments = ("--reward", reward, "--max-new-tokens", 80, *SHORT[2:])
    filtered = ("--method", "filter", "--threshold", -0.2, "--compare")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "a.jsonl", *arguments, *filtered)
    assert done.returncode == 0, done.stderr
    assert (
        gcrm("generate", policy, asked, "-o", tmp_path / "b.jsonl", *arguments, "--method", "best-of-n").returncode == 0
    )
    ours, whole = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl")
    for one, other in zip(ours, whole, strict=True):
        unfiltered = one["unfiltered"]
        assert {name: unfiltered[name] for name in ("text", "reward")} == {n: other[n] for n in ("text", "reward")}
        assert unfiltered["policy_tokens"] == other["policy_tokens"] >= one["policy_tokens"]
    total = sum(one["policy_tokens"] for one in whole)
    assert f"without dropping any: {total} tokens by the policy" in done.stdout
    endings = [one["samples"][one["chosen_sample"]]["ending"] for one in ours]
    same = [one["unfiltered"]["reward_at_same_tokens"] for one in ours]
    ended = [ending == "stop" and reward is not None for ending, reward in zip(endings, same, strict=True)]
    assert 0 < sum(ended) < 5  # the means are of the same prompts
    means = [np.mean([one["reward"] for one, own in zip(side, ended, strict=True) if own]) for side in (ours, whole)]
    said = f"{sum(ended)} prompts whose answers ended: filter {means[0]:.4f}, without dropping any {means[1]:.4f}"
    assert said in done.stdout


@pytest.mark.parametrize(
    ("ending", "other", "counts"), [("stop", 0.5, True), ("length", 0.5, False), ("stop", None, False)]
)
def test_rewards_of_cut_answers_are_not_compared(ending: str, other: float | None, counts: bool) -> None:
    samples = [{"ending": "dropped"}, {"ending": ending}]
    record = {"samples": samples, "chosen_sample": 1, "unfiltered": {"reward_at_same_tokens": other}}
    assert command.ended(record) == counts


def test_beams_are_compared_with_samples_of_their_length(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    beams = ("--method", "beams", "--beams", 2, "--per-beam", 2, "--steps", 2, "--step-tokens", 3, "--compare")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "a.jsonl", "--reward", reward, *SHORT, *beams)
    assert done.returncode == 0, done.stderr
    written = [record["unfiltered"]["policy_tokens"] for record in lines(tmp_path / "a.jsonl")]
    assert max(written) <= 4 * 6, "four samples of up to two steps of three tokens"
    assert max(written) > 6


def test_a_comparison_of_answers_that_never_end(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    short = ("--max-new-tokens", 2, "--samples", 2, "--method", "filter", "--compare")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "a.jsonl", "--reward", reward, *short)
    assert "rewards are not compared: no prompt has answers that ended in both" in done.stdout
    assert "nan" not in done.stdout


def test_goals_with_weights_and_controls(policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    model = RewardModel.from_pretrained(reward, device="cpu")
    states = {"helpful": torch.randn(32), "complex": torch.randn(32)}
    write_goals(tmp_path / "g.safetensors", states, dict.fromkeys(states, 3), model.fingerprint)

    def q_values(*arguments: object) -> np.ndarray:
        output = tmp_path / "out.jsonl"
        done = gcrm("generate", policy, asked, "-o", output, "--reward", reward, *SHORT, *arguments)
        assert done.returncode == 0, done.stderr
        return np.concatenate([s["tokens"]["q_values"] for record in lines(output) for s in record["samples"]])

    helpful, both = f"{tmp_path}/g.safetensors:helpful", f"{tmp_path}/g.safetensors:complex:-1"
    a, b = q_values("--goal", helpful), q_values("--goal", f"{tmp_path}/g.safetensors:complex")
    np.testing.assert_allclose(q_values("--goal", f"{helpful}:3", "--goal", both), 0.75 * a - 0.25 * b, atol=1e-5)
    np.testing.assert_allclose(q_values("--goal", "default:2"), q_values(), atol=1e-6)
    np.testing.assert_allclose(q_values("--goal", helpful, "--control", "opposite"), -a, atol=1e-6)
    shuffled = q_values("--goal", helpful, "--control", "shuffled")
    assert np.abs(shuffled - a).max() > 0.1


def test_a_warning_where_no_sample_reaches_its_end(policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    for tokens, warned in ((1, True), (200, False)):
        output = tmp_path / f"{tokens}.jsonl"
        done = gcrm("generate", policy, asked, "-o", output, "--max-new-tokens", tokens, "--samples", 4)
        assert done.returncode == 0
        endings = {sample["ending"] for record in lines(output) for sample in record["samples"]}
        assert ("stop" not in endings) == warned
        warning = "no sample reached its end within 1 tokens: raise --max-new-tokens, or name with --stop"
        assert (warning in done.stderr) == warned


def interrupt(monkeypatch: pytest.MonkeyPatch, when: Callable[[command.Partial, dict[str, Any]], bool]) -> None:
    """Ctrl-C after each record that is kept for which ``when`` says so."""
    add = command.Partial.add

    def interrupted(self: command.Partial, prompt: int, record: dict[str, Any]) -> None:
        add(self, prompt, record)
        if when(self, record):
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Partial, "add", interrupted)


def test_an_interrupted_run_keeps_what_is_finished_and_resumes(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (policy, asked, "-o", tmp_path / "out.jsonl", "--reward", reward, *SHORT, "--rows", 4)
    assert gcrm("generate", policy, asked, "-o", tmp_path / "whole.jsonl", "--reward", reward, *SHORT).returncode == 0
    add = command.Partial.add
    interrupt(monkeypatch, lambda partial, _: len(partial.records) == 2)
    done = gcrm("generate", *arguments)
    assert done.returncode == 130
    assert re.search(
        r"interrupted; 2 of 5 prompts are finished and kept in .+: the same command resumes\n", done.stderr
    )
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'{"prompt": 4, "rec')  # killed while it wrote
    added: list[int] = []
    monkeypatch.setattr(
        command.Partial, "add", lambda self, prompt, record: (added.append(prompt), add(self, prompt, record))[1]
    )
    done = gcrm("generate", *arguments)
    assert done.returncode == 0
    assert len(added) == 3
    assert re.search(r"by the reward model, [0-9.]+ s for 3 of them\n", done.stdout)

    def untimed(path: Path) -> list[dict[str, Any]]:
        return [record | {"seconds": 0, "samples": [round_q(s) for s in record["samples"]]} for record in lines(path)]

    def round_q(sample: dict[str, Any]) -> dict[str, Any]:
        return {"ids": sample["ids"], "text": sample["text"], "ending": sample["ending"]}

    resumed, whole = untimed(tmp_path / "out.jsonl"), untimed(tmp_path / "whole.jsonl")
    assert [record["samples"] for record in resumed] == [record["samples"] for record in whole]
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert not (tmp_path / "out.jsonl.lock").exists()


def test_errors_after_a_resume_name_the_record(
    policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked.write_text(asked.read_text() + json.dumps({"prompt": "one two " * 20}) + "\n")
    arguments = ("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT)
    interrupt(monkeypatch, lambda partial, _: len(partial.records) == 2)
    assert gcrm(*arguments, "--rows", 4).returncode == 130
    failed = gcrm(*arguments, "--cache-tokens", 30)
    assert failed.returncode == 2
    assert re.search(r"prompts\.jsonl:6 has \d+ tokens: with a text of 20 tokens more than the cache", failed.stderr)


def test_resumed_without_compare_no_record_is_compared(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", policy, asked, "-o", tmp_path / "out.jsonl", "--reward", reward, *SHORT)
    interrupt(monkeypatch, lambda _, record: command.UNFILTERED in record)
    assert gcrm(*arguments, "--method", "filter", "--compare").returncode == 130
    assert (tmp_path / "out.jsonl.partial").read_text().count('"unfiltered"') == 1
    assert gcrm(*arguments, "--method", "filter").returncode == 0
    assert {"unfiltered" in record for record in lines(tmp_path / "out.jsonl")} == {False}


def test_other_weights_or_goals_of_the_same_name_start_over(
    reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, goal = tmp_path / "policy", tmp_path / "goal.safetensors"
    policies.save(policy, ends=0.7)
    model = RewardModel.from_pretrained(reward, device="cpu")
    state = model.goal()

    def write_goal(sign: float) -> None:
        write_goals(goal, {"default": sign * state}, {"default": 3}, model.fingerprint)

    write_goal(1.0)
    more = ("--goal", goal, "--method", "filter", *SHORT)
    arguments = ("generate", policy, asked, "-o", tmp_path / "out.jsonl", "--reward", reward, *more)
    for change, name in ((lambda: policies.save(policy, ends=0.5), "policy"), (lambda: write_goal(-1.0), "goal")):
        with monkeypatch.context() as patch:
            interrupt(patch, lambda *_: True)
            assert gcrm(*arguments).returncode == 130
        change()
        done = gcrm(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"was made with another {name}: starting over" in done.stderr


def test_another_option_starts_over(policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    partial = tmp_path / "out.jsonl.partial"
    record = {"prompt": 0, "record": {"text": "stale"}}
    partial.write_text(json.dumps({"made_by": {"seed": 1}}) + "\n" + json.dumps(record) + "\n")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT)
    assert done.returncode == 0
    assert "was made with another" in done.stderr
    assert "stale" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "filter"), "--method filter: needs a reward model: name one with --reward"),
        (("--goal", "default"), "--goal: only a reward model has goals and rewards"),
        (("--reward", "MODEL", "--compare"), "--compare: --method sample drops no samples"),
        (("--top-p", 0), "--top-p 0.0: must be"),
        (("--reward", "MODEL", "--goal", "nothing:1"), "nothing"),
        (("--reward", "MODEL", "--goal", "default:0"), "the weights of the goals are 0"),
        (("--cache-tokens", 20), "prompts.jsonl:1 has 3 tokens: with a text of 20 tokens more than the cache of 20"),
        (("--prompt-field", "answer"), "prompts.jsonl:1: field 'answer' is missing: a record needs a prompt"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: tuple[object, ...], message: str, policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    given = [reward if one == "MODEL" else one for one in arguments]
    done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT, *given)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3}, "field 'prompt' is int, not a string"),
        ({"prompt": "one", "text": "two"}, "field 'text' already exists"),
        ({"prompt": "one", "system": "be brief"}, "field 'system' is not read here"),
        ({"messages": [{"role": "assistant", "content": "two"}]}, "field 'messages' has only the answer"),
        ({"messages": []}, "field 'messages' is an empty list"),
    ],
)
def test_records_without_a_prompt(
    record: dict[str, Any], message: str, policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    asked.write_text(asked.read_text() + json.dumps(record) + "\n")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT)
    assert done.returncode == 2
    assert f"prompts.jsonl:6: {message}" in done.stderr
    if "text" not in record:
        assert gcrm("generate", policy, asked, "-o", tmp_path / "o", *SHORT, "--on-bad-record", "skip").returncode == 0
        assert len(lines(tmp_path / "o")) == 5


def test_prompts_too_long_for_the_cache_are_skipped(
    policy: Path, reward: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    """Lines 6 and 7; the comparison has neither."""
    long = "".join(json.dumps({"prompt": "one " * count}) + "\n" for count in (90, 95))
    asked.write_text(asked.read_text() + long)
    words = ["-o", tmp_path / "out.jsonl", *SHORT, "--reward", reward, "--method", "filter", "--cache-tokens", 110]
    stopped = gcrm("generate", policy, asked, *words)
    assert stopped.returncode == 2
    assert "prompts.jsonl:6" in stopped.stderr
    done = gcrm("generate", policy, asked, *words, "--on-bad-record", "skip", "--compare")
    assert done.returncode == 0, done.stderr
    assert [record["prompt"] for record in lines(tmp_path / "out.jsonl")] == [one["prompt"] for one in PROMPTS]
    assert re.search(r"bad records skipped: 2; the first: \S*prompts.jsonl:6", done.stderr)
    asked.write_text(json.dumps({"prompt": "one " * 99}) + "\n")
    none = gcrm("generate", policy, asked, *words, "--on-bad-record", "skip")
    assert none.returncode == 2
    assert re.search(r"every record is bad; the first: \S*prompts.jsonl:1 has \d+ tokens", none.stderr)


@pytest.mark.parametrize("more", [(), ("--on-bad-record", "skip")])
def test_nothing_is_kept_where_no_prompt_is_finished(
    more: tuple[str, ...], policy: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    asked = tmp_path / "prompts.jsonl"
    asked.write_text(json.dumps({"prompt": "one " * 99}) + "\n")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT, "--cache-tokens", 110, *more)
    assert done.returncode == 2
    assert "the same command resumes" not in done.stderr
    assert list(tmp_path.iterdir()) == [asked]


def test_prompts_that_the_reward_model_cannot_read_are_skipped(
    policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, unknown_tokenizer: Callable[[Path], Path]
) -> None:
    asked.write_text(asked.read_text() + json.dumps({"prompt": "αβγ"}) + "\n")
    words = ["-o", tmp_path / "out.jsonl", *SHORT, "--reward", unknown_tokenizer(tmp_path / "m")]
    done = gcrm("generate", policy, asked, *words, "--on-bad-record", "skip")
    assert done.returncode == 0, done.stderr
    assert [record["prompt"] for record in lines(tmp_path / "out.jsonl")] == ["αβγ"]
    assert "bad records skipped: 5;" in done.stderr


def test_messages_without_a_chat_template_name_their_record(
    policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    asked.write_text(asked.read_text() + json.dumps({"messages": [{"role": "user", "content": "one"}]}) + "\n")
    done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT)
    assert done.returncode == 2
    assert "prompts.jsonl:6: " in done.stderr


def test_a_policy_that_the_reward_model_cannot_read(
    policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm, unknown_tokenizer: Callable[[Path], Path]
) -> None:
    done = gcrm(
        "generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT, "--reward", unknown_tokenizer(tmp_path / "m")
    )
    assert done.returncode == 2
    assert "prompts.jsonl:1: the tokenizer of the reward model knows none of its text" in done.stderr


@pytest.fixture
def unknown_tokenizer() -> Callable[[Path], Path]:
    """A reward model that knows Greek words alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from gcrm_fast.checkpoints.saving import save_model
    from support.small import small_config, small_model

    def save(folder: Path) -> Path:
        words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2, "αβγ": 3}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        greek = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
        model = small_model(small_config(), torch.float32)
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_model(folder, state, small_config(), greek, torch.ones(32), 3)
        return folder

    return save


def test_two_runs_do_not_write_one_file(policy: Path, asked: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / "out.jsonl.lock"):
        done = gcrm("generate", policy, asked, "-o", tmp_path / "out.jsonl", *SHORT)
    assert done.returncode == 2
    assert "another process is writing it" in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"one {i}"}) + "\n" for i in range(2000)))
    arguments = ["generate", policy, path, "-o", tmp_path / "out.jsonl", "--rows", "4", *map(str, SHORT)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gcrm_fast", *map(str, arguments)],
        stderr=subprocess.PIPE,
        # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    partial = tmp_path / "out.jsonl.partial"
    while not partial.is_file() or len(partial.read_bytes().splitlines()) < 5:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"of 2000 prompts are finished and kept in" in err
    assert b"Traceback" not in err
