"""Records of public data sets, rewritten in this project's fields; the names of their fields identify them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from gcrm_fast.data import fields
from gcrm_fast.data.fields import FieldError
from gcrm_fast.data.messages import decoded, is_messages

Record = dict[str, Any]
Adapt = Callable[[Record], Record]
# Of one completion; the first that is there counts.
JUDGMENTS = ("is_correct", "label", "kto_tag", "score", "rating", "reward", "helpfulness", "overall_score", "is_safe")
RESPONSES = ("response", "output", "answer", "generation")
SYNONYMS = {  # names that other data sets use, for what an error suggests
    "prompt": ("instruction", "question", "query", "input", "problem", "trajectory", "context", "text"),
    "chosen": (
        *("chosen_response", "preferred", "accepted", "good", "better", "winner", "positive", "response_chosen"),
        *("response_j", "correct", "chosen_answer"),
    ),
    "rejected": (
        *("rejected_response", "dispreferred", "bad", "worse", "loser", "negative", "response_rejected"),
        *("response_k", "incorrect", "rejected_answer"),
    ),
    "completion": RESPONSES,
    "completions": ("responses", "outputs", "answers", "generations", "candidates"),
    "scores": ("rewards", "ratings", "correctness", "correctness_math_verify", "all_rm_scores"),
    "is_correct": (*JUDGMENTS[1:], "correct", "correctness", "quality"),
}
OPTIONAL = ("system", "tools", "margin")
LISTS = ("completions", "scores", "ranks")


class Tie(FieldError):
    """Two responses that were judged alike, which make no pair."""


def adapted(record: Record, source: str = "") -> Record:
    """The record as it is, or one of the shapes below in this project's fields. Raises FieldError."""
    for needed, (what, program) in REFUSED.items():
        if all(name in record for name in needed):
            raise FieldError(needed[0], _refusal(what, program, source))
    for needed, adapt in SHAPES:
        if all(name in record for name in needed):
            return adapt(record)
    return record


def suggested_columns(record: Mapping[str, Any], needed: tuple[str, ...]) -> str:
    """The option --columns with which the record has all fields of a format, as far as their names tell; or ""."""

    def fits(name: str, column: str) -> bool:
        value = decoded(record.get(column))
        if name in LISTS:
            return isinstance(value, list)
        return (
            isinstance(value, (bool, int, float))
            if name == "is_correct"
            else isinstance(value, str) | is_messages(value)
        )

    columns = {
        name: next((other for other in (name, *SYNONYMS.get(name, ())) if fits(name, other)), None) for name in needed
    }
    if None in columns.values() or _has_input(record):
        return ""
    if "prompt" not in columns and "question" not in columns:  # optional next to messages
        prompt = next((name for name in ("prompt", *SYNONYMS["prompt"]) if fits("prompt", name)), None)
        columns = {"prompt": prompt, **columns} if prompt else columns
    columns |= {name: name for name in OPTIONAL if record.get(name) is not None}
    return "--columns " + ",".join(f"{name}={column}" for name, column in columns.items())


def judged_by(record: Mapping[str, Any]) -> str:
    """The field that judges a record's one completion."""
    return next((name for name in JUDGMENTS if record.get(name) is not None), "is_correct")


def judgment(name: str, value: Any) -> float:
    """true above false, or a number."""
    return float(value) if isinstance(value, bool) else fields.number(name, value)


# ------------------------------------------------------------------------------------------------------------- prompts


def _has_input(record: Mapping[str, Any]) -> bool:
    """Whether an instruction is one half of the prompt."""
    inputs = record.get("input")
    return isinstance(record.get("instruction"), str) and isinstance(inputs, str) and bool(inputs.strip())


def _prompt(record: Record) -> Any:
    if "prompt" not in record and _has_input(record):
        return f"{record['instruction']}\n{record['input']}"  # as in Alpaca
    prompt = next((record[name] for name in ("prompt", "instruction", "question", "history") if name in record), None)
    return prompt["full_text"] if isinstance(prompt, dict) and "full_text" in prompt else prompt  # WebGPT


def _without(record: Record, *names: str) -> Record:
    return {name: value for name, value in record.items() if name not in names}


# --------------------------------------------------------------------------------------------------------------- pairs


def _pair(record: Record, first: Any, second: Any, better: int | None, field: str) -> Record:
    if better is None:
        raise Tie(field, "is a tie: the responses make no pair")
    chosen, rejected = (second, first) if better else (first, second)
    return record | {"chosen": chosen, "rejected": rejected}


def _compared(
    first: str, second: str, field: str, meaning: Mapping[Any, int | None] | None, *, prompt: str = "prompt"
) -> tuple[tuple[str, ...], Adapt]:
    """Two responses, and a field that compares them: what its values mean, 0 for the first, 1 for the second, None for
    a tie; without ``meaning``, numbers below 0 are for the first, above 0 for the second."""

    def adapt(record: Record) -> Record:
        value = record[field]
        if meaning is None:
            number = fields.number(field, value)
            better = None if number == 0 else int(number > 0)
        elif isinstance(value, (str, int)) and value in meaning:
            better = meaning[value]
        else:
            raise FieldError(field, f"is {str(value)[:20]!r}, not one of {', '.join(map(str, meaning))}")
        asked = {"prompt": record[prompt] if prompt == "context" else _prompt(record)} if prompt else {}
        return _pair(record | asked, record[first], record[second], better, field)

    return (*((prompt,) if prompt else ()), first, second, field), adapt


def _scored_answers(record: Record) -> Record:
    """WebGPT comparisons."""
    first, second = (fields.number(name, record[name]) for name in ("score_0", "score_1"))
    better = None if first == second else int(second > first)
    return _pair(record | {"prompt": _prompt(record)}, record["answer_0"], record["answer_1"], better, "score_0")


def _summaries(record: Record) -> Record:
    """OpenAI's comparisons of summaries, with the prompt of their code."""
    info, [first, second] = record["info"], [summary["text"] for summary in record["summaries"]]
    if info.get("post") is not None:
        post = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        post = f"Article: {info.get('article')}\n\nTL;DR:"
    return _pair(record | {"prompt": post}, first, second, {0: 0, 1: 1}.get(record["choice"]), "choice")


def _battle(record: Record) -> Record:
    """Chatbot Arena as on Kaggle: the turns as JSON lists, and a column for each winner."""

    def conversation(side: str) -> list[Record]:
        turns = zip(json.loads(record["prompt"]), json.loads(record[side]), strict=True)
        return [
            {"role": r, "content": text} for pair in turns for r, text in zip(("user", "assistant"), pair, strict=True)
        ]

    better = 0 if record["winner_model_a"] == 1 else 1 if record["winner_model_b"] == 1 else None
    try:
        first, second = conversation("response_a"), conversation("response_b")
    except (ValueError, TypeError):
        raise FieldError("prompt", "and the responses are not JSON lists of as many texts") from None
    return _pair(_without(record, "prompt"), first, second, better, "winner_tie")


def _two_sides(record: Record) -> Record:
    """A prompt under another name, or the dialogue before two answers; lists of texts (RewardBench 2), of which every
    chosen one is better than every rejected one."""
    sides = {name: record[name] for name in ("chosen", "rejected")}
    if "prompt" not in record:
        before = record.get("conversations", record.get("messages"))
        answers = all(isinstance(side, dict) or (is_messages(side) and len(side) == 1) for side in sides.values())
        prompt = before if before is not None and (answers or "conversations" in record) else _prompt(record)
        record = record | ({} if prompt is None else {"prompt": prompt})
    lists = {
        name: isinstance(side, list) and bool(side) and all(isinstance(text, str) for text in side)
        for name, side in sides.items()
    }
    if not any(lists.values()):
        return _without(record, "conversations", "messages")
    chosen, rejected = (side if lists[name] else [side] for name, side in sides.items())
    scores = [1] * len(chosen) + [0] * len(rejected)
    return _without(record, *sides) | {"completions": chosen + rejected, "scores": scores}


def _rejected_answer(record: Record) -> Record:
    """ms-swift: a dialogue, and a worse answer instead of its last."""
    *prompt, chosen = fields.entries("messages", record["messages"]) or [None]
    rejected = {"role": "assistant", "content": record["rejected_response"]}
    return _without(record, "messages") | {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


# --------------------------------------------------------------------------------------------------------- completions


def _objects(name: str, text: str, order: tuple[str, ...], into: str) -> Adapt:
    """Of a list of objects, each with a text and its place in the order."""

    def adapt(record: Record) -> Record:
        items = record[name]
        if not isinstance(items, list) or not all(isinstance(item, dict) and text in item for item in items):
            return record
        key = next((key for key in order if any(item.get(key) is not None for item in items)), None)
        ordered = {into: [item.get(key) for item in items]} if key else {}
        return {"prompt": _prompt(record), "completions": [item[text] for item in items], **ordered}

    return adapt


def _judged_list(record: Record) -> Record:
    return record if "scores" in record or "ranks" in record else record | {"scores": record["is_correct"]}


def _judged(record: Record) -> Record:
    """One completion and what is said of it: KTO, HelpSteer; the completion of a dialogue is its last message."""
    name = next((name for name in ("completion", *RESPONSES) if name in record), None)
    judgment, prompt = record.get(judged_by(record)), _prompt(record)
    dialogue = decoded(record.get("conversations", record.get("messages")))
    if judgment is None or is_messages(judgment) or (prompt is None and not dialogue):
        return record if dialogue is None else _without(record, "conversations") | {"messages": dialogue}
    if name is not None and prompt is not None:
        asked = {} if "question" in record else {"prompt": prompt}
        return record | asked | {"completion": record[name], "is_correct": judgment}
    if prompt is None and is_messages(dialogue):
        parts = {"prompt": dialogue[:-1], "completion": dialogue[-1:], "is_correct": judgment}
        return _without(record, "conversations", "messages") | parts
    return record


# ---------------------------------------------------------------------------------------------------------- the shapes

BATTLE = {"model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None, "both_bad": None, "bothbad": None}
SHAPES: tuple[tuple[tuple[str, ...], Adapt], ...] = (
    _compared("response_0", "response_1", "better_response_id", {0: 0, 1: 1}),  # PKU-SafeRLHF
    _compared("human_ref_A", "human_ref_B", "labels", {1: 0, 0: 1}, prompt="history"),  # Stanford Human Preferences
    _compared("response_1", "response_2", "preference_strength", None),  # HelpSteer 2
    _compared("response1", "response2", "overall_preference", None, prompt="context"),  # HelpSteer 3
    _compared("output_1", "output_2", "preference", {1: 0, 2: 1}, prompt="instruction"),  # AlpacaFarm
    _compared("output_1", "output_2", "label", {1: 0, 2: 1}, prompt="instruction"),  # OffsetBias
    _compared("conversation_a", "conversation_b", "winner", BATTLE, prompt=""),  # Chatbot Arena
    _compared("response_A", "response_B", "label", {"A>B": 0, "B>A": 1, "A=B": None}, prompt="question"),  # JudgeBench
    (("question", "answer_0", "answer_1", "score_0", "score_1"), _scored_answers),
    (("info", "summaries", "choice"), _summaries),
    (("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"), _battle),
    (("messages", "rejected_response"), _rejected_answer),
    (("chosen", "rejected"), _two_sides),
    (("prompt", "answers"), _objects("answers", "answer", ("rank",), "ranks")),  # Nectar
    (("question", "answers"), _objects("answers", "text", ("pm_score", "score"), "scores")),  # Stack Exchange
    (
        ("instruction", "completions"),  # UltraFeedback
        _objects("completions", "response", ("overall_score", "fine-grained_score"), "scores"),
    ),
    (("prompt", "completions", "is_correct"), _judged_list),
    ((), _judged),
)

# Layouts that are not read: what the records hold, and a program that writes pairs.
REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    ("message_id", "text", "role"): (
        "belongs to a tree of messages (OpenAssistant)",
        """
rows = {row["message_id"]: row for _, row in rows(SOURCE, BadRecords())}
def thread(i):
    if not i: return []
    role = rows[i]["role"].replace("prompter", "user")
    return thread(rows[i]["parent_id"]) + [{"role": role, "content": rows[i]["text"]}]
answers = {}
for row in rows.values():
    if row["role"] == "assistant" and row.get("rank") is not None: answers.setdefault(row["parent_id"], []).append(row)
for i, of in answers.items():
    texts, ranks = [row["text"] for row in of], [row["rank"] for row in of]
    if len(of) > 1: print(json.dumps({"prompt": thread(i), "completions": texts, "ranks": ranks}))
""",
    ),
    ("question", "label", "labeler"): (
        "holds judgments of steps (PRM800K)",
        """
for _, row in rows(SOURCE, BadRecords()):
    text = row["question"]["problem"] + "\\n"
    for step in row["label"]["steps"]:
        texts, scores = ([part[key] for part in step["completions"] or []] for key in ("text", "rating"))
        if len(texts) > 1: print(json.dumps({"prompt": text, "completions": texts, "scores": scores}))
        if step["chosen_completion"] is None: break
        text += texts[step["chosen_completion"]] + "\\n"
""",
    ),
}


def _refusal(what: str, program: str, source: str) -> str:
    """One line, in which the program can be pasted into bash."""
    program = "import json\nfrom gcrm_fast.data.sources import BadRecords, rows" + program.rstrip()
    quoted = (
        program.replace("SOURCE", json.dumps(source)).replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    )
    return f"{what}: write pairs with: python -c $'{quoted}' > pairs.jsonl"
