"""Faults planted in common/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "layers: scoring loads a plot library": (
        "gcrm_fast/common/tables.py",
        "from collections.abc import Sequence\n",
        ("from collections.abc import Sequence\nimport matplotlib\n"),
        "tests/test_layers.py -k scoring",
    ),
    "judging: ties count for nothing": (
        "gcrm_fast/common/statistics.py",
        "rankdata(score_N)",
        "rankdata(score_N, 'min')",
        "tests/evaluation/test_judging.py -k sklearn",
    ),
    "outputs written in place": (
        "gcrm_fast/common/files.py",
        'path.name + ".partial"',
        "path.name",
        "tests/commands/test_command_line.py",
    ),
    "what was half-written stays": (
        "gcrm_fast/common/files.py",
        "    finally:\n        _remove(partial)",
        "    finally:\n        pass",
        "tests/commands/test_command_line.py",
    ),
}
