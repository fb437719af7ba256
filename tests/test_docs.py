"""README and the pages of docs/: short enough, links that lead somewhere, examples that run."""

import re
from pathlib import Path
from typing import Any

import pytest

from gcrm_fast import RewardModel
from support.training_runs import ROOT, Gcrm

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "extending.md"}  # by docs/pages.py
LINK = re.compile(r"!?\[[^]\n]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One head\n[a](#one-head) [b](#two) [c](page.md) [d](none.md) ![e](none.png) [f](https://x.org)\n"
    )
    assert broken_links(page) == ["#two", "none.md", "none.png"]


def test_the_readme_fits_on_three_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    assert {name for name in listed if "/" not in name} == {page.name for page in PAGES[2:]} | GENERATED
    assert all((ROOT / name).exists() for name in listed if "/" in name)


@pytest.mark.parametrize("page", ["README.md", "docs/scoring.md"])
def test_python_examples_run(page: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the small default model whatever folder is named."""
    [example] = re.findall(
        r"^```python\n(.+?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    load = RewardModel.from_pretrained
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda _: load(finished / "model"))
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["rewards"].shape == (2,)
    assert [len(q) for q in names["q_values"]] == [len(states) for states in names["states"]]


@pytest.mark.slow
def test_the_example_with_a_pretrained_model_runs(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    [command] = re.findall(
        r"^    gcrm (train --model runs/smollm2 .*\\\n.*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    model, out = ROOT / "runs" / "smollm2", tmp_path / "out"
    if not model.is_dir():
        pytest.skip("runs/smollm2 is missing: make real-model")
    here = {"pairs.jsonl": pair_file, "runs/smollm2": model, "runs/smollm2-mine": out}
    words = [str(here.get(word, word)) for word in command.replace("\\\n", "").split()]
    result = gcrm(*words, "--steps", "1", "--global-batch-pairs", "2", "--eval-pairs", "2", "--goal-pairs", "2")
    assert result.returncode == 0, result.stderr
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_the_tour_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"\b\w+\.py\b", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    modules = {
        path.name
        for folder in ("gcrm_fast", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "commands" and path.name != "rewards.py" and not path.name.startswith("__")
    }
    everything = {
        path.name for folder in ("gcrm_fast", "bench", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")
    }
    assert modules - named == set()
    assert named - modules - everything == set()
