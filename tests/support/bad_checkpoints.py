"""Checkpoints and tokenizers that must be refused."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import PreTrainedTokenizerFast

from gcrm_fast.data.tokenization import BOS, PAD
from support.bad_input import Case
from support.folders import CONFIG, llama, tokenizer, trunk

H = CONFIG["hidden_size"]
NORM = "model.layers.0.input_layernorm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def arguments(folder: Path, *more: str) -> list[str]:
    """``gcrm train`` on one good pair with the model ``folder/m``."""
    (folder / "pairs.jsonl").write_text('{"prompt": "one", "chosen": " two", "rejected": " six"}\n')
    return ["--data", str(folder / "pairs.jsonl"), "--model", str(folder / "m"), *more]


def config(name: str, message: str, **changes: object) -> Case:
    """A good folder with changed fields of config.json (None removes one)."""

    def build(folder: Path) -> list[str]:
        llama(folder / "m", None, **changes)
        return arguments(folder)

    return Case(f"config: {name}", build, message)


def tensors(name: str, message: str, changes: Mapping[str, torch.Tensor | None], *more: str) -> Case:
    """A good trunk with changed tensors (None removes one)."""

    def build(folder: Path) -> list[str]:
        changed = {**trunk(), **changes}
        llama(folder / "m", {k: v for k, v in changed.items() if v is not None})
        return arguments(folder, *more)

    return Case(f"tensors: {name}", build, message)


def damaged(name: str, message: str, damage: Callable[[Path], object], *more: str) -> Case:
    """A good folder after ``damage(folder)``."""

    def build(folder: Path) -> list[str]:
        damage(llama(folder / "m"))
        return arguments(folder, *more)

    return Case(name, build, message)


def sharded(folder: Path, **weight_map: object) -> None:
    """Splits the weights into a.safetensors (the norms) and b.safetensors, with an index; ``weight_map`` adds to it."""
    stored = load_file(folder / WEIGHTS)
    norms = {key: value for key, value in stored.items() if "norm" in key}
    save_file(norms, folder / "a.safetensors")
    save_file({key: value for key, value in stored.items() if key not in norms}, folder / "b.safetensors")
    index = {key: "a.safetensors" if key in norms else "b.safetensors" for key in stored}
    (folder / INDEX).write_text(json.dumps({"weight_map": index | weight_map}))
    (folder / WEIGHTS).unlink()


def with_index(folder: Path, text: str) -> None:
    sharded(folder)
    (folder / INDEX).write_text(text)


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").unlink()


def same_tensor_twice(folder: Path) -> None:
    sharded(folder)
    save_file(load_file(folder / "a.safetensors") | {"lm_head.weight": torch.zeros(1)}, folder / "a.safetensors")


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def move(folder: Path, name: str) -> None:
    """Puts a folder where a file belongs."""
    (folder / name).unlink()
    (folder / name).mkdir()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def with_tokenizer(folder: Path, **special: str) -> None:
    """The tokenizer with no other special tokens than ``special``."""
    without_tokenizer(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, **special).save_pretrained(folder)


def with_nothing_to_pad(folder: Path) -> None:
    """A tokenizer whose one special token is bos, eos and pad."""
    with_tokenizer(folder, eos_token=BOS, pad_token=BOS)
    for path in folder.glob("*token*"):
        path.write_text(path.read_text().replace(PAD, "<|other|>"))
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    for token in raw["added_tokens"]:
        token["special"] = token["content"] == BOS
    path.write_text(json.dumps(raw))


def with_fewer_rows(folder: Path) -> None:
    """A model whose embedding has one row fewer than its tokenizer has tokens."""
    rows = len(tokenizer()) - 1
    llama(folder, trunk() | {"model.embed_tokens.weight": torch.ones(rows, H)}, vocab_size=rows)


def with_sentencepiece(folder: Path, model_type: str) -> None:
    """A sentencepiece model that Llama's rules do not describe."""
    without_tokenizer(folder)
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["one two three four five six seven"] * 50),
            model_writer=file,
            vocab_size=276,
            byte_fallback=True,
            minloglevel=2,
            model_type=model_type,
        )


def with_random_tokenizer_model(folder: Path) -> None:
    without_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(os.urandom(100))


def model_name(name: str, message: str, value: str, *more: str) -> Case:
    """Another value of --model."""
    return Case(f"--model: {name}", lambda folder: [*arguments(folder), "--model", value, *more], message)


def _unreadable_folder(folder: Path) -> list[str]:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    llama(folder / "m").chmod(0)
    return arguments(folder)


def _file_as_model(folder: Path) -> list[str]:
    (folder / "weights").write_text("x")
    return [*arguments(folder), "--model", "weights"]


def _bad_tokenizer_name(folder: Path) -> list[str]:
    llama(folder / "m")
    return [*arguments(folder), "--tokenizer", "no/such/tokenizer"]


CASES = [
    # ---- finding
    model_name("no such folder", r"--model \./nowhere: no such folder$", "./nowhere"),
    model_name("a path of several folders", r"--model a/b/c: no such folder$", "a/b/c"),
    model_name(
        "a hub name without network",
        r"--model nobody/none: no such folder, .* cache of .* hub, and HF_HUB_OFFLINE is set$",
        "nobody/none",
    ),
    model_name("too long for a path", r"--model x{5000}: no such folder$", "x" * 5000),
    Case("--model: a folder that may not be read", _unreadable_folder, r"--model \S+/m: permission denied"),
    Case("--model: a file", _file_as_model, r"--model weights: is a file"),
    Case("--tokenizer: no such folder", _bad_tokenizer_name, r"--tokenizer no/such/tokenizer: no such folder"),
    # ---- config.json
    damaged("config: missing", r"--model .*m: holds no config\.json", lambda m: (m / "config.json").unlink()),
    damaged("config: a folder", r"m/config\.json: is not a file", lambda m: move(m, "config.json")),
    damaged("config: not JSON", r"m/config\.json: not valid JSON", lambda m: (m / "config.json").write_text("{")),
    damaged(
        "config: not UTF-8",
        r"m/config\.json: not valid JSON",
        lambda m: (m / "config.json").write_bytes(b'{"a": "\xff"}'),
    ),
    damaged(
        "config: nested too deeply",
        r"m/config\.json: not valid JSON",
        lambda m: (m / "config.json").write_text("[" * 100_000),
    ),
    damaged("config: a list", r"m/config\.json: not a JSON object", lambda m: (m / "config.json").write_text("[]")),
    config(
        "another family",
        r"m/config\.json: field 'model_type' is 'gemma2': supported are llama, mistral, qwen2, "
        r"qwen3$",
        model_type="gemma2",
    ),
    config("a list as family", r"m/config\.json: field 'model_type' is \['llama'\]", model_type=["llama"]),
    config(
        "Mistral's window shorter than the text",
        r"--max-length 2048: more than the sliding window of \S+/m, 2047 "
        r"tokens: pass --max-length 2047 or less",
        model_type="mistral",
        sliding_window=2047,
    ),
    config(
        "Mistral's window not a number",
        r"m/config\.json: field 'sliding_window' is 'all'",
        model_type="mistral",
        sliding_window="all",
    ),
    *(
        config(
            f"sliding window of {family}",
            r"m/config\.json: field 'use_sliding_window' is true, with a window of 4",
            model_type=family,
            use_sliding_window=True,
        )
        for family in ("qwen2", "qwen3")
    ),
    config(
        "Qwen2 without its biases",
        r"m: 3 tensors \('model\.layers\.0\.self_attn\.k_proj\.bias', .*missing",
        model_type="qwen2",
    ),
    config(
        "Qwen3 without its norms",
        r"m: 2 tensors \('model\.layers\.0\.self_attn\.k_norm\.weight', .*missing",
        model_type="qwen3",
        head_dim=8,
    ),
    config("no architecture", r"m/config\.json: field 'model_type' is None", model_type=None),
    config("no vocab_size", r"m/config\.json: field 'vocab_size' is missing", vocab_size=None),
    config(
        "a size as text", r"m/config\.json: field 'hidden_size' is '32': must be a positive integer", hidden_size="32"
    ),
    config("a size as boolean", r"m/config\.json: field 'num_hidden_layers' is True", num_hidden_layers=True),
    config("a size of zero", r"m/config\.json: field 'num_attention_heads' is 0", num_attention_heads=0),
    config("an enormous size", r"m/config\.json: field 'vocab_size' is 10{30}", vocab_size=10**30),
    config(
        "heads that do not divide the width",
        r"field 'hidden_size' is 32, not a multiple of the 5",
        num_attention_heads=5,
    ),
    config("key/value heads that do not divide the heads", r"field 'num_key_value_heads' is 3", num_key_value_heads=3),
    config("odd head_dim", r"field 'head_dim' is 7", head_dim=7),
    config("epsilon not a number", r"field 'rms_norm_eps' is nan: must be a positive", rms_norm_eps=float("nan")),
    config("bias not a boolean", r"field 'attention_bias' is 'no': must be true or false", attention_bias="no"),
    config("other activation", r"field 'hidden_act' is 'gelu'", hidden_act="gelu"),
    config("quantized", r"field 'quantization_config': a quantized", quantization_config={"quant_method": "gptq"}),
    config(
        "RoPE of another type",
        r"field 'rope_scaling' names a RoPE of type 'yarn'",
        rope_scaling={"rope_type": "yarn", "factor": 2.0},
    ),
    config("RoPE not an object", r"field 'rope_parameters' is list", rope_parameters=["linear"]),
    config("RoPE type not text", r"names a RoPE of type \['linear'\]", rope_scaling={"type": ["linear"]}),
    config("RoPE without a factor", r"field 'factor' is missing", rope_scaling={"type": "linear"}),
    config(
        "RoPE on part of a head",
        r"field 'partial_rotary_factor' is 0\.5: only RoPE on whole heads",
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    config(
        "RoPE on part of a head, transformers 4", r"field 'partial_rotary_factor' is 0\.5", partial_rotary_factor=0.5
    ),
    config("llama3 without its context", r"field 'original_max_position_embeddings' is missing", rope_scaling=LLAMA3),
    config(
        "llama3 with swapped factors",
        r"low_freq_factor must be below high_freq_factor",
        rope_scaling=LLAMA3 | {"low_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    config(
        "two values of theta",
        r"field 'rope_theta' is 5000\.0, but 10000\.0 in 'rope_parameters': keep the right one",
        rope_theta=5000.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    config(
        "two partial rotations",
        r"field 'partial_rotary_factor' is 0\.5, but 1\.0 in 'rope_scaling'",
        partial_rotary_factor=0.5,
        rope_scaling={"type": "default", "partial_rotary_factor": 1.0},
    ),
    config("theta of zero", r"field 'rope_theta' is 0", rope_theta=0),
    damaged(
        "an adapter",
        r"m/adapter_config\.json: field 'peft_type' is None: only 'LORA' is supported: merge it with peft",
        lambda m: (m / "adapter_config.json").write_text("{}"),
    ),
    # ---- files of weights
    damaged("weights: missing", r"m/model\.safetensors: missing", lambda m: (m / WEIGHTS).unlink()),
    damaged("weights: a pickle", r"m/model\.safetensors: missing: .*pytorch_model\.bin is a pickle", pickled),
    damaged(
        "weights: reward head in a pickle",
        r"m/value_head\.bin: a reward head in a pickle",
        lambda m: torch.save({}, m / "value_head.bin"),
    ),
    damaged("weights: truncated", r"m/model\.safetensors: not a readable safetensors file", truncated),
    damaged(
        "weights: not safetensors",
        r"m/model\.safetensors: not a readable safetensors file",
        lambda m: (m / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
    ),
    damaged(
        "weights: empty",
        r"m/model\.safetensors: not a readable safetensors file",
        lambda m: (m / WEIGHTS).write_bytes(b""),
    ),
    damaged("shards: one missing", r"m/b\.safetensors: missing", missing_shard),
    damaged(
        "shards: index names an absent file", r"m/c\.safetensors: missing", lambda m: sharded(m, extra="c.safetensors")
    ),
    damaged(
        "shards: index leaves the folder",
        r"index\.json: field 'weight_map' must name a file of this folder",
        lambda m: sharded(m, extra="../c.safetensors"),
    ),
    damaged("shards: index of numbers", r"index\.json: field 'weight_map'", lambda m: sharded(m, extra=1)),
    damaged(
        "shards: index without a map",
        r"index\.json: field 'weight_map'",
        lambda m: with_index(m, '{"metadata": {}}'),
    ),
    damaged("shards: index not JSON", r"index\.json: not valid JSON", lambda m: with_index(m, "{")),
    damaged(
        "shards: a tensor in two",
        r"m/b\.safetensors: tensor 'lm_head\.weight' is also in a\.safetensors",
        same_tensor_twice,
    ),
    # ---- tensors
    tensors("one missing", r"m: 1 tensor \('model\.norm\.weight'\) missing", {"model.norm.weight": None}),
    config("more layers than weights", r"m: 9 tensors \('model\.layers\.1\..*, \.\.\.\) missing", num_hidden_layers=2),
    tensors(
        "more layers than config.json says",
        r"m: 1 tensor \('model\.layers\.1\.input_layernorm\.weight'\) without",
        {"model.layers.1.input_layernorm.weight": torch.ones(H)},
    ),
    config(
        "bias without tensors",
        r"m: 4 tensors \('model\.layers\.0\.self_attn\.k_proj\.bias', .*missing",
        attention_bias=True,
    ),
    tensors("no trunk", r"m: no tensor 'layers\.0\.input_layernorm\.weight'", {NORM: None}),
    tensors(
        "two trunks",
        r"m: 2 tensors \('model\.layers\.0.*', 'reference\.layers\.0.*one model is expected there",
        {"reference.layers.0.input_layernorm.weight": torch.ones(H)},
    ),
    tensors(
        "wrong shape",
        r"tensor 'model\.norm\.weight' has shape \(33,\), not \(32,\)",
        {"model.norm.weight": torch.ones(33)},
    ),
    config(
        "other width than the weights",
        r"tensor 'model\.layers\.0\.mlp\.gate_proj\.weight' has shape \(48, 32\), "
        r"not \(64, 32\)",
        intermediate_size=64,
    ),
    tensors("int8", r"tensor 'model\.norm\.weight' has dtype I8", {"model.norm.weight": torch.ones(H).to(torch.int8)}),
    tensors(
        "float8",
        r"tensor 'model\.norm\.weight' has dtype F8_E4M3",
        {"model.norm.weight": torch.ones(H).to(torch.float8_e4m3fn)},
    ),
    tensors(
        "left over",
        r"m: 5 tensors \('extra\.0', 'extra\.1', 'extra\.2', \.\.\.\) without a place",
        {f"extra.{i}": torch.ones(1) for i in range(5)},
    ),
    tensors(
        "biases that config.json denies",
        r"m: 1 tensor \('model\.layers\.0\.self_attn\.q_proj\.bias'\) without",
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(H)},
    ),
    # ---- heads
    tensors(
        "unknown head",
        r"m: 1 tensor \('regression_layer\.weight'\) without a place",
        {"regression_layer.weight": torch.ones(19, H)},
    ),
    config(
        "classifier without a head",
        r"m: tensor 'score\.weight' missing .*field 'architectures'",
        architectures=["LlamaForSequenceClassification"],
    ),
    tensors(
        "bias of a head that is not there", r"m: 1 tensor \('score\.bias'\) without", {"score.bias": torch.ones(1)}
    ),
    tensors(
        "head of two labels",
        r"tensor 'score\.weight' has shape \(2, 32\), not \(1, 32\): a reward head has one",
        {"score.weight": torch.ones(2, H)},
    ),
    tensors(
        "head of two layers",
        r"m: 2 tensors \('v_head\.0\.weight', 'v_head\.2\.weight'\) without a place",
        {"v_head.0.weight": torch.ones(H, H), "v_head.2.weight": torch.ones(1, H)},
    ),
    tensors(
        "two heads",
        r"m: holds 2 reward heads \(score, v_head\)",
        {"score.weight": torch.ones(1, H), "v_head.weight": torch.ones(1, H)},
    ),
    tensors(
        "bias of two",
        r"tensor 'score\.bias' has shape \(2,\)",
        {"score.weight": torch.ones(1, H), "score.bias": torch.ones(2)},
    ),
    tensors(
        "head in int8", r"tensor 'score\.weight' has dtype I8", {"score.weight": torch.ones(1, H, dtype=torch.int8)}
    ),
    tensors(
        "linear head where an MLP is asked for",
        r"m: its reward head 'score\.weight' is linear: omit --head",
        {"score.weight": torch.ones(1, H)},
        "--head",
        "mlp",
    ),
    tensors(
        "MLP head and projection where neither is asked for",
        r"m: 9 tensors .*pass --head mlp --projection-size 5",
        {
            f"score.{i}.{kind}": torch.ones(H if i < 6 else 1, H)[:, : H if kind == "weight" else 1].squeeze(1)
            for i in (0, 2, 4, 6)
            for kind in ("weight", "bias")
        }
        | {"projection.weight": torch.ones(5, H)},
    ),
    tensors(
        "part of an MLP head",
        r"m: 7 tensors \('score\.0\.bias'.*missing",
        {"score.0.weight": torch.ones(H, H)},
        "--head",
        "mlp",
    ),
    tensors(
        "projection of another width",
        r"tensor 'projection\.weight' has shape \(5, 32\), not \(8, 32\): see",
        {"projection.weight": torch.ones(5, H)},
        "--projection-size",
        "8",
    ),
    # ---- tokenizers
    damaged("tokenizer: none", r"m: holds no tokenizer\.json or tokenizer\.model: .*--tokenizer", without_tokenizer),
    damaged(
        "tokenizer: damaged",
        r"m: no tokenizer that transformers can load",
        lambda m: (m / "tokenizer.json").write_text("{}"),
    ),
    damaged(
        "tokenizer: settings that are no object",
        r"m: no tokenizer that transformers can load .*--tokenizer",
        lambda m: (m / "tokenizer_config.json").write_text("[]"),
    ),
    damaged("tokenizer: no eos", r"m: the tokenizer has no eos token", lambda m: with_tokenizer(m, bos_token=BOS)),
    damaged(
        "tokenizer: pad is eos and nothing else can pad",
        r"m: the tokenizer has no pad, unk or bos token that "
        r"differs from eos",
        with_nothing_to_pad,
    ),
    damaged(
        "tokenizer: more tokens than the embedding has rows",
        r"m: the tokenizer has ids up to (\d+), the model's "
        r"vocab_size is \1",
        with_fewer_rows,
    ),
    damaged(
        "tokenizer: sentencepiece with other rules",
        r"m/tokenizer\.model: converted, it does not tokenize ' a' as sentencepiece",
        lambda m: with_sentencepiece(m, model_type="bpe"),
    ),
    damaged(
        "tokenizer: sentencepiece unigram",
        r"m/tokenizer\.model: converted, it does not tokenize|m: no tokenizer",
        lambda m: with_sentencepiece(m, model_type="unigram"),
    ),
    damaged(
        "tokenizer: sentencepiece damaged",
        r"m: no tokenizer that transformers can load",
        with_random_tokenizer_model,
    ),
]
