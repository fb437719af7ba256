"""Faults planted in experiments/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "localization: the error's own token counted before it": (
        "experiments/arithmetic_chain.py",
        "above(one)[one.error :].tolist()",
        "above(one)[one.error + 1 :].tolist()",
        "tests/experiments/test_experiments.py -k known_values",
    ),
    "localization: a drop from the error's next token on": (
        "experiments/arithmetic_chain.py",
        "values_n[:error, None] - values_n[error:]",
        "values_n[:error, None] - values_n[error + 1 :]",
        "tests/experiments/test_experiments.py -k drop",
    ),
    "localization: the error's token by its end": (
        "experiments/arithmetic_chain.py",
        'side="right"',
        'side="left"',
        "tests/experiments/test_experiments.py -k token_of_a_character",
    ),
    "position alone: wrong solutions counted": (
        "experiments/arithmetic_chain.py",
        'right = [own for c, own in zip(candidates, values, strict=True) if c.fields["is_correct"]]',
        "right = list(values)",
        "tests/experiments/test_experiments.py -k position_alone",
    ),
    "intervals over seeds of a normal distribution": (
        "experiments/summary.py",
        "scipy.stats.t.ppf((1 + COVERAGE) / 2, n - 1)",
        "scipy.stats.norm.ppf((1 + COVERAGE) / 2)",
        "tests/experiments/test_experiments.py -k students",
    ),
    "AUROC within groups over all groups together": (
        "experiments/objectives.py",
        "own = group_N == group",
        "own = group_N >= 0",
        "tests/experiments/test_experiments.py -k blind",
    ),
    "pairs: one side dropped": (
        "experiments/objectives.py",
        "for ok in (a and b, a and b)]",
        "for ok in (a, b)]",
        "tests/experiments/test_experiments.py -k whole",
    ),
    "policies: the first token of a solution not counted": (
        "experiments/policies.py",
        "(places >= torch.tensor(prompts)[:, None])",
        "(places > torch.tensor(prompts)[:, None])",
        "tests/experiments/test_experiments.py -k every_token_of_the_solutions",
    ),
    "policies: the last percentage written at once": (
        "experiments/policies.py",
        "while self.wanted and right >= self.wanted[0] / 100:",
        "while self.wanted and right >= min(self.wanted) / 1000:",
        "tests/experiments/test_experiments.py -k reach_a_percentage",
    ),
    "live: the worst of the samples": (
        "experiments/live.py",
        "np.argsort(scores)[::-1]",
        "np.argsort(scores)",
        "tests/experiments/test_experiments.py -k best_and_the_most_common",
    ),
    "live: tokens of one sample counted as one": (
        "experiments/live.py",
        'sizes_S = tokens_S / self.values(UNSTEERED, "length").mean(1)',
        "sizes_S = tokens_S / 1",
        "tests/experiments/test_experiments.py -k same_number_of_tokens",
    ),
    "live: the controls have the goal itself": (
        "experiments/live.py",
        "goals.shuffled(seed) if arm.endswith(SHUFFLED) else goals",
        "goals",
        "tests/experiments/test_experiments.py -k live_from_policies",
    ),
    "TRL's losses of pairs in another order": (
        "experiments/same_as_trl.py",
        "for i in range(prepared.steps) for group",
        "for i in reversed(range(prepared.steps)) for group",
        "tests/experiments/test_experiments.py -k of_trl_at_each_step",
    ),
    "loop: finished rows are computed a second time": (
        "experiments/rlhf_loop.py",
        'if any((row["seed"], row["arm"]) == (seed, arm) for row in found["rows"]):',
        "if False:",
        "tests/experiments/test_rlhf_loop.py -k finished_rows",
    ),
    "loop: one seed is enough for a claim": (
        "experiments/rlhf_loop.py",
        'verdict = "shown" if mean > half',
        'verdict = "shown" if mean > 0',
        "tests/experiments/test_rlhf_loop.py -k needs_three_seeds",
    ),
}
