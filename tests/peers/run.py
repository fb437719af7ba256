"""Other projects' real code on small models of this one: what each computes, against what is computed here.

    make peers                       # all of them; the environments take half an hour to build, and 12 GB
    make peers ARGS="vllm trl"       # some

Each peer runs in an environment of its own (environments.py), as the program peer_NAME.py; what it answers is compared
here. results.json keeps the outcome, and the table of docs/integrations.md is written from it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from gcrm_fast import RewardModel, cli  # noqa: E402
from gcrm_fast.common.errors import UserError, one_line  # noqa: E402
from gcrm_fast.data.chat import as_text  # noqa: E402
from peers.environments import PEERS, python_of, version_of  # noqa: E402 (in tests/)
from peers.sample import write_models, write_preferences  # noqa: E402

RESULTS, PAGE = Path(__file__).parent / "results.json", ROOT / "docs" / "integrations.md"
HEADER = "| peer | what ran | model | largest difference | verdict |\n|---|---|---|---|---|\n"
TOLERANCE = 1e-4  # of a reward, in float32
Row = dict[str, str]


def render(rows: list[Row]) -> str:
    """The table of the docs."""
    lines = [f"| {r['peer']} | {r['what']} | {r['model']} | {r['difference']} | {r['verdict']} |\n" for r in rows]
    return HEADER + "".join(lines)


def in_page(page: str, rows: list[Row]) -> str:
    """The page with its table replaced."""
    return re.sub(re.escape(HEADER) + r"(\|.*\n)*", lambda _: render(rows), page)


def judged(answer: dict[str, Any], models: dict[str, Any]) -> tuple[str, str]:
    """(largest difference, verdict) of one answer of a peer."""
    if "said" in answer:
        agrees = answer["said"] == answer["documented"]
        return "", f"{answer['said']}, as documented" if agrees else f"differs: {answer['said']}"
    try:
        found, ours = answer["found"], rewards_here(answer, models)
    except UserError as error:
        return "", f"not read here: {one_line(error).replace(answer.get('folder', ''), 'the folder')}"
    differences = [np.abs(np.subtract(a, b)).max() for a, b in zip(found, ours, strict=True)]
    largest = float(np.max(differences))
    if np.isfinite(largest) and largest <= answer.get("tolerance", TOLERANCE):
        return f"{largest:.0e}", "equal"
    return f"{largest:.0e}", f"differs: {answer['known']}" if "known" in answer else "differs"


def rewards_here(answer: dict[str, Any], models: dict[str, Any]) -> list[Any]:
    """What this project computes: one reward per completion, or all of a text's tokens where the peer gave those."""
    known = models[answer["model"]]
    folder = answer.get("folder", known["folder"])
    model = RewardModel.from_pretrained(folder, end=answer.get("end", "auto"), device="cpu", dtype="float32")
    if "texts" in answer:
        prompts, completions = ([pair[side] for pair in answer["texts"]] for side in (0, 1))
    else:
        prompts, completions = ([case[name] for case in known["cases"]] for name in ("prompt", "completion"))
    per_token = isinstance(answer["found"][0], list)
    if per_token:
        prompts, completions = [""] * len(prompts), [p + c for p, c in zip(prompts, completions, strict=True)]
    texts = [as_text(model.tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
    encoded = model.encode([p for p, _ in texts], [c for _, c in texts], answer.get("cuts"))
    shift = json.loads((Path(folder) / "gcrm.json").read_text())["standardized"]["shift"] if "shifted" in answer else 0
    rewards = model.judge(encoded, per_token=per_token)
    if per_token:  # the peer also gives one at bos
        return [
            np.concatenate([given[: len(given) - len(j.rewards_n)], j.rewards_n])
            for given, j in zip(answer["found"], rewards, strict=True)
            if j.rewards_n is not None  # it was asked for
        ]
    return [j.reward + shift for j in rewards]


def prepared(work: Path) -> dict[str, Any]:
    """Models, exported folders and files of completions in ``work``."""
    models = write_models(work)
    for name in ("text", "chatml"):
        cases, completions = models[name]["cases"], work / f"{name}.jsonl"
        rows = [{"prompt": case["prompt"], "completion": case["completion"]} for case in cases]
        completions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        exported = str(work / f"{name}-openrlhf")
        options = ["--format", "openrlhf", "--dtype", "bfloat16", "--standardize", str(completions)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.run("export", [models[name]["folder"], "-o", exported, *options]) == 0
        models[name]["exported"] = exported
    write_preferences(work / "preferences.jsonl", models["chatml"]["cases"])
    return models


@contextlib.contextmanager
def serving(folder: str, ready: Path) -> Iterator[str]:
    """The address of a ``gcrm serve``."""
    command = [sys.executable, "-m", "gcrm_fast", "serve", folder, "--port", "0", "--ready-file", str(ready)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not ready.is_file() or not ready.read_text():
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"gcrm serve {folder}: did not start")
            time.sleep(0.2)
        yield ready.read_text().strip()
    finally:
        server.terminate()
        server.wait(60)


def run(key: str, models: dict[str, Any], work: Path) -> list[Row]:
    """One peer's rows. Whatever keeps it from running is its only row."""
    peer, answers, log = PEERS[key], work / f"{key}.json", work / f"{key}.log"
    row = {"peer": peer.name, "what": "nothing", "model": "", "difference": ""}
    try:
        python = python_of(key)
        row["peer"] = f"{peer.name} {version_of(python, peer.package)}"
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return [{**row, "verdict": f"not installed: {' '.join(last)}"}]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    program = Path(__file__).parent / peer.program
    with log.open("w") as file:
        done = subprocess.run(
            [python, program, work, answers], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        print(*lines[-20:], sep="\n", file=sys.stderr)
        return [{**row, "verdict": f"failed: {lines[-1] if lines else 'no output'}"}]
    rows = []
    for answer in json.loads(answers.read_text()):
        difference, verdict = judged(answer, models)
        what = {"what": answer["what"], "model": answer.get("model", "")}
        rows.append({**row, **what, "difference": difference, "verdict": verdict})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"{', '.join(PEERS)}; default: all")
    chosen = parser.parse_args(argv).peers or list(PEERS)
    if unknown := [key for key in chosen if key not in PEERS]:
        parser.error(f"no such peer: {unknown[0]}: choose from {', '.join(PEERS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        work = Path(folder)
        models = prepared(work)
        for name in models:
            models[name]["url"] = servers.enter_context(serving(models[name]["folder"], work / f"{name}.ready"))
        (work / "models.json").write_text(json.dumps(models))
        for key in chosen:
            results[key] = run(key, models, work)
            print(render(results[key])[len(HEADER) if key != chosen[0] else 0 :], end="", flush=True)
    results = {key: results[key] for key in PEERS if key in results}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    rows = [row for peer in results.values() for row in peer]
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(row["verdict"] == "differs" or row["verdict"].startswith(("failed", "not ")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
