"""Records of public preference data: read as they are, or refused with a line that makes them readable."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gcrm_fast.cli import main
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.records import COMPLETION_FORMATS, Pair, parse_columns, read_completions, read_pairs
from gcrm_fast.data.sources import BadRecords
from support.chat import CHATML, chat_tokenizer

Records = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [(answer if i % 2 else user)(text) for i, text in enumerate(texts)]


def shared(*texts: str) -> list[dict[str, str]]:
    """ShareGPT's."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def asked(*texts: str) -> str:
    roles = ("user", "assistant")
    written = "".join(f"<|im_start|>{roles[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(texts))
    return written + "<|im_start|>assistant\n"


def system(text: str, *texts: str) -> str:
    return f"<|im_start|>system\n{text}<|im_end|>\n{asked(*texts)}"


X, Y, Z = (f"{text}<|im_end|>\n" for text in "xyz")
PAIR = {"chosen": "x", "rejected": "y"}
# name -> (records, pairs)
READ: dict[str, tuple[Records, list[tuple[str, str, str]]]] = {
    # ---- chosen and rejected
    "HH": (
        [{side: f"\n\nHuman: p\n\nAssistant: {text}" for side, text in PAIR.items()}],
        [("\n\nHuman: p\n\nAssistant:", " x", " y")],
    ),
    "full-hh-rlhf": ([{"prompt": "p", "response": "x", **PAIR}], [("p", "x", "y")]),
    "UltraFeedback, binarized": (
        [
            {
                "prompt": "p",
                "prompt_id": "1",
                "chosen": turns("p", "x"),
                "rejected": turns("p", "y"),
                "messages": turns("p", "x"),
                "score_chosen": 8.0,
                "score_rejected": 7.5,
            }
        ],
        [(asked("p"), X, Y)],
    ),
    "Skywork, Tulu 3": (
        [{"id": "1", "source": "s", "chosen": turns("p", "x"), "rejected": turns("p", "y"), "prompt": None}],
        [(asked("p"), X, Y)],
    ),
    "Capybara": (
        [
            {
                "prompt": "second\n",
                "conversation": [{"input": "p", "output": "o"}, {"input": "second", "output": "x"}],
                "chosen": turns("p", "o", "second", "x"),
                "rejected": turns("p", "o", "second", "y"),
            }
        ],
        [(asked("p", "o", "second"), X, Y)],
    ),
    "Orca DPO": ([{"system": "s", "question": "p", **PAIR}], [(system("s", "p"), X, Y)]),
    "Orca DPO without a system message": ([{"system": "", "question": "p", **PAIR}], [("p", "x", "y")]),
    "RewardBench 1": (
        [{"prompt": "p", **PAIR, "chosen_model": "m", "rejected_model": "n", "subset": "s", "id": 1}],
        [("p", "x", "y")],
    ),
    "RewardBench 2": (
        [{"prompt": "p", "chosen": ["x"], "rejected": ["y", "z"], "num_correct": 1, "subset": "s"}],
        [("p", "x", "y"), ("p", "x", "z")],
    ),
    "several rejected": (
        [{"prompt": "p", "chosen": "x", "rejected": ["y", "z"]}],
        [("p", "x", "y"), ("p", "x", "z")],
    ),
    "Alpaca": ([{"instruction": "p", "input": "q", **PAIR}], [("p\nq", "x", "y")]),
    "ShareGPT": (
        [{"conversations": shared("p"), "chosen": shared("", "x")[1], "rejected": shared("", "y")[1]}],
        [(asked("p"), X, Y)],
    ),
    "messages with two answers": (
        [{"messages": turns("p"), "chosen": answer("x"), "rejected": answer("y")}],
        [(asked("p"), X, Y)],
    ),
    "ms-swift": (
        [{"messages": turns("p", "o", "q", "x"), "rejected_response": "y"}],
        [(asked("p", "o", "q"), X, Y)],
    ),
    "dialogues as JSON text": (
        [{"prompt": "p", "chosen": json.dumps(turns("p", "x")), "rejected": json.dumps(turns("p", "y"))}],
        [(asked("p"), X, Y)],
    ),
    # ---- two responses and which is better
    "PKU-SafeRLHF": (
        [{"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1, "safer_response_id": 0}],
        [("p", "y", "x")],
    ),
    "SHP": (
        [{"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": label} for label in (0, 1)],
        [("p", "x", "y"), ("p", "y", "x")],
    ),
    "HelpSteer 2, preferences": (
        [{"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": n} for n in (-2, 0, 3)],
        [("p", "x", "y"), ("p", "y", "x")],
    ),
    "HelpSteer 3": (
        [
            {"domain": "g", "context": turns("p", "o", "q"), "response1": "x", "response2": "y"}
            | {"overall_preference": n, "individual_preference": [{"score": n}]}
            for n in (-1, 0, 2)
        ],
        [(asked("p", "o", "q"), X, Y), (asked("p", "o", "q"), Y, X)],
    ),
    "AlpacaFarm": (
        [{"instruction": "p", "input": "q", "output_1": "x", "output_2": "y", "preference": 2}],
        [("p\nq", "y", "x")],
    ),
    "OffsetBias": ([{"instruction": "p", "output_1": "x", "output_2": "y", "label": 1}], [("p", "x", "y")]),
    "JudgeBench": (
        [{"question": "p", "response_A": "x", "response_B": "y", "label": "B>A", "pair_id": "1"}],
        [("p", "y", "x")],
    ),
    "Chatbot Arena": (
        [
            {"model_a": "m", "model_b": "n", "conversation_a": turns("p", "x"), "conversation_b": turns("p", "y")}
            | {"winner": winner}
            for winner in ("model_a", "tie", "model_b", "tie (bothbad)")
        ],
        [(asked("p"), X, Y), (asked("p"), Y, X)],
    ),
    "Chatbot Arena on Kaggle": (
        [
            {"id": 1, "prompt": '["p"]', "response_a": '["x"]', "response_b": '["y"]'}
            | {"winner_model_a": a, "winner_model_b": b, "winner_tie": int(a == b)}
            for a, b in ((1, 0), (0, 1), (0, 0))
        ],
        [(asked("p"), X, Y), (asked("p"), Y, X)],
    ),
    "WebGPT": (
        [
            {"question": {"dataset": "d", "full_text": "p"}, "answer_0": "x", "answer_1": "y"}
            | {"score_0": score, "score_1": -score}
            for score in (-1.0, 0.0, 0.5)
        ],
        [("p", "x", "y"), ("p", "y", "x")],
    ),
    "summarize from feedback": (
        [
            {"info": {"post": "p", "title": "t", "subreddit": "r"}, "summaries": [{"text": "x"}, {"text": "y"}]}
            | {"choice": 1, "worker": "w", "split": "train"}
        ],
        [("SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "y", "x")],
    ),
    # ---- several completions
    "Nectar": (
        [{"prompt": "p", "answers": [{"answer": "x", "rank": 2.0}, {"answer": "y", "rank": 1.0}]}],
        [("p", "y", "x")],
    ),
    "UltraFeedback": (
        [
            {"instruction": "p", "completions": [{"response": r, "overall_score": s} for r, s in scores]}
            for scores in [[("x", 3), ("y", 7.5), ("z", None)]]
        ],
        [("p", "y", "x")],
    ),
    "Stack Exchange": (
        [{"qid": 1, "question": "p", "answers": [{"text": "x", "pm_score": 0}, {"text": "y", "pm_score": 4}]}],
        [("p", "y", "x")],
    ),
    "booleans": ([{"prompt": "p", "completions": ["x", "y"], "is_correct": [False, True]}], [("p", "y", "x")]),
    "boolean scores": ([{"prompt": "p", "completions": ["x", "y"], "scores": [False, True]}], [("p", "y", "x")]),
    # ---- completions judged one by one
    "HelpSteer": (
        [{"prompt": "p", "response": text, "helpfulness": n, "verbosity": 0} for text, n in (("x", 1), ("y", 3))],
        [("p", "y", "x")],
    ),
    "KTO": (
        [
            {"prompt": prompt, "completion": text, "label": right}
            for prompt, text, right in (("p", "x", True), ("q", "x", True), ("p", "y", False), ("p", "x", False))
        ],
        [("p", "x", "y")],
    ),
    "KTO of messages": (
        [{"prompt": turns("p"), "completion": [answer(text)], "label": text == "x"} for text in "xy"],
        [(asked("p"), X, Y)],
    ),
    "KTO of dialogues": (
        [{"messages": turns("p", text), "label": text == "x"} for text in "xy"],
        [(asked("p"), X, Y)],
    ),
    "KTO of ShareGPT dialogues": (
        [{"conversations": shared("p", text), "kto_tag": text == "x"} for text in "xy"],
        [(asked("p"), X, Y)],
    ),
    "ratings": (
        [{"prompt": "p", "response": text, "rating": n} for text, n in (("x", 2), ("y", 5), ("z", 2))],
        [("p", "y", "x"), ("p", "y", "z")],
    ),
    "rated outputs": (
        [{"instruction": "p", "input": "q", "output": text, "score": n} for text, n in (("x", 2.5), ("y", 1.5))],
        [("p\nq", "x", "y")],
    ),
    "BeaverTails": (
        [{"prompt": "p", "response": text, "category": {}, "is_safe": text == "x"} for text in "xy"],
        [("p", "x", "y")],
    ),
    "verified": (
        [{"prompt": "p", "completion": text, "is_correct": text == "x"} for text in ("y", "x")],
        [("p", "x", "y")],
    ),
}
# name -> (records, the option that the refusal names, pairs)
COLUMNS: dict[str, tuple[Records, str, list[tuple[str, str, str]]]] = {
    "Stack Exchange, paired": (
        [{"qid": 1, "question": "p", "date": "d", "response_j": "x", "response_k": "y"}],
        "prompt=question,chosen=response_j,rejected=response_k",
        [("p", "x", "y")],
    ),
    "UltraInteract": (
        [{"task": "t", "trajectory": [{"from": "user", "value": "p"}], **PAIR}],
        "prompt=trajectory,chosen=chosen,rejected=rejected",
        [(asked("p"), X, Y)],
    ),
    "Orca of distilabel": (
        [{"system": "s", "input": "p", **PAIR, "rating": [9, 7]}],
        "prompt=input,chosen=chosen,rejected=rejected,system=system",
        [(system("s", "p"), X, Y)],
    ),
    "OpenR1": (
        [{"problem": "p", "generations": ["x", "y"], "correctness_math_verify": [False, True], "answer": "7"}],
        "prompt=problem,completions=generations,scores=correctness_math_verify",
        [("p", "y", "x")],
    ),
    "distilabel": (
        [{"instruction": "p", "generations": ["x", "y"], "ratings": [1, 2]}],
        "prompt=instruction,completions=generations,scores=ratings",
        [("p", "y", "x")],
    ),
    "code preferences": (
        [{"input": "p", "accepted": "x", "rejected": "y", "ID": 1}],
        "prompt=input,chosen=accepted,rejected=rejected",
        [("p", "x", "y")],
    ),
    "query and answers judged": (
        [{"query": "p", "answer": text, "quality": n} for text, n in (("x", 0.25), ("y", 0.5))],
        "prompt=query,completion=answer,is_correct=quality",
        [("p", "y", "x")],
    ),
    "a prompt that no dialogue repeats": (
        [{"prompt": "other", "chosen": turns("p", "x"), "rejected": turns("p", "y")}],
        "chosen=chosen,rejected=rejected",
        [(asked("p"), X, Y)],
    ),
    "two orders": (
        [{"prompt": "p", "completions": ["x", "y"], "scores": [2, 1], "ranks": [1, 2]}],
        "prompt=prompt,completions=completions,scores=scores",
        [("p", "x", "y")],
    ),
}


def write(folder: Path, records: Records) -> str:
    path = folder / "it's data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def sides(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return sorted((pair.prompt, pair.chosen, pair.rejected) for pair in pairs)


@pytest.mark.parametrize(("records", "expected"), READ.values(), ids=READ.keys())
def test_what_is_read_as_it_is(tmp_path: Path, records: Records, expected: Any) -> None:
    tokenizer, source = chat_tokenizer(CHATML), write(tmp_path, records)
    bad = BadRecords(skip=True)
    assert sides(read_pairs([source], tokenizer=tokenizer, bad=bad)) == sorted(expected)
    assert not bad.skipped
    texts = {(c.prompt, c.completion) for c in read_completions([source], tokenizer=tokenizer, bad=bad)}
    assert texts >= {(prompt, text) for prompt, *both in expected for text in both}
    assert all("is a tie" in line for line in bad.skipped), "to score and to evaluate, a tie has no better side"


@pytest.mark.parametrize(("records", "columns", "expected"), COLUMNS.values(), ids=COLUMNS.keys())
def test_what_is_refused_with_the_columns_to_give(
    tmp_path: Path, records: Records, columns: str, expected: Any
) -> None:
    tokenizer, source = chat_tokenizer(CHATML), write(tmp_path, records)
    with pytest.raises(UserError) as refused:
        read_pairs([source], tokenizer=tokenizer)
    assert f"--columns {columns}" in str(refused.value)
    assert sides(read_pairs([source], columns=parse_columns(columns), tokenizer=tokenizer)) == sorted(expected)


TREE = [
    {"message_id": "1", "parent_id": None, "text": "p", "role": "prompter", "rank": None},
    {"message_id": "2", "parent_id": "1", "text": "x", "role": "assistant", "rank": 1},
    {"message_id": "3", "parent_id": "1", "text": "y", "role": "assistant", "rank": 0},
    {"message_id": "4", "parent_id": "3", "text": "q", "role": "prompter", "rank": 0},
    {"message_id": "5", "parent_id": "4", "text": "z", "role": "assistant"},
]
STEPS = [
    {
        "labeler": "l",
        "question": {"problem": "p", "ground_truth_answer": "7"},
        "label": {
            "steps": [
                {"completions": [{"text": "x", "rating": 1}, {"text": "y", "rating": -1}], "chosen_completion": 0},
                {"completions": [{"text": "z", "rating": 1}, {"text": "'\\w", "rating": 0}], "chosen_completion": None},
            ]
        },
    }
]


@pytest.mark.parametrize(
    ("records", "expected"),
    [(TREE, [(asked("p"), Y, X)]), (STEPS, [("p\n", "x", "y"), ("p\nx\n", "z", "'\\w")])],
    ids=["OpenAssistant", "PRM800K"],
)
def test_what_is_refused_with_a_program_to_paste(
    tmp_path: Path, records: Records, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, records)
    assert main(["train", "--data", source, "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    command = line.partition("write pairs with: ")[2].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    pairs = read_pairs([f"{tmp_path}/pairs.jsonl"], tokenizer=chat_tokenizer(CHATML))
    assert sides(pairs) == sorted(expected)


def test_what_cannot_be_guessed_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has 'ask', 'yes', 'no': .*--columns prompt=NAME,chosen=NAME,rejected="):
        read_pairs([write(tmp_path, [{"ask": "p", "yes": "x", "no": "y"}])])
    with pytest.raises(UserError, match=r"it has 'ask', 'yes': .*--columns prompt=NAME,completion=NAME"):
        read_completions([write(tmp_path, [{"ask": "p", "yes": "x"}])])
    columns = parse_columns("prompt=ask,completion=yes", COMPLETION_FORMATS)
    assert len(read_completions([write(tmp_path, [{"ask": "p", "yes": "x"}])], columns=columns)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "completion": "x"}, "'is_correct' is missing"),
        ({"messages": turns("p", "x")}, "it has 'messages'"),
        ({"conversations": shared("p", "x")}, "it has 'conversations'"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "'scores' is missing"),
        (
            {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": "much"},
            "'preference_strength' is str, not a finite number",
        ),
        (
            {"id": 1, "prompt": "p", "response_a": "x", "response_b": "y", "winner_model_a": 1, "winner_model_b": 0},
            "'prompt' and the responses are not JSON lists",
        ),
        ({"messages": [], "rejected_response": "x"}, "'chosen"),
        ({"conversation_a": turns("p", "x"), "conversation_b": turns("p", "y"), "winner": "m"}, "'winner' is 'm'"),
    ],
)
def test_what_makes_no_pair(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs([write(tmp_path, [record])], tokenizer=chat_tokenizer(CHATML))


def test_ties_are_counted(tmp_path: Path) -> None:
    bad, [records, expected] = BadRecords(), READ["Chatbot Arena"]
    assert len(read_pairs([write(tmp_path, records)], tokenizer=chat_tokenizer(CHATML), bad=bad)) == len(expected)
    assert bad.tied == 2
    with pytest.raises(UserError, match="contains no pairs: the completions of every record tie"):
        read_pairs([write(tmp_path, records[1::2])], tokenizer=chat_tokenizer(CHATML))
