"""Commands that work in windows, interrupted and called again."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.training_runs import Result


def windows_of_an_interrupted_run(
    run: Callable[[], Result], output: Path, module: ModuleType, work: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Interrupts ``run`` in window number ``at``, for which it calls ``module.work``, and calls it again: it must write
    to ``output`` what an undisturbed run does. Returns the sizes of the windows worked on, those of both calls; a later
    call is interrupted where the list reaches ``at`` entries again."""
    assert run().returncode == 0
    expected = output.read_bytes()
    output.unlink()
    real, seen = getattr(module, work), list[int]()

    def interrupted(window: Any, *arguments: Any) -> Any:
        seen.append(len(window))
        if len(seen) == at:
            raise KeyboardInterrupt
        return real(window, *arguments)

    monkeypatch.setattr(module, work, interrupted)
    done = run()
    assert (done.returncode, done.stderr.endswith(": the same command resumes\n")) == (130, True)
    assert not output.exists()
    assert run().returncode == 0
    assert output.read_bytes() == expected
    return seen
