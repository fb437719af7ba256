"""The options of every command but train. Nothing here imports torch, so that --help is quick."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import Argument, AtLeastOne, Options, Range, ZeroOrMore, check_fields

Model = Annotated[str, Argument(positional=True, metavar="MODEL")]
OutputFile = Annotated[str, Argument(short="-o", metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options of every command that runs a model over records."""

    ELSEWHERE: ClassVar[dict[str, tuple[str, ...]]] = {"tokens-per-batch": ("batch-size", "max-tokens")}
    model: Model
    """Reward model: a folder, or a name on the Hugging Face Hub."""
    data: Annotated[tuple[str, ...], Argument(positional=True, metavar="FILE")]
    """Records: files of JSON lines (plain or gzipped; - is stdin) or Parquet, folders that datasets saved, or datasets
    of the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. auto is bfloat16 on a GPU, float32 elsewhere."""
    tokens_per_batch: AtLeastOne = 16384
    """Tokens computed at a time. More tokens need more memory."""
    end: Literal["auto", "eos", "as-is"] = "auto"
    """Where the reward is read. eos: at an end token, appended where there is none; as-is: at the last token of the
    text as given; auto: where the model was trained to be read."""
    special_tokens: Literal["auto", "tokens", "text"] = "auto"
    """How special tokens that prompts and completions spell out, such as <|im_end|>, are read: as tokens, or as plain
    text. Those of the chat template are always tokens. auto is how the model was trained."""
    columns: str = ""
    """The records' names for the fields read here, as in prompt=instruction,completion=answer. No other fields are then
    read."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record that cannot be used ends the command, or is skipped and counted."""

    def check(self) -> None:
        super().check()
        if not all(self.data):
            raise UserError("FILE is empty: name a source of records")


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(ModelOptions):
    """Options of every command that needs Q-values."""

    goal: str = ""
    """Goal state of the Q-values, as FILE or FILE:NAME. The default is the one saved with the model."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(JudgingOptions):
    """Options of every command that writes a folder of results."""

    output: Annotated[Path, Argument(short="-o", metavar="FOLDER")]
    """Folder for the results. It appears when they are complete."""
    by: tuple[str, ...] = ()
    """Fields of the records to break the results down by, as in --by family model."""
    question: str = ""
    """Field that identifies the question a completion answers. The default is the prompt."""
    limit: ZeroOrMore = 0
    """Maximum number of records (of questions, in gcrm vote), drawn at random, the same each time; 0 takes all."""
    overwrite: bool = False
    """Replace the results in the output folder."""

    def check(self) -> None:
        super().check()
        check_fields("by", self.by)


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions(Options):
    """Options of every command that scores with several models."""

    ensemble: tuple[str, ...] = ()
    """Further reward models with the tokenizer of MODEL; their rewards are combined with its own. Q-values are those of
    MODEL."""
    combine: Literal["mean", "min", "mean-std"] = "mean"
    """How the rewards of --ensemble are combined: their mean, the lowest, or the mean less the standard deviation."""

    def check(self) -> None:
        super().check()
        if self.combine != "mean" and not self.ensemble:
            raise UserError(f"--combine {self.combine}: needs --ensemble: name further models there")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JudgingOptions, EnsembleOptions):
    """Copies each record, with the rewards of its completions, to a file of JSON lines in the order of the input. The
    file appears when it is complete; an interrupted run resumes where it stopped. Under torchrun all processes
    score."""

    output: OutputFile
    """File of JSON lines, gzipped if its name ends in .gz; - is stdout."""
    per_token: bool = False
    """Also write the tokens of each completion, with their rewards and Q-values."""

    def check(self) -> None:
        super().check()
        if self.goal and not self.per_token:
            raise UserError("--goal: only --per-token writes Q-values: add it, or omit --goal")


@dataclass(frozen=True, kw_only=True)
class GoalOptions(ModelOptions):
    """Makes a goal state, the mean hidden state at the end of preferred completions, and adds it to a file. Preferred
    are the chosen completions of pairs, and those labeled by is_correct. Completions cut by a length limit have no end
    state; they are skipped and counted."""

    output: OutputFile
    """Goal file. One that exists must be of the same model; the goal is added to it."""
    name: str = "default"
    """Name of the goal in the file."""
    where: tuple[str, ...] = ()
    """Conditions that replace is_correct, as in 'helpfulness>=4'; all must hold. The operators are >=, <=, ==, !=, >
    and <. A field that holds a list has an entry per completion."""
    limit: ZeroOrMore = 0
    """Number of completions to use, the first ones; 0 uses all."""
    token: Literal["last", "random"] = "last"
    """Token of each completion whose state is used. random, drawn from all its tokens, is an ablation of the paper."""
    seed: ZeroOrMore = 0
    """Seed of --token random."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TableOptions):
    """Measures how well rewards and Q-values tell right completions from wrong ones (AUROC), compared with shortcuts
    such as length. The records are labeled completions or preference pairs; each file is reported separately.

    Writes results.json, results.csv, roc.png, partial.png and histograms.png to the output folder.
    """

    label: str = "is_correct"
    """Field that is true for a right completion and false for a wrong one. Pairs need none."""


@dataclass(frozen=True, kw_only=True)
class VoteOptions(TableOptions):
    """Answers questions from many samples each: by majority, by majority after a filter on Q-values, by a vote weighted
    with rewards, by the best reward, and by the majority of the best.

    Writes results.json, results.csv and savings.png (accuracy against tokens saved) to the output folder. With --by,
    the samples of each value also vote alone.
    """

    answer: str = "predicted_answer"
    """Field with a sample's answer. A sample where it is null or empty does not vote."""
    expected: str = "expected_answer"
    """Field with the right answer. Answers are compared as text, without surrounding white space."""
    threshold: Annotated[float | Literal["auto"], Argument(metavar="NUMBER|auto")] = 0.0
    """A sample is dropped once a Q-value falls below this. auto chooses the best value on one half of the questions and
    reports the other half."""
    top_k: AtLeastOne = 5
    """Number of samples with the greatest rewards whose majority counts."""


@dataclass(frozen=True, kw_only=True)
class ResultOptions(Options):
    """Options of commands that write a folder of results from numbers in the records."""

    output: Annotated[Path, Argument(short="-o", metavar="FOLDER")]
    """Folder for the results. It appears when they are complete."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True, kw_only=True)
class OveroptimizeOptions(ResultOptions):
    """Shows whether a proxy reward is over-optimized: the gold score of the sample that the proxy picks, the best of n,
    over n. Each question needs several samples with both scores. No model is run.

    Writes results.json, results.csv and overoptimization.png to the output folder.
    """

    data: Annotated[str, Argument(positional=True, metavar="FILE")]
    """Samples: a file of JSON lines or Parquet, a folder that datasets saved, or a dataset of the Hub."""
    gold: str = "is_correct"
    """Field with the true score, a number or true or false."""
    proxy: str = "reward"
    """Field with the reward to judge, a number, such as gcrm score writes."""
    question: str = ""
    """Field that identifies the question of a sample. The default is the prompt."""
    columns: str = ""
    """The records' names for the fields read here, as in prompt=instruction,completion=answer. No other fields are then
    read."""


@dataclass(frozen=True, kw_only=True)
class MonitorOptions(ModelOptions):
    """Watches a policy that is trained with the reward model: how far the states at the end of its samples move from
    those of a reference, file by file (CSI, outliers, Mahalanobis distance, early-stop indicator).

    Writes results.json, results.csv, monitor.png and map.png to the output folder.
    """

    data: Annotated[tuple[str, ...], Argument(positional=True, metavar="FILE")]
    """Samples of the policy, a file per training step, in order."""
    reference: tuple[str, ...] = ()
    """Samples of the policy before it was trained with the reward."""
    output: Annotated[Path, Argument(short="-o", metavar="FOLDER")]
    """Folder for the results. It appears when they are complete."""
    overwrite: bool = False
    """Replace the results in the output folder."""

    def check(self) -> None:
        super().check()
        if not all(self.reference) or not self.reference:
            raise UserError("--reference is missing: name samples of the policy before training")


@dataclass(frozen=True, kw_only=True)
class SelectOptions(ModelOptions):
    """Selects the prompts to train a policy on next: those on which its samples score lowest, within each domain
    (Pre-PPO, arXiv 2503.22230). Records have a prompt, completions of the policy, and for scores of a reward model a
    reference, or reference_completions of the policy before RL, of which the best counts.

    Writes the prompts to FILE, what was done to FILE.json, the scores per domain to FILE.png, and prompts that may have
    no answer to FILE.unanswerable.jsonl. An interrupted run resumes where it stopped.
    """

    GROUPS: ClassVar[dict[str, str]] = {"selection": "score", "curriculum": "order", "model": "model"}

    data: Annotated[tuple[str, ...], Argument(positional=True, metavar="FILE")]
    """Samples: files of JSON lines (plain or gzipped; - is stdin) or Parquet, folders that datasets saved, or datasets
    of the Hub."""
    output: OutputFile
    """File of JSON lines to write, gzipped if its name ends in .gz."""
    score: Literal["reward", "proxy", "pass-rate"] = "reward"
    """Score of a prompt, a mean over its samples. reward: r(sample) - r(reference); proxy: its sigmoid; pass-rate: the
    share that is right, by --verifier or the field is_correct."""
    verifier: tuple[str, ...] = ()
    """Verifier that judges samples: math, arithmetic, regex:PATTERN or MODULE:FUNCTION; as TASK=VERIFIER for records
    with this task. Prompts that no sample solves are dropped and listed."""
    domain: str = ""
    """Field with a prompt's domain. By default all prompts are of one."""
    keep: Annotated[float, Range(above=0, greatest=1)] = 0.1
    """Share of the prompts to keep, those with the lowest scores."""
    normalize: Literal["rank", "z"] = "rank"
    """How domains are made comparable. rank keeps the same share of each; z keeps the lowest of all by standard
    deviations from the domain's mean."""
    merge: tuple[str, ...] = ()
    """Prompts to train on too, which are written first, unchanged; selected prompts that are among them are omitted."""
    order: str = ""
    """Stages of a curriculum, which is written to FILE.curriculum.jsonl: domains, as in math+code,all. A trainer must
    read it without shuffling."""
    steps: ZeroOrMore = 0
    """Training steps of the curriculum, equally many per stage."""
    prompts_per_step: AtLeastOne = 8
    """Number of prompts per step of the curriculum."""
    seed: Annotated[int, Range(least=0, below=2**31)] = 0
    """Seed of the curriculum's order."""
    model: str = ""
    """Reward model: a folder, or a name on the Hugging Face Hub."""

    def check(self) -> None:
        super().check()
        if self.score != "pass-rate" and not self.model:
            raise UserError(f"--score {self.score}: needs a reward model: name one with --model")
        if bool(self.order) != bool(self.steps):
            raise UserError("--order and --steps: a curriculum needs both")


@dataclass(frozen=True, kw_only=True)
class SynthesizeOptions(ModelOptions):
    """Writes preference pairs from unlabeled samples of a policy (RLP's synthetic preferences, arXiv 2403.19279). The
    samples of a record are clustered by final answer: the one with the greatest reward in the largest cluster is
    chosen, and one of the others is rejected at random. Train on these pairs together with those of people.

    Writes the pairs to FILE and what was done to FILE.json. An interrupted run resumes where it stopped.
    """

    data: Annotated[tuple[str, ...], Argument(positional=True, metavar="FILE")]
    """Samples: records of a prompt and several completions, and with answers, a list of final answers."""
    output: OutputFile
    """File of pairs to write, JSON lines, gzipped if its name ends in .gz."""
    verifier: tuple[str, ...] = ()
    """Verifier that reads the final answers of records without answers: math, arithmetic, regex:PATTERN or
    MODULE:FUNCTION; as TASK=VERIFIER for records with this task. Where the right answer is known, it also judges the
    pairs."""
    entailment: str = ""
    """Model of natural language inference, by which samples are clustered instead: those that entail each other."""
    threshold: Annotated[float, Range(least=0, greatest=1)] = 0.5
    """Least share of the samples that the largest cluster must have."""
    seed: Annotated[int, Range(least=0, below=2**31)] = 0
    """Seed of the rejected samples."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(JudgingOptions):
    """Writes a web page of records with their completions side by side: tokens colored by Q-value or running reward,
    charts along the completion, the first difference and the wrong step marked. By default the records with the lowest
    margins between right and wrong completions, and some drawn at random. A file of gcrm generate is shown with the
    Q-values that it holds, its samples or beams as a tree; the model is not loaded."""

    output: OutputFile
    """HTML file to write."""
    row: tuple[ZeroOrMore, ...] = ()
    """Numbers of the records to show, counted from 0, instead of those that --worst and --random select."""
    worst: ZeroOrMore = 20
    """Number of records with the lowest margins to show."""
    random: ZeroOrMore = 10
    """Number of records to show that are drawn at random from the others."""
    limit: ZeroOrMore = 1000
    """Maximum number of records to score, drawn at random, the same each time; 0 takes all."""
    error_field: str = ""
    """Field with the number of the wrong step or a list of them; in a pair, of the rejected completion. By default
    first_error_step (counted from 0; -1 for none), error_step or error_steps (counted from 1), if present."""
    count_from: Literal["", "0", "1"] = ""
    """Number of the first step in --error-field. By default 0 for first_error_step, 1 for other fields."""
    step_end: str = ""
    """Text that ends a step. By default the first of blank line, line feed and semicolon that the completion has."""

    def check(self) -> None:
        super().check()
        if not self.row and not self.worst + self.random:
            raise UserError("--worst 0 --random 0: nothing to show: raise one, or name a --row")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """Writes texts for prompts with a policy, chosen or steered by a reward model while they are written. Copies each
    record with its answer, and all samples with their rewards and the Q-value of each token. An interrupted run keeps
    the prompts that are finished, and the same command resumes."""

    GROUPS: ClassVar[dict[str, str]] = {
        "text": "max_new_tokens",
        "choice": "method",
        "beams": "beams",
        "machine": "rows",
    }

    policy: Annotated[str, Argument(positional=True, metavar="POLICY")]
    """Language model: a folder, or a name on the Hugging Face Hub."""
    data: Annotated[tuple[str, ...], Argument(positional=True, metavar="FILE")]
    """Records with a prompt, question or messages: files of JSON lines (plain or gzipped; - is stdin) or Parquet,
    folders that datasets saved, or datasets of the Hub."""
    output: OutputFile
    """File of JSON lines, gzipped if its name ends in .gz. It appears when all prompts are finished."""
    prompt_field: str = ""
    """Field with the prompt. By default the first of prompt, question and messages that a record has."""
    limit: ZeroOrMore = 0
    """Number of prompts to use, the first ones; 0 uses all."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record without a prompt that policy and reward model can read ends the command, or is skipped and
    counted."""
    max_new_tokens: AtLeastOne = 256
    """Maximum number of tokens of a text."""
    temperature: Annotated[float, Range(least=0)] = 1.0
    """Temperature of the samples; 0 takes the most likely token each time."""
    top_p: Annotated[float, Range(above=0, greatest=1)] = 1.0
    """Sample only from the most likely tokens that have this probability together."""
    top_k: ZeroOrMore = 0
    """Sample only from this many of the most likely tokens; 0 takes all."""
    seed: Annotated[int, Range(least=0, below=2**31)] = 0
    """Seed of the samples. A sample depends on it, its prompt and its number alone."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample, in addition to the policy's end tokens."""
    method: Literal["sample", "best-of-n", "filter", "reject", "beams"] = "sample"
    """How the answer is chosen. best-of-n: the greatest reward; filter: samples whose Q-value falls below --threshold
    are dropped, except for the best of them if all fall; reject: at each of --checkpoints the samples with the lower
    Q-values are dropped; beams: after each step those with the best log p / tokens + alpha Q continue. sample needs no
    reward model."""
    reward: str = ""
    """Reward model: a folder, or a name on the Hugging Face Hub. Its tokenizer may differ from the policy's."""
    goal: tuple[str, ...] = ()
    """Goal states of the Q-values, as NAME, FILE or FILE:NAME, each with a weight behind a colon if it is not 1. The
    default is the one saved with the model."""
    control: Literal["none", "shuffled", "opposite"] = "none"
    """Goal states that should not help: with their coordinates shuffled, or Q-values with the other sign."""
    samples: AtLeastOne = 16
    """Number of samples per prompt (of beams: --beams times --per-beam)."""
    threshold: float = 0.0
    """Q-value below which filter drops a sample. The first 5 tokens are not judged."""
    every: ZeroOrMore = 16
    """Tokens between two looks at the Q-values, in which waiting samples may start; 0 looks only where the method must,
    and starts the samples of a prompt together."""
    keep: Annotated[float, Range(above=0, greatest=1)] = 0.5
    """Share of the samples that each checkpoint of reject keeps."""
    checkpoints: tuple[AtLeastOne, ...] = (32, 64, 128, 256, 512, 1024)
    """Numbers of tokens at which reject drops samples."""
    compare: bool = False
    """Also write as many samples without dropping any, and compare with them in the summary."""
    beams: AtLeastOne = 5
    """Number of beams that continue after each step."""
    per_beam: AtLeastOne = 2
    """Number of samples of each beam."""
    step_tokens: AtLeastOne = 52
    """Maximum number of tokens of a step, which ends at a line feed."""
    steps: AtLeastOne = 16
    """Maximum number of steps."""
    alpha: float = 1.0
    """Weight of Q in the score of a beam; 0 is plain beam search over steps."""
    step_q: Literal["last", "mean"] = "last"
    """Q of a step: that of its last token, or the mean."""
    rows: AtLeastOne = 64
    """Maximum number of samples that are written at a time. With reject, beams or --every 0, those of a prompt are
    written together, even if more."""
    cache_tokens: AtLeastOne = 65536
    """Maximum number of tokens whose keys and values are kept, of the policy and of the reward model each."""
    tokens_per_batch: AtLeastOne = 16384
    """Maximum number of tokens per forward."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. auto is bfloat16 on a GPU, float32 elsewhere."""

    def check(self) -> None:
        if not all(self.data):
            raise UserError("FILE is empty: name a source of prompts")
        if self.method != "sample" and not self.reward:
            raise UserError(f"--method {self.method}: needs a reward model: name one with --reward")
        if not self.reward and (self.goal or self.control != "none" or self.compare):
            option = "--goal" if self.goal else "--compare" if self.compare else "--control"
            raise UserError(f"{option}: only a reward model has goals and rewards: name one with --reward")
        if self.compare and self.method in ("sample", "best-of-n"):
            raise UserError(f"--compare: --method {self.method} drops no samples: choose filter, reject or beams")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Writes a reward model in the format of another program."""

    model: Model
    """Reward model: a folder, or a name on the Hugging Face Hub."""
    output: Annotated[str, Argument(short="-o", metavar="FOLDER")]
    """Folder to write. It must not exist."""
    format: Literal["transformers", "vllm", "openrlhf", "token-classification"] = "transformers"
    """Reader of the folder. transformers is AutoModelForSequenceClassification, also for rewardbench; vllm is the same
    without projection and goal states, for vLLM and SGLang; token-classification is AutoModelForTokenClassification."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved weights; auto is that of MODEL. vLLM and SGLang convert float32 weights to float16 unless
    they are started with --dtype float32."""
    standardize: tuple[str, ...] = ()
    """Sources of completions (see gcrm score) over which rewards get mean 0 and standard deviation 1. The scale goes
    into score.weight; the shift, for which that head has no place, into the format's field for it and gcrm.json."""
    end: Literal["auto", "eos", "as-is"] = "auto"
    """Where the reward is read. eos: at an end token, appended where there is none; as-is: at the last token of the
    text as given; auto: where the model was trained to be read. The choice is saved
    with the model."""
    columns: str = ""
    """Their names for the fields read here, as in prompt=instruction,completion=answer."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EnsembleOptions):
    """Serves rewards and Q-values over HTTP. POST /score and POST /get_reward (OpenRLHF's protocol) answer with
    rewards; POST /classify and POST /pooling do so as vLLM does. POST /stream opens a stream, POST /stream/{id} adds
    text to it and DELETE /stream/{id} closes it. GET /health, GET /metrics (Prometheus) and GET /v1/models
    describe the server.
    """

    model: Model
    """Reward model: a folder, or a name on the Hugging Face Hub."""
    host: str = "127.0.0.1"
    """Address to listen on. At the default only programs on this machine can connect."""
    port: Annotated[int, Range(least=0, greatest=65535)] = 8000
    """Port to listen on; 0 picks a free one, which the first line of output names."""
    ready_file: str = ""
    """File that holds the server's address while it answers. It is written once the server listens, and removed when
    it stops."""
    token_file: str = ""
    """File with the token that requests must carry (Authorization: Bearer TOKEN). By default the token is read from the
    environment variable GCRM_TOKEN; without that none is required."""
    tokens_per_batch: AtLeastOne = 16384
    """Maximum number of tokens computed at a time, and of one completion with its prompt."""
    verifier: tuple[str, ...] = ()
    """Verifiers of requests with tasks, each TASK=VERIFIER: math, arithmetic, regex:PATTERN or MODULE:FUNCTION."""
    delay: Annotated[float, Range(least=0, greatest=60)] = 0.003
    """Seconds that a request to an idle model waits for others to share its batch."""
    queue: AtLeastOne = 4096
    """Maximum number of completions that wait. Requests beyond that are answered 429."""
    streams: AtLeastOne = 64
    """Maximum number of open streams (POST /stream). More are answered 429."""
    stream_tokens: AtLeastOne = 65536
    """Maximum number of tokens of all open streams, whose keys and values stay in memory. Beyond that, 429."""
    stream_idle: Annotated[float, Range(above=0, greatest=10**6)] = 300.0
    """Seconds after which a stream that is sent nothing is closed."""
    max_body: AtLeastOne = 16 * 2**20
    """Maximum size of a request's body in bytes. Longer ones are answered 413."""
    timeout: Annotated[float, Range(above=0, greatest=10**6)] = 60.0
    """Maximum seconds for a request's body to arrive (else 408), for its answer (else 504), and to answer pending
    requests when the server stops."""
    end: Literal["auto", "eos", "as-is"] = "auto"
    """Where the reward is read. eos: at an end token, appended where there is none; as-is: at the last token of the
    text as given; auto: where the model was trained to be read."""
    special_tokens: Literal["auto", "tokens", "text"] = "auto"
    """How special tokens that prompts and completions spell out, such as <|im_end|>, are read: as tokens, or as plain
    text. Those of the chat template are always tokens. auto is how the model was trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. auto is bfloat16 on a GPU, float32 elsewhere."""

    def check(self) -> None:
        super().check()
        ready = Path(self.ready_file)
        if self.ready_file and (ready.is_dir() or not ready.parent.is_dir()):
            raise UserError(f"--ready-file {ready}: must name a file in a folder that exists")
        for module in ("starlette", "uvicorn", "prometheus_client"):
            if importlib.util.find_spec(module) is None:
                raise UserError(f"{module} is not installed: pip install 'gcrm-fast[serve]'")


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """Writes labeled solutions of generated arithmetic problems as JSON lines that the other commands read. A wrong
    solution has one wrong step, each with the same chance, and continues from its result."""

    output: OutputFile
    """File of JSON lines, gzipped if its name ends in .gz; - is stdout."""
    side: Literal["held-out", "train"] = "held-out"
    """Problems that gcrm train never trains on, or others."""
    problems: Annotated[int, Range(least=1, greatest=10**7)] = 500
    """Number of different problems."""
    samples: Annotated[int, Range(least=1, greatest=10**5)] = 16
    """Number of solutions per problem. They may repeat, as a model's do."""
    right: Annotated[float, Range(least=0, greatest=1)] = 0.25
    """Chance that a solution is right. If it is little more than that of each wrong answer, a majority is often
    wrong."""
    arithmetic_steps: Annotated[int, Range(least=1, greatest=25)] = 3
    """Maximum number of solution steps of a problem."""
    seed: Annotated[int, Range(least=0, below=2**31)] = 0
    """Seed of problems and solutions."""
