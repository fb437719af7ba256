"""Faults in the training on single completions: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "completions: the squared error's gradient halved": (
        "gcrm_fast/training/objectives.py",
        "    return (reward_N - target_N) ** 2\n",
        "    return (reward_N - target_N) ** 2 / 2\n",
        "tests/training/test_completion_losses.py -k formulas",
    ),
    "completions: a run resumes with other labels": (
        "gcrm_fast/training/prepare.py",
        " + targets.tobytes() + more",
        " + more",
        "tests/training/test_completion_losses.py -k other_labels",
    ),
    "completions: wrong ones in the goal state": (
        "gcrm_fast/data/encoding.py",
        " and pair.target >= least]",
        "]",
        "tests/training/test_completion_losses.py -k at_least_the_mean",
    ),
    "completions: labels below 0 accepted": (
        "gcrm_fast/data/records.py",
        "if probability and not 0 <= target <= 1:",
        "if probability and not target <= 1:",
        "tests/data/test_judged_records.py -k named_by_file",
    ),
    "completions: compared states read too": (
        "gcrm_fast/training/prepare.py",
        "else Sampling(samples=0),",
        "else Sampling(),",
        "tests/training/test_completion_losses.py -k reads_no_other",
    ),
}
