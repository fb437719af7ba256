"""rewardbench's own program on a model of ChatML and a local file, its ``.to("cuda")`` redirected to the CPU."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from rewardbench import rewardbench
from transformers import BatchEncoding

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "rewardbench_local.sh"
_to = BatchEncoding.to


def to_cpu(self: BatchEncoding, device: Any, **options: Any) -> BatchEncoding:
    return _to(self, "cpu" if device == "cuda" else device, **options)


def main(work: Path, answers: Path) -> None:
    models = json.loads((work / "models.json").read_text())
    setattr(BatchEncoding, "to", to_cpu)  # noqa: B010 (mypy refuses to assign to a method)
    os.chdir(work)
    # As the example calls it: what it writes is named after the model, below the working directory.
    [command] = re.findall(r"^rewardbench (.+)$", SCRIPT.read_text().replace("\\\n", ""), re.MULTILINE)
    options = [word for word in command.split() if '"' not in word and not word.startswith(("--model", "--dataset"))]
    sys.argv = ["rewardbench", "--model", "chatml", "--dataset", "preferences.jsonl", *options]
    rewardbench.main()
    scored = Path("results/chatml_outputs.jsonl").read_text()
    rows: list[dict[str, Any]] = [json.loads(line) for line in scored.splitlines()]
    cases = models["chatml"]["cases"]
    texts = [[c["messages"][:1], c["messages"][1:]] for c in cases]
    others = [[c["messages"][:1], o["messages"][1:]] for c, o in zip(cases, [*cases[1:], cases[0]], strict=True)]
    found = [row[name] for name in ("scores_chosen", "scores_rejected") for row in rows]
    found = [value[0] if isinstance(value, list) else value for value in found]
    made = [{"what": "examples/rewardbench_local.sh", "model": "chatml", "found": found, "texts": texts + others}]
    answers.write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
