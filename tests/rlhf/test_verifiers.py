"""Verifiers: right, wrong, unreadable, and those that fail."""

import json

import pytest

from gcrm_fast.common.errors import UserError
from gcrm_fast.data.arithmetic import generate
from gcrm_fast.rlhf import verifiers as module
from gcrm_fast.rlhf.verifiers import Verifiers, parse_verifiers, plain

RIGHT, WRONG, UNREADABLE = (1.0, "verified"), (0.0, "verified"), (0.0, "unreadable")


@pytest.mark.parametrize(
    ("completion", "reference", "verdict", "answer"),
    [
        (r"First 3, so the answer is $\frac{1}{2}$.", "0.5", RIGHT, "1/2"),
        ("the answer is 0.5", r"\frac12", RIGHT, "1/2"),
        (r"\boxed{1,234}", 1234, RIGHT, "1234"),
        ("$x = 5$", "5", RIGHT, "5"),
        ("$(x+1)^2$", "x^2 + 2x + 1", RIGHT, "x**2 + 2*x + 1"),
        (r"$\{1, 2\}$", r"\{2, 1\}", RIGHT, "{1, 2}"),
        ("#### 72", "Natalia sold 48/2 = 24.\n#### 72", RIGHT, "72"),
        ("the answer is 4", "5", WRONG, "4"),
        ("I do not know", "5", UNREADABLE, None),
    ],
)
def test_numbers_and_latex(completion: str, reference: object, verdict: object, answer: str | None) -> None:
    pytest.importorskip("math_verify")
    verifiers = Verifiers({"sums": "math"})
    assert verifiers.check("sums", "p", completion, reference) == verdict
    assert verifiers.read("sums", "p", completion) == answer


def test_a_power_that_nobody_can_compute_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    verifiers = Verifiers({"sums": "math"}, seconds=3.0)
    assert verifiers.check("sums", "p", "$9^{9^{9^9}}$", "1") == (0.0, "failed")
    assert "verifier math failed at the prompt 'p': takes more than 3 s" in capsys.readouterr().err
    assert verifiers.check("sums", "p", "$1$", "1") == RIGHT


def test_arithmetic_judges_every_step_and_reads_the_last() -> None:
    verifiers = Verifiers({"sums": "arithmetic"})
    pair = next(p for p in generate(500, 0, 0, 3)[0] if p.fields["error_step"] == 1 and p.fields["steps"] == 3)
    assert verifiers.check("sums", pair.prompt, pair.chosen, None) == RIGHT
    assert verifiers.check("sums", pair.prompt, pair.rejected, None) == WRONG
    assert verifiers.read("sums", pair.prompt, pair.rejected) == pair.rejected[-2]
    # The right digit without its steps does not pass.
    assert verifiers.check("sums", pair.prompt, f"0+0={pair.chosen[-2]};", None) == WRONG
    assert verifiers.read("sums", pair.prompt, pair.chosen[:-1]) is None


@pytest.mark.parametrize("prompt", ["What is 3 + 4?", "a=3,b=4:a+c?", "a=x,b=4:a+b?", "a=3:b=4:a+b?"])
def test_arithmetic_names_the_form_of_its_prompts(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Verifiers({"sums": "arithmetic"}).check("sums", prompt, "3+4=2;", None) == (0.0, "failed")
    reason = "the prompt is not a sum of the form a=3,b=4:a+b?"
    line = f"gcrm: verifier arithmetic failed at the prompt {prompt!r}: {reason}: counted as wrong\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("pattern", "completion", "verdict", "answer"),
    [
        (r"#### (\d+)", "#### 4, no, #### 12", RIGHT, "12"),
        (r"\d+", "4 or 12", RIGHT, "12"),
        (r"#### (\d+)", "#### 13", WRONG, "13"),
        (r"#### (\d+)", "twelve", UNREADABLE, None),
    ],
)
def test_patterns(pattern: str, completion: str, verdict: object, answer: str | None) -> None:
    verifiers = Verifiers({"x": f"regex:{pattern}"})
    assert verifiers.check("x", "p", completion, " 12") == verdict
    assert verifiers.read("x", "p", completion) == answer


def test_functions_of_users_get_plain_text() -> None:
    verifiers = Verifiers({"x": "support.checks:contains"})
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
    assert verifiers.check("x", asked, answer, "two three") == (0.5, "verified")
    assert verifiers.check("x", asked, "12", "two") == UNREADABLE
    assert verifiers.counts == {"verified": 1, "unreadable": 1}
    assert plain(asked) == "q"
    with pytest.raises(
        UserError, match=r"'support\.checks:contains': reads no answers: give its function an attribute"
    ):
        verifiers.read("x", asked, answer)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("raise", "no sandbox"),
        ("exit", "crashes (exit code 3)"),
        ("sleep", "takes more than 2 s"),
        ("text", "gives 'yes': not true, false, a number from 0 to 1 or None"),
        ("many", "gives '7': not true, false, a number from 0 to 1 or None"),
    ],
)
def test_one_that_fails_says_so_and_counts_as_wrong(
    completion: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verifiers = Verifiers({"x": "support.checks:misbehaves"}, seconds=2.0)
    assert verifiers.check("x", "a question\n" + "very " * 50, completion, None) == (0.0, "failed")
    line = capsys.readouterr().err
    start = ("a question\n" + "very " * 50)[: module.QUOTED] + "..."
    assert (
        line == f"gcrm: verifier support.checks:misbehaves failed at the prompt {start!r}: {reason}: counted as wrong\n"
    )
    assert verifiers.check("x", "q", "fine", None) == RIGHT
    assert verifiers.counts == {"failed": 1, "verified": 1}


@pytest.mark.parametrize("kind", ["bool_", "int64", "float32", "float64"])
def test_numbers_of_numpy_count_as_any(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    verifiers = Verifiers({"x": "support.checks:of_numpy"})
    assert verifiers.check("x", "q", f"{kind} 1", None) == RIGHT
    assert verifiers.check("x", "q", f"{kind} 0", None) == WRONG
    if kind.startswith("float"):
        assert verifiers.check("x", "q", f"{kind} 0.5", None) == (0.5, "verified")
    assert capsys.readouterr().err == ""
    if kind != "bool_":
        assert verifiers.check("x", "q", f"{kind} 7", None) == (0.0, "failed")
        assert "gives '7" in capsys.readouterr().err


def test_many_failures_are_counted_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    verifiers = Verifiers({"x": "support.checks:misbehaves"})
    for _ in range(module.LINES + 5):
        verifiers.check("x", "q", "raise", None)
    assert capsys.readouterr().err.count("\n") == module.LINES
    assert verifiers.counts["failed"] == module.LINES + 5


def test_a_pattern_without_end_and_a_reference_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    verifiers = Verifiers({"x": "regex:(a+)+$"}, seconds=1.0)
    assert verifiers.check("x", "q", "a" * 40 + "b", "a") == (0.0, "failed")
    assert verifiers.check("x", "q", "a", None) == (0.0, "failed")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("'q': ")[1] for line in lines] == [
        "takes more than 1 s: counted as wrong",
        "the reference is missing: counted as wrong",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "is not one of math, arithmetic, regex:PATTERN and MODULE:FUNCTION"),
        ("regex:(", "missing \\)"),
        ("no_such_module:check", "No module named 'no_such_module'"),
        ("support.checks:nothing", "has no attribute 'nothing'"),
        ("support.checks:os", "is not a function"),
    ],
)
def test_one_that_cannot_be_loaded_is_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^verifier '{name}' of task 'x': .*{message}".replace("(' of", r"\(' of")):
        Verifiers({"x": name})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"math-verify is not installed: pip install 'gcrm-fast\[math\]'"):
        module._math()


def test_options() -> None:
    assert parse_verifiers(["math"]) == {"": "math"}
    assert parse_verifiers(["a=math", "b=my.mod:f"]) == {"a": "math", "b": "my.mod:f"}
    assert parse_verifiers(["regex:x=(.*)"]) == {"": "regex:x=(.*)"}
    assert parse_verifiers(["a=regex:x=(.*)"]) == {"a": "regex:x=(.*)"}
    for wrong in (["a="], ["a=math", "a=arithmetic"], ["math", "arithmetic"]):
        with pytest.raises(UserError, match="must be TASK=VERIFIER, with each task once"):
            parse_verifiers(wrong)
    assert json.loads(module._work("check", "arithmetic", "a=1,b=2:a+b?", "1+2=3;", None)) == 1.0
