"""Faults planted in what the live readers share with scores: name -> (file, text, replacement, test that must turn
red)."""

FAULTS = {
    "live: special tokens of a chat template spelled out": (
        "gcrm_fast/data/chat.py",
        "return Rendered(asked), [",
        "return asked, [",
        "tests/data/test_special_tokens.py -k messages_as_scores_do",
    ),
    "live: an answer to messages ends with eos": (
        "gcrm_fast/inference/streaming.py",
        'if not answer or model.end.kind != "eos":',
        "if True:",
        "tests/inference/test_sessions.py -k chat_template_ends_it",
    ),
    "live: a foreign model reads messages as text": (
        "gcrm_fast/inference/judging.py",
        "as_text(self.model.tokenizer, own.prompt.given, row.text)",
        "(own.prompt.text, row.text)",
        "tests/inference/test_decoding.py -k messages_to_a_reward_model",
    ),
    "live: a stop token of the policy alone is read": (
        "gcrm_fast/inference/judging.py",
        "[token for token in row.ids[own.seen :] if token not in self.unread]",
        "row.ids[own.seen :]",
        "tests/inference/test_decoding.py -k policy_alone",
    ),
    "live: a prompt too long for the reward model is found while others are written": (
        "gcrm_fast/inference/judging.py",
        "if self.one_tokenizer and window and len(ids) + new > window:",
        "if False:",
        "tests/inference/test_decoding.py -k before_the_first_token",
    ),
    "latents: values that are not finite": (
        "gcrm_fast/inference/scoring.py",
        "if wrong_N.any():",
        "if False:",
        "tests/inference/test_scoring.py -k must_not_score",
    ),
    "ensemble: forgets what is known of the Q-values": (
        "gcrm_fast/inference/ensembles.py",
        "        first.q_verdict,\n",
        "",
        "tests/inference/test_ensembles.py -k known_of_the_q_values",
    ),
    "generate: a run without a finished prompt says that it can be resumed": (
        "gcrm_fast/commands/generate.py",
        'return "no prompt is finished, nothing is kept"',
        "pass",
        "tests/commands/test_generate.py -k nothing_is_kept",
    ),
    "inspect: no reason where every record is skipped": (
        "gcrm_fast/commands/inspect.py",
        "    check_left(len(records), bad, options.data)\n",
        "",
        "tests/evaluation/test_tree.py -k another_name",
    ),
    "detectors: latents of two values end in a traceback": (
        "gcrm_fast/evaluation/detectors.py",
        "except np.linalg.LinAlgError:",
        "except FloatingPointError:",
        "tests/evaluation/test_detectors.py -k refused_or_said",
    ),
}
