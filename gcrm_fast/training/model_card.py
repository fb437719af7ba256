"""The model card, README.md of a saved model: data, results, configuration, command; a header that the Hub reads."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gcrm_fast.model import heads
from gcrm_fast.training.config import ARITHMETIC, PRESETS, TrainConfig, to_toml

Rows = Sequence[tuple[str, str]]  # name and value of each line of a table

USE = """\
```python
from gcrm_fast import RewardModel

model = RewardModel.from_pretrained("path/to/this/folder")
rewards = model.score(["1+1="], ["2"])
q_values = model.q_values(["1+1="], ["2"])  # one per token: the cosine to the goal state
```
"""
IN_TRANSFORMERS = """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
reward = model(**tokenizer("1+1=" + "2" + tokenizer.eos_token, return_tensors="pt")).logits[0, 0]
```
"""


def model_card(config: TrainConfig, data: Rows, results: Rows, metrics: Mapping[str, float], world_size: int) -> str:
    """The text of README.md.

    ``data`` and ``results`` are shown as they are; the header gets pair accuracy and AUROC from ``metrics``, those of
    the last evaluation (empty without held-out data).
    """
    linear = heads.KINDS[config.head].in_transformers
    sections = [
        f"---\n{_header(config, metrics)}\n---\n",
        "# Goal-conditioned reward model\n",
        "A reward for a completion, and a Q-value at each of its tokens "
        "([GCRM](https://arxiv.org/abs/2407.13887)). Trained by gcrm_fast.\n",
        "## Use\n",
        USE,
        *([IN_TRANSFORMERS] if linear else []),
        _ends(linear),
        "## Data\n",
        _table([("training", " ".join(config.data)), ("held out", " ".join(config.eval_data) or "-"), *data]),
        "## Results\n",
        _table(results),
        "## Training\n",
        f"```\n{command(config, world_size)}\n```\n",
        f"```toml\n{to_toml(config)}```\n",
    ]
    return "\n".join(sections)


def _ends(linear: bool) -> str:
    head = "" if linear else " Its reward head has several layers and is in `gcrm.safetensors`: load it with gcrm_fast."
    return (
        "The reward is read at the last token: the tokenizer's eos token, or the token with which the chat template "
        "ends a turn. The text must contain it (without the white space that some templates put after it), unless a "
        f"length limit cut the completion.{head}\n"
    )


def _header(config: TrainConfig, metrics: Mapping[str, float]) -> str:
    """YAML: what the Hub lists and searches."""
    source = " ".join(config.eval_data or config.data)
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="preference-pairs",
            dataset_name=source,
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics[key], 4),
        )
        for key, kind, name in (("eval/accuracy", "accuracy", "pair accuracy"), ("eval/auroc", "roc_auc", "AUROC"))
        if key in metrics
    ]
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "goal-conditioned", "gcrm"],
        "base_model": config.model if _on_the_hub(config.model) else None,
        "datasets": sorted(
            {"/".join(name.partition(":")[0].split("/")[:2]) for name in config.data if _on_the_hub(name)}
        )
        or None,
    }
    if results:
        values |= {"model_name": Path(config.output or "gcrm").name, "eval_results": results}
    return str(ModelCardData(**values).to_yaml()).strip()


def _on_the_hub(name: str) -> bool:
    """Whether a source came from the Hub: it is no file or folder here."""
    here = any(Path(part).exists() for part in (name, name.rpartition(":")[0]) if part)
    return bool(name) and name != ARITHMETIC and not here


def _table(rows: Rows) -> str:
    cells = [(name.strip(), value.replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells), ""])


def command(config: TrainConfig, world_size: int) -> str:
    """The command line that gives ``config``: every option that differs from its default or preset."""
    words = (
        ["gcrm", "train"]
        if world_size == 1
        else ["torchrun", "--standalone", "--nproc-per-node", str(world_size), "gcrm_fast/train.py"]
    )
    default = dataclasses.replace(TrainConfig(), **PRESETS[config.preset])
    for field in dataclasses.fields(TrainConfig):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if field.name == "config" or value == getattr(default, field.name):
            continue  # the values include those from a file
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
