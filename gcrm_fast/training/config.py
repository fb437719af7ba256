"""Every option of ``gcrm train``, its default, and how flags, presets and files combine.

Order of precedence: command line, then ``--config`` file, then ``--preset``, then the defaults below.
"""

import dataclasses
import difflib
import importlib.util
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import parse_options
from gcrm_fast.data.records import parse_columns

ARITHMETIC = "arithmetic"


@dataclass(frozen=True)
class TrainConfig:
    """Trains a goal-conditioned reward model on preference pairs."""

    # ---- data
    data: tuple[str, ...] = (ARITHMETIC,)
    """Training pairs, one or more of: a file (JSON lines, gzip, Parquet), a folder that datasets saved
    (FOLDER[:SPLIT]), a dataset of the Hub (OWNER/NAME[/CONFIG][:SPLIT]). 'arithmetic' generates them."""
    eval_data: tuple[str, ...] = ()
    """Held-out pairs, likewise. Empty: no evaluation (generated for 'arithmetic')."""
    columns: str = ""
    """Names that the records use for this project's fields: prompt=instruction,chosen=good,rejected=bad. No other
    fields are read then."""
    pairs_per_prompt: int = 20
    """Most pairs made of one record with several completions, every one about equally often and neighbours in order
    last; 0 is all."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be used ends the run, or is counted and listed in the run's skipped_records.txt."""
    allow_overlap: bool = False
    """Go on where held-out prompts are also trained on."""
    train_pairs: int = 0
    """Pairs of the training data to use (the first ones); 0 is all. For 'arithmetic': how many to generate."""
    eval_pairs: int = 2000
    """Most held-out pairs used at an evaluation, a fixed random choice; 0 is all."""
    eval_by: tuple[str, ...] = ()
    """Record fields by whose values the final AUROC is broken down, e.g. family pair_type."""
    arithmetic_steps: int = 3
    """Longest generated problem, in solution steps."""
    max_length: int = 2048
    """Most tokens of prompt + completion."""
    overlong: Literal["drop", "truncate-prompt", "error"] = "drop"
    """Longer pairs are dropped and counted; or lose prompt tokens at the left, after bos (dropped where that is not
    enough); or end the run."""
    cache: str = "auto"
    """Folder of tokenized data, which later runs on the same data read. auto: $XDG_CACHE_HOME/gcrm_fast, by default
    ~/.cache/gcrm_fast; none: no cache."""

    # ---- model
    model: str = ""
    """Hugging Face Llama, Mistral, Qwen2 or Qwen3 to start from: a folder or a hub name. Empty: a Llama from scratch
    with the sizes below."""
    tokenizer: str = ""
    """Folder or hub name of another tokenizer than that of --model; from scratch, than the one trained on the text."""
    hidden_size: int = 128
    """Width of a model from scratch."""
    layers: int = 4
    """Layers of a model from scratch."""
    heads: int = 4
    """Query heads of a model from scratch."""
    kv_heads: int = 2
    """Key/value heads of a model from scratch."""
    intermediate_size: int = 384
    """MLP width of a model from scratch."""
    vocab_size: int = 4096
    """Vocabulary of the byte-level BPE trained on the training text for a model from scratch, at least 259."""
    head: Literal["linear", "mlp"] = "linear"
    """Reward head: linear, or the paper's ablation with three ReLU layers."""
    projection_size: int = 0
    """Width D of a learned projection that the contrastive loss compares; 0 compares hidden states."""

    # ---- objective
    objective: Literal["gcrm", "ranking"] = "gcrm"
    """gcrm: ranking + contrastive loss; ranking: the ranking loss alone."""
    objective_variant: Literal["paper", "repo", "dense"] = "paper"
    """How positions are drawn and reduced: as the paper says, as the authors' release does, or all positions compared,
    the exact expectation of the paper's draws."""
    contrastive_weight: float = 0.5
    """Weight lambda of the contrastive loss."""
    samples: int = 16
    """Sampled positions a pair, at most 64 (K of the paper, S of the release); dense samples none."""
    pairing: Literal["auto", "paired", "grid"] = "auto"
    """Compare sample k with sample k (paired) or every source with every goal (grid). auto: paired for paper, grid for
    repo."""
    reduce: Literal["auto", "log_then_mean", "mean_then_log"] = "auto"
    """Order of mean and log. auto: log_then_mean for paper, mean_then_log for repo."""
    temperature: float = 1.0
    """tau in sigmoid(cos / tau)."""
    negatives: Literal["anywhere", "after-divergence"] = "anywhere"
    """Where negative goals lie on the rejected completion; after-divergence skips the text that both share."""

    # ---- optimisation
    global_batch_pairs: int = 64
    """Pairs an optimizer step, over all processes."""
    group_prompts: int = 1
    """Up to this many pairs of one prompt are put in the same step, where prompt and repeats are computed once."""
    tokens_per_batch: int = 16384
    """Most tokens in one micro-batch (pack) of one process."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    steps: int = 0
    """Optimizer steps; 0: as many as --epochs takes."""
    lr: float = 0.0
    """Peak learning rate; 0: 1e-3 from scratch, 9e-6 (the paper's) for a given --model."""
    warmup: float = 0.03
    """Fraction of the steps with a linearly growing learning rate; a cosine to 0 follows."""
    beta2: float = 0.95
    """Second AdamW momentum (the first is 0.9)."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute precision; master weights are float32. auto: bfloat16 on CUDA and on a CPU with matrix units for it
    (AMX), else float32; the first process decides for all, and a resumed run keeps it."""
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit"] = "adamw"
    """adamw: weights, gradient and moments in float32, 16 bytes a parameter. adamw-8bit: moments of 8 bits, 10 bytes.
    adamw-bf16: all in bfloat16, weights stochastically rounded, 8 bytes. The last two need torchao."""
    recompute: Literal["auto", "none", "product", "mlp", "block"] = "auto"
    """What the backward computes again instead of keeping it: nothing, the product of the MLP's two branches, the MLP,
    or the whole block. auto: as little as memory allows."""
    compile: bool = False
    """Compile each block with torch.compile."""
    workers: int = -1
    """Processes a rank that build packs ahead of the step; 0 builds them in between. -1: 2 with a GPU, else 0."""
    attention: Literal["auto", "flash_attn", "torch_varlen", "eager"] = "auto"
    """Attention backend. auto: on CUDA in bfloat16 flash-attn if installed, else torch's varlen attention; elsewhere
    eager."""
    seed: int = 0
    """Seed of weights, order, samples and generated data."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, so that a resumed run gives the same bits; on the CPU they always are."""
    max_skipped: int = 20
    """Most updates in a row that are left out for a loss or gradient that is not finite; more, or more than a quarter
    of the run, end it."""

    # ---- processes
    replicas: int = 1
    """Copies of the sharded model (HSDP): each is sharded over processes / replicas, e.g. one copy a node."""
    gather: Literal["auto", "block", "step"] = "auto"
    """When a process gathers the whole weights of a block: for each forward and each backward of it (block), or once
    per step, faster and larger. auto: once per step where memory allows."""
    timeout: float = 600.0
    """Seconds after which a process that waits for the others gives up."""

    # ---- output
    output: str = ""
    """Folder of the run, seen by all processes. Empty: runs/<name from the configuration>."""
    overwrite: bool = False
    """Replace a finished model in the output folder."""
    log_every: int = 10
    """Steps between log lines; steps in between never wait for the device."""
    eval_every: int = 0
    """Steps between evaluations; 0: eight times a run. There is always one before the first and after the last step."""
    goal_pairs: int = 2048
    """Training pairs whose preferred end states are averaged into the saved goal state; 0 is all."""
    save_every: int = 0
    """Steps between checkpoints, from which a run that was ended goes on; 0: eight times a run."""
    keep: int = 2
    """How many of the newest checkpoints stay; 0 writes none. A finished run removes them."""
    keep_best: Literal["", "eval/auroc", "eval/auroc_q", "eval/accuracy"] = ""
    """Also saves at every evaluation and keeps the checkpoint with the greatest value, whose model the finished run
    leaves in the folder model_best."""
    resume: str = "auto"
    """auto: goes on from the newest complete checkpoint in the output folder, if there is one; never: starts anew and
    removes them; or the folder of a checkpoint."""
    resume_force: bool = False
    """Go on although data or options are others than those of the checkpoint."""
    dry_run: bool = False
    """Print lengths, drops, packs, steps and predicted memory; train nothing."""

    # ---- where the values above come from
    preset: Literal["", "arithmetic", "math", "hh"] = ""
    """Named values: arithmetic (the default run), math and hh (the paper's). Without --data it is arithmetic."""
    config: str = ""
    """TOML file with any of these options, e.g. the config.toml that a run writes."""


PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    "arithmetic": {
        "train_pairs": 40_000,
        "eval_pairs": 1000,
        "eval_by": ("steps", "error_step"),
        "vocab_size": 259,
        "hidden_size": 64,
        "layers": 2,
        "kv_heads": 4,
        "intermediate_size": 256,
        "lr": 4e-3,
        "steps": 600,
        "warmup": 0.1,
        "weight_decay": 0.1,
        "contrastive_weight": 1.0,
        "log_every": 20,
    },
    "math": {"lr": 9e-6, "max_length": 2048, "global_batch_pairs": 64, "epochs": 1.0},
    "hh": {"lr": 1e-5, "max_length": 4096, "global_batch_pairs": 64, "epochs": 1.0},
}


def parse(argv: list[str]) -> TrainConfig:
    """The configuration of a command line; ``--help`` prints every option and exits.

    Raises:
        UserError: an unreadable ``--config`` file, an option in it that does not exist or has the wrong type, or a
            value that makes no sense.
    """
    # Presets and files change the defaults, so they must be known before the other options are read.
    _refuse_repeats(argv)
    early = _early_values(argv)
    default = TrainConfig()
    from_file = read_toml(Path(early["config"])) if early.get("config") else {}
    data = (early["data"],) if "data" in early else from_file.get("data", default.data)
    preset = early.get("preset", from_file.get("preset", ARITHMETIC if data == (ARITHMETIC,) else ""))
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: must be {one_of(preset, list(PRESETS))}")
    default = dataclasses.replace(default, **{**PRESETS[preset], **from_file, "preset": preset})
    config = parse_options(TrainConfig, argv, "gcrm train", default)
    check(config)
    return config


def _refuse_repeats(argv: list[str]) -> None:
    """tyro would keep the last list alone, and silently drop the data named before."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in argv if argument.startswith("--")]
    for option in dataclasses.fields(TrainConfig):
        flag = "--" + option.name.replace("_", "-")
        if isinstance(option.default, tuple) and flags.count(flag) > 1:
            raise UserError(f"{flag} is given {flags.count(flag)} times: give it once, with all values after it")


def _early_values(argv: list[str]) -> dict[str, str]:
    values = {}
    for i, argument in enumerate(argv):
        for name in ("preset", "config", "data"):
            if argument == f"--{name}" and i + 1 < len(argv):
                values[name] = argv[i + 1]
            elif argument.startswith(f"--{name}="):
                values[name] = argument.partition("=")[2]
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Options from a TOML file, checked by name and type."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): --config must name a TOML file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    defaults = TrainConfig()
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if not hasattr(defaults, name):
            raise UserError(f"{path}: unknown option {name!r}: see gcrm train --help for the names")
        example = getattr(defaults, name)
        if isinstance(example, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
            values[name] = tuple(value)
        elif isinstance(example, tuple) and isinstance(value, str):
            values[name] = (value,) if value else ()
        elif isinstance(example, float) and type(value) is int:
            values[name] = float(value)
        elif type(value) is type(example):
            values[name] = value
        else:
            raise UserError(f"{path}: option {name!r} is {value!r}: must be of type {type(example).__name__}")
    return values


# What each option with choices accepts: tyro holds the command line to it, ``check`` a file and Python.
CHOICES = {
    name: typing.get_args(kind)
    for name, kind in typing.get_type_hints(TrainConfig).items()
    if typing.get_origin(kind) is Literal
}


def one_of(value: str, choices: Sequence[str]) -> str:
    """The choices in words, with the one that ``value`` is probably meant to be."""
    near = difflib.get_close_matches(value, [choice for choice in choices if choice], n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return f"one of {', '.join(choice for choice in choices if choice)}{guess}"


def check(config: TrainConfig) -> None:
    """Raises UserError, naming the flag, for a value that makes no sense."""

    def need(ok: bool, name: str, what: str) -> None:
        if not ok:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, name)}: must be {what}")

    for name, choices in CHOICES.items():
        need(getattr(config, name) in choices, name, one_of(getattr(config, name), choices))
    for name in (
        "global_batch_pairs",
        "group_prompts",
        "replicas",
        "tokens_per_batch",
        "samples",
        "log_every",
        "arithmetic_steps",
        "hidden_size",
        "layers",
        "heads",
        "kv_heads",
        "intermediate_size",
    ):
        need(getattr(config, name) >= 1, name, "at least 1")
    for name in (
        "train_pairs",
        "eval_pairs",
        "steps",
        "eval_every",
        "save_every",
        "keep",
        "max_skipped",
        "goal_pairs",
        "projection_size",
        "lr",
        "contrastive_weight",
        "weight_decay",
        "seed",
        "pairs_per_prompt",
    ):
        need(0 <= getattr(config, name) < float("inf"), name, "0 or more, and finite")
    for name in ("epochs", "temperature", "clip", "timeout"):
        need(0 < getattr(config, name) < float("inf"), name, "more than 0, and finite")
    need(config.workers >= -1, "workers", "-1 or more")
    if config.optimizer != "adamw":
        need(
            importlib.util.find_spec("torchao") is not None,
            "optimizer",
            "adamw unless torchao is installed (pip install 'gcrm-fast[torchao]')",
        )
    need(config.samples <= 64, "samples", "at most 64")
    if config.objective_variant == "dense":
        need(config.pairing in ("auto", "paired"), "pairing", "paired with --objective-variant dense")
        need(config.reduce in ("auto", "log_then_mean"), "reduce", "log_then_mean with --objective-variant dense")
    need(0 <= config.warmup < 1, "warmup", "in [0, 1)")
    need(0 < config.beta2 < 1, "beta2", "in (0, 1)")
    need(config.seed < 2**31, "seed", "below 2^31")
    need(bool(config.cache), "cache", "a folder, auto or none")
    need(bool(config.resume), "resume", "auto, never or the folder of a checkpoint")
    need(
        not config.keep_best or (bool(config.eval_data) or config.data == (ARITHMETIC,)),
        "keep_best",
        "left out where there is no --eval-data",
    )
    need(not config.keep_best or config.keep > 0, "keep", "1 or more with --keep-best")
    for name, value in dataclasses.asdict(config).items():
        if any("\0" in v for v in (value if isinstance(value, tuple) else [value]) if isinstance(v, str)):
            raise UserError(f"option {name!r} holds a NUL character: no file has such a name")
    if config.attention == "flash_attn":
        need(importlib.util.find_spec("flash_attn") is not None, "attention", "another unless flash-attn is installed")
    need(config.max_length >= 3, "max_length", "at least 3")
    if not config.model:
        need(config.hidden_size % (2 * config.heads) == 0, "hidden_size", "a multiple of 2 * --heads")
        need(config.heads % config.kv_heads == 0, "kv_heads", "a divisor of --heads")
    parse_columns(config.columns)
    need(bool(config.data) and all(config.data), "data", "at least one source")
    need(all(config.eval_data), "eval_data", "names of sources")
    if config.data != (ARITHMETIC,) and ARITHMETIC in config.data:
        raise UserError("--data arithmetic: generated data stands alone: leave the other sources out")
    if config.data != (ARITHMETIC,) and config.preset == ARITHMETIC:
        raise UserError(f"--preset arithmetic goes with generated data, not with --data {' '.join(config.data)}")
    if ARITHMETIC in config.eval_data:
        raise UserError("--eval-data arithmetic: generated data brings its own held-out problems: leave it out")


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration; reads back through ``--config``."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name in ("config",):
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, tuple):
            text = "[" + ", ".join(_toml_string(v) for v in value) + "]"
        else:
            text = _toml_string(value) if isinstance(value, str) else repr(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"


def _toml_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
