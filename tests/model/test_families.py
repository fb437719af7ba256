"""Invariants 5 and 7 for every family: transformers' states, rewards and gradients, and folders in and out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_model as save_by_safetensors
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gcrm_fast import RewardModel, cli
from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.saving import write_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import TokenizedPair, encode_completions, tokenize_pairs
from gcrm_fast.data.packing import Item, build_pack, build_score_pack
from gcrm_fast.data.records import Pair
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer
from gcrm_fast.model.families import FAMILIES
from gcrm_fast.train import main as train
from gcrm_fast.training.memory import kept_for_backward
from support.folders import VOCAB, load, tokenizer
from support.training_runs import torchrun, write_pairs

# How transformers calls them, written out so that a wrong name in our table shows.
FAMILY_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEAD_DIM = 12  # not hidden_size / num_attention_heads
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": ("llama", {"rope_theta": 5e5}),
    "Mistral 7B": ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "Mistral 7B v0.1": ("mistral", {"sliding_window": 4096}),
    "Mistral Nemo": ("mistral", {"sliding_window": None, "head_dim": HEAD_DIM}),
    "Qwen2.5 7B": ("qwen2", {"rope_theta": 1e6}),
    "Qwen2.5 0.5B": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Qwen2 without groups": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 8}),
    "Qwen3 8B": ("qwen3", {"head_dim": 8, "rope_theta": 1e6}),
    "Qwen3 0.6B": ("qwen3", {"head_dim": HEAD_DIM, "tie_word_embeddings": True}),
    "Qwen3, attention bias": ("qwen3", {"head_dim": HEAD_DIM, "attention_bias": True}),
}
PROMPTS = ["one two", "three", "four, five six"] * 2
COMPLETIONS = [" three", "; seven four", " one", "two", " six six six", ", five"]


def theirs_of(model: str, kind: type = AutoModelForSequenceClassification, **more: Any) -> PreTrainedModel:
    """transformers' model of a few thousand random weights, all of standard deviation 0.2 or more."""
    family, changes = MODELS[model]
    theta = changes.get("rope_theta", 10000.0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_labels": 1,
        "pad_token_id": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    config = AutoConfig.for_model(family, **{**sizes, **changes, **more})
    theirs = kind.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(noise + name.endswith("norm.weight"))
    assert type(theirs).__name__.startswith(FAMILY_CLASSES[family] + "For")
    return theirs


def saved(folder: Path, model: str, kind: type = AutoModelForSequenceClassification, **more: Any) -> PreTrainedModel:
    theirs = theirs_of(model, kind, **more)
    theirs.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return theirs


def named(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def in_transformers(folder: Path) -> np.ndarray:
    """Rewards as AutoModelForSequenceClassification gives them, from the class that config.json names."""
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert named(folder)["architectures"] == [type(theirs).__name__]
    names = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batches = [names(p + c + "<|eos|>", return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        return np.array([theirs(**batch).logits[0, 0] for batch in batches])


def test_every_family_is_tested() -> None:
    assert {family for family, _ in MODELS.values()} == FAMILY_CLASSES.keys() == FAMILIES.keys()


# ---------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("model", MODELS)
def test_states_and_rewards_are_those_of_transformers(model: str, pairs: list[TokenizedPair], tmp_path: Path) -> None:
    """At every completion token, with prompts shared and without."""
    theirs = saved(tmp_path, model)
    ours, weights, _ = load(tmp_path)
    assert weights.notes == ()
    items = [
        Item(i, ids, pair.chosen_start, "")
        for i, (pair, ids) in enumerate((pair, ids) for pair in pairs for ids in pair.sequences)
    ]
    pack = build_score_pack([items[:4], items[4:10], items[12:]], per_token=True)
    with torch.no_grad():
        hidden_RH = ours.model(pack, "eager")
        reward_R = ours.rewards(hidden_RH)
        for index, rows in zip(pack.indices, pack.rows_of, strict=True):
            ids = torch.from_numpy(items[index].ids.astype(np.int64))[None]
            states = theirs.model(ids).last_hidden_state[0, items[index].start :]
            torch.testing.assert_close(hidden_RH[rows], states, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(reward_R[rows[-1]], theirs(ids).logits[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "recompute"), [*((model, "none") for model in MODELS), ("Qwen3 8B", "block")])
def test_gradients_are_those_of_transformers(
    model: str, recompute: str, pairs: list[TokenizedPair], tmp_path: Path
) -> None:
    """Of a ranking loss on packs that share prompts; every parameter has one, biases and norms of heads too."""
    theirs = saved(tmp_path, model)
    ours, _, _ = load(tmp_path)
    for layer in ours.model.layers:
        layer.recompute = recompute
    reward_2N = ours(build_pack([pairs[:2], pairs[2:5], [pairs[6]]], Sampling(samples=4), 0)).reward_2N
    torch.nn.functional.softplus(reward_2N[1] - reward_2N[0]).sum().backward()
    loss = torch.zeros(())
    for pair in [*pairs[:5], pairs[6]]:
        chosen, rejected = (theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits for ids in pair.sequences)
        loss = loss + torch.nn.functional.softplus(rejected - chosen).sum()
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4 * float(expected[name].abs().max()))


# ------------------------------------------------------------------------------------------------------ in and out


@pytest.mark.parametrize("model", MODELS)
def test_a_reward_model_goes_in_and_out(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' folder -> here -> exported: the same tensors bit for bit, class and rewards in transformers."""
    saved(tmp_path / "in", model)
    assert cli.run("export", [str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load(tmp_path / "in")[2] == load(tmp_path / "out")[2]
    rewards = RewardModel.from_pretrained(tmp_path / "in").score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(in_transformers(tmp_path / "in"), rewards, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(in_transformers(tmp_path / "out"), rewards, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(RewardModel.from_pretrained(tmp_path / "out").score(PROMPTS, COMPLETIONS), rewards)
    family, prefix = MODELS[model][0], FAMILY_CLASSES[MODELS[model][0]]
    assert (named(tmp_path / "out")["model_type"], named(tmp_path / "out")["architectures"]) == (
        family,
        [f"{prefix}ForSequenceClassification"],
    )
    assert named(tmp_path / "out").get("sliding_window") == named(tmp_path / "in").get("sliding_window")


@pytest.mark.parametrize("family", FAMILY_CLASSES)
def test_token_classifiers_have_their_familys_class(family: str, tmp_path: Path) -> None:
    model = next(name for name, (own, _) in MODELS.items() if own == family)
    saved(tmp_path / "in", model)
    assert (
        cli.run("export", [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--format", "token-classification"]) == 0
    )
    assert named(tmp_path / "out")["architectures"] == [f"{FAMILY_CLASSES[family]}ForTokenClassification"]
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = RewardModel.from_pretrained(tmp_path / "in")
    for completion, judged in zip(
        encoded := ours.encode(PROMPTS, COMPLETIONS), ours.judge(encoded, per_token=True), strict=True
    ):
        with torch.no_grad():
            found = theirs(torch.from_numpy(completion.ids.astype(np.int64))[None]).logits[0, completion.start :, 0]
        np.testing.assert_allclose(found, judged.rewards_n, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "mlp", "bottleneck"])
@pytest.mark.parametrize("family", FAMILY_CLASSES)
def test_round_trip_with_every_head(family: str, head: str, tmp_path: Path) -> None:
    model = next(name for name, (own, _) in MODELS.items() if own == family)
    saved(tmp_path / "in", model, AutoModelForCausalLM)
    shape = {"head": head, "projection_size": 5, "bottleneck_size": 6 if head == "bottleneck" else 0}
    ours, _, config = load(tmp_path / "in", **shape)
    state = {name: p.detach() for name, p in ours.named_parameters()}
    write_model(tmp_path / "out", state, config, tokenizer())
    again, weights, read = load(tmp_path / "out", **shape)
    assert (read, weights.notes) == (config, ())
    assert all(torch.equal(parameter, state[name]) for name, parameter in again.named_parameters())
    kind = "Model" if head == "mlp" else "ForSequenceClassification"
    assert named(tmp_path / "out")["architectures"] == [FAMILY_CLASSES[family] + kind]


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("model", [name for name, (_, changes) in MODELS.items() if "tie_word_embeddings" in changes])
def test_tied_embeddings(model: str, kept: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, model, AutoModelForCausalLM)
    if kept == "lm_head":
        save_by_safetensors(theirs, str(tmp_path / "model.safetensors"))
    ours, weights, _ = load(tmp_path)
    assert weights.notes == (f"{tmp_path}: holds no reward head: a new one is initialized",)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.get_parameter(name), tensor)


@pytest.mark.parametrize("family", FAMILY_CLASSES)
def test_language_models_train_into_reward_models(family: str, tmp_path: Path) -> None:
    """gcrm train from a language model, and what it saves in transformers. Small parameters move like all others."""
    model = next(name for name, (own, _) in MODELS.items() if own == family)
    theirs = saved(tmp_path / "m", model, AutoModelForCausalLM)
    data, out = write_pairs(tmp_path / "pairs.jsonl.gz"), tmp_path / "out"
    assert (
        train(
            [
                "--data",
                str(data),
                "--model",
                str(tmp_path / "m"),
                "--output",
                str(out),
                "--steps",
                "2",
                "--lr",
                "0.01",
                "--samples",
                "4",
            ]
        )
        == 0
    )
    rewards = RewardModel.from_pretrained(out / "model").score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(in_transformers(out / "model"), rewards, rtol=1e-4, atol=1e-4)
    trained = load_file(out / "model" / "model.safetensors")
    for name, before in theirs.named_parameters():
        if name != "lm_head.weight":
            moved = (trained[name] - before).abs().max()
            assert 1e-4 < moved < 0.1, name


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Biases and norms of heads, cut into shards: some of a bias for each process, and half of a norm's 12 numbers."""
    saved(tmp_path / "m", "Qwen3, attention bias", AutoModelForCausalLM)
    data = write_pairs(tmp_path / "pairs.jsonl.gz")
    options = ["--data", str(data), "--model", str(tmp_path / "m"), "--steps", "3", "--lr", "0.001", "--samples", "4"]
    assert train([*options, "--output", str(tmp_path / "one")]) == 0
    result = torchrun(*options, "--output", str(tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        if not name.endswith("k_proj.bias"):  # gradients near zero, whose rounding Adam makes as large as any
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_norms_of_heads_keep_their_input_for_the_backward(tmp_path: Path) -> None:
    """The memory model counts queries and keys twice where they are normed."""
    saved(tmp_path, "Qwen3 0.6B")
    config = load(tmp_path)[2]
    plain = type(config)(**{**vars(config), "model_type": "llama"})
    shape = (100, 150, 20, "none", 2, True)
    assert kept_for_backward(config, *shape) - kept_for_backward(plain, *shape) == 3 * 100 * (4 + 2) * HEAD_DIM * 2


# ------------------------------------------------------------------------------------------------------- config.json

COMMON = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # config.json in the form of these models, from memory
    "mistralai/Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {
            "head_dim": 128,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 32768,
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32768,
        },
        {"head_dim": 128, "sliding_window": None, "rope_theta": 1e6},
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {
            "head_dim": 128,
            "num_key_value_heads": 4,
            "sliding_window": None,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
        },
    ),
    "Qwen/Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"head_dim": 128, "num_key_value_heads": 8, "sliding_window": None, "max_position_embeddings": 40960},
    ),
}


@pytest.mark.parametrize(("raw", "expected"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configs(raw: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | raw))
    config = read_config(tmp_path, head="linear", projection_size=0)
    assert config.model_type == raw["model_type"]
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILY_CLASSES)
def test_absent_fields_are_transformers_defaults(family: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 1024,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": family}))
    ours, theirs = read_config(tmp_path, head="linear", projection_size=0), AutoConfig.for_model(family, **sizes)
    for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "sliding_window"):
        assert getattr(ours, name) == getattr(theirs, name, None), name
    assert ours.head_dim == getattr(theirs, "head_dim", 1024 // 32)
    assert ours.rope_theta == getattr(theirs, "rope_parameters", vars(theirs))["rope_theta"]  # transformers 5, 4
    assert (ours.attention_bias, ours.mlp_bias) == (False, False)


# -------------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("Mistral 7B", {"sliding_window": None}),
        ("Mistral 7B", {"sliding_window": 131072}),
        ("Qwen2.5 7B", {"use_sliding_window": False, "sliding_window": 8}),
        ("Qwen2.5 7B", {"use_sliding_window": True, "sliding_window": None}),
        ("Qwen3 8B", {"use_sliding_window": True, "sliding_window": 64, "max_position_embeddings": 64}),
    ],
)
def test_windows_that_do_not_bite_are_accepted(model: str, fields: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(named(tmp_path) | fields))
    rewards = RewardModel.from_pretrained(tmp_path).score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(in_transformers(tmp_path), rewards, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["Qwen2.5 7B", "Qwen3 8B"])
def test_windows_in_some_layers_are_refused(model: str, tmp_path: Path) -> None:
    saved(tmp_path, model)
    fields = {"use_sliding_window": True, "sliding_window": 63, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(named(tmp_path) | fields))
    with pytest.raises(UserError, match="'use_sliding_window' is true, with a window of 63 tokens"):
        RewardModel.from_pretrained(tmp_path)


def test_a_text_as_long_as_the_window_is_scored_and_a_longer_one_refused(tmp_path: Path) -> None:
    window = 8
    theirs = saved(tmp_path, "Mistral 7B", sliding_window=window)
    ours = RewardModel.from_pretrained(tmp_path)
    encoded = ours.encode(["one two"] * 2, [" one two three", " one two three four"])
    fitting = [c for c in encoded if len(c.ids) <= window]
    assert [len(c.ids) - window for c in encoded] == [0, 1], "the texts must be as long as the window and one longer"
    with torch.no_grad():
        expected = theirs(torch.from_numpy(fitting[0].ids.astype(np.int64))[None]).logits[0, 0]
    assert ours.judge(fitting)[0].reward == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    with pytest.raises(UserError, match="completion 1 has 9 tokens, more than the model's sliding window of 8"):
        ours.judge(encoded)


# --------------------------------------------------------------------------------------------------- Qwen's tokenizers

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def qwen(tmp_path: Path) -> Callable[..., Path]:
    """qwen(eos, more special tokens...): a folder with the tokenizer files of a Qwen."""

    def write(eos: str, *more: str) -> Path:
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            ["one two three four, five"] * 9, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet)
        )
        bpe.add_special_tokens([*SPECIAL, *more])
        PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path)
        settings = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": eos,
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "split_special_tokens": False,
            "additional_special_tokens": SPECIAL[1:],
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 32768,
            "chat_template": CHATML,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def test_nothing_is_put_before_a_text_without_bos(qwen: Callable[..., Path]) -> None:
    folder = qwen("<|im_end|>")
    loaded, stated = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded.bos_token_id is None
    (plain,) = encode_completions(loaded, ["one two"], [" three"])
    assert plain.ids.tolist() == [*stated.encode("one two three").ids, loaded.eos_token_id]
    assert plain.start == len(stated.encode("one two").ids)
    prompt = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    (turn,) = encode_completions(loaded, [prompt], ["two<|im_end|>\n"])
    assert turn.ids.tolist() == stated.encode(prompt + "two<|im_end|>").ids
    # A prompt that is too long loses its first token, which is nobody's bos.
    [kept], report = tokenize_pairs(loaded, [Pair("one two three", " four", " five")], 4, overlong="truncate-prompt")
    assert (report.shortened, len(kept.chosen_ids)) == (1, 4)
    assert kept.chosen_ids.tolist() == [*stated.encode("one two three four").ids, loaded.eos_token_id][-4:]


@pytest.mark.parametrize(
    ("eos", "more", "pad"),
    [
        ("<|im_end|>", ["<|fim_pad|>"], "<|endoftext|>"),  # instruct models pad with another token than they end with
        ("<|endoftext|>", ["<|fim_pad|>"], "<|fim_pad|>"),  # Qwen2.5 and Qwen3, base
        ("<|endoftext|>", [], "<|im_start|>"),  # Qwen2, base
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_pad_of_qwen_ends_nothing(family: str, eos: str, more: list[str], pad: str, qwen: Callable[..., Path]) -> None:
    loaded = load_tokenizer(qwen(eos, *more))
    assert choose_pad(loaded, 1000, "test", FAMILIES[family]) == loaded.get_vocab()[pad]
    assert loaded.pad_token == pad
