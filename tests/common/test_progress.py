"""Progress bars in logs and on terminals."""

import sys
from pathlib import Path

import pytest

from gcrm_fast.common import progress
from gcrm_fast.common.progress import progress_bar


def work(**options: object) -> None:
    bar = progress_bar(range(500), desc="work", **options)
    for i in bar:
        bar.set_postfix({"value": i}, refresh=False)


def test_a_log_gets_whole_lines_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    text = capsys.readouterr().err
    assert not {"\r", "\x1b"} & set(text)
    first, last = text.splitlines()
    assert first.startswith("work:   0%")
    assert "500/500 " in last
    assert last.endswith("value=499]")


def test_a_log_gets_a_line_per_interval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0)
    work()
    assert len(capsys.readouterr().err.splitlines()) > 500


@pytest.mark.parametrize("options", [{"brief": True}, {"shown": False}], ids=str)
def test_no_bar_for_short_work_nor_of_other_processes(
    options: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    work(**options)
    assert capsys.readouterr().err == ""


def test_a_state_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=1, desc="work", bar_format="work {n}") as bar:
        bar.refresh()
        bar.update()
        bar.refresh()
    assert capsys.readouterr().err.splitlines() == ["work 0", "work 1"]


def test_bars_within_bars_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=1, desc="outer") as bar:
        work()
        bar.update()
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["outer", "work", "work", "outer"]


def test_a_terminal_gets_a_bar_that_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work()
    assert capsys.readouterr().err.count("\rwork: ") > 1


def test_every_bar_is_made_in_one_place() -> None:
    package = Path(progress.__file__).parents[1]
    assert [path.name for path in package.rglob("*.py") if "import tqdm" in path.read_text()] == ["progress.py"]
