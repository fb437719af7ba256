"""Every option of ``gcrm train``, its default, and how flags, presets and files combine.

Order of precedence: command line, ``--config`` file, ``--preset``, the defaults below.
"""

import dataclasses
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_origin

import tomli_w

from gcrm_fast.common.command_line import parse_options
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import read_text
from gcrm_fast.common.options import (
    Argument,
    AtLeastOne,
    Options,
    Range,
    ZeroOrMore,
    kinds_of,
    missed,
    one_of,
)
from gcrm_fast.training.option_checks import ARITHMETIC, OF_BOTTLENECK, OF_PAIRS, OF_VIEWS, check_options

Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Trains a goal-conditioned reward model on preference pairs."""

    GROUPS: ClassVar[dict[str, str]] = {
        "data": "data",
        "model": "model",
        "objective": "objective",
        "optimization": "global_batch_pairs",
        "hardware": "tokens_per_batch",
        "output": "output",
        "resume": "save_every",
        "named values": "preset",
    }
    ELSEWHERE: ClassVar[dict[str, tuple[str, ...]]] = {  # of TRL, transformers and OpenRLHF
        "data": ("dataset", "dataset-name", "train-file", "train-data", "data-path"),
        "data-weights": ("interleave-probs", "dataset-probs", "dataset-weights"),
        "eval-data": ("eval-dataset", "eval-file", "validation-file", "test-data"),
        "columns": ("prompt-key", "chosen-key", "rejected-key", "input-key", "output-key", "label-key"),
        "eval-split": ("test-size", "val-size", "validation-split", "eval-split-ratio"),
        "model": ("model-name", "model-name-or-path", "pretrain", "base-model"),
        "tokenizer": ("tokenizer-name", "tokenizer-name-or-path"),
        "train-layers": ("freeze-layers",),
        "lora-rank": ("use-peft", "use-lora", "lora-r"),
        "max-length": ("max-len", "max-seq-len", "max-seq-length", "model-max-length"),
        "lr": ("learning-rate",),
        "global-batch-pairs": ("batch-size", "train-batch-size", "per-device-train-batch-size"),
        "tokens-per-batch": ("micro-batch-size", "micro-train-batch-size", "gradient-accumulation-steps"),
        "epochs": ("num-epochs", "max-epochs", "num-train-epochs"),
        "steps": ("max-steps",),
        "warmup": ("warmup-ratio", "warmup-steps", "lr-warmup-ratio"),
        "center-rewards": ("center-rewards-coefficient",),
        "clip": ("max-grad-norm", "max-norm", "grad-clip"),
        "beta2": ("adam-beta2",),
        "optimizer": ("optim",),
        "dtype": ("bf16", "fp16", "torch-dtype", "precision"),
        "attention": ("attn-implementation", "flash-attn"),
        "recompute": ("gradient-checkpointing",),
        "compile": ("torch-compile",),
        "workers": ("dataloader-num-workers",),
        "output": ("output-dir", "output-path", "save-path", "run-name"),
        "overwrite": ("overwrite-output-dir",),
        "report-to": ("use-wandb", "use-tensorboard", "log-with"),
        "push-to-hub": ("hub-model-id",),
        "log-every": ("logging-steps",),
        "eval-every": ("eval-steps", "eval-strategy"),
        "save-every": ("save-steps", "save-strategy"),
        "keep": ("save-total-limit", "max-ckpt-num"),
        "keep-best": ("load-best-model-at-end", "metric-for-best-model"),
        "early-stopping": ("early-stopping-patience",),
        "resume": ("resume-from-checkpoint", "load-checkpoint"),
    }
    NOT_HERE: ClassVar[dict[str, tuple[str, ...]]] = {
        "FSDP2 shards the model by itself (docs/clusters.md)": ("deepspeed", "zero-stage", "fsdp", "fsdp-config"),
        "CUDA_VISIBLE_DEVICES chooses the GPUs; empty, it chooses the CPU": ("device", "gpus", "num-gpus"),
        "pairs are always packed": ("packing", "packing-samples"),
        "--warmup and a cosine decay are the only schedule": ("lr-scheduler", "lr-scheduler-type"),
        "messages always go through the tokenizer's chat template": ("apply-chat-template",),
        "the field 'margin' of a record is always read": ("margin",),
    }

    # ---- data
    data: tuple[str, ...] = (ARITHMETIC,)
    """Training pairs, from one or more sources: files (JSON lines, gzip, Parquet), folders that datasets saved
    (FOLDER[:SPLIT]), datasets of the Hub (OWNER/NAME[/CONFIG][:SPLIT]). 'arithmetic' generates pairs."""
    data_weights: tuple[Positive, ...] = ()
    """Shares of the sources of --data in the training pairs of an epoch, one number per source, as in 0.7 0.3. An epoch
    still has as many pairs as all sources together: those of a source are repeated or spread over several epochs. By
    default every pair occurs once."""
    on_policy: tuple[str, ...] = ()
    """Unlabeled samples of a policy, from the same kinds of sources: records of a prompt and at least two completions,
    as gcrm generate writes them. The multi-view loss on pairs of samples of one prompt (RLP) is added to that of the
    training pairs; a step has as many pairs of samples as training pairs, and repeats the smaller set."""
    eval_data: tuple[str, ...] = ()
    """Held-out pairs, from the same kinds of sources. Without any and without --eval-split, nothing is evaluated;
    'arithmetic' generates its own."""
    eval_split: Annotated[float, Range(least=0, below=1)] = 0.0
    """Fraction of the prompts of --data to hold out, as in 0.02, with all their pairs; for use without --eval-data."""
    columns: str = ""
    """The records' names for the fields read here, as in prompt=instruction,chosen=good,rejected=bad. No other fields
    are then read."""
    pairs_per_prompt: ZeroOrMore = 20
    """Maximum number of pairs made from one record with several completions. Each completion is used about equally
    often, neighbors in rank last; 0 makes all pairs."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record that cannot be used ends the run, or is skipped and listed in skipped_records.txt."""
    allow_overlap: bool = False
    """Allow held-out prompts that are also in the training data."""
    train_pairs: Annotated[int, Range(least=0, greatest=10**8)] = 0
    """Number of training pairs to use, the first ones; 0 uses all. For 'arithmetic': how many to generate."""
    eval_pairs: Annotated[int, Range(least=0, greatest=10**8)] = 2000
    """Maximum number of held-out pairs per evaluation, a fixed random choice; 0 uses all."""
    eval_by: tuple[str, ...] = ()
    """Fields of the records to break the final AUROC down by, as in family pair_type."""
    arithmetic_steps: Annotated[int, Range(least=1, greatest=25)] = 3
    """Maximum number of solution steps of a generated problem."""
    max_length: Annotated[int, Range(least=3)] = 2048
    """Maximum length of prompt and completion together, in tokens."""
    overlong: Literal["drop", "truncate-prompt", "error"] = "drop"
    """What happens to longer pairs. drop skips and counts them; truncate-prompt removes prompt tokens after the first
    (bos), and drops pairs where that is not enough; error ends the run."""
    cache: str = "auto"
    """Folder that keeps tokenized data for later runs. auto is gcrm_fast in $XDG_CACHE_HOME, or in ~/.cache; none keeps
    nothing."""

    # ---- model
    model: str = ""
    """Llama, Mistral, Qwen2 or Qwen3 to start from: a folder, or a name on the Hugging Face Hub. The default is a Llama
    of the sizes below, initialized at random."""
    tokenizer: str = ""
    """Tokenizer: a folder, or a name on the Hub. The default is that of --model; without --model a tokenizer is trained
    on the training text."""
    template_date: str = ""
    """Date, as in 2026-01-31, that a chat template writes as today's, in the run and in its model. The default is that
    of the checkpoint to resume from, or else today."""
    special_tokens: Literal["tokens", "text"] = "tokens"
    """How special tokens that prompts and completions spell out, such as <|im_end|>, are read, here and by the trained
    model: as tokens, as transformers reads them, or as plain text. Those of the chat template are always tokens."""
    hidden_size: Annotated[int, Range(least=1, greatest=2**16)] = 128
    """Width of a model without --model."""
    layers: Annotated[int, Range(least=1, greatest=1000)] = 4
    """Number of layers of a model without --model."""
    heads: Annotated[int, Range(least=1, greatest=1024)] = 4
    """Number of query heads of a model without --model."""
    kv_heads: Annotated[int, Range(least=1, greatest=1024)] = 2
    """Number of key/value heads of a model without --model."""
    head_size: Annotated[int, Range(least=0, greatest=1024)] = 0
    """Width of each attention head of a model without --model, an even number; 0 is --hidden-size / --heads."""
    intermediate_size: Annotated[int, Range(least=1, greatest=2**18)] = 384
    """Width of the MLPs of a model without --model."""
    vocab_size: Annotated[int, Range(least=259, greatest=2**20)] = 4096
    """Vocabulary size of the byte-level BPE tokenizer trained for a model without --model."""
    head: Literal["linear", "mlp", "bottleneck"] = "linear"
    """Reward head: linear; mlp, the paper's ablation with three ReLU layers; or bottleneck, which reads the reward from
    a random latent (InfoRM)."""
    bottleneck_size: Annotated[int, Range(least=1, greatest=2**16)] = 128
    """Width of the latent of --head bottleneck."""
    train_layers: ZeroOrMore = 0
    """Number of layers to train, the top ones, with the final norm, the head and the projection. Those below keep the
    weights of --model, without gradients, moments or stored activations. 0, or the number of all layers, trains the
    whole model."""
    cache_states: bool = False
    """With --train-layers, compute the states that enter the trained layers once and keep them in the folder of
    --cache, for later epochs, evaluations and runs. A token takes 2 bytes per unit of the hidden size in bfloat16, 4 in
    float32."""
    lora_rank: Annotated[int, Range(least=0, greatest=2**16)] = 0
    """Rank of LoRA adapters, which are trained instead of the weights of --model, with the head and the projection; 0
    trains the weights. The run also saves the adapter, in the folder adapter."""
    lora_alpha: ZeroOrMore = 0
    """LoRA adapters are scaled by this / --lora-rank; 0 is twice the rank."""
    lora_targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, in every trained layer."""
    lora_dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    """Dropout of the adapters' inputs."""
    projection_size: Annotated[int, Range(least=0, greatest=2**16)] = 0
    """Width of a learned projection of the hidden states that the contrastive loss compares; 0 compares the hidden
    states themselves."""

    # ---- objective
    loss: Literal["ranking", "bce", "mse"] = "ranking"
    """ranking trains on preference pairs. bce and mse train on single completions, with the reward loss alone: bce, the
    binary cross-entropy of a label (true, false, or from 0 to 1) under sigmoid(reward); mse, the squared difference of
    the reward and a score. Where other options count pairs, they then count completions."""
    objective: Literal["gcrm", "ranking"] = "gcrm"
    """gcrm is the ranking loss plus the contrastive loss; ranking is the ranking loss alone. With --loss bce or mse it
    is ranking: these have no contrastive loss."""
    objective_variant: Literal["paper", "repo", "dense"] = "paper"
    """How the contrastive loss draws and reduces positions: as in the paper, as in the authors' code (repo), or over
    all positions (dense), which is the exact expectation of the paper's."""
    label_smoothing: Annotated[float, Range(least=0, below=0.5)] = 0.0
    """Probability that a pair's label is wrong, which the ranking loss allows for."""
    center_rewards: NotNegative = 0.0
    """Weight of the squared sum of a pair's two rewards in the ranking loss, which keeps rewards around 0; 0.01 is what
    TRL's examples use."""
    contrastive_weight: NotNegative = 0.5
    """Weight of the contrastive loss (lambda)."""
    sampling: Literal["random", "late_goal", "late_both", "avg", "rs", "end", "end_mix"] = "random"
    """Where the contrastive loss draws positions: random; late_goal, goals in the last tenth of a completion;
    late_both, sources too; avg, the goal is the mean of the goals drawn; rs, negative goals from the rejected
    completion of another prompt; end, the goal is the end of the chosen completion, as where Q-values are computed;
    end_mix, half of the samples so."""
    distance: Literal["cosine", "dot", "euclidean"] = "cosine"
    """What the contrastive loss compares states by. Q-values are cosines in any case; dot and euclidean (negative) are
    computed in plain PyTorch."""
    samples: Annotated[int, Range(least=1, greatest=64)] = 16
    """Number of positions drawn per pair (K in the paper). dense draws none."""
    pairing: Literal["auto", "paired", "grid"] = "auto"
    """Compare sample k with sample k (paired), or every source with every goal (grid). auto is grid for repo, paired
    otherwise."""
    reduce: Literal["auto", "log_then_mean", "mean_then_log"] = "auto"
    """Order of mean and logarithm in the contrastive loss. auto is mean_then_log for repo, log_then_mean otherwise."""
    temperature: Positive = 1.0
    """Temperature tau in sigmoid(cos / tau)."""
    bottleneck_weight: NotNegative = 0.1
    """Weight of the KL divergence of both latents of a pair from a standard normal, with --head bottleneck (beta)."""
    sft_weight: NotNegative = 0.0
    """Weight of the language-model loss on the chosen completion, by the lm_head of --model, which keeps its weights
    (GRM). It regularizes the hidden states; the saved reward model has no lm_head."""
    views_weight: Positive = 0.5
    """Weight of the multi-view loss on the samples of --on-policy."""
    views_ramp: Annotated[float, Range(least=0, greatest=1)] = 0.0
    """Fraction of the steps in which the weight of the KL divergences in the multi-view loss grows from 0.001 to 1; 0
    keeps it at 1, as in the paper. A remedy where views/i_js stays at 0."""
    compare: Literal["states", "latents"] = "states"
    """What the contrastive loss and Q-values compare: hidden states, projected ones with --projection-size, or the mean
    latents of --head bottleneck."""
    negatives: Literal["anywhere", "after-divergence"] = "anywhere"
    """Where negative goals are drawn in the rejected completion. after-divergence skips the text that both completions
    share."""

    # ---- optimization
    global_batch_pairs: AtLeastOne = 64
    """Number of pairs per optimizer step, over all processes."""
    group_prompts: AtLeastOne = 1
    """Maximum number of pairs of the same prompt in one step, where the prompt is computed once."""
    epochs: Positive = 1.0
    """Number of passes over the training pairs."""
    steps: ZeroOrMore = 0
    """Number of optimizer steps; 0 takes as many as --epochs needs."""
    lr: NotNegative = 0.0
    """Peak learning rate; 0 is 9e-6 (as in the paper) with --model, 1e-4 with --lora-rank, 1e-3 without --model."""
    warmup: Annotated[float, Range(least=0, below=1)] = 0.03
    """Fraction of the steps in which the learning rate grows linearly. A cosine decay to 0 follows."""
    beta2: Annotated[float, Range(above=0, below=1)] = 0.95
    """Decay rate of AdamW's second moment (that of the first is 0.9)."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    clip: Positive = 1.0
    """Maximum norm of the gradient; a larger one is scaled down."""
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit"] = "adamw"
    """adamw: weights, gradient and moments in float32, 16 bytes per parameter. adamw-8bit: moments of 8 bits, 10 bytes.
    adamw-bf16: all in bfloat16, weights rounded stochastically, 8 bytes. The last two require torchao."""
    max_skipped: ZeroOrMore = 20
    """Maximum number of consecutive updates that are skipped for a loss or gradient that is not finite, and never more
    than a quarter of the run's steps. One more ends the run."""
    seed: Annotated[int, Range(least=0, below=2**31)] = 0
    """Seed of weights, order, sampling and generated data."""

    # ---- hardware
    tokens_per_batch: AtLeastOne = 16384
    """Maximum number of tokens in a micro-batch of one process."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the computation; master weights are float32. auto is bfloat16 on CUDA and on CPUs with AMX, float32
    elsewhere. The first process decides for all, and a resumed run keeps it."""
    attention: Literal["auto", "flash_attn", "torch_varlen", "eager"] = "auto"
    """Implementation of attention. auto is flash-attn if installed, else torch's varlen attention, on CUDA in bfloat16;
    eager elsewhere."""
    recompute: Literal["auto", "none", "product", "mlp", "block"] = "auto"
    """What the backward pass recomputes instead of storing: nothing, the product of the MLP's branches, the MLP, or
    the block. auto recomputes as little as memory allows."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU, so that a resumed run gives the same bits. On a CPU they always are."""
    workers: Annotated[int, Range(least=-1, greatest=1024)] = -1
    """Number of processes per rank that prepare batches; 0 prepares them between steps. -1 is 2 with a GPU, else 0."""
    replicas: AtLeastOne = 1
    """Number of copies of the sharded model (HSDP); each is sharded over processes / replicas, such as one node."""
    gather: Literal["auto", "block", "step"] = "auto"
    """When a process gathers the weights of a block: for each forward and backward pass (block), or once per step,
    which is faster and needs more memory. auto gathers once per step where memory allows."""
    timeout: Annotated[float, Range(above=0, greatest=10**6)] = 600.0
    """Seconds that a process waits for the others before it gives up."""

    # ---- output
    output: Annotated[str, Argument(short="-o", metavar="FOLDER")] = ""
    """Folder of the run, shared by all processes. The default is a folder in runs/, named after the configuration."""
    overwrite: bool = False
    """Replace a finished model in the output folder, or write into one that holds other files."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics and options go, next to metrics.jsonl: the folder tensorboard/ in the output folder, or Weights &
    Biases (its environment variables, such as WANDB_PROJECT and WANDB_MODE=offline, apply)."""
    push_to_hub: str = ""
    """Repository on the Hugging Face Hub, as in OWNER/NAME, to upload the finished model to. One that does not exist is
    created, private, before training."""
    license: str = ""
    """License in the model card, as in apache-2.0. The default is that in the card of --model, if there is one."""
    language: tuple[str, ...] = ()
    """Languages in the model card, as in en. The default is those in the card of --model, if there is one."""
    log_every: ZeroOrMore = 0
    """Steps between log lines; 0 logs every 10 steps, or ten times in a shorter run. Steps in between never wait for
    the device."""
    eval_every: ZeroOrMore = 0
    """Steps between evaluations; 0 evaluates eight times per run. The first and the last step are always evaluated."""
    goal_pairs: ZeroOrMore = 2048
    """Number of training pairs whose chosen end states are averaged into the saved goal state; 0 uses all."""
    dry_run: bool = False
    """Print lengths, dropped pairs, batches, steps and predicted memory, and train nothing."""

    # ---- resume
    save_every: ZeroOrMore = 0
    """Steps between checkpoints, from which an interrupted run resumes; 0 saves eight times per run."""
    keep: ZeroOrMore = 2
    """Number of checkpoints to keep, the newest ones; 0 writes none. A finished run removes them."""
    keep_best: Literal["", "eval/auroc", "eval/auroc_q", "eval/accuracy", "eval/spearman"] = ""
    """Also save at every evaluation, keep the checkpoint with the greatest value of this metric, and write its model to
    the folder model_best at the end; eval/spearman is that of --loss mse."""
    early_stopping: ZeroOrMore = 0
    """Stop after this many consecutive evaluations that do not improve the metric of --keep-best; 0 never does. The
    learning rate follows the schedule of the whole run."""
    resume: str = "auto"
    """auto resumes from the newest complete checkpoint in the output folder, if there is one; never starts over and
    removes them; or the folder of a checkpoint."""
    resume_force: bool = False
    """Resume although data or options differ from those of the checkpoint."""

    # ---- where the values above come from
    preset: Literal["", "arithmetic", "math", "hh"] = ""
    """Named values of other options: arithmetic (the default run), math and hh (the paper's). Without --data it is
    arithmetic."""
    config: str = ""
    """TOML file with any of these options, such as the config.toml that a run writes."""

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""
        return "pairs" if self.loss == "ranking" else "completions"

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        from_file = read_toml(Path(given["config"])) if given.get("config") else {}
        known = from_file | given
        preset = known.get("preset", ARITHMETIC if known.get("data", (ARITHMETIC,)) == (ARITHMETIC,) else "")
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: must be {one_of(preset, list(PRESETS))}")
        sources = [("", {"preset": preset}), (f"--preset {preset}", PRESETS[preset])]
        if known.get("loss", "ranking") != "ranking":
            sources.append((f"--loss {known['loss']}", {"objective": "ranking"}))
        return [*sources, (f"--config {given.get('config')}", from_file)]

    def check(self) -> None:
        """Raises UserError, naming the option, for values that contradict each other, or need what is not installed."""
        check_options(self)


PRESETS: dict[str, dict[str, Any]] = {
    "": {},
    "arithmetic": {
        "train_pairs": 50_000,
        "global_batch_pairs": 80,
        "group_prompts": 3,
        "eval_pairs": 1000,
        "eval_by": ("steps", "error_step"),
        "vocab_size": 259,
        "hidden_size": 64,
        "layers": 2,
        "kv_heads": 4,
        "head_size": 32,
        "intermediate_size": 128,
        "lr": 4e-3,
        "steps": 600,
        "warmup": 0.1,
        "weight_decay": 0.1,
        "contrastive_weight": 2.0,
        "log_every": 20,
    },
    "math": {"lr": 9e-6, "max_length": 2048, "global_batch_pairs": 64, "epochs": 1.0},
    "hh": {"lr": 1e-5, "max_length": 4096, "global_batch_pairs": 64, "epochs": 1.0},
}


def parse(argv: list[str]) -> TrainConfig:
    """The configuration of a command line; ``--help`` prints every option and exits. Raises UserError."""
    return parse_options(TrainConfig, argv, "gcrm train")


def read_toml(path: Path) -> dict[str, Any]:
    """Options from a TOML file.

    Raises:
        UserError: the file cannot be read, or holds an option that does not exist or does not accept its value.
    """
    try:
        raw = tomllib.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): --config must name a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    kinds = kinds_of(TrainConfig)
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in kinds:
            raise UserError(f"{path}: unknown option {name!r}: see gcrm train --help for the names")
        if get_origin(kinds[name]) is tuple and isinstance(value, (list, str)):
            value = tuple(value) if isinstance(value, list) else tuple(filter(None, [value]))
        if wanted := missed(value, kinds[name]):
            raise UserError(f"{path}: option {name!r} is {str(raw[name])[:60]!r}: must be {wanted}")
        values[name] = value
    return values


def unused_options(config: TrainConfig) -> set[str]:
    """Options that mean nothing next to others of ``config``."""
    contrastive = "objective_variant contrastive_weight sampling distance samples pairing reduce temperature negatives"
    parts = {
        "hidden_size layers heads kv_heads head_size intermediate_size": bool(config.model),
        "vocab_size": bool(config.model or config.tokenizer),
        "lora_alpha lora_targets lora_dropout": not config.lora_rank,
        " ".join(OF_BOTTLENECK): config.head != "bottleneck",
        " ".join(OF_VIEWS): not config.on_policy,
        "arithmetic_steps": config.data != (ARITHMETIC,),
        contrastive: config.objective == "ranking",
        " ".join(OF_PAIRS): config.loss != "ranking",
    }
    return {name for names, unused in parts.items() if unused for name in names.split()} | {"config"}


def to_toml(config: TrainConfig, omit: Collection[str] = ("config",)) -> str:
    """The configuration with all defaults resolved, without the options to ``omit``; ``--config`` reads it."""
    return tomli_w.dumps({name: value for name, value in dataclasses.asdict(config).items() if name not in omit})
