"""Verifiers: is a response right? Of tasks with a right answer, where a reward model can be fooled and a check cannot.

    math               numbers and LaTeX, compared by the library math-verify: what the response states last
    arithmetic         the generated sums of data/arithmetic.py, every step; needs no reference
    regex:PATTERN      the last match of PATTERN, or of its first group, equals the reference
    MODULE:FUNCTION    FUNCTION(prompt, completion, reference) -> true, false, a number from 0 to 1, or None for an
                       answer that it cannot read; FUNCTION.read(completion) -> the final answer, for gcrm synthesize

They run in a process of their own (common/limited.py), since patterns, equations and functions of users may take
forever or crash. A verifier that fails gives a line with the prompt and the reason, and the response counts as wrong.
"""

import functools
import importlib
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gcrm_fast.common.errors import UserError, printable
from gcrm_fast.common.limited import EndedError, LimitedProcess, serve
from gcrm_fast.data.messages import Messages

WITHOUT_REFERENCE = "arithmetic"
SECONDS = 10.0  # per response
LOADING = 120.0  # seconds for the imports of a verifier
MEMORY = 16 * 2**30  # bytes of address space; a user's function may import large libraries
LINES = 20  # failures that are printed; all are counted
QUOTED = 60  # characters of a prompt in a line

_process = LimitedProcess(__name__)


class Verdict(NamedTuple):
    """``score`` is 0 for wrong to 1 for right; ``kind`` is verified, unreadable (scored 0) or failed (scored 0)."""

    score: float
    kind: str


class Verifiers:
    """The verifiers of tasks by the tasks' names, such as {"math": "math", "code": "my_sandbox:check"}.

    ``counts``: verdicts by their kind. ``seconds``: maximum per response.

    Raises:
        UserError: no such verifier, or one that cannot be loaded.
    """

    def __init__(self, by_task: Mapping[str, str], *, seconds: float = SECONDS) -> None:
        self.by_task, self.seconds = dict(by_task), seconds
        self.counts: Counter[str] = Counter()
        for task, name in self.by_task.items():
            try:
                _process(LOADING, "load", name)
            except (ValueError, EndedError) as error:
                raise UserError(f"verifier {name!r} of task {task!r}: {error}") from None

    def __contains__(self, task: object) -> bool:
        return task in self.by_task

    def check(self, task: str, prompt: str | Messages, completion: str | Messages, reference: Any) -> Verdict:
        """Whether a completion is right; ``reference`` is the right answer, None where the task needs none."""
        answer, kind = self._ask("check", task, prompt, plain(prompt), plain(completion), reference)
        verdict = Verdict(answer or 0.0, kind or ("unreadable" if answer is None else "verified"))
        self.counts[verdict.kind] += 1
        return verdict

    def read(self, task: str, prompt: str | Messages, completion: str | Messages) -> str | None:
        """The final answer of a completion: equal answers are equal texts. None where there is none that can be read.

        Raises:
            UserError: the task's verifier reads no answers.
        """
        name = self.by_task[task]
        if not _reads(self.seconds, name):
            raise UserError(f"verifier {name!r}: reads no answers: give its function an attribute read(completion)")
        answer, kind = self._ask("read", task, prompt, plain(completion))
        self.counts[kind or ("unreadable" if answer is None else "read")] += 1
        return None if answer is None else str(answer)

    def _ask(self, request: str, task: str, prompt: str | Messages, *arguments: Any) -> tuple[Any, str]:
        """The verifier's answer, and "failed" where it fails."""
        name = self.by_task[task]
        try:
            return json.loads(_process(self.seconds, request, name, *arguments)), ""
        except (ValueError, EndedError) as error:
            failed = self.counts["failed"]
            if failed < LINES:
                start = plain(prompt)
                start = start if len(start) <= QUOTED else start[:QUOTED] + "..."
                more = f" (line {LINES} of such lines; later failures are only counted)" if failed == LINES - 1 else ""
                line = f"gcrm: verifier {name} failed at the prompt {start!r}: {error}: counted as wrong{more}"
                print(printable(line), file=sys.stderr, flush=True)
            return None, "failed"


def parse_verifiers(items: Iterable[str]) -> dict[str, str]:
    """Verifiers by task, of TASK=VERIFIER; "" is the task of a verifier alone. Raises UserError."""
    by_task: dict[str, str] = {}
    for item in items:
        task, equals, name = item.partition("=")
        if not equals or task.startswith("regex:"):  # a pattern may hold an equals sign
            task, name = "", item
        if not name or task in by_task:
            raise UserError(f"--verifier {item}: must be TASK=VERIFIER, with each task once")
        by_task[task] = name
    return by_task


def plain(text: str | Messages) -> str:
    """A text as it is; of messages the content of the last one."""
    if isinstance(text, str):
        return text
    content = text[-1].get("content") if text else ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content or "")


@functools.cache
def _reads(seconds: float, name: str) -> bool:
    return bool(json.loads(_process(seconds, "reads", name)))


# --------------------------------------------------------------------------------------------------- the other process


class _Verifier(NamedTuple):
    check: Callable[[str, str, Any], float | None]
    read: Callable[[str], str | None] | None


def _work(request: str, name: str, *arguments: Any) -> str:
    verifier = _loaded(name)
    if request == "reads":
        return json.dumps(verifier.read is not None)
    if request == "read":
        assert verifier.read is not None
        return json.dumps(verifier.read(*arguments))
    if request == "load":
        return ""
    score: Any = verifier.check(*arguments)
    if hasattr(score, "item"):  # of NumPy or torch
        score = score.item()
    if score is not None and not (isinstance(score, (bool, int, float)) and 0 <= score <= 1):
        raise ValueError(f"gives {str(score)[:20]!r}: not true, false, a number from 0 to 1 or None")
    return json.dumps(None if score is None else float(score))


@functools.cache
def _loaded(name: str) -> _Verifier:
    if name == "math":
        return _math()
    if name == "arithmetic":
        from gcrm_fast.data.arithmetic import final_answer, is_correct  # here: the others need none of it

        return _Verifier(lambda prompt, completion, reference: is_correct(prompt, completion), final_answer)
    kind, _, rest = name.partition(":")
    if kind == "regex":
        return _regex(re.compile(rest))
    if not rest:
        raise ValueError("is not one of math, arithmetic, regex:PATTERN and MODULE:FUNCTION")
    function = getattr(importlib.import_module(kind), rest)
    if not callable(function):
        raise ValueError("is not a function")
    return _Verifier(function, getattr(function, "read", None))


def _regex(pattern: re.Pattern[str]) -> _Verifier:
    def read(completion: str) -> str | None:
        matches = list(pattern.finditer(completion))
        return str(matches[-1][min(1, pattern.groups)] or "").strip() if matches else None

    return _Verifier(_compared(read, lambda answer, reference: answer == str(reference).strip()), read)


def _math() -> _Verifier:
    try:
        import math_verify
    except ImportError:
        raise ValueError("math-verify is not installed: pip install 'gcrm-fast[math]'") from None
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it does not limit the time: we do

    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=None)

    def same(completion: str, reference: Any) -> bool:
        text = str(reference)
        bare = not any(mark in text for mark in ("$", r"\boxed", r"\(", r"\[", "####"))
        right = parse(f"${text}$" if bare else text)
        if not right:
            raise ValueError(f"the reference {text[:QUOTED]!r} is neither a number nor LaTeX")
        return bool(math_verify.verify(right, parse(completion), timeout_seconds=None))

    def read(completion: str) -> str | None:
        parsed = parse(completion)
        if not parsed or isinstance(parsed[0], str):
            return parsed[0].strip() or None if parsed else None
        value = parsed[0]
        if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:  # x = 5 answers 5
            value = value.rhs
        try:
            return str(sympy.expand(sympy.simplify(sympy.nsimplify(value, rational=True))))
        except (TypeError, ValueError, AttributeError, NotImplementedError):  # sets, matrices, relations
            return str(value)

    def check(prompt: str, completion: str, reference: Any) -> float | None:
        return None if not parse(completion) else _compared(lambda text: text, same)(prompt, completion, reference)

    return _Verifier(check, read)


def _compared(
    read: Callable[[str], str | None], same: Callable[[str, Any], bool]
) -> Callable[[str, str, Any], float | None]:
    """Checks what is read against a reference, which must be there."""

    def check(prompt: str, completion: str, reference: Any) -> float | None:
        if reference is None or (isinstance(reference, float) and math.isnan(reference)):
            raise ValueError("the reference is missing")
        answer = read(completion)
        return None if answer is None else float(same(answer, reference))

    return check


if __name__ == "__main__":
    serve(_work, MEMORY)
