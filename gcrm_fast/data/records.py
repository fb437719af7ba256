"""From records to text: preference pairs to train on, completions to score. The fields of a record tell its format;
README.md has the tables.

Text stays as it is. Message lists are written out by the tokenizer's chat template, so that everything after this file
sees one kind of pair: a prompt, and two completions that follow it; or a prompt and one completion.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.data.sources import BadRecords, rows

T = TypeVar("T")
Formats = Mapping[str, tuple[str, ...]]  # name -> fields

PAIRS = {"chosen and rejected": ("chosen", "rejected"), "question": ("question", "correct", "incorrect")}
FORMATS = {  # of preference pairs
    **PAIRS,
    "scores": ("prompt", "completions", "scores"),
    "ranks": ("prompt", "completions", "ranks"),
}
COMPLETION_FORMATS = {
    "completion": ("prompt", "completion"),
    "completions": ("prompt", "completions"),
    "question and completion": ("question", "completion"),
    "question and completions": ("question", "completions"),
    **PAIRS,
    "conversation": ("messages",),
}
MOST = 1e30  # of a margin or a score: float32 holds it and sums of it
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """A preference pair as text. ``where`` is 'source:line'; ``fields`` holds the record's other fields asked for.

    ``chosen_cut`` and ``rejected_cut``: a length limit cut the completion, so it has no end.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    where: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    chosen_cut: bool = False
    rejected_cut: bool = False


@dataclass(frozen=True)
class Candidate:
    """A completion as text. ``where`` is 'source:line'; ``row`` the number of its record over all sources, from 0, bad
    ones left out; ``name`` its field: 'completion', 'completions[2]', 'chosen' ...; ``cut``: a length limit cut it, so
    it has no end. ``fields`` holds the record's fields asked for.
    """

    prompt: str
    completion: str
    where: str
    row: int
    name: str
    cut: bool
    fields: dict[str, Any]

    @property
    def position(self) -> int | None:
        """Of a completion that stands in the list ``completions``; else None."""
        found = re.fullmatch(r"completions\[(\d+)\]", self.name)
        return int(found[1]) if found else None

    def field(self, name: str, asked: str) -> Any:
        """A field of the record; of a list beside ``completions`` the completion's own entry.

        Raises:
            UserError: no such field, or no such entry; ``asked`` says who wants it: "named by --by".
        """
        if name not in self.fields:
            raise UserError(f"{self.where}: field '{name}', {asked}, is missing")
        value = self.fields[name]
        if self.position is None or not isinstance(value, list):
            return value
        if self.position >= len(value):
            raise UserError(f"{self.where}: field '{name}' has {len(value)} entries, none for {self.name}")
        return value[self.position]

    @property
    def label(self) -> str:
        """How an error calls it."""
        return f"{self.where}: field '{self.name}'"


@dataclass(frozen=True)
class _Record:
    """A record under this project's field names, and what an error about it says."""

    values: dict[str, Any]
    where: str
    columns: Mapping[str, str]  # this project's name -> the record's
    tokenizer: PreTrainedTokenizerBase | None

    def error(self, name: str, what: str) -> UserError:
        """``name`` may go on with an index: 'completions[2]'."""
        stem, bracket, rest = name.partition("[")
        return UserError(f"{self.where}: field '{self.columns.get(stem, stem)}{bracket}{rest}' {what}")

    def text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(name, f"is {type(value).__name__}, not a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, "holds half of a surrogate pair: write the character whole") from None
        return value

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"is {type(value).__name__}, not a finite number")
        # Compared, not converted: JSON integers have no bound. NaN fails it too.
        if not abs(value) <= MOST:
            raise self.error(name, f"is not a finite number: write one between {-MOST:g} and {MOST:g}")
        return float(value)

    def items(self, name: str) -> list[Any]:
        if not isinstance(self.values[name], list):
            raise self.error(name, f"is {type(self.values[name]).__name__}, not a list")
        return self.values[name]

    def cut(self, name: str) -> bool:
        return self._flag(f"{name}_cut", self.values.get(f"{name}_cut", False))

    def cuts(self, name: str, count: int) -> list[bool]:
        """The flags of a list of ``count`` completions."""
        name = f"{name}_cut"
        flags = self.items(name) if name in self.values else [False] * count
        if len(flags) != count:
            raise self.error(name, f"has {len(flags)} entries for {count} completions")
        return [self._flag(f"{name}[{i}]", flag) for i, flag in enumerate(flags)]

    def _flag(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.error(name, f"is {type(value).__name__}, not true or false")
        return value

    # ------------------------------------------------------------------------------------------------ prompt + sides

    def texts(self, sides: Mapping[str, Any], prompt: str = "prompt") -> tuple[str, list[str]]:
        """(prompt, completions) of the named sides: plain strings, or message lists through the chat template."""
        before = self.values.get(prompt)
        if isinstance(before, list) or any(isinstance(side, list) for side in sides.values()):
            text, completions = self.rendered(sides, prompt)
        else:
            text, completions = self.text(prompt, before), [self.text(*side) for side in sides.items()]
        for name, completion in zip(sides, completions, strict=True):
            if not completion.strip():
                raise self.error(name, "is empty: a completion needs text")
        return text, completions

    def _messages(self, name: str, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise self.error(name, f"is {type(value).__name__}, not a list of messages")
        if not value:
            raise self.error(name, "is an empty list: messages with 'role' and 'content' are expected")
        messages = []
        for i, message in enumerate(value):
            if not isinstance(message, dict):
                raise self.error(f"{name}[{i}]", f"is {type(message).__name__}, not a message")
            for part in ("role", "content"):
                self.text(f"{name}[{i}].{part}", message.get(part))
            # Tables give every message every key: what is null was never there.
            messages.append({key: part for key, part in message.items() if part is not None})
        return messages

    def rendered(self, sides: Mapping[str, Any], prompt: str) -> tuple[str, list[str]]:
        """The prompt is every message but the last, which is the completion and the only one that may differ."""
        dialogues = {name: self._messages(name, side) for name, side in sides.items()}
        first, *others = dialogues
        shared = dialogues[first][:-1]
        for name in others:
            if dialogues[name][:-1] != shared:
                raise self.error(name, f"differs from '{first}' before the last message: only the answer may differ")
        for name, messages in dialogues.items():
            role, content = messages[-1]["role"], messages[-1]["content"]
            if role != "assistant":
                raise self.error(
                    f"{name}[{len(messages) - 1}].role", f"is {role[:20]!r}: an answer is by the 'assistant'"
                )
            if not content.strip():
                raise self.error(f"{name}[{len(messages) - 1}].content", "is empty: a completion needs text")
        before, context = self.values.get(prompt), shared
        if isinstance(before, list):
            context = self._messages(prompt, before) + shared
        elif before is not None and self.text(prompt, before) not in [message["content"] for message in shared]:
            raise self.error(prompt, f"is str, and not one of the messages of '{first}': give it as messages too")
        if not context:
            raise self.error(prompt, f"is missing, and '{first}' holds the answer alone")
        text = self._template(prompt if isinstance(before, list) else first, context, True)
        completions = []
        for name, messages in dialogues.items():
            whole = self._template(name, [*context, messages[-1]], False)
            if not whole.startswith(text):
                raise self.error(name, "changes how the chat template writes the prompt: the answer has no start")
            completions.append(whole[len(text) :])
        return text, completions

    def _template(self, name: str, messages: list[dict[str, Any]], ask: bool) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise self.error(name, "is a list of messages: take a --model whose tokenizer has a chat template")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template is a program, and may fail in any way
            raise self.error(name, f"does not suit the chat template ({one_line(error)})") from None
        return self.text(name, text)


# --------------------------------------------------------------------------------------------------------- formats


def known_fields(formats: Formats) -> list[str]:
    """All fields of a record that are read under these formats."""
    names = {name for needed in formats.values() for name in needed}
    cuts = {f"{name}_cut" for name in names - {"prompt", "question", "scores", "ranks"}}
    return sorted(names | cuts | ({"margin"} if formats is FORMATS else set()))


def parse_columns(text: str, formats: Formats = FORMATS) -> dict[str, str]:
    """This project's field names and the records', of prompt=instruction,chosen=good. Raises UserError."""
    fields = known_fields(formats)
    columns: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, equals, column = (part.strip() for part in item.partition("="))
        if not equals or not column or name in columns:
            raise UserError(f"--columns {text}: must be NAME=COLUMN,NAME=COLUMN with every name once")
        if name not in fields:
            raise UserError(f"--columns {text}: {name!r} is none of the fields {', '.join(fields)}")
        columns[name] = column
    if columns and not any(columns.keys() >= set(needed) for needed in formats.values()):
        listed = "; ".join(", ".join(needed) for needed in formats.values())
        raise UserError(f"--columns {text}: no other fields are read, so all of a format must be named: {listed}")
    return columns


def format_of(record: _Record, formats: Formats) -> str:
    """The name of the one format whose fields are all there. Raises UserError for none, or more than one."""
    values = record.values
    found = [name for name, needed in formats.items() if all(field in values for field in needed)]
    if len(found) > 1:
        raise UserError(f"{record.where}: has the fields of two formats, {' and '.join(found)}: choose with --columns")
    if not found:
        nearest = max(formats.values(), key=lambda needed: sum(field in values for field in needed) / len(needed))
        missing = next(field for field in nearest if field not in values)
        if not any(field in values for field in nearest):
            nearest = formats.get("completion", ("prompt", *PAIRS["chosen and rejected"]))
            missing = nearest[1]
        listed = ", ".join(f"'{field}'" for field in nearest)
        raise record.error(missing, f"is missing: a record needs {listed}, or the fields of another format (README)")
    if found != ["chosen and rejected"]:
        return found[0]
    if isinstance(values["chosen"], list) or isinstance(values["rejected"], list):
        return "messages"
    return "prompt, chosen, rejected" if "prompt" in values else "dialogue"


def _pair(record: _Record, names: tuple[str, str] = ("chosen", "rejected"), prompt: str = "prompt") -> list[Pair]:
    text, (chosen, rejected) = record.texts({name: record.values[name] for name in names}, prompt)
    if chosen == rejected:
        raise UserError(f"{record.where}: fields '{names[0]}' and '{names[1]}' are equal: a pair needs a difference")
    return [Pair(text, chosen, rejected, 0.0, record.where, {}, record.cut(names[0]), record.cut(names[1]))]


def _dialogue(record: _Record) -> list[Pair]:
    """Raw dialogues as Anthropic's HH has them: the last assistant turn is the completion."""
    split = {}
    for name in ("chosen", "rejected"):
        text = record.text(name, record.values[name])
        before, marker, completion = text.rpartition(ASSISTANT)
        if not marker or HUMAN not in before:
            what = "is missing, and field '{}' is no dialogue of {!r} and {!r} turns"
            raise record.error("prompt", what.format(name, HUMAN, ASSISTANT))
        if HUMAN in completion:
            raise record.error(name, "ends with a human turn: the last assistant turn is the completion")
        split[name] = before + marker, completion
    if split["chosen"][0] != split["rejected"][0]:
        raise record.error("rejected", "differs from 'chosen' before the last assistant turn: only that may differ")
    values = {"prompt": split["chosen"][0], "chosen": split["chosen"][1], "rejected": split["rejected"][1]}
    return _pair(_Record(record.values | values, record.where, record.columns, None))


def _ranked(record: _Record, order: str, limit: int) -> list[Pair]:
    """(better, worse) pairs of completions with 'scores' (more is better) or 'ranks' (less is better)."""
    completions, given = record.items("completions"), record.items(order)
    if len(given) != len(completions):
        raise record.error(order, f"has {len(given)} entries for {len(completions)} completions")
    if len(completions) < 2:
        raise record.error("completions", f"has {len(completions)} entries: at least two are compared")
    values = [record.number(f"{order}[{i}]", value) for i, value in enumerate(given)]
    cuts = record.cuts("completions", len(completions))
    prompt, texts = record.texts({f"completions[{i}]": text for i, text in enumerate(completions)})
    pairs = ordered_pairs(values if order == "scores" else [-value for value in values], limit)
    for better, worse in pairs:
        if texts[better] == texts[worse]:
            raise record.error(f"completions[{worse}]", f"is equal to completions[{better}], but {order} differ")
    return [Pair(prompt, texts[a], texts[b], 0.0, record.where, {}, cuts[a], cuts[b]) for a, b in pairs]


def ordered_pairs(values: Sequence[float], limit: int) -> list[tuple[int, int]]:
    """Pairs of indices (greater value, smaller value), ties left out; at most ``limit`` of them, 0 for all.

    A pure function of its input. In order of value, each item meets the one half the list away first and its
    neighbours last: a limit keeps wide differences, and takes every item about equally often.
    """
    n = len(values)
    order = sorted(range(n), key=lambda i: -values[i])
    ordered = np.array([values[i] for i in order])
    pairs: list[tuple[int, int]] = []
    for distance in range(n // 2 if len(set(values)) > 1 else 0, 0, -1):
        count = distance if 2 * distance == n else n  # at half of an even n each pair would come twice
        away = np.roll(ordered, -distance)
        for i in np.flatnonzero(ordered[:count] != away[:count]).tolist():  # tied ones are many, and skipped at once
            a, b = order[i], order[(i + distance) % n]
            pairs.append((a, b) if values[a] > values[b] else (b, a))
            if len(pairs) == limit:
                return pairs
    return pairs


# ------------------------------------------------------------------------------------------------------- all records


def _record(raw: Any, where: str, columns: Mapping[str, str], tokenizer: PreTrainedTokenizerBase | None) -> _Record:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a record must be a JSON object, this is {type(raw).__name__}")
    for name, column in columns.items():
        if column not in raw:
            raise UserError(f"{where}: field '{column}', named by --columns for '{name}', is missing")
    named = {name: raw[column] for name, column in columns.items()}
    return _Record(named or raw, where, columns, tokenizer)


def _extra_fields(raw: dict[str, Any], names: Sequence[str], record: _Record) -> dict[str, Any]:
    for name in names:
        if name not in raw:
            raise UserError(f"{record.where}: field '{name}', named by --eval-by, is missing")
        if isinstance(raw[name], str):
            record.text(name, raw[name])
        elif not isinstance(raw[name], (int, float)):
            kind = f"is {type(raw[name]).__name__}, not a string, number or boolean"
            raise UserError(f"{record.where}: field '{name}', named by --eval-by, {kind}")
    return {name: raw[name] for name in names}


def _converted(
    source: str,
    formats: Formats,
    columns: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
    bad: BadRecords,
    convert: Callable[[_Record, str, dict[str, Any]], list[T]],
) -> Iterator[list[T]]:
    """What ``convert(record, format, raw record)`` makes of each good record of ``source``."""
    skipped, count = len(bad.skipped), 0
    first: tuple[str, str] | None = None  # format and place of the first good record
    for where, raw in rows(source, bad):
        count += 1
        try:
            record = _record(raw, where, columns, tokenizer)
            format_ = format_of(record, formats)
            if first and format_ != first[0]:
                raise UserError(f"{where}: has the format '{format_}', but {first[1]} '{first[0]}': split the data")
            found = convert(record, format_, raw)
        except UserError as error:
            bad.add(error)
            continue
        first = first or (format_, where)
        yield found
    if not first and len(bad.skipped) > skipped:
        raise UserError(f"{source}: every record is bad; the first: {bad.skipped[skipped]}")
    if not count:
        raise UserError(f"{source}: holds no records: one JSON object a line, or rows, are expected")


def read_pairs(
    sources: Sequence[str],
    *,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    pairs_per_prompt: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> list[Pair]:
    """Pairs of all sources (see sources.rows), in order; the records of one source have one format.

    ``columns`` gives the record's names of this project's fields; then no others are read. ``tokenizer`` brings the
    chat template for message lists. A record with n completions gives at most ``pairs_per_prompt`` pairs, 0 for all.

    Raises:
        UserError: an unreadable source, one without pairs, or, unless ``bad`` skips them, a bad record, with place and
            field.
    """
    bad = bad or BadRecords()

    def convert(record: _Record, format_: str, raw: dict[str, Any]) -> list[Pair]:
        if format_ in ("scores", "ranks"):
            found = _ranked(record, format_, pairs_per_prompt)
        else:
            found = _two_sides(record, format_)
        margin = record.number("margin", record.values.get("margin", 0.0))
        extra = _extra_fields(raw, fields, record)
        return [replace(pair, margin=margin, fields=extra) for pair in found]

    pairs: list[Pair] = []
    for source in sources:
        found = list(_converted(source, FORMATS, columns or {}, tokenizer, bad, convert))
        bad.tied += found.count([])
        if not any(found):
            raise UserError(f"{source}: holds no pairs: the completions of every record tie")
        pairs += [pair for of_record in found for pair in of_record]
    return pairs


def _two_sides(record: _Record, format_: str) -> list[Pair]:
    if format_ == "question":
        return _pair(record, ("correct", "incorrect"), "question")
    return _dialogue(record) if format_ == "dialogue" else _pair(record)


# ----------------------------------------------------------------------------------------------------- completions


def read_completions(
    sources: Sequence[str],
    *,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> list[Candidate]:
    """All completions of all sources (see sources.rows), in order; the records of one source have one format.

    ``fields`` are kept as they are, "*" keeps the whole record. Other arguments and errors are those of read_pairs.
    """
    found = completions_of_records(sources, fields=fields, columns=columns, tokenizer=tokenizer, bad=bad)
    return [candidate for of_record in found for candidate in of_record]


def completions_of_records(
    sources: Sequence[str],
    *,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> Iterator[list[Candidate]]:
    """The completions of one record after another, read as they are asked for; see read_completions."""
    bad = bad or BadRecords()
    row = 0

    def convert(record: _Record, format_: str, raw: dict[str, Any]) -> list[Candidate]:
        missing = [name for name in fields if name != "*" and name not in raw]
        if missing:
            raise UserError(f"{record.where}: field '{missing[0]}' is missing")
        kept = raw if "*" in fields else {name: raw[name] for name in fields}
        return [
            Candidate(prompt, completion, record.where, row, name, cut, kept)
            for prompt, completion, name, cut in _texts(record, format_)
        ]

    for source in sources:
        for found in _converted(source, COMPLETION_FORMATS, columns or {}, tokenizer, bad, convert):
            yield found
            row += 1


def _texts(record: _Record, format_: str) -> list[tuple[str, str, str, bool]]:
    """(prompt, completion, field, whether it is cut) of each completion of a record."""
    if format_ not in COMPLETION_FORMATS or format_ in PAIRS:  # format_of has names of its own for chosen and rejected
        [pair] = _two_sides(record, format_)
        better, worse = PAIRS["question" if format_ == "question" else "chosen and rejected"][-2:]
        return [
            (pair.prompt, pair.chosen, better, pair.chosen_cut),
            (pair.prompt, pair.rejected, worse, pair.rejected_cut),
        ]
    prompt, name = COMPLETION_FORMATS[format_][0], COMPLETION_FORMATS[format_][-1]
    if name == "completions":
        given = record.items(name)
        if not given:
            raise record.error(name, "is an empty list: at least one completion is scored")
        sides = {f"{name}[{i}]": completion for i, completion in enumerate(given)}
        text, completions = record.texts(sides, prompt)
        return [(text, *rest) for rest in zip(completions, sides, record.cuts(name, len(sides)), strict=True)]
    sides = {name: record.values[name]}
    text, [completion] = record.rendered(sides, "prompt") if name == "messages" else record.texts(sides, prompt)
    return [(text, completion, name, record.cut(name))]


# --------------------------------------------------------------------------------------------------------- overlap


@dataclass(frozen=True)
class Overlap:
    """How much of the held-out data is also in the training data, white space aside."""

    prompts: int  # held-out pairs whose prompt is trained on
    completions: int  # held-out completions (two a pair) that are trained on, after whatever prompt
    example: str = ""  # place of the first such pair, by prompt


def overlap(train: Sequence[Pair], held_out: Sequence[Pair]) -> Overlap:
    """White space does not count: copies of one problem often differ in it. Empty prompts are no overlap."""

    def bare(text: str) -> str:
        return "".join(text.split())

    # Only the held-out side, which is small, is held as a set.
    prompts = {bare(p.prompt) for p in held_out} - {""}
    completions = {bare(side) for p in held_out for side in (p.chosen, p.rejected)}
    prompts &= {text for p in train if (text := bare(p.prompt)) in prompts}
    completions &= {text for p in train for side in (p.chosen, p.rejected) if (text := bare(side)) in completions}
    same = [p for p in held_out if bare(p.prompt) in prompts]
    return Overlap(
        prompts=len(same),
        completions=sum(bare(side) in completions for p in held_out for side in (p.chosen, p.rejected)),
        example=same[0].where if same else "",
    )
