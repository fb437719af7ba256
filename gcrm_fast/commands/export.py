"""``gcrm export``: a reward model in the folder that another program loads.

    transformers           its family's LlamaForSequenceClassification, one label
    vllm                   the same, with no tensor but the classifier's: for vLLM and SGLang, which read the LAST token
    openrlhf               the same, and in config.json value_head_prefix, mean and std as OpenRLHF reads them
    token-classification   its family's LlamaForTokenClassification: a reward at every token, from a head with a bias

All of them load here again with the same rewards. The first also takes a head of several layers, in a file next to it
that only this project reads. MODEL may have any head that the README lists: other projects' models become these too.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcrm_fast.checkpoints.adapters import tokenizer_folder
from gcrm_fast.checkpoints.goals import GOAL_FILE, read_goals, write_goals
from gcrm_fast.checkpoints.locating import COMPANION, MODEL_FILES, locate
from gcrm_fast.checkpoints.reading import read_as_trained, where_read
from gcrm_fast.checkpoints.saving import fingerprint, write_model
from gcrm_fast.checkpoints.weights import open_reward_model, parameter_shapes
from gcrm_fast.commands.options import ExportOptions
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import table
from gcrm_fast.data.records import COMPLETION_FORMATS, parse_columns, read_completions
from gcrm_fast.data.tokenization import choose_pad, load_tokenizer
from gcrm_fast.inference.candidates import encoded
from gcrm_fast.inference.scoring import RewardModel
from gcrm_fast.model import heads
from gcrm_fast.model.llama import ModelConfig

CARD = "README.md"


class Scale(NamedTuple):
    """Mean and standard deviation of the rewards of ``completions`` completions."""

    mean: float
    std: float
    completions: int

    @property
    def shift(self) -> float:
        """What to add to a reward after the division by ``std``."""
        return -self.mean / self.std


def measure(options: ExportOptions) -> Scale:
    """The scale of rewards over the completions of --standardize. Raises UserError if all are equal."""
    model = RewardModel.from_pretrained(options.model, end=options.end)
    candidates = read_completions(
        options.standardize, columns=parse_columns(options.columns, COMPLETION_FORMATS), tokenizer=model.tokenizer
    )
    names = [c.label for c in candidates]
    judged = model.judge(encoded(candidates, model), names=names, progress=True)
    rewards = np.array([j.reward for j in judged], dtype=np.float64)
    scale = Scale(float(rewards.mean()), float(rewards.std()), len(rewards))
    if scale.std <= 1e-12 * np.abs(rewards).max():
        raise UserError(f"--standardize {' '.join(options.standardize)}: all {len(rewards)} rewards are equal")
    return scale


def config_fields(options: ExportOptions, config: ModelConfig, scale: Scale | None) -> dict[str, Any]:
    """Fields of config.json that the format adds to those of a sequence classifier."""
    if options.format == "openrlhf":  # it computes (reward - mean) / std when asked to normalize
        return {"value_head_prefix": "score", "mean": -scale.shift if scale else 0.0, "std": 1.0}
    if options.format == "token-classification":
        return {"architectures": [config.family.class_name("ForTokenClassification")], "classifier_dropout": 0.0}
    return {}


def converted(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in ``dtype``. Raises UserError for values beyond its range."""
    result = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name, tensor in result.items():
        if not torch.equal(tensor.isfinite(), state[name].isfinite()):
            name_of = str(dtype).removeprefix("torch.")
            raise UserError(f"--dtype {name_of}: tensor {name!r} holds values beyond its range: use bfloat16")
    return result


def in_one_layer(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with a linear head that gives the same rewards; a bottleneck's latents are lost."""
    exported = heads.KINDS[config.head].exported(state)
    if not exported:
        return config, dict(state)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("score.")}
    return replace(config, head="linear", bottleneck_size=0, compare="states"), kept | exported


def export(options: ExportOptions) -> None:
    """Writes the folder and prints what became of the model. Raises UserError."""
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output {output}: exists: choose another")
    folder = locate(options.model, "MODEL", MODEL_FILES)
    config, weights = open_reward_model(folder)
    one_layer = options.format != "transformers" or bool(options.standardize)
    if one_layer and not heads.KINDS[config.head].in_transformers:
        asked = "--standardize scales" if options.standardize else f"--format {options.format} holds"
        raise UserError(
            f"{options.model}: its reward head has several layers, {asked} one: use it with gcrm_fast, or train with "
            "--head linear"
        )
    state = {name: weights.rows(name, shape, slice(None)) for name, shape in parameter_shapes(config).items()}
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    read_as_trained(tokenizer, folder)
    end, reading = where_read(folder, options.end)
    if end.pad is None:
        choose_pad(tokenizer, config.vocab_size, options.model, config.family)
    else:  # it says where the reward is read
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end.pad)
    goal_file, before = folder / GOAL_FILE, fingerprint(state)
    goals, counts = read_goals(goal_file, before, config.state_size) if goal_file.exists() else ({}, {})
    if one_layer:
        goals = {} if config.compare == "latents" else goals
        config, state = in_one_layer(config, state)
    scale = measure(options) if options.standardize else None
    about = {"standardized": {**scale._asdict(), "shift": scale.shift}} if scale else {}
    if scale:
        state["score.weight"] = (state["score.weight"].double() / scale.std).to(state["score.weight"].dtype)
    if options.dtype != "auto":
        state = converted(state, getattr(torch, options.dtype))
    rows = _summary(options, config, scale, state["model.norm.weight"].dtype, bool(goals))
    if options.format == "vllm":
        config, goals = replace(config, projection_size=0), {}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("projection.")}
    bias = None
    if options.format == "token-classification":
        bias = torch.full((1,), scale.shift if scale else 0.0, dtype=state["score.weight"].dtype)

    with written_aside(output) as partial:
        fields = config_fields(options, config, scale)
        after = write_model(partial, state, config, tokenizer, bias=bias, fields=fields, about=about, end=end.kind)
        if goals:  # states do not depend on the head, but the fingerprint does
            write_goals(partial / GOAL_FILE, goals, counts, after, where_read(folder, "auto")[0].kind)
        if (folder / CARD).is_file():
            card = (folder / CARD).read_text(encoding="utf-8")
            lines = "".join(f"- {name}: {value}\n" for name, value in rows)
            (partial / CARD).write_text(f"{card}\n## Export\n\n{lines}", encoding="utf-8")
    print(*weights.notes, *filter(None, [reading]), table([*rows, ("saved", str(output))]), sep="\n", flush=True)


def _summary(
    options: ExportOptions, config: ModelConfig, scale: Scale | None, dtype: torch.dtype, goals: bool
) -> list[tuple[str, str]]:
    precision = str(dtype).removeprefix("torch.")
    if options.format == "vllm" and dtype == torch.float32:
        precision += ", which vLLM and SGLang convert to float16 unless they are started with --dtype float32"
    rows: list[tuple[str, str]] = [("format", options.format), ("dtype", precision)]
    if scale:
        places = {"openrlhf": "config.json (mean) and gcrm.json", "token-classification": "score.bias and gcrm.json"}
        place = places.get(options.format, "gcrm.json")
        rows += [
            ("rewards were", f"mean {scale.mean:.6g}, deviation {scale.std:.6g}, {scale.completions} completions"),
            ("rewards are", f"divided by the deviation; still to be added: {scale.shift:.6g}, in {place}"),
        ]
    if options.format == "vllm":
        if config.projection_size or goals:
            rows.append(("Q-values", "projection and goal states are omitted: the folder gives rewards only"))
        return rows
    if not heads.KINDS[config.head].in_transformers:
        rows.append(("reward head", f"in {COMPANION}, for gcrm_fast only: transformers has no head of several layers"))
    if config.bottleneck_size:
        rows.append(("latents", f"in {COMPANION}, for gcrm_fast only: score.weight gives the reward without them"))
    if config.projection_size:
        rows.append(("projection", f"in {COMPANION}, for Q-values here: the format has no place for it"))
    return rows
