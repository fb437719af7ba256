"""The options of the commands that read records and run a model over them. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.options import AtLeastOne, Options, ZeroOrMore


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options of every command that runs a model over records."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Reward model: a folder, or a name on the Hugging Face Hub."""
    data: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """Records: files of JSON lines (plain or gzipped; - is stdin) or Parquet, folders that datasets saved, or datasets
    of the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation. auto is bfloat16 on a GPU, float32 elsewhere."""
    tokens_per_batch: AtLeastOne = 16384
    """Tokens computed at a time. More tokens need more memory."""
    columns: str = ""
    """The records' names for the fields read here, as in prompt=instruction,completion=answer. No other fields are then
    read."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record that cannot be used ends the command, or is skipped and counted."""

    def check(self) -> None:
        if not all(self.data) or not self.data:
            raise UserError("FILE... is missing: name at least one source of records")


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(ModelOptions):
    """Options of every command that needs Q-values."""

    goal: str = ""
    """Goal state of the Q-values, as FILE or FILE:NAME. The default is the one saved with the model."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(JudgingOptions):
    """Options of every command that writes a folder of results."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder for the results. It appears when they are complete."""
    by: str = ""
    """Fields of the records to break the results down by, as in family,model."""
    question: str = ""
    """Field that identifies the question a completion answers. The default is the prompt."""
    limit: ZeroOrMore = 0
    """Maximum number of records (vote: questions), drawn at random, the same each time; 0 takes all."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(JudgingOptions):
    """Copies each record, with the rewards of its completions, to a file of JSON lines in the order of the input. The
    file appears when it is complete; an interrupted run resumes where it stopped. Under torchrun all processes
    score."""

    output: Annotated[str, tyro.conf.arg(aliases=("-o",))]
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

    output: Annotated[str, tyro.conf.arg(aliases=("-o",))]
    """Goal file. One that exists must be of the same model; the goal is added to it."""
    name: str = "default"
    """Name of the goal in the file."""
    where: tuple[str, ...] = ()
    """Conditions that replace is_correct, as in 'helpfulness>=4'; all must hold. The operators are >=, <=, ==, !=, >
    and <. A field that holds a list has an entry per completion."""
    limit: ZeroOrMore = 0
    """Number of completions to use, the first ones; 0 uses all."""


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
    threshold: float | Literal["auto"] = 0.0
    """A sample is dropped once a Q-value falls below this. auto chooses the best value on one half of the questions and
    reports the other half."""
    top_k: AtLeastOne = 5
    """Number of samples with the greatest rewards whose majority counts."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(JudgingOptions):
    """Writes a web page of records with their completions side by side: tokens colored by Q-value or running reward,
    charts along the completion, the first difference and the wrong step marked. By default the records with the lowest
    margins between right and wrong completions, and some drawn at random."""

    output: Annotated[str, tyro.conf.arg(aliases=("-o",))]
    """HTML file to write."""
    row: tuple[int, ...] = ()
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
        if min(self.row, default=0) < 0:
            raise UserError(f"--row {min(self.row)}: must be at least 0")
        if not self.row and not self.worst + self.random:
            raise UserError("--worst 0 --random 0: nothing to show: raise one, or name a --row")
