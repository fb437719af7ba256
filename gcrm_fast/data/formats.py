"""Records of public data sets, rewritten in this project's fields; the names of their fields identify them."""

from collections.abc import Callable, Mapping
from typing import Any

from gcrm_fast.data import fields
from gcrm_fast.data.fields import FieldError
from gcrm_fast.data.messages import is_messages

Record = dict[str, Any]
JUDGMENTS = ("label", "score", "helpfulness")  # of a row with one completion; the first that is there counts
SYNONYMS = {  # names that other data sets use, for what an error suggests
    "prompt": ("instruction", "question", "query", "input", "context", "text"),
    "chosen": ("chosen_response", "preferred", "accepted", "good", "better", "winner", "positive", "response_chosen"),
    "rejected": ("rejected_response", "dispreferred", "bad", "worse", "loser", "negative", "response_rejected"),
    "completion": ("response", "output", "answer", "generation"),
    "completions": ("responses", "outputs", "answers", "generations"),
    "scores": ("rewards", "ratings"),
}


def adapted(record: Record) -> Record:
    """The record as it is, or one of the shapes below in this project's fields. Raises FieldError."""
    for needed, adapt in SHAPES:
        if all(name in record for name in needed):
            return adapt(record)
    return record


def suggested_columns(record: Mapping[str, Any], needed: tuple[str, ...]) -> str:
    """The option --columns with which the record has all fields of a format, as far as their names tell; or ""."""
    columns = {
        name: next((other for other in (name, *SYNONYMS.get(name, ())) if other in record), None) for name in needed
    }
    if None in columns.values():
        return ""
    if "prompt" not in columns and "question" not in columns:  # optional next to messages
        prompt = next((name for name in ("prompt", *SYNONYMS["prompt"]) if name in record), None)
        columns = {"prompt": prompt, **columns} if prompt else columns
    return "--columns " + ",".join(f"{name}={column}" for name, column in columns.items())


def _numbered_choice(record: Record) -> Record:
    """PKU-SafeRLHF: which of two responses is better."""
    better = record["better_response_id"]
    if better not in (0, 1):
        raise FieldError("better_response_id", f"is {better!r}, not 0 or 1")
    return record | {"chosen": record[f"response_{int(better)}"], "rejected": record[f"response_{1 - int(better)}"]}


def _lettered_choice(record: Record) -> Record:
    """Stanford Human Preferences: labels is 1 where A is preferred."""
    if record["labels"] not in (0, 1):
        raise FieldError("labels", f"is {record['labels']!r}, not 0 or 1")
    chosen, rejected = ("human_ref_A", "human_ref_B") if record["labels"] else ("human_ref_B", "human_ref_A")
    return {"prompt": record["history"], "chosen": record[chosen], "rejected": record[rejected]}


def _objects(name: str, text: str, order: tuple[str, ...], into: str) -> Callable[[Record], Record]:
    """Of a list of objects, each with a text and its place in the order."""

    def adapt(record: Record) -> Record:
        items = record[name]
        if not isinstance(items, list) or not all(isinstance(item, dict) and text in item for item in items):
            return record
        key = next((key for key in order if all(item.get(key) is not None for item in items)), None)
        ordered = {into: [item[key] for item in items]} if key else {}
        prompt = record.get("prompt", record.get("instruction"))
        return {"prompt": prompt, "completions": [item[text] for item in items], **ordered}

    return adapt


def _several_sides(record: Record) -> Record:
    """RewardBench 2 and others: lists of texts, every chosen one better than every rejected one."""
    sides = {name: record[name] for name in ("chosen", "rejected")}
    lists = {
        name: isinstance(side, list) and bool(side) and all(isinstance(text, str) for text in side)
        for name, side in sides.items()
    }
    if not any(lists.values()):
        return record
    chosen, rejected = (side if lists[name] else [side] for name, side in sides.items())
    rest = {name: value for name, value in record.items() if name not in sides}
    return rest | {"completions": chosen + rejected, "scores": [1] * len(chosen) + [0] * len(rejected)}


def _conversation(record: Record) -> Record:
    """ShareGPT turns: the prompt of two sides, or a dialogue that ends with its answer."""
    rest = {name: value for name, value in record.items() if name != "conversations"}
    return rest | {"prompt" if "chosen" in record else "messages": record["conversations"]}


def _judged_list(record: Record) -> Record:
    return record if "scores" in record or "ranks" in record else record | {"scores": record["is_correct"]}


def _judged(record: Record) -> Record:
    """One completion and what is said of it: KTO, HelpSteer."""
    judgment = next((record[name] for name in JUDGMENTS if name in record), None)
    completion = {"completion": record["response"]} if "response" in record else {}
    if judgment is None or "is_correct" in record or is_messages(judgment):
        return record | completion
    return record | completion | {"is_correct": judgment}


SHAPES: tuple[tuple[tuple[str, ...], Callable[[Record], Record]], ...] = (
    (("prompt", "response_0", "response_1", "better_response_id"), _numbered_choice),
    (("history", "human_ref_A", "human_ref_B", "labels"), _lettered_choice),
    (("prompt", "answers"), _objects("answers", "answer", ("rank",), "ranks")),  # Nectar
    (
        ("instruction", "completions"),  # UltraFeedback
        _objects("completions", "response", ("overall_score", "fine-grained_score"), "scores"),
    ),
    (("conversations",), _conversation),
    (("prompt", "chosen", "rejected"), _several_sides),
    (("prompt", "completions", "is_correct"), _judged_list),
    (("prompt", "response"), _judged),
    (("prompt", "completion"), _judged),
)


def judgment(name: str, value: Any) -> float:
    """true above false, or a number."""
    return float(value) if isinstance(value, bool) else fields.number(name, value)
