"""Which texts say the same: bidirectional entailment, judged by a model of natural language inference (transformers).

Two responses mean the same where each entails the other, both read after their prompt (semantic entropy, arXiv
2302.09664, section 3.2).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gcrm_fast.common.devices import default_device
from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.notes import warn_once
from gcrm_fast.rlhf.synthesis import by_entailment

BATCH = 32


class Entailment:
    """A classifier of (premise, hypothesis) whose labels name entailment: a folder, or a name on the Hugging Face Hub.

    Raises:
        UserError: no such model, or none of its labels is entailment.
    """

    def __init__(self, model: str | Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.network = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--entailment {model}: cannot be loaded ({one_line(error)})") from None
        labels = {int(i): str(label).lower() for i, label in self.network.config.id2label.items()}
        named = [i for i, label in labels.items() if label.startswith("entail")]
        if len(named) != 1:
            listed = ", ".join(labels.values())
            raise UserError(f"--entailment {model}: one label must be 'entailment', but its labels are {listed}")
        self.label = named[0]
        self.network.to(default_device()).eval()
        positions = getattr(self.network.config, "max_position_embeddings", 512)
        self.limit = min(self.tokenizer.model_max_length, positions - 2)  # RoBERTa's first two are not for tokens

    def clusters(self, prompt: str, texts: Sequence[str]) -> list[int]:
        """The cluster of each text: texts that mean the same, as answers to the prompt."""
        distinct = list(dict.fromkeys(texts))
        pairs = [(a, b) for a in range(len(distinct)) for b in range(len(distinct)) if a != b]
        said = [f"{prompt} {text}" for text in distinct]
        entails = dict(zip(pairs, self._entails([(said[a], said[b]) for a, b in pairs]), strict=True))
        of_distinct = by_entailment(len(distinct), lambda a, b: entails[a, b])
        return [of_distinct[distinct.index(text)] for text in texts]

    @torch.inference_mode()
    def _entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        found: list[bool] = []
        for start in range(0, len(pairs), BATCH):
            premises, hypotheses = zip(*pairs[start : start + BATCH], strict=True)
            batch = self.tokenizer(
                list(premises),
                list(hypotheses),
                truncation="longest_first",
                max_length=self.limit,
                padding=True,
                return_tensors="pt",
            )
            if batch["input_ids"].shape[1] == self.limit:
                warn_once(f"--entailment: some texts have {self.limit} tokens or more and were cut")
            logits = self.network(**batch.to(self.network.device)).logits
            found += (logits.argmax(-1) == self.label).tolist()
        return found
