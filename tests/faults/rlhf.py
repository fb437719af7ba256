"""Faults planted in rlhf/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "rewards: Q at the first token": (
        "gcrm_fast/rlhf/trl.py",
        "j.q_Gn[0, -1]",
        "j.q_Gn[0, 0]",
        "tests/rlhf/test_trl.py -k second_signal",
    ),
    "rewards: cut completions taken for ended": (
        "gcrm_fast/rlhf/trl.py",
        "bool(ids) and ids[-1] not in self.ends",
        "False",
        "tests/rlhf/test_trl.py -k length_limit",
    ),
    "verifiers: one that fails counts as right": (
        "gcrm_fast/rlhf/verifiers.py",
        "verdict = Verdict(answer or 0.0, kind",
        "verdict = Verdict(1.0 if kind else answer or 0.0, kind",
        "tests/rlhf/test_verifiers.py -k one_that_fails",
    ),
    "verifiers: the first match counts": (
        "gcrm_fast/rlhf/verifiers.py",
        "matches[-1][",
        "matches[0][",
        "tests/rlhf/test_verifiers.py -k patterns",
    ),
    "verifiers: no time limit": (
        "gcrm_fast/rlhf/verifiers.py",
        "_process(self.seconds, request",
        "_process(10 * self.seconds, request",
        "tests/rlhf/test_verifiers.py -k pattern_without_end",
    ),
    "hybrid: raw rewards instead of the difference from the reference": (
        "gcrm_fast/rlhf/hybrid.py",
        "    difference = reward - reference\n",
        "    difference = reward\n",
        "tests/rlhf/test_hybrid.py -k score_of_its_task",
    ),
    "hybrid: the worst response is the reference": (
        "gcrm_fast/rlhf/hybrid.py",
        "best = max(",
        "best = min(",
        "tests/rlhf/test_hybrid.py -k best_of_several",
    ),
    "hybrid: references are cut with their completions": (
        "gcrm_fast/rlhf/trl.py",
        "cuts[i] and text is completions[i] for",
        "cuts[i] for",
        "tests/rlhf/test_hybrid.py -k cut_completion",
    ),
    "serve: references are cut with their completions": (
        "gcrm_fast/inference/server.py",
        "cuts[i] and text is completions[i] for",
        "cuts[i] for",
        "tests/inference/test_serve.py -k hybrid_reward",
    ),
    "samples: one sample per prompt is enough": (
        "gcrm_fast/rlhf/samples.py",
        "if len(completions) < 2:",
        "if len(completions) < 1:",
        "tests/rlhf/test_samples.py -k what_is_refused",
    ),
    "samples: the end token of another tokenizer is text": (
        "gcrm_fast/rlhf/samples.py",
        "if end and end[1] not in known:",
        "if False:",
        "tests/rlhf/test_samples.py -k another_tokenizer",
    ),
    "samples: the worst reference counts": (
        "gcrm_fast/rlhf/samples.py",
        "best = max(references)",
        "best = min(references)",
        "tests/rlhf/test_samples.py -k by_their_best",
    ),
    "select: places among all prompts instead of their domain": (
        "gcrm_fast/rlhf/selection.py",
        "own = np.flatnonzero(np.array(groups) == group)",
        "own = np.arange(len(groups))",
        "tests/rlhf/test_selection.py -k places",
    ),
    "select: the highest are kept": (
        "gcrm_fast/rlhf/selection.py",
        "kept_N = places_N < keep",
        "kept_N = places_N > 1 - keep",
        "tests/rlhf/test_selection.py -k lowest_share",
    ),
    "select: every pass of a curriculum in the same order": (
        "gcrm_fast/rlhf/selection.py",
        "(seed, number, start // len(own))",
        "(seed, number)",
        "tests/rlhf/test_selection.py -k stages",
    ),
    "select: prompts that no sample solves stay": (
        "gcrm_fast/commands/select.py",
        'unsolved_N = np.array([row["solved"] is False for row in found])',
        "unsolved_N = np.zeros(len(found), dtype=bool)",
        "tests/commands/test_select.py -k verifier",
    ),
    "select: finished windows are scored again": (
        "gcrm_fast/commands/windows.py",
        "range(done.windows * WINDOW, len(samples), WINDOW)",
        "range(0, len(samples), WINDOW)",
        "tests/commands/test_select.py -k resumes",
    ),
}
