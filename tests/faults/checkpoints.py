"""Faults planted in checkpoints/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "norm epsilon of another model": (
        "gcrm_fast/checkpoints/config_json.py",
        "**windows[family.sliding_window],",
        '**windows[family.sliding_window],\n        "rms_norm_eps": 0.1,',
        "tests/model/test_parity.py",
    ),
    "reward scaled by a sigmoid in servers": (
        "gcrm_fast/checkpoints/config_json.py",
        '"problem_type": "regression",',
        "",
        "tests/model/test_parity.py",
    ),
    "missing trunk tensor initialized again": (
        "gcrm_fast/checkpoints/weights.py",
        "    if missing := [key for key in source.values() if key not in stored]:\n",
        "    source = {name: key for name, key in source.items() if key in stored}\n    if missing := []:\n",
        "tests/data/test_bad_input.py -k missing",
    ),
    "lost head of a classifier initialized again": (
        "gcrm_fast/checkpoints/weights.py",
        '"Classification" in',
        '"Never" in',
        "tests/data/test_bad_input.py -k classifier",
    ),
    "tensors without a place ignored": (
        "gcrm_fast/checkpoints/weights.py",
        "    if rest:\n",
        "    if False:\n",
        "tests/data/test_bad_input.py -k unknown",
    ),
    "shape of a tensor not checked": (
        "gcrm_fast/checkpoints/weights.py",
        "if tensor.shape != tuple(shape):",
        "if False:",
        "tests/data/test_bad_input.py -k shape",
    ),
    "dtype of a tensor not checked": (
        "gcrm_fast/checkpoints/weights.py",
        "if tensor.dtype not in FLOATS:",
        "if False:",
        "tests/data/test_bad_input.py -k int8",
    ),
    "every rank reads whole tensors": (
        "gcrm_fast/checkpoints/weights.py",
        "file.get_slice(key)[rows]",
        "file.get_tensor(key)[rows]",
        "tests/checkpoints/test_checkpoint.py",
    ),
    "tied embedding under the name of lm_head not found": (
        "gcrm_fast/checkpoints/weights.py",
        'source["model.embed_tokens.weight"] = "lm_head.weight"',
        "pass",
        "tests/model/test_parity.py -k tied",
    ),
    "head_dim of config.json ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        '_field(raw, path, "head_dim", int, hidden // n_heads)',
        "hidden // n_heads",
        "tests/model/test_parity.py",
    ),
    "families: an absent field is Llama's": (
        "gcrm_fast/checkpoints/config_json.py",
        "raw = {**family.defaults, **raw}",
        'raw = {"sliding_window": None, **raw}',
        "tests/model/test_families.py -k absent",
    ),
    "families: Mistral's window lost on the way out": (
        "gcrm_fast/checkpoints/config_json.py",
        '{"sliding_window": config.sliding_window}',
        '{"sliding_window": None}',
        "tests/model/test_families.py -k in_and_out",
    ),
    "families: windows in some layers ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        "if window < positions:",
        "if False:",
        "tests/model/test_families.py -k some_layers",
    ),
    "rope scaling of transformers 4 ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        'else "rope_scaling"',
        'else "rope_parameters"',
        "tests/model/test_parity.py",
    ),
    "older name of the rope type ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        'parameters.get("type", "default")',
        '"default"',
        "tests/model/test_parity.py",
    ),
    "rope theta of transformers 5 ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        '**raw, **parameters}, path, "rope_theta"',
        '**raw}, path, "rope_theta"',
        "tests/model/test_parity.py",
    ),
    "another model's goal is taken": (
        "gcrm_fast/checkpoints/goals.py",
        'if metadata["fingerprint"] != fingerprint:',
        "if False:",
        "tests/evaluation/test_goals.py -k another",
    ),
    "saved: a single file without an index": (
        "gcrm_fast/checkpoints/saving.py",
        "    if not path.exists():\n",
        "    if False:\n",
        "tests/checkpoints/test_saved_for_others.py -k vllm",
    ),
    "saved: the template ends in a newline after the reward": (
        "gcrm_fast/checkpoints/saving.py",
        "tokenizer.chat_template = ending_at_the_reward(tokenizer)",
        "pass",
        "tests/checkpoints/test_saved_for_others.py -k template",
    ),
    "a million layers are built before the files are read": (
        "gcrm_fast/checkpoints/weights.py",
        "if config.num_hidden_layers > max(layers, MOST_LAYERS):",
        "if False:",
        "tests/checkpoints/test_saved_for_others.py -k sizes",
    ),
}
