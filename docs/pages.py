"""Pages of the site that are not files of docs/: the commands' help, and reports from elsewhere in the repository."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from gcrm_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ("experiments/arithmetic.md", "experiments/objectives.md", "bench/LOG.md")
EXAMPLES = tuple(f"examples/{path.name}" for path in (ROOT / "examples").iterdir() if path.is_file())
WIDTH = "72"  # columns of the help, which fit next to the navigation


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for name in REPORTS + EXAMPLES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "extending.md", content=extending()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave docs/, as they are in the repository, lead to the pages added above."""
    for name in REPORTS + EXAMPLES:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    return markdown


def command_line() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nThe help of each command, as `gcrm COMMAND --help` prints it.\n"]
    environment = {**os.environ, "COLUMNS": WIDTH, "NO_COLOR": "1"}
    for name in COMMANDS:
        command = [sys.executable, "-m", "gcrm_fast", name, "--help"]
        shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        parts.append(f"## gcrm {name}\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(parts)


def extending() -> str:
    """The section of CONTRIBUTING.md that says how to add things."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return "# Extending\n\n" + text.partition("## How to add\n")[2].partition("\n## ")[0]
