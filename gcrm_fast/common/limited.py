"""Programs of other people, run in a process of their own, which ends when one takes too long.

What comes with a model or from a user may run forever, fill the memory or crash the interpreter. So another process,
started with the first request, works for this one: before each request it sets an alarm that the system answers by
killing it, whatever it computes. The next request starts it again.
"""

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from gcrm_fast.common.errors import one_line

TEXT, ERROR = b"t", b"e"  # how an answer begins


class EndedError(Exception):
    """The other process ended instead of answering; ``reason`` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LimitedProcess:
    """The other process as this one sees it: ``python -m MODULE FD``, which calls ``serve``; threads take turns.

    ``endless`` counts the requests that ended it.
    """

    def __init__(self, module: str) -> None:
        self.module, self.endless = module, 0
        self._turn = threading.Lock()
        self._other: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._owner = 0  # process that started it; a fork must not use its parent's
        atexit.register(self.stop)

    def __call__(self, seconds: float, *request: Any) -> str:
        """The answer to a request, which may take ``seconds``.

        Raises:
            EndedError: it takes longer, or ends the process.
            ValueError: one line that says what was raised there.
        """
        with self._turn:
            if self._other is None or self._owner != os.getpid():
                self._other, self._owner = self._start(), os.getpid()
            process, connection = self._other
            try:
                connection.send((seconds, *request))
                answer = connection.recv_bytes()
            except (EOFError, OSError):
                code, self.endless = self.stop(), self.endless + 1
                late = code == -signal.SIGALRM
                raise EndedError(f"takes more than {seconds:g} s" if late else f"crashes (exit code {code})") from None
            except BaseException:  # an interrupt: the answer must not go to the next request
                process.kill()
                self.stop()
                raise
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[:1] == ERROR:
            raise ValueError(text)
        return text

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        return process, ours

    def stop(self) -> int:
        """Ends the other process, if there is one; returns its exit code."""
        if self._other is None or self._owner != os.getpid():
            return 0
        process, connection = self._other
        connection.close()
        self._other = None
        return process.wait()


def serve(work: Callable[..., str], memory: int) -> None:
    """Answers requests with ``work(*request)`` until the connection ends, which it does with the process that asks.
    ``memory``: maximum bytes of address space."""
    connection = Connection(int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # that process ends in its own time
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(EOFError):
        while True:
            seconds, *request = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                text, kind = work(*request), TEXT
            except Exception as error:  # a program may fail in any way
                text, kind = one_line(error), ERROR
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(kind + text.encode("utf-8", "surrogatepass"))
