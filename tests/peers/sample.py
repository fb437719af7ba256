"""The models and completions that every peer scores."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer
from support.chat import CHATML, chat_tokenizer
from support.folders import tokenizer
from support.small import small_config, small_model

WORDS = (("one two", " three"), ("three", "; seven four one"), ("four, five six", " two two"), ("one", " hello"))
QUESTIONS = (("hello?", "world 123 yes."), ("world", "yes."), ("hello world 123", "café café hello"), ("yes", "123"))


def write_models(work: Path) -> dict[str, Any]:
    """Models in ``work``, and what peers need to score completions with them.

    ``text`` is one of plain text, ``chatml`` has a chat template that ends in a newline; ``base``, from which peers
    train their own, is like Qwen: eos is the end of a turn, and there is no bos.
    """
    text, chat, base = tokenizer(), chat_tokenizer(CHATML), chat_tokenizer(CHATML)
    base.eos_token, base.bos_token = "<|im_end|>", None
    base.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    models = {"text": text, "chatml": chat, "base": base}
    for name, names in models.items():
        _save(work / name, names)
    plain = [{"prompt": p, "completion": c, "text": p + c + str(text.eos_token)} for p, c in WORDS]
    cases = {name: _conversations(load_tokenizer(work / name)) for name in ("chatml", "base")}
    return {name: {"folder": str(work / name), "cases": cases.get(name, plain)} for name in models}


def _save(folder: Path, names: PreTrainedTokenizerBase) -> None:
    """vLLM's CPU backend takes no smaller heads than 32."""
    config = small_config(
        vocab_size=len(names), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32
    )
    choose_pad(names, config.vocab_size, str(folder))
    torch.manual_seed(0)
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    save_model(folder, state, config, names, torch.ones(config.hidden_size), 1)


def _conversations(names: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    cases = []
    for question, answer in QUESTIONS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt, completion = as_text(names, messages[:1], messages[1:])
        cases.append({"prompt": prompt, "completion": completion, "text": prompt + completion, "messages": messages})
    return cases


def write_preferences(path: Path, cases: list[dict[str, Any]]) -> None:
    """JSON lines of chosen and rejected conversations: each case against the next one's answer."""
    with path.open("w") as file:
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True):
            rejected = [case["messages"][0], other["messages"][1]]
            file.write(json.dumps({"chosen": case["messages"], "rejected": rejected}) + "\n")
