"""The model card, README.md of a saved model: data, results, configuration, command; a header that the Hub reads."""

import contextlib
import dataclasses
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from gcrm_fast.data.encoding import TokenizedPair, prompt_text
from gcrm_fast.model import heads
from gcrm_fast.training.config import PRESETS, TrainConfig, to_toml, unused_options
from gcrm_fast.training.option_checks import ARITHMETIC

Rows = Sequence[tuple[str, str]]  # name and value of each line of a table

USE = """\
```python
from gcrm_fast import RewardModel

prompt = {prompt!r}
completion = {completion!r}
model = RewardModel.from_pretrained({folder!r})
reward = model.score(prompt, completion)  # {messages}
q_values = model.q_values(prompt, completion)  # one per token: the cosine to the goal state
```
"""
IN_TRANSFORMERS = """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForSequenceClassification.from_pretrained({folder!r})
reward = model(**tokenizer(prompt + completion{eos}, return_tensors="pt")).logits[0, 0]
```
"""
FOLDER = "path/to/this/folder"
EXAMPLE_CHARACTERS = 400
EXAMPLES = 1000  # pairs among which a short one is looked for
RESULTS = {  # in the header: metric -> its kind on the Hub, its name
    "eval/accuracy": ("accuracy", "pair accuracy"),
    "eval/auroc": ("roc_auc", "AUROC"),
}
OF_COMPLETIONS = RESULTS | {
    "eval/accuracy": ("accuracy", "accuracy"),
    "eval/pearson": ("pearsonr", "Pearson correlation"),
    "eval/spearman": ("spearmanr", "Spearman correlation"),
    "eval/loss/mse": ("mse", "squared error"),
}


class Example(NamedTuple):
    """A prompt and its chosen completion as text; ``ended``: with the token that ends a turn, which is not eos."""

    prompt: str
    completion: str
    ended: bool


def example_of(pairs: Sequence[TokenizedPair], tokenizer: PreTrainedTokenizerBase) -> Example:
    """The first of the chosen completions, uncut ones, of up to EXAMPLE_CHARACTERS, or else the shortest, as its tokens
    read."""

    def example(pair: TokenizedPair) -> Example:
        ended = int(pair.chosen_ids[-1]) != tokenizer.eos_token_id
        ids = pair.chosen_ids[pair.chosen_start : None if ended else -1].tolist()
        completion = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        return Example(prompt_text(tokenizer, pair), completion, ended)

    near = pairs[:EXAMPLES]
    examples = (example(pair) for pair in near)
    short = (one for one in examples if len(one.prompt + one.completion) <= EXAMPLE_CHARACTERS)
    return next(short, None) or example(min(near, key=lambda pair: len(pair.chosen_ids)))


def model_card(
    config: TrainConfig,
    data: Rows,
    results: Rows,
    metrics: Mapping[str, float],
    world_size: int,
    example: Example,
    *,
    chats: bool,
) -> str:
    """The text of README.md.

    ``data`` and ``results`` are shown as they are; the header gets accuracy, AUROC or correlations from ``metrics``,
    those of the last evaluation (empty without held-out data). ``chats``: the tokenizer has a chat template.
    """
    folder = config.push_to_hub or FOLDER
    messages = "a float; lists of texts" + (" and messages" if chats else "") + " work as well"
    eos = "" if example.ended else " + tokenizer.eos_token"
    use = USE.format(prompt=example.prompt, completion=example.completion, folder=folder, messages=messages)
    linear = heads.KINDS[config.head].in_transformers
    sections = [
        f"---\n{_header(config, metrics)}\n---\n",
        "# Goal-conditioned reward model\n",
        "A reward for a completion, and a Q-value at each of its tokens "
        "([GCRM](https://arxiv.org/abs/2407.13887)). Trained by gcrm_fast.\n",
        "## Use\n",
        use,
        *([IN_TRANSFORMERS.format(folder=folder, eos=eos)] if linear else []),
        _ends(linear),
        "## Data\n",
        _table([*_sources(config), *data]),
        "## Results\n",
        _table(results),
        "## Training\n",
        f"```\n{command(config, world_size)}\n```\n",
        f"```toml\n{to_toml(config, unused_options(config))}```\n",
    ]
    return "\n".join(sections)


def _held_out(config: TrainConfig) -> str:
    split = f"{config.eval_split:g} of the prompts" if config.eval_split else "-"
    return " ".join(config.eval_data) or split


def _sources(config: TrainConfig) -> Rows:
    samples = [("samples of a policy, without labels", " ".join(config.on_policy))] if config.on_policy else []
    return [("training", " ".join(config.data)), *samples, ("held out", _held_out(config))]


def _ends(linear: bool) -> str:
    head = "" if linear else " Its reward head has several layers and is in `gcrm.safetensors`: load it with gcrm_fast."
    return (
        "The reward is read at the last token: the tokenizer's eos token, or the token with which the chat template "
        "ends a turn. The text must contain it (without the white space that some templates put after it), unless a "
        f"length limit cut the completion.{head}\n"
    )


def _header(config: TrainConfig, metrics: Mapping[str, float]) -> str:
    """YAML: what the Hub lists and searches."""
    trained_on = (*config.data, *config.on_policy)
    sources = config.eval_data or config.data
    source = " ".join(name if _on_the_hub(name) else Path(name).name for name in sources)
    base, count = base_card(config.model), f"eval/{config.unit}"
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="preference-pairs" if config.loss == "ranking" else "labeled-completions",
            dataset_name=source,
            dataset_args={f"held-out {config.unit}": int(metrics[count])} if count in metrics else None,
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics[key], 4),
        )
        for key, (kind, name) in (RESULTS if config.loss == "ranking" else OF_COMPLETIONS).items()
        if math.isfinite(metrics.get(key, math.nan))
    ]
    values: dict[str, Any] = {
        "license": config.license or base.get("license"),
        "language": list(config.language) or base.get("language"),
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "goal-conditioned", "gcrm"],
        "base_model": config.model if _on_the_hub(config.model) else None,
        "datasets": sorted(
            {"/".join(name.partition(":")[0].split("/")[:2]) for name in filter(_on_the_hub, trained_on)}
        )
        or None,
    }
    if results:
        values |= {"model_name": Path(config.output or "gcrm").name, "eval_results": results}
    return str(ModelCardData(**values).to_yaml()).strip()


def base_card(model: str) -> Mapping[str, Any]:
    """The header of the card of a model's folder, or of the copy in the hub's cache; empty without one."""
    here = os.path.isdir(model) or not model
    path = os.path.join(model, "README.md") if here else try_to_load_from_cache(model, "README.md")
    if model and isinstance(path, str) and os.path.isfile(path):
        with contextlib.suppress(Exception):  # cards are written by hand, and their YAML may be anything
            return ModelCard.load(path).data.to_dict()
    return {}


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
        else ["torchrun", "--standalone", "--nproc-per-node", str(world_size), "-m", "gcrm_fast.train"]
    )
    default = dataclasses.replace(TrainConfig(), **PRESETS[config.preset])
    for field in dataclasses.fields(TrainConfig):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if field.name == "config" or value == getattr(default, field.name):
            continue  # the values include those from a file
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)
