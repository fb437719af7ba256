"""Small policies on the disk: random Llamas with an lm_head, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from gcrm_fast.data.tokenization import train_tokenizer
from support.folders import VOCAB, tokenizer
from support.small import small_config

EOS = 1
BRIEF_GRPO: dict[str, Any] = {  # of TRL's GRPOConfig: a few tokens on a CPU, a logged row per step, nothing saved
    "max_completion_length": 4,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def save(folder: Path, *, ends: float = 0.0, **changes: Any) -> Path:
    """A random policy with the tokenizer of support.folders. ``ends`` moves its texts to their end: 0 hardly ever, 1
    soon."""
    from model.test_parity import theirs_of

    theirs = theirs_of(small_config(vocab_size=VOCAB, **changes), LlamaForCausalLM, eos_token_id=EOS)
    if ends:
        with torch.no_grad():
            theirs.lm_head.weight[EOS] = ends * theirs.lm_head.weight[50:90].sum(0)
    theirs.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One with other tokens than that of support.folders."""
    return train_tokenizer(["seven six; five, four three two one\n"] * 40, 320)
