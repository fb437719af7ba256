"""What a judging command leaves: a folder that is complete or absent, with results.json, results.csv and plots."""

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
    """One number of a table. ``group`` is 'all' or FIELD=VALUE; an interval or a count that there is none of is NaN."""

    source: str
    group: str
    measure: str
    value: float
    low: float = math.nan
    high: float = math.nan


def check_folder(path: Path, overwrite: bool) -> None:
    """Raises UserError where ``path`` cannot become the folder of a command; before its work, not after."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: is not a folder: name a folder for the results")
    held = sorted(path.iterdir()) if path.exists() else []
    if held and not overwrite:
        raise UserError(f"--output {path}: holds files: choose another folder or pass --overwrite")
    others = [file for file in held if file.name not in ("results.json", "results.csv") and file.suffix != ".png"]
    if others:
        raise UserError(f"{others[0]}: is no result, and --overwrite would remove it: choose another folder")


def write_rows(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """results.csv, a line a row, and results.json, an object with ``about`` and the rows; what is NaN is left empty in
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
