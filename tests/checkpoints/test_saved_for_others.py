"""Saved folders as other programs read them, by their own rules; folders that are broken."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gcrm_fast.checkpoints import weights
from gcrm_fast.checkpoints.goals import GOAL_FILE
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import encode_completions
from gcrm_fast.data.tokenization import BOS, choose_pad, load_tokenizer
from gcrm_fast.inference.scoring import RewardModel
from support import models
from support.chat import CHATML, LLAMA2, LLAMA3, chat_tokenizer
from support.folders import llama
from support.small import small_config, small_model

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]


def read_as_vllm_does(folder: Path) -> set[str]:
    """Its ``filter_duplicate_safetensors_files``: the files that the index names, or all of them without an index."""
    files, index = {path.name for path in folder.glob("*.safetensors")}, folder / "model.safetensors.index.json"
    if index.is_file():
        files &= set(json.loads(index.read_text())["weight_map"].values())
    names: set[str] = set()
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_vllm_reads_the_classifier_and_nothing_else(tmp_path: Path) -> None:
    models.save(tmp_path / "m", projection_size=4)
    assert (tmp_path / "m" / "gcrm.safetensors").is_file()
    names = read_as_vllm_does(tmp_path / "m")
    assert {name for name in names if not name.startswith("model.")} == {"score.weight"}
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names


def test_older_folders_without_an_index_load_alike(tmp_path: Path) -> None:
    models.save(tmp_path / "m")
    before = RewardModel.from_pretrained(tmp_path / "m", device="cpu").score(["one"], ["two"])
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    assert RewardModel.from_pretrained(tmp_path / "m", device="cpu").score(["one"], ["two"]) == before


def test_saved_tokenizers_name_their_inputs(tmp_path: Path) -> None:
    models.save(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert raw["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2])
def test_the_saved_template_ends_where_the_reward_is_read(template: str, tmp_path: Path) -> None:
    """Prompts are those of the original template, whose user may have asked for them in training."""
    tokenizer = chat_tokenizer(template)
    choose_pad(tokenizer, len(tokenizer), "test")
    config = small_config(vocab_size=len(tokenizer), num_hidden_layers=1)
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    save_model(tmp_path / "m", state, config, tokenizer, torch.ones(32), 1)
    saved = load_tokenizer(tmp_path / "m")
    ids = saved.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    prompt, answer = as_text(tokenizer, MESSAGES[:1], MESSAGES[1:])
    [read] = encode_completions(tokenizer, [prompt], [answer])
    assert ids[-1] == read.ids[-1]
    assert as_text(saved, MESSAGES[:1], MESSAGES[1:])[0] == prompt
    long = [*MESSAGES, *MESSAGES]
    for ask in (True, False):
        one, other = (
            str(t.apply_chat_template(long, tokenize=False, add_generation_prompt=ask)) for t in (tokenizer, saved)
        )
        assert other == (one if ask else one.rstrip())
    assert tokenizer.chat_template == template, "the tokenizer of the run is left alone"


def test_pad_is_not_bos_where_there_is_another_token() -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_tokens(["<|spare|>", "<|reserved_7|>"], special_tokens=True)
    tokenizer.pad_token = None
    vocab = tokenizer.get_vocab()
    del vocab["<|pad|>"]
    tokenizer.get_vocab = lambda: vocab  # type: ignore[method-assign]  # as if it had no pad of its own
    choose_pad(tokenizer, 1000, "test")
    assert tokenizer.pad_token == "<|reserved_7|>"
    assert tokenizer.pad_token != BOS


# ---------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**6}, "'num_hidden_layers' is 1000000, but the files hold 1 layers"),
        ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1, "head_dim": 8}, "too large"),
    ],
)
def test_sizes_that_no_machine_holds(config: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        RewardModel.from_pretrained(llama(tmp_path / "m", **config), device="cpu")


def test_layers_are_counted_before_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_LAYERS", 3)
    with pytest.raises(UserError, match="'num_hidden_layers' is 4, but the files hold 1 layers"):
        RewardModel.from_pretrained(llama(tmp_path / "m", num_hidden_layers=4), device="cpu")


def test_a_projection_that_no_machine_holds(tmp_path: Path) -> None:
    models.save(tmp_path / "m", projection_size=4)
    path = tmp_path / "m" / "gcrm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "projection_size": 10**18}))
    with pytest.raises(UserError, match=r"too large: check config\.json and gcrm\.json"):
        RewardModel.from_pretrained(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("name", ["config.json", "gcrm.json", GOAL_FILE])
def test_a_pipe_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    models.save(tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    with pytest.raises(UserError, match=rf"{name}: is not a file"):
        RewardModel.from_pretrained(tmp_path / "m", device="cpu")


def test_a_config_json_of_a_terabyte(tmp_path: Path) -> None:
    os.truncate(llama(tmp_path / "m") / "config.json", 2**40)
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(more than 64 MiB\)"):
        RewardModel.from_pretrained(tmp_path / "m", device="cpu")
