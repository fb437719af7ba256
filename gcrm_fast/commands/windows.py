"""Long work on many records, one window after another: what is finished is kept, and the same command resumes."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gcrm_fast.commands.output import Output
from gcrm_fast.common.json_lines import json_line
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.samples import Samples

WINDOW = 128  # records

Row = dict[str, Any]


@contextlib.contextmanager
def worked(
    command: str,
    output: Path,
    made_by: dict[str, Any],
    samples: Sequence[Samples],
    work: Callable[[Sequence[Samples]], list[Row]],
) -> Iterator[list[Row]]:
    """A row of values for each record. They are kept in NAME.rows.partial until the block ends without an error; a
    partial file that other options or records made is discarded, and a line of ``command`` says so."""
    rows_file = Output(output.with_name(output.name + ".rows"), command)
    digest = hashlib.sha256(b"".join(json_line(one.fields) for one in samples)).hexdigest()
    with rows_file.held():
        done = rows_file.progress({**made_by, "records": digest})
        with rows_file.kept(), progress_bar(total=len(samples), desc="scoring", unit="record") as bar:
            bar.update(min(done.windows * WINDOW, len(samples)))
            for start in range(done.windows * WINDOW, len(samples), WINDOW):
                window = samples[start : start + WINDOW]
                lines = b"".join(json_line(row) for row in work(window))
                done = rows_file.append(lines, done._replace(windows=done.windows + 1))
                bar.update(len(window))
        with rows_file.partial.open("rb") as file:
            text = file.read(done.bytes)
        yield [json.loads(line) for line in text.splitlines()]
        rows_file.partial.unlink()
        rows_file.state.unlink()
