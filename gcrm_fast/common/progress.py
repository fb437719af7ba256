"""Progress bars: on a terminal one that moves, in a log a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines of a log
BRIEF = 2.0  # seconds before the bar of work that is usually short is shown


class _LogLines:
    """A stream that gets each new state of a bar as a line, instead of one that overwrites the last."""

    line = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.line:
            self.line = line
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, brief: bool = False, shown: bool = True, **more: Any) -> Any:
    """A tqdm bar on stderr. ``brief``: work that is usually short gets no bar unless it takes a while, and leaves none.
    ``shown``: false for all processes but one. ``more``: tqdm's own options."""
    more |= {"disable": not shown, "leave": not brief, "dynamic_ncols": True, "delay": BRIEF if brief else 0}
    if not sys.stderr.isatty():
        more |= {"file": _LogLines(), "ascii": True, "position": 0, "mininterval": LOG_INTERVAL, "miniters": 1}
        more["delay"] = LOG_INTERVAL if brief else 0
    return tqdm(iterable, **more)
