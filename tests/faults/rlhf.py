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
}
