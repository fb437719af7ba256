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
    "options: ranges not checked": (
        "gcrm_fast/common/options.py",
        'next((str(one) for one in ranges if value not in one), "")',
        '""',
        "tests/commands/test_options.py -k range_is_checked",
    ),
    "options: sizes beyond any machine": (
        "gcrm_fast/training/config.py",
        "projection_size: Annotated[int, Range(least=0, greatest=2**16)]",
        "projection_size: Annotated[int, Range(least=0)]",
        "tests/commands/test_options.py -k types_and_sizes",
    ),
    "options: defaults in help not the preset's": (
        "gcrm_fast/common/command_line.py",
        "for words, layer in layers if words and field.name in layer",
        "for words, layer in layers[:1] if words and field.name in layer",
        "tests/commands/test_options.py -k defaults_come_from",
    ),
    "options: names of other programs unknown": (
        "gcrm_fast/common/command_line.py",
        "for ours, theirs in kind.ELSEWHERE.items()",
        "for ours, theirs in ()",
        "tests/commands/test_options.py -k wrong_call",
    ),
    "options: help loads torch": (
        "gcrm_fast/commands/options.py",
        "import importlib.util\n",
        "import importlib.util\nimport torch\n",
        "tests/commands/test_options.py -k no_torch",
    ),
    "messages obeyed by the terminal": (
        "gcrm_fast/common/errors.py",
        "c if c.isprintable() else",
        "c if True else",
        "tests/commands/test_command_line.py -k terminal",
    ),
    "packaging: a wheel without the page's template": (
        "pyproject.toml",
        '"py.typed", "*.jinja"',
        '"py.typed"',
        "tests/test_packaging.py -k wheel",
    ),
    "a pipe is read as a configuration": (
        "gcrm_fast/common/files.py",
        "if path.exists() and not (path.is_file() or path.is_dir()):",
        "if False:",
        "tests/commands/test_options.py -k no_regular_file",
    ),
    "an output replaces a device": (
        "gcrm_fast/common/files.py",
        "if path.exists() and not path.is_file():",
        "if False:",
        "tests/commands/test_options.py -k output_is",
    ),
    "tables: escapes of a record reach the terminal": (
        "gcrm_fast/common/tables.py",
        "[[printable(cell) for cell in line] for line in [head, *lines]]",
        "[list(line) for line in [head, *lines]]",
        "tests/common/test_tables.py -k orders",
    ),
    "progress: a line of a log per update": (
        "gcrm_fast/common/progress.py",
        '"mininterval": LOG_INTERVAL',
        '"mininterval": 0',
        "tests/common/test_progress.py -k first_and_last",
    ),
    "an interrupt says nothing": (
        "gcrm_fast/common/command_line.py",
        'print(f"\\n{prog}: interrupted; {kept}", file=sys.stderr, flush=True)',
        "pass",
        "tests/commands/test_options.py -k ctrl_c",
    ),
    "fields joined with commas are one field": (
        "gcrm_fast/common/options.py",
        'if any("," in value for value in values):',
        "if not values:",
        "tests/commands/test_options.py -k separated_with_spaces",
    ),
}
