"""Faults planted in rlhf/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "latents: the squared distance": (
        "gcrm_fast/rlhf/latents.py",
        "np.linalg.solve(normal.factor_DD, centered_DN), axis=0)",
        "np.linalg.solve(normal.factor_DD, centered_DN), axis=0) ** 2",
        "tests/rlhf/test_latents.py -k weighted",
    ),
    "latents: of another model accepted": (
        "gcrm_fast/rlhf/latents.py",
        "if self.fingerprint != model.fingerprint:",
        "if False:",
        "tests/rlhf/test_latents.py -k other_weights",
    ),
    "latents: one reference for all classes": (
        "gcrm_fast/rlhf/latents.py",
        "own_ND = latents_ND[class_N == name]",
        "own_ND = latents_ND",
        "tests/rlhf/test_latents.py -k each_class",
    ),
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
}
