"""What a run logs: metrics.jsonl, and TensorBoard or Weights & Biases."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.json_lines import finite

WANDB_ID = "wandb_id"  # key of the row that names the run there


class Board(Protocol):
    """Where the numbers of metrics.jsonl are shown."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, options: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Completes it with the options of the run and its last results."""


class TensorBoard:
    """Event files in the folder ``tensorboard``."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: other boards need none of it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, options: Mapping[str, Any], results: Mapping[str, float]) -> None:
        shown = {
            name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()
        }
        self._writer.add_hparams(shown, dict(results), run_name=".")
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the output folder; ``earlier``: id of the run there to continue."""

    def __init__(self, folder: Path, options: Mapping[str, Any], earlier: str | None) -> None:
        """Raises UserError where it cannot start, without a login for example."""
        import wandb

        try:
            self._run = wandb.init(config=dict(options), dir=folder, name=folder.name, id=earlier, resume="allow")
        except wandb.Error as error:
            raise UserError(
                f"--report-to wandb: cannot start ({one_line(error)}): run wandb login, or set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")  # wandb's own step never goes back, as a resumed run does
        self.id = str(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, options: Mapping[str, Any], results: Mapping[str, float]) -> None:
        self._run.finish()


class MetricsLog:
    """Rows of ``metrics.jsonl`` (one object per row, always with ``step``), and their numbers to a board.

    Attributes:
        rows: the content of the file; values that are not finite are NaN here and null there: JSON has no NaN.
    """

    def __init__(self, folder: Path, step: int, *, report_to: str = "none", options: Mapping[str, Any]) -> None:
        """Continues after ``step``: later rows, of an interrupted run, are removed (all rows for step 0).

        ``report_to``: tensorboard, wandb or none; ``options``: of the run, which the board shows.

        Raises:
            UserError: a file cannot be written.
        """
        self.path, self.options = folder / "metrics.jsonl", options
        lines = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []
        # A killed run can leave a partial last line, later than any checkpoint.
        whole = [line for line in lines if line.endswith("}")]
        self.rows: list[dict[str, Any]] = [
            {k: math.nan if v is None else v for k, v in row.items()}
            for row in map(json.loads, whole)
            if row["step"] <= step
        ]
        self._board: Board | None = None
        with self._writing():
            with written_aside(self.path) as partial:
                partial.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            if not step:  # an earlier, unfinished or overwritten run's
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            if report_to == "tensorboard":
                self._board = TensorBoard(folder, step)
            elif report_to == "wandb":
                earlier = next((row[WANDB_ID] for row in self.rows if WANDB_ID in row), None)
                self._board = board = WeightsAndBiases(folder, options, earlier)
                if earlier is None:
                    self.note(step, {WANDB_ID: board.id})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row of numbers. Raises UserError where it cannot be written."""
        self.note(step, values)
        if self._board:
            with self._writing():
                self._board.write(step, values)

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row of any values, for the file alone. Raises UserError where it cannot be written."""
        row = {"step": step, **values}
        self.rows.append(row)
        with self._writing():
            self._file.write(_line(row))

    def series(self, name: str) -> list[float]:
        """The values of a metric, in order."""
        return [row[name] for row in self.rows if name in row]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}): make room or choose another --output"
            ) from None

    def close(self, results: Mapping[str, float]) -> None:
        """``results``: of the last evaluation, which the board compares between runs."""
        self._file.close()
        if self._board:
            with self._writing():
                self._board.close(self.options, results)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"
