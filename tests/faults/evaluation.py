"""Faults planted in evaluation/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "judging: intervals draw completions": (
        "gcrm_fast/evaluation/measures.py",
        "_, number_N = np.unique(question_N, return_inverse=True)",
        "number_N = np.arange(len(question_N))",
        "tests/evaluation/test_judging.py -k draw_questions",
    ),
    "judging: ties count for nothing in an interval": (
        "gcrm_fast/evaluation/measures.py",
        "(below[:, above] + below[:, level]) / 2",
        "below[:, above]",
        "tests/evaluation/test_judging.py -k weighed",
    ),
    "judging: a shortcut fitted on what it is judged on": (
        "gcrm_fast/evaluation/measures.py",
        "scores(~own_N)[own_N]",
        "scores(own_N)[own_N]",
        "tests/evaluation/test_judging.py -k groups_score_nothing",
    ),
    "judging: couples of different questions": (
        "gcrm_fast/evaluation/measures.py",
        "np.diff(question_N[order], prepend=-1)",
        "np.diff(question_N[order] * 0, prepend=-1)",
        "tests/evaluation/test_judging.py -k within",
    ),
    "judging: a tied pair counts whole": (
        "gcrm_fast/evaluation/measures.py",
        "+ 1) / 2\n    _, number",
        "+ 1) > 0\n    _, number",
        "tests/evaluation/test_judging.py -k ties_counts",
    ),
    "results: other files are overwritten": (
        "gcrm_fast/evaluation/results.py",
        "    if others:",
        "    if not others and others:",
        "tests/evaluation/test_evaluate.py -k unasked",
    ),
    "vote: samples without an answer are left alone": (
        "gcrm_fast/evaluation/voting.py",
        "any(answer for answer, kept in",
        "any(True for answer, kept in",
        "tests/evaluation/test_vote.py -k drops_none",
    ),
    "vote: the first tokens judged": (
        "gcrm_fast/evaluation/voting.py",
        "UNJUDGED = 5",
        "UNJUDGED = 0",
        "tests/evaluation/test_vote.py -k sixth",
    ),
    "vote: a Q-value at the threshold dropped": (
        "gcrm_fast/evaluation/voting.py",
        "question.lowest_q() >= threshold",
        "question.lowest_q() > threshold",
        "tests/evaluation/test_vote.py -k at_the_threshold",
    ),
    "vote: the token that fell below saved too": (
        "gcrm_fast/evaluation/voting.py",
        "len(q) - UNJUDGED - 1 - int",
        "len(q) - UNJUDGED - int",
        "tests/evaluation/test_vote.py -k first_below",
    ),
    "vote: all dropped": (
        "gcrm_fast/evaluation/voting.py",
        "if not any(answer for",
        "if False and any(answer for",
        "tests/evaluation/test_vote.py -k drops_all",
    ),
    "vote: ties not broken by reward": (
        "gcrm_fast/evaluation/voting.py",
        "reward_before + reward",
        "reward_before",
        "tests/evaluation/test_vote.py -k ties_by_summed",
    ),
    "vote: samples without an answer vote": (
        "gcrm_fast/evaluation/voting.py",
        "        if answer:\n",
        "        if True:\n",
        "tests/evaluation/test_vote.py -k empty_answers",
    ),
    "vote: weights depend on a constant": (
        "gcrm_fast/evaluation/voting.py",
        "softmax(question.rewards_n)",
        "question.rewards_n",
        "tests/evaluation/test_vote.py -k constant",
    ),
    "vote: the released metric takes ties for wrong": (
        "gcrm_fast/evaluation/voting.py",
        "len(answers) - len(wrong) >= max",
        "len(answers) - len(wrong) > max",
        "tests/evaluation/test_vote.py -k released_metric",
    ),
    "vote: the test counts questions that agree": (
        "gcrm_fast/evaluation/voting.py",
        "binomtest(won, won + lost)",
        "binomtest(won, len(right_Q))",
        "tests/evaluation/test_vote.py -k paired",
    ),
    "inspect: text not escaped": (
        "gcrm_fast/evaluation/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/evaluation/test_page.py -k escapes",
    ),
    "inspect: the token before a step marked": (
        "gcrm_fast/evaluation/page.py",
        'position, "right"',
        'position, "left"',
        "tests/evaluation/test_page.py -k steps_begin",
    ),
    "inspect: the difference counted from the prompt": (
        "gcrm_fast/evaluation/page.py",
        "a, b = one.ids[one.start :], other.ids[other.start :]",
        "a, b = one.ids, other.ids",
        "tests/evaluation/test_page.py -k first_difference",
    ),
    "halves: every held-out problem in the same one": (
        "gcrm_fast/evaluation/measures.py",
        ">> 16 & 1",
        "% 2",
        "tests/data/test_arithmetic.py -k halves",
    ),
}
