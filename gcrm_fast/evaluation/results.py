"""The folder of results of a command: complete or absent, with results.json, results.csv and plots."""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.tables import number


@dataclass(frozen=True)
class Row:
    """One number of a table. ``group`` is 'all' or FIELD=VALUE; a missing value or interval is NaN."""

    source: str
    group: str
    measure: str
    value: float
    low: float = math.nan
    high: float = math.nan


def check_folder(path: Path, overwrite: bool) -> None:
    """Raises UserError where ``path`` cannot become the folder of results; called before the work starts."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: is not a folder: choose a folder for the results")
    present = sorted(path.iterdir()) if path.exists() else []
    if present and not overwrite:
        raise UserError(f"--output {path}: contains files: choose another folder or pass --overwrite")
    others = [file for file in present if file.name not in ("results.json", "results.csv") and file.suffix != ".png"]
    if others:
        raise UserError(f"{others[0]}: is not a result file, and --overwrite would delete it: choose another folder")


def write_rows(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes results.csv, one line per row, and results.json, an object with ``about`` and the rows. NaN is empty in
    the one and null in the other."""
    records = [
        {name: None if value != value else value for name, value in dataclasses.asdict(row).items()} for row in rows
    ]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(records)
    text = json.dumps({**about, "rows": records}, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def with_interval(row: Row) -> str:
    """0.713 [0.700, 0.725], or the value alone."""
    return number(row.value) + (f" [{number(row.low)}, {number(row.high)}]" if row.low == row.low else "")
