"""Samples of a policy: records of a prompt and several completions, as gcrm generate and trainers write them.

prompt (or question), completions, and where known completions_cut, answers, is_correct (a list each, an entry per
completion), task, reference, reference_completions, tools, system; or the output of gcrm generate.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError
from gcrm_fast.data import fields as checked
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.fields import FieldError
from gcrm_fast.data.messages import Messages, decoded, is_messages
from gcrm_fast.data.prompts import NAMES
from gcrm_fast.data.records import placed, renamed
from gcrm_fast.data.sources import BadRecords, rows

OF_COMPLETIONS = ("completions_cut", "answers", "is_correct", "completion_ids")  # lists with an entry for each
READ = ("task", "reference", "tools", "system")
FORMATS = {
    "samples": ("prompt", "completions"),
    "all of their fields": ("prompt", "completions", "reference_completions", *OF_COMPLETIONS, *READ),
}
WRITTEN = ("completions", "reference_completions", "samples", *OF_COMPLETIONS)  # what does not belong to a prompt
GENERATED = (
    "text",
    "reward",
    "chosen_sample",
    "policy_tokens",
    "reward_tokens",
    "saved_tokens",
    "seconds",
    "unfiltered",
)
SPECIAL = re.compile(r"(<[|\uff5c][^<>\s]+[|\uff5c]>|</?s>|<eos>|<end_of_turn>|\[/?INST\])\s*$")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of one prompt, text or messages as in their record, which ``fields`` holds; ``rest`` is the record as
    a prompt without samples; ``where`` is 'source:line'; ``answers`` and ``correct`` have an entry per completion, or
    are None where the record has none."""

    where: str
    fields: dict[str, Any]
    rest: dict[str, Any]
    prompt: str | Messages
    completions: list[str | Messages]
    cuts: list[bool]
    answers: list[str | None] | None
    correct: list[bool] | None
    task: str
    reference: Any
    reference_completions: list[str | Messages]

    @property
    def references(self) -> list[str | Messages]:
        """Responses to compare with: the reference, or those that the policy wrote before RL."""
        if isinstance(self.reference, str) or is_messages(self.reference):
            return [self.reference]
        return self.reference_completions


def read_samples(
    sources: Sequence[str], *, columns: Mapping[str, str] | None = None, bad: BadRecords | None = None
) -> list[Samples]:
    """The samples of all sources; records of one prompt stay apart.

    Raises:
        UserError: a source without records or, unless ``bad`` skips it, a record without a prompt, without samples, or
            with only one.
    """
    bad, columns = bad or BadRecords(), columns or {}
    found: list[Samples] = []
    for source in sources:
        before = len(found), len(bad.skipped)
        for where, raw in rows(source, bad):
            try:
                values = _values(raw, columns, source)
                found.append(_samples(values, raw, where, set(columns.values())))
            except UserError as error:
                bad.add(placed(error, where, columns))
        if len(found) == before[0]:
            reason = f"every record is bad; the first: {bad.skipped[before[1]]}" if bad.skipped[before[1] :] else ""
            raise UserError(f"{source}: {reason or 'contains no records: one JSON object per line is expected'}")
    return found


def _values(raw: Any, columns: Mapping[str, str], source: str) -> dict[str, Any]:
    """The fields of a record under this project's names. One of gcrm generate has its samples as completions."""
    if not isinstance(raw, dict) or "completions" in raw or not isinstance(raw.get("samples"), list):
        return renamed(raw, columns, source)
    texts = [sample for sample in raw["samples"] if isinstance(sample, dict) and sample.get("ending") != "dropped"]
    listed = {
        "prompt": next((raw[name] for name in NAMES if raw.get(name) is not None), None),
        "completions": [sample.get("text") for sample in texts],
        "completions_cut": [sample.get("ending") == "length" for sample in texts],
    }
    if columns:
        return listed | renamed(raw, columns, source)
    kept = {name: raw[name] for name in (*READ, "reference_completions") if name in raw}
    return renamed(kept | listed, {}, source)


def _samples(values: Mapping[str, Any], raw: dict[str, Any], where: str, columns: set[str]) -> Samples:
    name = "prompt" if "prompt" in values else "question"
    if name not in values:
        raise FieldError("prompt", "is missing: a record needs a prompt and completions of it")
    if "completions" not in values:
        raise FieldError("completions", "is missing: sample the prompt first, for example with gcrm generate")
    completions = [
        _text(f"completions[{i}]", one) for i, one in enumerate(checked.entries("completions", values["completions"]))
    ]
    if len(completions) < 2:
        few = "1 entry" if completions else "no entry"
        raise FieldError("completions", f"has {few}: several samples of a prompt are compared")
    lists: dict[str, list[Any]] = {
        name: checked.entries(name, values[name], len(completions)) for name in OF_COMPLETIONS if name in values
    }
    cuts = [checked.boolean(f"completions_cut[{i}]", one) for i, one in enumerate(lists.get("completions_cut", []))]
    answers = [_answer(f"answers[{i}]", one) for i, one in enumerate(lists.get("answers", []))]
    correct = [checked.boolean(f"is_correct[{i}]", one) for i, one in enumerate(lists.get("is_correct", []))]
    references = checked.entries("reference_completions", values.get("reference_completions", []))
    prompt = _text(name, values[name])
    others = {*NAMES, *WRITTEN, *columns, *(GENERATED if "samples" in raw else ())}
    rest = {key: value for key, value in raw.items() if key not in others}
    return Samples(
        where=where,
        fields=raw,
        rest={"prompt": prompt, **{key: values[key] for key in READ if key in values}, **rest},
        prompt=prompt,
        completions=completions,
        cuts=cuts or [False] * len(completions),
        answers=answers or None,
        correct=correct or None,
        task=checked.text("task", values.get("task", "")),
        reference=decoded(values.get("reference")),
        reference_completions=[_text(f"reference_completions[{i}]", one) for i, one in enumerate(references)],
    )


def _text(name: str, value: Any) -> str | Messages:
    value = decoded(value)
    return value if is_messages(value) else checked.text(name, value)


def _answer(name: str, value: Any) -> str | None:
    """A final answer as text, without surrounding white space; None for null and for nothing."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise FieldError(name, f"is {checked.kind(value)}, not a string, a number or null")
    return str(value).strip() or None if value is not None else None


def texts_of(
    samples: Samples, completions: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """(prompt, completion) as text, of each of ``completions``. Raises UserError with the record's place, also where
    the samples are of another tokenizer."""
    check_tokenizer(samples, tokenizer)
    context = {name: samples.rest.get(name) for name in ("tools", "system")}
    try:
        return [as_text(tokenizer, samples.prompt, text, **context) for text in completions]
    except UserError as error:
        raise UserError(f"{samples.where}: {error}") from None


def check_tokenizer(samples: Samples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the samples have tokens of another tokenizer: ids that decode to another text, or an end
    token that this one does not know, which would be scored as plain text."""
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    for i, completion in enumerate(samples.completions):
        name = f"{samples.where}: field 'completions[{i}]'"
        if not isinstance(completion, str):
            continue
        end = SPECIAL.search(completion)
        if end and end[1] not in known:
            raise UserError(
                f"{name}: ends with {end[1]!r}, which is not a token of the reward model's tokenizer: these are "
                "samples of another tokenizer: write the texts without special tokens"
            )
        ids = samples.fields.get("completion_ids")
        if ids is not None:
            own, text = checked.entries("completion_ids", ids)[i], completion
            if tokenizer.decode(own, skip_special_tokens=True) != text and tokenizer.decode(own) != text:
                raise UserError(
                    f"{name}: is not what the reward model's tokenizer makes of completion_ids[{i}]: these are samples "
                    "of another tokenizer: omit the ids to score the texts"
                )
