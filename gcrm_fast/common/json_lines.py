"""Lines of JSON: numbers that strict readers accept, and files that are gzipped if their name says so."""

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcrm_fast.common.files import written_aside


def numbers(values: np.ndarray) -> list[float]:
    """float32 values with as few digits as identify them."""
    return [float(text) for text in values.astype(np.float32).astype("U")]


def finite(value: Any) -> Any:
    """``value`` with null for the numbers that JSON does not have, which strict readers refuse: NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(record: Mapping[str, Any]) -> bytes:
    """UTF-8 if that can hold the record, otherwise escapes; dates and similar values of Parquet as text."""
    record = finite(record)
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a field passed on
        return (json.dumps(record, default=str) + "\n").encode()


def compressed(path: Path, lines: bytes) -> bytes:
    """The lines as a file of that name holds them; a gzip file may have several such members."""
    return gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file as a whole, or leaves it as it was."""
    with written_aside(path) as partial:
        partial.write_bytes(compressed(path, b"".join(map(json_line, records))))
