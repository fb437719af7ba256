"""``gcrm vote``: answers questions by votes among many samples, with and without a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gcrm_fast.commands.options import VoteOptions
from gcrm_fast.commands.shared import (
    groups_of,
    limited,
    members_of,
    open_model,
    questions_of,
    records,
    text_of,
    truth_of,
)
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.tables import columns, number
from gcrm_fast.data.records import Candidate
from gcrm_fast.evaluation.measures import halves
from gcrm_fast.evaluation.plots import plot_savings
from gcrm_fast.evaluation.results import Row, check_folder, write_rows
from gcrm_fast.evaluation.voting import Question, Result, Saving, chosen_threshold, results, saving, thresholds
from gcrm_fast.inference.candidates import Judgement, judge

LABEL = "is_correct"  # as the published code reads it


def answer_of(candidate: Candidate, name: str) -> str:
    """A sample's answer, "" if it has none."""
    value = candidate.field(name, "named by --answer")
    return "" if value is None else text_of(candidate, name, "--answer")


def expected_of(candidates: Sequence[Candidate], questions: Sequence[str], name: str) -> dict[str, str]:
    """The right answer of each question. Raises UserError if one is missing, or if samples state different ones."""
    expected: dict[str, str] = {}
    for candidate, question in zip(candidates, questions, strict=True):
        answer = text_of(candidate, name, "--expected")
        if not answer:
            raise UserError(f"{candidate.where}: field '{name}' is empty: every question needs its right answer")
        if expected.setdefault(question, answer) != answer:
            raise UserError(
                f"{candidate.where}: field '{name}' is {answer[:20]!r}, but {expected[question][:20]!r} in another "
                "sample of the question: correct it, or identify questions by a field with --question"
            )
    return expected


def label_of(candidate: Candidate, right: bool) -> bool:
    """The record's own label of a sample; ``right``, whether its answer is the expected one, if it has none."""
    if candidate.fields.get(LABEL) is None:
        return right
    return truth_of(candidate, LABEL, "the label of a sample")


def gather(
    questions: Sequence[str],
    answers: Sequence[str],
    expected: dict[str, str],
    correct: Sequence[bool],
    judged: Sequence[Judgement],
) -> dict[str, Question]:
    """The samples of each question."""
    samples: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        samples.setdefault(question, []).append(i)
    return {
        question: Question(
            expected=expected[question],
            answers=[answers[i] for i in own],
            rewards_n=np.array([judged[i].reward_n[-1] for i in own], dtype=np.float64),
            q_n=[judged[i].q_n for i in own],
            correct=[correct[i] for i in own],
        )
        for question, own in samples.items()
    }


@dataclass(frozen=True, kw_only=True)
class Election:
    """The votes on one group's questions at one threshold, and what filtering saves at this and other thresholds."""

    group: str
    samples: int
    results: list[Result]
    saving: Saving
    curve: list[Saving]


def elect(group: str, questions: dict[str, Question], threshold: float | Literal["auto"], top_k: int) -> Election:
    """The votes on a group's questions; with --threshold auto, on the half that the threshold was not chosen on."""
    reported = list(questions.values())
    if threshold == "auto":
        taken_Q = halves(list(questions))
        threshold = chosen_threshold([q for q, taken in zip(reported, taken_Q, strict=True) if not taken])
        reported = [q for q, taken in zip(reported, taken_Q, strict=True) if taken]
    return Election(
        group=group,
        samples=sum(len(question.answers) for question in reported),
        results=results(reported, threshold, top_k),
        saving=saving(reported, threshold),
        curve=[saving(reported, value) for value in thresholds(reported)],
    )


def rows_of(source: str, election: Election) -> list[Row]:
    group, chosen = election.group, election.saving
    rows = [
        Row(source, group, "questions", election.results[0].questions),
        Row(source, group, "samples", election.samples),
        Row(source, group, "threshold", chosen.threshold),
        Row(source, group, "dropped", chosen.dropped),
        Row(source, group, "tokens_saved", chosen.saved),
        Row(source, group, "tokens_saved_as_released", chosen.saved_as_released),
        Row(source, group, "none_left", chosen.none_left),
    ]
    for result in election.results:
        rows.append(Row(source, group, f"accuracy:{result.name}", result.accuracy, result.low, result.high))
        rows += [
            Row(source, group, f"{name}:{result.name}", value)
            for name, value in (("won", result.won), ("lost", result.lost), ("p", result.p))
        ]
    for point in election.curve:
        rows += [
            Row(source, group, f"{name}@{point.threshold:.6g}", getattr(point, name))
            for name in ("accuracy", "dropped", "saved", "saved_as_released", "none_left")
        ]
    return rows


def table(elections: Sequence[Election], *, auto: bool) -> str:
    """The printed summary: a line per group and vote, then a line per group on what filtering saves. ``auto``: the
    threshold was."""
    lines, savings = [], []
    for election in elections:
        for r in election.results:
            accuracy = f"{number(r.accuracy)} [{number(r.low)}, {number(r.high)}]"
            lines.append([f"{election.group}: {r.name}", accuracy, str(r.won), str(r.lost), f"{r.p:.2g}"])
        chosen = election.saving
        shares = [f"{100 * share:.1f}%" for share in chosen[2:]]
        savings.append(
            [
                election.group,
                str(election.results[0].questions),
                str(election.samples),
                number(chosen.threshold),
                *shares,
            ]
        )
    head = ["", "questions", "samples", "threshold", "dropped", "tokens saved", "as released", "unfiltered"]
    notes = []
    if auto:
        notes.append(
            "--threshold auto: the tables report one half of each group's questions; the other half chose its threshold"
        )
    if any(election.saving.none_left for election in elections):
        notes.append("unfiltered: questions whose samples all fall below the threshold; none of theirs is dropped")
    if all(election.samples == election.results[0].questions for election in elections):
        notes.append("no question has more than one sample, so that every vote gives the same answers")
    tables = [columns(["", "accuracy", "won", "lost", "p"], lines), columns(head, savings), "\n".join(notes)]
    return "\n\n".join(filter(None, tables))


def vote(options: VoteOptions) -> None:
    """Reads and checks the file, then scores it. Raises UserError."""
    check_folder(options.output, options.overwrite)
    model, goal_D = open_model(options)

    def check(candidate: Candidate) -> None:
        questions_of([candidate], options.question)
        answer_of(candidate, options.answer)
        expected_of([candidate], [candidate.prompt], options.expected)
        label_of(candidate, right=False)
        groups_of([candidate], options.by)

    candidates = [candidate for of_record in records(options.data, model, options, check) for candidate in of_record]
    candidates = limited(candidates, questions_of(candidates, options.question), options.limit)
    questions = questions_of(candidates, options.question)
    answers = [answer_of(candidate, options.answer) for candidate in candidates]
    expected = expected_of(candidates, questions, options.expected)
    correct = [
        label_of(candidate, answer == expected[question])
        for candidate, answer, question in zip(candidates, answers, questions, strict=True)
    ]
    parts = members_of(groups_of(candidates, options.by), len(candidates))
    members = {group: np.flatnonzero(mask_N) for group, mask_N in parts.items()}
    for group, own in members.items() if options.threshold == "auto" else ():
        if len(set(halves([questions[i] for i in own]))) < 2:
            raise UserError(f"--threshold auto: {group} has too few questions to split in two: give a number")
    with written_aside(options.output) as folder:
        folder.mkdir(parents=True)
        judged = judge(model, candidates, goal_D)
        elections = []
        for group, own in members.items():
            own_questions, own_answers = [questions[i] for i in own], [answers[i] for i in own]
            of_group = gather(own_questions, own_answers, expected, [correct[i] for i in own], [judged[i] for i in own])
            elections.append(elect(group, of_group, options.threshold, options.top_k))
        plot_savings({e.group: (e.results, e.saving, e.curve) for e in elections}, folder / "savings.png")
        about = {
            "model": options.model,
            "fingerprint": model.fingerprint,
            "goal": options.goal or "the model's own",
            "threshold": options.threshold,
            "tested": "won and lost questions against the plain majority (the released metric against itself without "
            "the filter): exact McNemar test, two-sided",
        }
        write_rows(folder, [row for election in elections for row in rows_of(", ".join(options.data), election)], about)
    print(f"{table(elections, auto=options.threshold == 'auto')}\n")
    for note in model.q_notes:
        print(note)
    print(f"wrote {options.output}")
