"""Lines for people that are no errors: once per process, of each machine's first process alone, on stderr."""

import functools
import sys

from gcrm_fast.common import processes


@functools.cache
def warn_once(message: str) -> None:
    if processes.local_rank() == 0:
        print(f"gcrm: warning: {message}", file=sys.stderr, flush=True)
