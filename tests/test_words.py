"""The words of code, messages and docs: plain American English, the field's standard terms."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("*.py", "*.md", "*.toml", "*.html", "*.jinja", "*.yml", "*.cff", "Makefile", ".ci/run")
THINGS = (
    "seconds|tokens?|pairs?|losses|loss|bytes|times|rows?|steps?|completions?|rewards?|lines?|votes?|requests?|GiB|MiB|"
    "processes|copies|copy|workers?|checkpoints?|samples?|updates|registers|numbers?"
)
PER = (
    "pair|token|step|second|row|process|rank|prompt|pack|line|epoch|completion|question|layer|minute|batch|node|"
    "micro-batch|parameter|thread|program|record|group|model"
)
STEMS = (
    "initialis|normalis|optimis|recognis|organis|serialis|tokenis|randomis|summaris|parallelis|localis|minimis|maximis"
)
# What stumbles -> what a native engineer writes.
WORDS = {
    r"anew": "again, start over",
    r"mend(s|ed|ing)?": "fix",
    r"(leave|leaves|leaving|left) (it |them |this |that )?out": "skip, omit",
    r"(go|goes|going|went) on": "continue, resume",
    r"(hand|hands|handed|handing) (it |them |this |that )?on": "pass on, forward",
    r"hangs on": "depends on",
    r"(is|are|was|were) told": "reads, is given",
    r"in the words of": "as ... puts it",
    r"(can|could|cannot|to|not to) be had": "is available",
    r"[Bb]eside": "next to, with, compared with",
    r"some (twenty|ten|thirty|sixty)": "about twenty",
    r"as often as not": "about half the time",
    r"as (it|they) stands?": "unchanged, verbatim",
    r"in (the )?place of": "instead of",
    r"(tells?|told|telling) (it |them |the two )?apart": "distinguish, separate",
    r"for want of": "for lack of",
    r"(somebody|whoever)": "someone, or the thing itself",
    r"unasked": "without being asked, unless --OPTION",
    r"in silence": "silently",
    r"(made|computed|built) again": "rebuilt, recomputed",
    r"of no use": "useless",
    r"has gone": "disconnected, was deleted",
    r"(whilst|thrice|till|thereby|therein)": "while, three times, until, so, in it",
    rf"({THINGS}) an? ({PER})": "per",
    rf"([Tt]he most|Most( held-out)?) ({THINGS})": "the maximum",
    r"(col|behavi|fav|neighb|hon)our(s|ed|ing|ite|hood)?": "-or",
    r"licence": "license",
    rf"\w*({STEMS})(e|es|ed|ing|ation)": "-ize",
    r"(centre|metre|fibre)s?": "-er",
    r"(labell|cancell|modell|travell)(ed|ing)": "one l",
    r"(analyse|catalogue|grey|amongst|artefact|judgement)s?": "American spelling",
}


def texts() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *KINDS], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line) != Path(__file__)]


def stumbles(line: str) -> list[str]:
    """What a line says that it should say in other words."""
    matches = ((re.search(rf"\b(?:{pattern})\b", line), instead) for pattern, instead in WORDS.items())
    return [f"{match[0]!r}: {instead}" for match, instead in matches if match]


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"line {n}: {what}" for n, line in enumerate(lines, 1) for what in stumbles(line)] == []


def test_each_pattern_finds_what_it_names() -> None:
    for line in (
        "start anew",
        "bytes a parameter",
        "Most tokens of a pack",
        "the run goes on",
        "it is told",
        "a colour",
    ):
        assert stumbles(line), line
    assert stumbles("bytes per parameter, the maximum, most rows differ, continue, the color") == []
