"""What a run logs: metrics.jsonl and TensorBoard scalars."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside


class MetricsLog:
    """Rows of ``metrics.jsonl`` (one object per row, always with ``step``), and their numbers to TensorBoard.

    Attributes:
        rows: the content of the file; values that are not finite are NaN here and null there: JSON has no NaN.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Continues after ``step``: later rows, of an interrupted run, are removed (all rows for step 0).

        Raises:
            UserError: a file cannot be written.
        """
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []
        # A killed run can leave a partial last line, later than any checkpoint.
        whole = [line for line in lines if line.endswith("}")]
        self.rows: list[dict[str, Any]] = [
            {k: math.nan if v is None else v for k, v in row.items()}
            for row in map(json.loads, whole)
            if row["step"] <= step
        ]
        with self._writing():
            with written_aside(self.path) as partial:
                partial.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            if not step:  # an earlier, unfinished or overwritten run's
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row of numbers. Raises UserError where it cannot be written."""
        self.note(step, values)
        with self._writing():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row of any values, without TensorBoard. Raises UserError where it cannot be written."""
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

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
