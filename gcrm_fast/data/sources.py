"""Rows of data, whatever holds them: JSON lines, gzip, Parquet, saved datasets, datasets of the Hub; stdin.

A row comes with its place, 'source:number', numbered from 1: the line of a JSON-lines file (blank lines count), the row
of anything else.
"""

import gzip
import importlib
import io
import json
import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError, one_line

STDIN = "-"
GZIP = b"\x1f\x8b"  # how its files begin
MAX_ARRAY = 2**30  # bytes of a JSON array, which is read as a whole
UNREAD = {b"BZh": "bzip2", b"\xfd7z": "xz", b"(\xb5/": "Zstandard", b"PK\x03": "a ZIP archive"}  # how theirs begin
MAX_LINE = 2**24  # bytes: a file without line feeds must not fill the memory
MAX_BLANK = 2**20  # bytes of blank lines in a row: a small gzip file may hold years of them
MAX_SKIPPED = 2**28  # bytes of a line that is skipped
TABLES = (".csv", ".tsv")
FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".parquet", ".ndjson", ".txt", *TABLES}
SEPARATOR = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>\S+))?")


@dataclass
class BadRecords:
    """What becomes of a bad record: it ends the program or, with ``skip``, is skipped and listed."""

    skip: bool = False
    skipped: list[str] = field(default_factory=list)
    tied: int = 0  # good records without a pair: all their completions tie

    def add(self, error: UserError) -> None:
        if not self.skip:
            raise error
        self.skipped.append(str(error))


def rows(source: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file, a folder that ``datasets`` saved (FOLDER[:SPLIT]), a dataset of the Hub
    (OWNER/NAME[/CONFIG][:SPLIT], split train by default), or of JSON lines on stdin ('-').

    What exists on the disk comes first. Rows that cannot be read go to ``bad``.

    Raises:
        UserError: nothing has that name, or the file is unreadable or damaged.
    """
    if source == STDIN:
        return _stdin_rows(bad)
    folder, _, split = source.rpartition(":") if ":" in source else (source, "", "")
    hub = _hub_name(source)
    if os.path.isdir(source):
        return _folder_rows(source, source, "", bad)
    if os.path.exists(source):
        return _file_rows(Path(source), bad)
    if os.path.isdir(folder):
        return _folder_rows(source, folder, split, bad)
    if hub:
        return _hub_rows(source, hub["name"], hub["config"], hub["split"] or "train")
    return _file_rows(Path(source), bad)


def check_present(source: str) -> None:
    """Raises UserError for a source that is neither on the disk nor could be a dataset of the Hub. Reads nothing."""
    if not (os.path.exists(source) or os.path.isdir(source.rpartition(":")[0]) or _hub_name(source)):
        next(_file_rows(Path(source), BadRecords()))  # says what is wrong


def _hub_name(source: str) -> re.Match[str] | None:
    """OWNER/NAME[/CONFIG][:SPLIT], unless that looks like a file."""
    hub = HUB_NAME.fullmatch(source)
    return hub if hub and Path(source).suffix not in FILE_SUFFIXES and source[0] != "." else None


# ----------------------------------------------------------------------------------------------------------- files


def _file_rows(path: Path, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """The first bytes of a file tell its kind, not its name."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # the first bytes of a pipe, once read, would be lost
            raise UserError(f"{path}: is not a regular file: save the records in one")
        with path.open("rb") as file:
            magic = file.read(4)
        if kind := UNREAD.get(magic[:3]):
            raise UserError(f"{path}: is {kind}: decompress it, or compress it with gzip instead")
        if magic == b"PAR1":
            yield from _parquet_rows(path, bad)
        elif path.name.lower().removesuffix(".gz").endswith(TABLES) and not magic.lstrip().startswith((b"{", b"[")):
            convert = "pandas.read_csv(FILE).to_json('records.jsonl', orient='records', lines=True)"
            raise UserError(f"{path}: is a table of text (CSV), which is not read: convert it to JSON lines: {convert}")
        else:
            with gzip.open(path) if magic[:2] == GZIP else path.open("rb") as file:
                yield from _json_rows(path, file, bad)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{path}: cannot be read ({reason}): expected a file, a saved dataset or OWNER/NAME") from None


def _stdin_rows(bad: BadRecords) -> Iterator[tuple[str, Any]]:
    if processes.world_size() > 1:
        raise UserError("-: several processes cannot share stdin: save the records in a file")
    file = cast(io.BufferedReader, sys.stdin.buffer)
    yield from _json_rows("stdin", gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file, bad)


def _json_rows(name: object, file: BinaryIO | gzip.GzipFile, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    blank = 0  # bytes since the last line that is not
    for number, line in _lines(name, file):
        where = f"{name}:{number}"
        if number == 1 and line.lstrip().startswith(b"["):
            yield from _array_rows(name, line, file)
            return
        if len(line) <= MAX_LINE and not line.strip():
            blank += len(line)
            if blank > MAX_BLANK:
                raise UserError(f"{where}: more than {MAX_BLANK >> 20} MiB of blank lines: remove them")
            continue
        blank = 0
        try:
            if len(line) > MAX_LINE:
                raise UserError(f"{where}: the line has more than {MAX_LINE >> 20} MiB: write one JSON object per line")
            record = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            place = f"byte {error.start} of the line"
            bad.add(UserError(f"{where}: not UTF-8 text ({place}): save the file as UTF-8"))
        except (ValueError, RecursionError) as error:
            column = f"{error.msg}: column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            reason = column or one_line(error)
            bad.add(UserError(f"{where}: not valid JSON ({reason}): write one JSON object per line"))
        except UserError as error:
            bad.add(error)
        else:
            yield where, record


def _array_rows(name: object, start: bytes, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[str, Any]]:
    """The records of a file that is one JSON array, decoded one by one."""
    number, decoder = 1, json.JSONDecoder(object_pairs_hook=_distinct)
    try:
        raw = start.lstrip() + file.read(MAX_LINE)
        if len(raw) > MAX_LINE and not raw[1:].strip():
            raise UserError(f"{name}:1: the array begins with more than {MAX_LINE >> 20} MiB of spaces: remove them")
        raw += file.read(MAX_ARRAY)
        if len(raw) > MAX_ARRAY:
            raise UserError(f"{name}:1: the array has more than {MAX_ARRAY >> 20} MiB: write one JSON object per line")
        text = raw.decode("utf-8")
        separator, end = _separator(text, 1)  # after the bracket
        while separator != "]":
            if separator != ("," if number > 1 else ""):
                raise ValueError(f"no comma at character {end}")
            record, end = decoder.raw_decode(text, end)
            yield f"{name}:{number}", record
            number += 1
            separator, end = _separator(text, end)
        if text[end:].strip():
            raise ValueError(f"more text after its end, at character {end}")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name}:{number}: not a valid JSON array ({one_line(error)}): write one JSON object per line"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}:{number}: gzip data is damaged ({error}): copy the file again") from None


def _separator(text: str, start: int) -> tuple[str, int]:
    """A comma or closing bracket at ``start``, spaces aside, "" for neither; and where the next value begins."""
    match = SEPARATOR.match(text, start)
    assert match is not None  # it also matches nothing
    return match[1], match.end()


def _distinct(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose fields have different names; json would keep the last of equal ones."""
    record = dict(fields)
    if len(record) < len(fields):
        [(name, _)] = Counter(name for name, _ in fields).most_common(1)
        raise ValueError(f"field {name!r} occurs twice in an object")
    return record


def _lines(name: object, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """(line number, raw line); a line over MAX_LINE is cut one byte after it."""
    number = 0
    try:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            yield number, line
            length = len(line)
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)
                length += len(line)
                if length > MAX_SKIPPED:
                    raise UserError(f"{name}:{number}: the line has more than {MAX_SKIPPED >> 20} MiB: fix the file")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}:{number + 1}: gzip data is damaged ({error}): copy the file again") from None


def _parquet_rows(path: Path, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    pyarrow, parquet = _needed("pyarrow", path), _needed("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for i in range(len(batch)):
                    number += 1
                    try:
                        [record] = batch.slice(i, 1).to_pylist()
                    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates out of range
                        message = f"{path}:{number}: the row cannot be read ({one_line(error)}): save it again"
                        bad.add(UserError(message))
                    else:
                        yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        message = f"{path}:{number + 1}: Parquet data is damaged ({one_line(error)}): copy the file again"
        raise UserError(message) from None


# -------------------------------------------------------------------------------------------------------- datasets


def _needed(module: str, source: object) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{source}: needs {module}: pip install 'gcrm-fast[datasets]'") from None


def _folder_rows(source: str, folder: str, split: str, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    """Parquet shards as the Hub lays them out, data/SPLIT-00000-of-00001.parquet; else what datasets saved."""
    shards: dict[str, list[Path]] = {}
    for path in sorted([*Path(folder).glob("*.parquet"), *Path(folder).glob("data/*.parquet")]):
        shards.setdefault(path.stem.split("-")[0], []).append(path)
    if not shards:
        yield from _saved_rows(source, folder, split)
        return
    name = split or ("train" if len(shards) > 1 else next(iter(shards)))
    if name not in shards:
        known = ", ".join(f"{folder}:{name}" for name in shards)
        raise UserError(f"{source}: has Parquet files of other splits: pass one of them: {known}")
    for path in shards[name]:
        yield from _parquet_rows(path, bad)


def _saved_rows(source: str, folder: str, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _needed("datasets", source)
    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # whatever its JSON, Arrow and file system libraries raise
        files = sorted(Path(folder).glob("*.jsonl*"))
        pass_file = f"pass a file, such as {files[0]}" if files else "pass a file"
        raise UserError(f"{source}: not a folder that datasets can load ({one_line(error)}): {pass_file}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            known = ", ".join(f"{folder}:{name}" for name in dataset)
            raise UserError(f"{source}: has several splits: pass one of them: {known}")
        dataset = dataset[split]
    elif split:
        raise UserError(f"{source}: has no splits: pass the folder alone")
    yield from _dataset_rows(source, dataset)


def _hub_rows(source: str, name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _needed("datasets", source)
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network, the Hub's answers, the dataset's own files
        reason = one_line(error)
        raise UserError(
            f"{source}: neither a file nor a dataset that can be loaded ({reason}): check the name"
        ) from None
    yield from _dataset_rows(source, dataset)


def _dataset_rows(source: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, record in enumerate(dataset, start=1):
            yield f"{source}:{number}", record
    except Exception as error:  # a damaged Arrow file
        raise UserError(f"{source}:{number + 1}: cannot be read ({one_line(error)}): save it again") from None
