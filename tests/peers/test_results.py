"""What is kept of the last run of ``make peers``: the table of the docs, the releases that ran, the verdicts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcrm_fast.common.errors import UserError
from peers import run
from peers.environments import PEERS

RESULTS: dict[str, list[run.Row]] = json.loads(run.RESULTS.read_text())


def test_the_page_has_the_results_of_the_last_run() -> None:
    page = run.PAGE.read_text(encoding="utf-8")
    rows = [row for peer in RESULTS.values() for row in peer]
    assert run.in_page(page, rows) == page
    assert run.render(rows) in page


@pytest.mark.parametrize("key", PEERS)
def test_the_results_are_those_of_the_pinned_release(key: str) -> None:
    [version] = re.findall(rf" {PEERS[key].package}==(\S+)", " ".join(PEERS[key].steps))
    assert {row["peer"] for row in RESULTS[key]} == {f"{PEERS[key].name} {version}"}


def test_every_example_for_a_peer_ran() -> None:
    """That of GRPO runs in the slow tests."""
    named = {
        word for peer in RESULTS.values() for row in peer for word in re.findall(r"examples/\w+\.\w+", row["what"])
    }
    page = run.PAGE.read_text(encoding="utf-8")
    linked = set(re.findall(r"examples/\w+\.(?:py|sh)", page)) - {"examples/grpo_with_trl.py"}
    assert linked == named


def answer(**changes: Any) -> dict[str, Any]:
    return {"what": "x", "model": "m", "found": [1.0, 2.0], **changes}


@pytest.mark.parametrize(
    ("given", "ours", "verdict"),
    [
        (answer(), [1.0, 2.0], "equal"),
        (answer(), [1.0, 2.001], "differs"),
        (answer(tolerance=0.01), [1.0, 2.001], "equal"),
        (answer(known="a bug of theirs"), [1.0, 3.0], "differs: a bug of theirs"),
        (answer(known="a bug of theirs"), [1.0, 2.0], "equal"),
        (answer(found=[1.0, float("nan")]), [1.0, 2.0], "differs"),
        (answer(found=[[1.0, 2.0], [3.0]]), [[1.0, 2.5], [3.0]], "differs"),
        ({"what": "x", "said": "float16", "documented": "float16"}, [], "float16, as documented"),
        ({"what": "x", "said": "bfloat16", "documented": "float16"}, [], "differs: bfloat16"),
    ],
)
def test_verdicts(given: dict[str, Any], ours: list[Any], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "rewards_here", lambda *_: [np.array(row) for row in ours])
    assert run.judged(given, {})[1] == verdict


def test_a_folder_that_is_not_read_here_is_named_without_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("/somewhere/model: holds an adapter")

    monkeypatch.setattr(run, "rewards_here", refuse)
    assert run.judged(answer(folder="/somewhere/model"), {})[1] == "not read here: the folder: holds an adapter"


def test_a_peer_that_is_not_available_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    [row] = run.run("trl", {}, tmp_path)
    assert row["verdict"].startswith("not installed: ERROR: No matching distribution found for torch")


def test_without_names_all_peers_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def noted(key: str, *_: object) -> list[run.Row]:
        ran.append(key)
        return RESULTS[key]

    (tmp_path / "page.md").write_text(run.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for name, value in {"RESULTS": tmp_path / "results.json", "PAGE": tmp_path / "page.md"}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "prepared", lambda work: {})
    monkeypatch.setattr(run, "run", noted)
    run.main([])
    assert ran == [*PEERS]
    run.main(["trl"])
    assert ran == [*PEERS, "trl"]
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    with pytest.raises(SystemExit):
        run.main(["nobody"])
    assert "no such peer: nobody: choose from vllm, " in capsys.readouterr().err
