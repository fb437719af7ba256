"""Faults planted in commands/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "families: a token classifier of another family": (
        "gcrm_fast/commands/export.py",
        '[config.family.class_name("ForTokenClassification")]',
        '["LlamaForTokenClassification"]',
        "tests/model/test_families.py -k token_classifiers",
    ),
    "a cut completion's state is in the goal": (
        "gcrm_fast/commands/goals.py",
        "for candidate in wanted if not candidate.cut]",
        "for candidate in wanted]",
        "tests/evaluation/test_goals.py -k means",
    ),
    "the worse side of a pair is in the goal": (
        "gcrm_fast/commands/goals.py",
        'if candidate.name in ("rejected", "incorrect"):',
        "if False:",
        "tests/evaluation/test_goals.py -k conditions",
    ),
    "a resumed output keeps what came after its last whole window": (
        "gcrm_fast/commands/score.py",
        "file.truncate()",
        "file.seek(0, 2)",
        "tests/inference/test_scoring.py -k killed",
    ),
    "a partial output of other records is continued": (
        "gcrm_fast/commands/score.py",
        "if digest.hexdigest() != (done.records or hashlib.sha256().hexdigest()):",
        "if False:",
        "tests/inference/test_scoring.py -k something_else",
    ),
    "a partial output of other options is continued": (
        "gcrm_fast/commands/score.py",
        "if done.made_by.get(name) != made_by[name]]",
        "if name not in found.made_by]",
        "tests/inference/test_scoring.py -k something_else",
    ),
    "the processes' windows in another order": (
        "gcrm_fast/commands/score.py",
        'output.append(b"".join(parts), done)',
        'output.append(b"".join(parts[::-1]), done)',
        "tests/inference/test_scoring.py -k share_the_work",
    ),
    "a record's own reward is lost": (
        "gcrm_fast/commands/score.py",
        "taken = sorted(raw.keys() & added.keys())",
        "taken = list[str]()",
        "tests/inference/test_scoring.py -k bad_record",
    ),
    "judging: rejected completions taken for right": (
        "gcrm_fast/commands/shared.py",
        '"rejected": False',
        '"rejected": True',
        "tests/evaluation/test_evaluate.py -k reports",
    ),
    "judging: a limit cuts records in two": (
        "gcrm_fast/commands/evaluate.py",
        "[candidate.row for candidate in candidates]",
        "list(range(len(candidates)))",
        "tests/evaluation/test_evaluate.py -k whole_records",
    ),
    "vote: the threshold reported where it was chosen": (
        "gcrm_fast/commands/vote.py",
        "for q, taken in zip(reported, taken_Q, strict=True) if taken]",
        "for q, taken in zip(reported, taken_Q, strict=True) if not taken]",
        "tests/evaluation/test_vote.py -k automatic",
    ),
    "inspect: steps counted from 1 where they count from 0": (
        "gcrm_fast/commands/inspect.py",
        '"first_error_step": 0',
        '"first_error_step": 1',
        "tests/evaluation/test_page.py -k error_steps",
    ),
    "export: rewards not divided by their deviation": (
        "gcrm_fast/commands/export.py",
        'state["score.weight"].double() / scale.std',
        'state["score.weight"].double()',
        "tests/checkpoints/test_export.py -k standardized",
    ),
    "export: the shift with the wrong sign": (
        "gcrm_fast/commands/export.py",
        "return -self.mean / self.std",
        "return self.mean / self.std",
        "tests/checkpoints/test_export.py -k standardized",
    ),
    "export: goals under the fingerprint of the old weights": (
        "gcrm_fast/commands/export.py",
        "        after = write_model(",
        "        after = before\n        write_model(",
        "tests/checkpoints/test_export.py -k standardized",
    ),
    "export: a token classifier without its bias": (
        "gcrm_fast/commands/export.py",
        "tokenizer, bias=bias,",
        "tokenizer, bias=None,",
        "tests/checkpoints/test_export.py -k standardized",
    ),
    "export: an MLP head dropped": (
        "gcrm_fast/commands/export.py",
        'if config.head != "linear" and (',
        "if False and (",
        "tests/checkpoints/test_export.py -k one_line",
    ),
    "export: no line about a head that transformers cannot read": (
        "gcrm_fast/commands/export.py",
        "if not heads.KINDS[config.head].in_transformers:",
        "if False:",
        "tests/checkpoints/test_export.py -k goes_beside",
    ),
    "samples of problems that are trained on": (
        "gcrm_fast/commands/samples.py",
        'if options.side == "held-out":',
        'if options.side != "held-out":',
        "tests/data/test_arithmetic.py -k sides",
    ),
    "score: NaN passed on as it is": (
        "gcrm_fast/commands/score.py",
        "    record = finite(record)\n",
        "",
        "tests/commands/test_command_line.py -k strict_json",
    ),
}
