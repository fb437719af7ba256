"""Files of completions, for the commands that score and judge them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def samples(questions: int = 6, each: int = 5) -> list[dict[str, Any]]:
    """Samples with answers; by question 1 to ``each`` of them are right. Two families."""
    return [
        {
            "question": f"one and {'two ' * (q + 1)}is?",
            "completion": f" three, {'four ' * (q + s)}so {'five' if s <= q % each else 'six'}",
            "predicted_answer": "five" if s <= q % each else None if s == each - 1 and q == 0 else "six",
            "expected_answer": "five",
            "is_correct": s <= q % each,
            "family": "ab"[s % 2],
            "qid": f"q{q}",
        }
        for q in range(questions)
        for s in range(each)
    ]
