"""From records to text: preference pairs to train on, completions to score. The fields of a record tell its format;
README.md has the tables. Messages become text here (see chat.py), so that everything after sees one kind of pair: a
prompt and two completions that follow it; or a prompt and one completion.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.common.errors import UserError
from gcrm_fast.data import fields as checked
from gcrm_fast.data.chat import as_texts, is_empty
from gcrm_fast.data.fields import FieldError, kind
from gcrm_fast.data.formats import JUDGMENTS, Tie, adapted, judged_by, judgment, suggested_columns
from gcrm_fast.data.messages import decoded, is_messages
from gcrm_fast.data.rendering import EndlessTemplate
from gcrm_fast.data.sources import BadRecords, rows

T = TypeVar("T")
Formats = Mapping[str, tuple[str, ...]]  # name -> fields

PAIRS = {"chosen and rejected": ("chosen", "rejected"), "question": ("question", "correct", "incorrect")}
FORMATS = {  # of preference pairs
    **PAIRS,
    "scores": ("prompt", "completions", "scores"),
    "ranks": ("prompt", "completions", "ranks"),
    "is_correct": ("prompt", "completion", "is_correct"),  # paired with other completions of the prompt
    "question and is_correct": ("question", "completion", "is_correct"),
}
JUDGED_FORMATS = {  # of completions with a label or score
    "completion": FORMATS["is_correct"],
    "question and completion": FORMATS["question and is_correct"],
    "completions": FORMATS["scores"],
}
COMPLETION_FORMATS = {
    "completion": ("prompt", "completion"),
    "completions": ("prompt", "completions"),
    "question and completion": ("question", "completion"),
    "question and completions": ("question", "completions"),
    **PAIRS,
    "conversation": ("messages",),
}
PROMPTS, ORDERS = ("prompt", "question"), ("scores", "ranks", "is_correct")  # fields without a completion
CONTEXT = ("system", "tools")  # read next to any prompt
MOST_PAIRS = 10**6  # of one prompt
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """A preference pair as text. ``where`` is 'source:line', ``source`` the number of its source among all, from 0;
    ``fields`` holds the record's requested fields.

    With a ``target``, its label or score, it is one completion: ``chosen`` and ``rejected`` are the same.

    ``chosen_cut`` and ``rejected_cut``: a length limit cut the completion, so it has no end.
    """

    prompt: str
    chosen: str
    rejected: str
    _: KW_ONLY
    margin: float = 0.0
    where: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    chosen_cut: bool = False
    rejected_cut: bool = False
    source: int = 0
    target: float | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected) if self.target is None else (self.chosen,)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A completion as text. ``where`` is 'source:line'; ``row`` the number of its record over all sources, from 0, not
    counting bad ones; ``name`` its field: 'completion', 'completions[2]', 'chosen' ...; ``cut``: a length limit cut it,
    so it has no end. ``fields`` holds the record's requested fields.
    """

    prompt: str
    completion: str
    where: str
    row: int
    name: str
    cut: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def position(self) -> int | None:
        """Index in the list ``completions``; None for a completion outside of it."""
        entry = re.fullmatch(r"completions\[(\d+)\]", self.name)
        return int(entry[1]) if entry else None

    def field(self, name: str, asked: str) -> Any:
        """A field of the record; of a list with an entry for each of ``completions`` this completion's entry.

        Raises:
            UserError: no such field, or no such entry; ``asked`` says who needs it: "named by --by".
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
        """Its place, for errors."""
        return f"{self.where}: field '{self.name}'"


class Side(NamedTuple):
    """One completion of a record: its field, its text, whether a length limit cut it."""

    name: str
    text: str
    cut: bool


class Judged(NamedTuple):
    """A completion that was judged by itself: a greater value is better."""

    side: Side
    value: float
    where: str
    fields: dict[str, Any]


# --------------------------------------------------------------------------------------------------------- formats


def known_fields(formats: Formats) -> list[str]:
    """All fields of a record that are read under these formats."""
    names = {name for needed in formats.values() for name in needed}
    cuts = {f"{name}_cut" for name in names.difference(PROMPTS, ORDERS)}
    return sorted(names | cuts | set(CONTEXT) | ({"margin"} if formats is FORMATS else set()))


def parse_columns(text: str, formats: Formats = FORMATS) -> dict[str, str]:
    """This project's field names and the records', of prompt=instruction,chosen=good. Raises UserError."""
    known = known_fields(formats)
    columns: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, equals, column = (part.strip() for part in item.partition("="))
        if not equals or not column or name in columns:
            raise UserError(f"--columns {text}: must be NAME=COLUMN,NAME=COLUMN with every name once")
        if name not in known:
            raise UserError(f"--columns {text}: {name!r} is not one of the fields {', '.join(known)}")
        columns[name] = column
    if columns and not any(columns.keys() >= set(needed) for needed in formats.values()):
        listed = "; ".join(", ".join(needed) for needed in formats.values())
        raise UserError(f"--columns {text}: no other fields are read, so name all fields of a format: {listed}")
    return columns


def format_of(values: Mapping[str, Any], raw: Mapping[str, Any], formats: Formats) -> str:
    """The name of the one format whose fields are all there. Raises UserError for none, or more than one, with the
    option --columns that suits the names of the ``raw`` record."""
    complete = [name for name, needed in formats.items() if all(field in values for field in needed)]
    complete = complete[:1] if complete[1:] == ["conversation"] else complete  # the other one has its parts
    if len(complete) > 1:
        options = " or ".join(filter(None, (suggested_columns(raw, formats[name]) for name in complete)))
        raise UserError(f"has the fields of two formats, {' and '.join(complete)}: pass {options or '--columns'}")
    if complete:
        bare = layout_of(values, complete[0]) == "dialogue" and ASSISTANT not in str(values["chosen"])
        if bare and (columns := suggested_columns(raw, ("prompt", *formats[complete[0]]))):
            raise FieldError("prompt", f"is missing: pass {columns}")
        if bare and (error := _misspelled(values, raw, ("prompt",), formats)):
            raise error
        return complete[0]
    nearest = max(formats.values(), key=lambda needed: sum(field in values for field in needed) / len(needed))
    missing = next(field for field in nearest if field not in values)
    if not any(field in values for field in nearest):
        nearest = formats.get("completion", ("prompt", *PAIRS["chosen and rejected"]))
        missing = nearest[1]
    listed = _listed(nearest)
    if missing in raw:
        raise FieldError(missing, f"is null: a record needs {listed}")
    for needed in formats.values():
        if columns := suggested_columns(raw, needed):
            absent = next(field for field in needed if field not in values)
            raise FieldError(absent, f"is missing: a record needs {_listed(needed)}: pass {columns}")
    for needed in formats.values():
        if error := _misspelled(values, raw, needed, formats):
            raise error
    present = ", ".join(map(repr, list(raw)[:12])) or "no field"
    raise FieldError(
        missing,
        f"is missing: a record needs {listed}, or the fields of another format (docs/data.md); it has {present}: name "
        f"those to read, as in --columns {','.join(f'{field}=NAME' for field in nearest)}",
    )


def _misspelled(
    values: Mapping[str, Any], raw: Mapping[str, Any], needed: Sequence[str], formats: Formats
) -> FieldError | None:
    """The error of the first field that is missing, where every one of them is in the record under a similar name."""
    known = known_fields(formats)
    others = [name for name, value in raw.items() if value is not None and name not in known]
    questions = {name: checked.misspelled(name, others) for name in needed if name not in values}
    if not all(questions.values()):
        return None
    name, question = next(iter(questions.items()))
    return FieldError(name, f"is missing: {question}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def layout_of(values: Mapping[str, Any], format_: str) -> str:
    """The format, and for pairs of text which of its layouts: all records of a source must have the same."""
    if format_ != "chosen and rejected":
        return format_
    if any(is_messages(decoded(values[name])) for name in ("chosen", "rejected")):
        return "messages"
    return "prompt, chosen, rejected" if "prompt" in values else "dialogue"


def sides_of(
    values: Mapping[str, Any], needed: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, list[Side]]:
    """The prompt and the completions of a record whose format has the fields ``needed``. Raises FieldError."""
    prompt_name = "question" if "question" in needed else "prompt"
    names = [name for name in needed if name not in (*PROMPTS, *ORDERS)]
    if names == ["completions"]:
        given = checked.entries("completions", values["completions"])
        sides = {f"completions[{i}]": completion for i, completion in enumerate(given)}
        raw_cuts = values.get("completions_cut", [False] * len(given))
        raw_cuts = checked.entries("completions_cut", raw_cuts, len(given))
        cuts = [
            checked.boolean(f"completions_cut[{i}]", False if cut is None else cut) for i, cut in enumerate(raw_cuts)
        ]
    else:
        sides = {name: values[name] for name in names}
        cuts = [checked.boolean(f"{name}_cut", values.get(f"{name}_cut", False)) for name in names]
    if not sides:
        raise FieldError("completions", "is an empty list: at least one completion is needed")
    prompt = values.get(prompt_name)
    if all(is_messages(decoded(side)) for side in sides.values()):  # also those stored as JSON text
        prompt, sides = decoded(prompt), {name: decoded(side) for name, side in sides.items()}
    if "chosen" in needed and layout_of(values, "chosen and rejected") == "dialogue":
        prompt, sides = _split_dialogues(sides)
    if names == ["messages"]:
        checked.entries("messages", sides["messages"])
    context = {name: values.get(name) for name in CONTEXT}
    text, completions = as_texts(tokenizer, prompt, sides, prompt_name=prompt_name, **context)
    for name, side in sides.items():
        if is_empty(side):
            raise FieldError(name, "is empty: a completion needs text")
    return text, [Side(*side) for side in zip(sides, completions, cuts, strict=True)]


def _split_dialogues(sides: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Raw dialogues as in Anthropic's HH: the last assistant turn is the completion, all before it the prompt."""
    prompts, completions = {}, {}
    for name, side in sides.items():
        before, marker, completions[name] = checked.text(name, side).rpartition(ASSISTANT)
        prompts[name] = before + marker
        if not marker or HUMAN not in before:
            columns = ",".join(["prompt=NAME", *(f"{side}={side}" for side in sides)])
            raise FieldError(
                "prompt",
                f"is missing, and field '{name}' is not a dialogue of {HUMAN!r} and {ASSISTANT!r} turns: name the "
                f"prompt's field, as in --columns {columns}",
            )
        if HUMAN in completions[name]:
            raise FieldError(name, "ends with a human turn: the last turn must be the assistant's")
    first, *others = sides
    for name in others:
        if prompts[name] != prompts[first]:
            raise FieldError(name, f"differs from '{first}' before the answer: only the answer may differ")
    return prompts[first], completions


def preferences(values: Mapping[str, Any], needed: Sequence[str], sides: list[Side], limit: int) -> list[list[Side]]:
    """[better, worse] of the sides: the two of a pair, or ordered by 'scores' (more is better) or 'ranks' (less is),
    where these are not null."""
    order = next((name for name in needed if name in ORDERS), None)
    chosen = [(0, 1)]
    if order:
        given = checked.entries(order, values[order], len(sides))
        if len(sides) < 2:
            raise FieldError("completions", "has 1 entry: at least two are compared")
        judged = [i for i, value in enumerate(given) if value is not None]
        ranking = [judgment(f"{order}[{i}]", given[i]) for i in judged]
        ordered = ordered_pairs(ranking if order == "scores" else [-value for value in ranking], limit)
        chosen = [(judged[better], judged[worse]) for better, worse in ordered]
    pairs = [[sides[better], sides[worse]] for better, worse in chosen]
    for better, worse in pairs:
        if better.text == worse.text:
            raise FieldError(worse.name, f"is equal to '{better.name}', which is preferred: a pair needs a difference")
    return pairs


def ordered_pairs(values: Sequence[float], limit: int) -> list[tuple[int, int]]:
    """Pairs of indices (greater value, smaller value) without ties; a maximum of ``limit``, 0 for all.

    A pure function of its input. In order of value, each item meets the one half the list away first and its
    neighbors last: a limit keeps wide differences, and takes every item about equally often. Raises UserError for more
    than MOST_PAIRS without a limit.
    """
    n = len(values)
    order = sorted(range(n), key=lambda i: -values[i])
    ordered = np.array([values[i] for i in order])
    pairs: list[tuple[int, int]] = []
    for distance in range(n // 2 if len(set(values)) > 1 else 0, 0, -1):
        count = distance if 2 * distance == n else n  # at half of an even n each pair would come twice
        away = np.roll(ordered, -distance)
        for i in np.flatnonzero(ordered[:count] != away[:count]).tolist():  # ties are many, and skipped at once
            a, b = order[i], order[(i + distance) % n]
            pairs.append((a, b) if values[a] > values[b] else (b, a))
            if len(pairs) == limit:
                return pairs
        if not limit and len(pairs) > MOST_PAIRS:
            raise UserError(f"{n} completions give more than {MOST_PAIRS:,} pairs: limit them with --pairs-per-prompt")
    return pairs


# ------------------------------------------------------------------------------------------------------- all records


def _converted(
    source: str,
    formats: Formats,
    columns: Mapping[str, str],
    bad: BadRecords,
    convert: Callable[[dict[str, Any], tuple[str, ...], dict[str, Any], str], list[T]],
) -> Iterator[list[T]]:
    """What ``convert(values, fields of the format, raw record, place)`` makes of each good record of ``source``."""
    skipped, count = len(bad.skipped), 0
    first: tuple[str, str] | None = None  # layout and place of the first good record
    for where, raw in rows(source, bad):
        count += 1
        try:
            values = renamed(raw, columns, source)
            format_ = format_of(values, raw, formats)
            layout = layout_of(values, format_)
            if first and layout != first[0]:
                raise UserError(f"has the format '{layout}', but {first[1]} '{first[0]}': split the data")
            items = convert(values, formats[format_], raw, where)
        except UserError as error:
            if isinstance(error, EndlessTemplate) and error.hopeless:
                raise placed(error, where, columns) from None
            if isinstance(error, Tie) and formats is FORMATS:
                yield []
            else:
                bad.add(placed(error, where, columns))
            continue
        first = first or (layout, where)
        yield items
    if not first and len(bad.skipped) > skipped:
        raise UserError(f"{source}: every record is bad; the first: {bad.skipped[skipped]}")
    if not count:
        raise UserError(f"{source}: contains no records: one JSON object per line, or rows, are expected")


def renamed(raw: Any, columns: Mapping[str, str], source: str) -> dict[str, Any]:
    """The fields that a record has, under this project's names; with ``columns`` no others."""
    if not isinstance(raw, dict):
        raise UserError(f"a record must be a JSON object, this is {kind(raw)}")
    for name, column in columns.items():
        if column not in raw:
            raise UserError(f"field '{column}', named by --columns for '{name}', is missing")
    named = {name: raw[column] for name, column in columns.items()} or raw
    present = {name: value for name, value in named.items() if value is not None}  # null means absent
    return present if columns else adapted(present, source)


def placed(error: UserError, where: str, columns: Mapping[str, str]) -> UserError:
    """The error with the record's place, a field under the record's own name for it."""
    if isinstance(error, FieldError):
        stem, bracket, rest = error.name.partition("[")
        return UserError(f"{where}: field '{columns.get(stem, stem)}{bracket}{rest}' {error.problem}")
    return UserError(f"{where}: {error}")


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

    ``columns`` maps this project's field names to the records'; then no other fields are read. ``tokenizer`` has the
    chat template for messages. A record with n completions gives a maximum of ``pairs_per_prompt`` pairs, 0 for all.

    Raises:
        UserError: an unreadable source, one without pairs, or, unless ``bad`` skips them, a bad record, with place and
            field.
    """
    bad = bad or BadRecords()

    def convert(values: dict[str, Any], needed: tuple[str, ...], raw: dict[str, Any], where: str) -> list[Pair]:
        prompt, sides = sides_of(values, needed, tokenizer)
        margin = checked.number("margin", values.get("margin", 0.0))
        extra = {name: _group_field(name, raw) for name in fields}
        if "is_correct" in needed:
            name = "is_correct" if columns else judged_by(raw)
            row = Judged(sides[0], judgment(name, values["is_correct"]), where, extra)
            judged.setdefault(prompt, []).append(row)
            return []
        return [
            Pair(
                prompt,
                better.text,
                worse.text,
                margin=margin,
                where=where,
                fields=extra,
                chosen_cut=better.cut,
                rejected_cut=worse.cut,
            )
            for better, worse in preferences(values, needed, sides, pairs_per_prompt)
        ]

    pairs: list[Pair] = []
    for number, source in enumerate(sources):
        judged: dict[str, list[Judged]] = {}
        of_records = list(_converted(source, FORMATS, columns or {}, bad, convert))
        if judged:
            of_records = [_paired(prompt, group, pairs_per_prompt) for prompt, group in judged.items()]
        bad.tied += of_records.count([])
        if not any(of_records):
            of_what = "prompt have the same judgment" if judged else "record tie"
            raise UserError(f"{source}: contains no pairs: the completions of every {of_what}")
        pairs += [replace(pair, source=number) for of_record in of_records for pair in of_record]
    return pairs


def _paired(prompt: str, group: list[Judged], limit: int) -> list[Pair]:
    """Pairs of the completions of one prompt that were judged one by one; equal texts are no pair."""
    pairs = [(group[a], group[b]) for a, b in ordered_pairs([row.value for row in group], limit)]
    return [
        Pair(
            prompt,
            better.side.text,
            worse.side.text,
            where=better.where,
            fields=better.fields,
            chosen_cut=better.side.cut,
            rejected_cut=worse.side.cut,
        )
        for better, worse in pairs
        if better.side.text != worse.side.text
    ]


def read_judged(
    sources: Sequence[str],
    *,
    probability: bool,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> list[Pair]:
    """All completions that have a label or score, in order, each with it as its ``target``: true is 1, false 0, or a
    number; with ``probability`` one from 0 to 1. Other arguments and errors are those of read_pairs."""
    bad = bad or BadRecords()

    def convert(values: dict[str, Any], needed: tuple[str, ...], raw: dict[str, Any], where: str) -> list[Pair]:
        prompt, sides = sides_of(values, needed, tokenizer)
        extra = {name: _group_field(name, raw) for name in fields}
        if "scores" in needed:
            given = checked.entries("scores", values["scores"], len(sides))
            names = [f"scores[{i}]" for i in range(len(given))]
        else:
            given, names = [values["is_correct"]], ["is_correct" if columns else judged_by(raw)]
            judgments = [name for name in JUDGMENTS if raw.get(name) is not None and not columns]
            if len(judgments) > 1:
                raise UserError(
                    f"is judged by {' and '.join(map(repr, judgments))}: name one of them, as in --columns "
                    f"prompt=prompt,completion=completion,is_correct={judgments[-1]}"
                )
        return [
            Pair(
                prompt,
                side.text,
                side.text,
                where=where,
                fields=extra,
                chosen_cut=side.cut,
                rejected_cut=side.cut,
                target=_target(name, value, probability),
            )
            for side, name, value in zip(sides, names, given, strict=True)
            if value is not None
        ]

    completions: list[Pair] = []
    for number, source in enumerate(sources):
        of_records = list(_converted(source, JUDGED_FORMATS, columns or {}, bad, convert))
        if not any(of_records):
            raise UserError(f"{source}: contains no completion with a score")
        completions += [replace(one, source=number) for of_record in of_records for one in of_record]
    return completions


def _target(name: str, value: Any, probability: bool) -> float:
    target = judgment(name, value)
    if probability and not 0 <= target <= 1:
        raise FieldError(name, f"is {target:g}: --loss bce needs true, false or a number from 0 to 1")
    return target


def _group_field(name: str, raw: Mapping[str, Any]) -> str | int | float:
    if name not in raw:
        raise UserError(f"field '{name}', named by --eval-by, is missing")
    value = raw[name]
    if not isinstance(value, (str, int, float)):
        raise UserError(f"field '{name}', named by --eval-by, is {kind(value)}, not a string, number or boolean")
    return checked.text(name, value) if isinstance(value, str) else value


def completions_of_records(
    sources: Sequence[str],
    *,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> Iterator[list[Candidate]]:
    """The completions of one record after another, read when they are asked for; see sources.rows.

    ``fields`` are kept as they are, "*" keeps the whole record. Other arguments and errors are those of read_pairs.
    """
    bad = bad or BadRecords()
    row = 0

    def convert(values: dict[str, Any], needed: tuple[str, ...], raw: dict[str, Any], where: str) -> list[Candidate]:
        prompt, sides = sides_of(values, needed, tokenizer)
        if missing := [name for name in fields if name != "*" and name not in raw]:
            raise UserError(f"field '{missing[0]}' is missing")
        kept = raw if "*" in fields else {name: raw[name] for name in fields}
        if not set(needed).isdisjoint({"chosen", "correct"}):
            preferences(values, needed, sides, 0)  # raises where the two are equal
        return [
            Candidate(prompt=prompt, completion=text, where=where, row=row, name=name, cut=cut, fields=kept)
            for name, text, cut in sides
        ]

    for source in sources:
        for of_record in _converted(source, COMPLETION_FORMATS, columns or {}, bad, convert):
            yield of_record
            row += 1


def read_completions(
    sources: Sequence[str],
    *,
    fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bad: BadRecords | None = None,
) -> list[Candidate]:
    """All completions of completions_of_records, in one list."""
    of_records = completions_of_records(sources, fields=fields, columns=columns, tokenizer=tokenizer, bad=bad)
    return [candidate for of_record in of_records for candidate in of_record]
