"""Chat templates, rendered in a process of their own, which ends with a rendering that takes too long.

A template is a program that comes with the model. Jinja's sandbox keeps it from files and from the network, but lets it
run forever or fill the memory. So another process, started with the first rendering, renders for this one: before each
rendering it sets an alarm that the system answers by killing it, whatever it computes. The next rendering starts it
again.
"""

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gcrm_fast.common.errors import UserError, one_line

SECONDS = 5.0  # per rendering, which takes a few milliseconds
MEMORY = 2 * 2**30  # bytes of address space
TOLERATED = 3  # renderings without an end, while bad records are skipped
LONGEST = 2**26  # characters
TEXT, ERROR = b"t", b"e"  # how an answer begins


class EndlessTemplate(UserError):
    """A rendering took too long, or ended its process. After TOLERATED of them ``hopeless`` is true: a file of such
    records would take hours."""

    def __init__(self, message: str, *, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class _Renderer:
    """The other process as this one sees it; threads take turns."""

    def __init__(self) -> None:
        self.endless = 0
        self._turn = threading.Lock()
        self._other: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._owner = 0  # process that started it; a fork must not use its parent's

    def __call__(self, source: str, request: Any) -> str:
        with self._turn:
            if self._other is None or self._owner != os.getpid():
                self._other, self._owner = self._start(), os.getpid()
            process, connection = self._other
            try:
                connection.send(request)
                answer = connection.recv_bytes()
            except (EOFError, OSError):
                code, self.endless = self.stop(), self.endless + 1
                how = f"takes more than {SECONDS:g} s" if code == -signal.SIGALRM else f"crashes (exit code {code})"
                message = f"{source}: the chat template {how}: correct it, or omit these messages"
                raise EndlessTemplate(message, hopeless=self.endless > TOLERATED) from None
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
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
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


_renderer = _Renderer()
atexit.register(_renderer.stop)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Any = None, *, ask: bool = False
) -> str:
    """The text that the tokenizer's chat template writes; ``ask`` adds the start of an answer.

    Raises:
        EndlessTemplate: it does not end within SECONDS, or crashes.
        ValueError: one line that says what the template raised.
    """
    template = tokenizer.get_chat_template(tools=tools)
    return _renderer(
        tokenizer.name_or_path or "the tokenizer",
        (SECONDS, template, list(messages), tools, ask, tokenizer.special_tokens_map),
    )


def _serve(connection: Connection) -> None:
    """Answers renderings until the connection ends, which it does with the other process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # that process ends in its own time
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with contextlib.suppress(EOFError):
        while True:
            seconds, *request = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                text, kind = _rendered(renderer, *request), TEXT
            except Exception as error:  # a program may fail in any way
                text, kind = one_line(error), ERROR
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(kind + text.encode("utf-8", "surrogatepass"))


def _rendered(
    renderer: PreTrainedTokenizerBase, template: str, messages: Any, tools: Any, ask: bool, tokens: dict[str, Any]
) -> str:
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": ask, **tokens}
    text = str(renderer.apply_chat_template(messages, chat_template=template, **options))
    if len(text) > LONGEST:
        raise ValueError(f"writes more than {LONGEST >> 20} Mi characters")
    return text


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
