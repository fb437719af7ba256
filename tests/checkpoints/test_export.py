"""A model in other people's programs: the same rewards in transformers however it is batched and padded, and of every
exported folder there, in OpenRLHF's way of reading it, and here."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from gcrm_fast import RewardModel, cli
from gcrm_fast.checkpoints.goals import GOAL_FILE, read_goals, write_goals
from gcrm_fast.checkpoints.saving import save_model, write_model
from gcrm_fast.data.encoding import ADDED_END, CUT, OWN_END, Completion, TokenizedPair, encode_completions
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.model.reward_model import LlamaRewardModel
from support import models
from support.chat import TEMPLATES, chat_tokenizer
from support.folders import VOCAB, llama, tokenizer, trunk
from support.small import small_config, small_model

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
    save_model(folder, state, config, tokenizer, torch.ones(config.hidden_size), 1)
    return Saved(folder, model, tokenizer)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rewards_here(model: LlamaRewardModel, encoded: list[Completion]) -> torch.Tensor:
    """[N], each sequence alone."""
    with torch.no_grad():
        return torch.cat(
            [
                model(
                    build_pack(
                        [
                            [
                                TokenizedPair(
                                    pair_id=0,
                                    chosen_ids=c.ids,
                                    rejected_ids=c.ids,
                                    chosen_start=c.start,
                                    rejected_start=c.start,
                                )
                            ]
                        ],
                        Sampling(),
                        0,
                    )
                ).reward_2N[0]
                for c in encoded
            ]
        )


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


# --------------------------------------------------------------------------------------------------------- gcrm export

PROMPTS = ["one two", "three", "four, five six"] * 3
COMPLETIONS = [" three", "; seven four", " one", "two", " six six six", ", five", "four one", " a b c", "seven"]
FORMATS = ("transformers", "openrlhf", "token-classification")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a projection, two goals and a card."""
    folder = tmp_path_factory.mktemp("source")
    config = small_config(vocab_size=VOCAB, projection_size=5)
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    choose_pad(tokenizer(), VOCAB, "test")
    weights = write_model(folder / "model", state, config, tokenizer())
    goals = {"default": torch.arange(5.0), "short": torch.ones(5)}
    write_goals(folder / "model" / GOAL_FILE, goals, {"default": 7, "short": 3}, weights)
    (folder / "model" / "README.md").write_text("# A model\n")
    with (folder / "completions.jsonl").open("w") as file:
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return folder


def in_transformers(folder: Path) -> np.ndarray:
    """Rewards as AutoModelForSequenceClassification gives them."""
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return np.array([row[-1] for row in logits_of(theirs, folder)])


def logits_of(theirs: torch.nn.Module, folder: Path) -> list[np.ndarray]:
    names = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batches = [names(p + c + EOS, return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        return [theirs(**batch).logits[0].flatten().numpy() for batch in batches]


def in_openrlhf(folder: Path) -> np.ndarray:
    """As OpenRLHF reads a folder, normalizing: its head by the name that config.json has, then mean and std."""
    config = AutoConfig.from_pretrained(folder)
    head = load_file(folder / "model.safetensors")[f"{config.value_head_prefix}.weight"]
    trunk, names = AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    rewards = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            hidden = trunk(**names(prompt + completion + EOS, return_tensors="pt")).last_hidden_state[0, -1]
            rewards.append(((head[0] @ hidden - config.mean) / config.std).item())
    return np.array(rewards)


def per_token(folder: Path) -> list[np.ndarray]:
    theirs = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return logits_of(theirs, folder)


@pytest.mark.parametrize("format_", FORMATS)
def test_exported_folders_give_the_same_rewards(
    source: Path, tmp_path: Path, format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = RewardModel.from_pretrained(source / "model")
    rewards, q = before.score(PROMPTS, COMPLETIONS), before.q_values(PROMPTS, COMPLETIONS, "short")
    out = tmp_path / "out"
    assert cli.run("export", [str(source / "model"), "-o", str(out), "--format", format_]) == 0
    assert "gcrm.safetensors" in capsys.readouterr().out  # the projection
    again = RewardModel.from_pretrained(out)
    np.testing.assert_array_equal(again.score(PROMPTS, COMPLETIONS), rewards)
    for ours, theirs in zip(q, again.q_values(PROMPTS, COMPLETIONS, "short"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert read_goals(out / GOAL_FILE, again.fingerprint, again.config.state_size)[1] == {"default": 7, "short": 3}
    if format_ == "token-classification":
        encoded = before.encode(PROMPTS, COMPLETIONS)
        for found, c, judged in zip(per_token(out), encoded, before.judge(encoded, per_token=True), strict=True):
            np.testing.assert_allclose(found[c.start :], judged.rewards_n, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(in_transformers(out), rewards, rtol=1e-4, atol=1e-5)
    if format_ == "openrlhf":
        np.testing.assert_allclose(in_openrlhf(out), rewards, rtol=1e-4, atol=1e-5)
    assert (out / "README.md").read_text().startswith("# A model\n\n## Export\n\n- format: " + format_)


@pytest.mark.parametrize("format_", FORMATS)
def test_standardized_rewards(source: Path, tmp_path: Path, format_: str) -> None:
    """The scale is in the head, the shift where the format has a place, and both in gcrm.json."""
    rewards = RewardModel.from_pretrained(source / "model").score(PROMPTS, COMPLETIONS).astype(np.float64)
    expected = (rewards - rewards.mean()) / rewards.std()
    out = tmp_path / "out"
    assert (
        cli.run(
            "export",
            [
                str(source / "model"),
                "-o",
                str(out),
                "--format",
                format_,
                "--standardize",
                str(source / "completions.jsonl"),
            ],
        )
        == 0
    )
    kept = json.loads((out / "gcrm.json").read_text())["standardized"]
    assert kept["completions"] == len(PROMPTS)
    assert (kept["mean"], kept["std"]) == pytest.approx((rewards.mean(), rewards.std()))
    again = RewardModel.from_pretrained(out)
    np.testing.assert_allclose(again.score(PROMPTS, COMPLETIONS) + kept["shift"], expected, rtol=1e-4, atol=1e-5)
    assert again.goals.keys() == {"default", "short"}  # of the new weights
    found = {
        "transformers": lambda: in_transformers(out) + kept["shift"],
        "openrlhf": lambda: in_openrlhf(out),
        "token-classification": lambda: np.array([row[-1] for row in per_token(out)]),
    }[format_]()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["score", "value_head"])
def test_models_of_openrlhf_score_here_as_there(prefix: str, tmp_path: Path) -> None:
    """Its class names itself in config.json, and the head whatever its option said; mean and std only move rewards."""
    head = {f"{prefix}.weight": torch.randn(1, 32)}
    fields = {"value_head_prefix": prefix, "mean": 0.5, "std": 2.0, "normalize_reward": False}
    folder = llama(tmp_path / "in", trunk() | head, architectures=["RewardModel"], **fields)
    rewards = RewardModel.from_pretrained(folder).score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose((rewards - 0.5) / 2, in_openrlhf(folder), rtol=1e-4, atol=1e-5)


def test_a_folder_for_vllm_holds_the_classifier_only(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = RewardModel.from_pretrained(source / "model").score(PROMPTS, COMPLETIONS)
    out = tmp_path / "out"
    assert cli.run("export", [str(source / "model"), "-o", str(out), "--format", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "projection and goal states are omitted" in said
    assert "float32, which vLLM and SGLang convert to float16" in said
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    tensors = load_file(out / "model.safetensors")
    assert {name for name in tensors if not name.startswith("model.")} == {"score.weight"}
    again = RewardModel.from_pretrained(out)
    np.testing.assert_array_equal(again.score(PROMPTS, COMPLETIONS), rewards)
    assert again.goals == {}
    np.testing.assert_allclose(in_transformers(out), rewards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format_", ["vllm", *FORMATS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weights_have_the_requested_dtype(
    source: Path, tmp_path: Path, format_: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all files and in config.json; rewards are those of the rounded weights."""
    out = tmp_path / "out"
    assert cli.run("export", [str(source / "model"), "-o", str(out), "--format", format_, "--dtype", dtype]) == 0
    assert ["dtype", dtype] in [line.split() for line in capsys.readouterr().out.splitlines()]
    files = {"model.safetensors", *([] if format_ == "vllm" else ["gcrm.safetensors"])}
    assert {t.dtype for name in files for t in load_file(out / name).values()} == {getattr(torch, dtype)}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    rewards = RewardModel.from_pretrained(out).score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(
        rewards, RewardModel.from_pretrained(source / "model").score(PROMPTS, COMPLETIONS), atol=0.1
    )
    if format_ != "token-classification":
        np.testing.assert_allclose(in_transformers(out), rewards, rtol=1e-4, atol=1e-5)


def test_weights_beyond_the_range_of_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "in", trunk() | {"score.weight": torch.full((1, 32), 1e5)})
    arguments = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--dtype", "float16"]
    assert cli.run("export", arguments) == 2
    assert "--dtype float16: tensor 'score.weight' holds values beyond its range" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_projects_heads_become_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value-head checkpoint with a bias, without goals, in bfloat16."""
    tensors = {name: tensor.bfloat16() for name, tensor in trunk().items()}
    tensors |= {"v_head.summary.weight": torch.randn(1, 32).bfloat16(), "v_head.summary.bias": torch.ones(1).bfloat16()}
    llama(tmp_path / "in", tensors)
    assert cli.run("export", [str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    assert "v_head.summary.bias" in capsys.readouterr().out
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == trunk().keys() | {"score.weight"}
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    rewards = RewardModel.from_pretrained(tmp_path / "in").score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(in_transformers(tmp_path / "out"), rewards, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "out" / GOAL_FILE).exists()


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """A model whose head has several layers."""
    config = small_config(vocab_size=VOCAB, head="mlp")
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    write_model(tmp_path / "mlp", state, config, tokenizer())
    return tmp_path / "mlp"


def test_a_head_of_several_layers_goes_beside(mlp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("export", [str(mlp), "-o", str(tmp_path / "out")]) == 0
    assert "in gcrm.safetensors, for gcrm_fast only" in capsys.readouterr().out
    rewards = [RewardModel.from_pretrained(folder).score(PROMPTS, COMPLETIONS) for folder in (mlp, tmp_path / "out")]
    np.testing.assert_array_equal(*rewards)


@pytest.mark.parametrize("format", ["transformers", "vllm", "openrlhf", "token-classification"])
@pytest.mark.parametrize("compare", ["states", "latents"])
def test_a_bottleneck_becomes_one_layer(
    format: str, compare: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its latents and a goal of theirs stay with the first format only; the goal of states stays with all but vLLM."""
    models.save(tmp_path / "in", head="bottleneck", bottleneck_size=6, compare=compare)
    command = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--format", format]
    assert cli.run("export", command) == 0
    assert ("latents" in capsys.readouterr().out) == (format == "transformers")
    before, after = (RewardModel.from_pretrained(tmp_path / name) for name in ("in", "out"))
    np.testing.assert_allclose(after.score(PROMPTS, COMPLETIONS), before.score(PROMPTS, COMPLETIONS), rtol=1e-5)
    assert after.config.head == ("bottleneck" if format == "transformers" else "linear")
    kept = format == "transformers" or (format != "vllm" and compare == "states")
    assert bool(after.goals) == kept
    if kept:
        for a, b in zip(after.q_values(PROMPTS, COMPLETIONS), before.q_values(PROMPTS, COMPLETIONS), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rewards_of_a_bottleneck_are_standardized_in_one_layer(source: Path, tmp_path: Path) -> None:
    models.save(tmp_path / "in", head="bottleneck", bottleneck_size=6)
    (tmp_path / "data").write_text(json.dumps({"prompt": PROMPTS[0], "completions": COMPLETIONS}) + "\n")
    before = RewardModel.from_pretrained(tmp_path / "in").score(PROMPTS[0], COMPLETIONS)
    command = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--standardize", str(tmp_path / "data")]
    assert cli.run("export", command) == 0
    after = RewardModel.from_pretrained(tmp_path / "out").score(PROMPTS[0], COMPLETIONS)
    np.testing.assert_allclose(after, before / before.std(), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{mlp}", "-o", "{out}", "--format", "openrlhf"], "several layers, --format openrlhf holds one"),
        (["{mlp}", "-o", "{out}", "--standardize", "{equal}"], "several layers, --standardize scales one"),
        (["{mlp}", "-o", "{mlp}"], "exists: choose another"),
        (["{source}", "-o", "{out}", "--standardize", "{equal}"], "all 2 rewards are equal"),
        (["{source}", "-o", "{out}", "--format", "onnx"], "onnx"),
        (["{source}", "-o", "{out}", "--standardize", "{out}"], "cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    source: Path, mlp: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "equal").write_text('{"prompt": "a", "completions": ["b", "b"]}\n')
    places = {"mlp": mlp, "out": tmp_path / "out", "source": source / "model", "equal": tmp_path / "equal"}
    assert cli.run("export", [argument.format(**places) for argument in arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line and "scoring:" not in line]  # a bar
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["equal", "mlp"]
