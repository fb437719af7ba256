"""Tables of what bench/gpu.py measured: all of it for docs/performance.md, a few lines for README.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu:begin (written by python bench/gpu.py --docs) -->", "<!-- gpu:end -->"
NOT_MEASURED = "Not yet measured on a GPU."
HIDDEN = ("t", "part", "what", "trace", "config", "parts", "right", "where")  # of a line, in the table
NOTES = ("began", "done", "begin")  # lines that say how the measuring went


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(cell, value))
    return str(value)


def result(row: Mapping[str, Any]) -> str:
    """The numbers of a line as words."""
    shown = [f"{name} {cell(value)}" for name, value in row.items() if name not in HIDDEN]
    return ("" if row.get("right") is not False else "WRONG: ") + ", ".join(shown)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each result, for a terminal."""
    shown = [row for row in rows if row["what"] not in NOTES]
    width = max((len(row["what"]) for row in shown), default=0)
    return "\n".join(f"{row['part']:14} {row['what']:{width}}  {result(row)}" for row in shown)


def newest(results: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The latest file and its lines."""
    paths = sorted(results.glob("gpu-*.jsonl"), key=lambda path: path.stem[-10:])  # names end in the date
    if not paths:
        return None
    return paths[-1], [json.loads(line) for line in paths[-1].read_text(encoding="utf-8").splitlines()]


def write(root: Path, results: Path) -> None:
    """Replaces what stands between the markers of README.md and docs/performance.md."""
    found = newest(results)
    for path, part in ((root / "README.md", short), (root / "docs" / "performance.md", full)):
        text = path.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        path.write_text(f"{head}{BEGIN}\n{part(*found) if found else NOT_MEASURED}\n{END}{tail}", encoding="utf-8")


def origin(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    begin = next(row for row in rows if row["what"] == "begin")
    return (
        f"{begin['device']}, torch {begin['torch']}, triton {begin['triton']}, {begin['date']}, "
        f"commit {begin['commit']}, kernels {begin['kernels']}; `bench/results/{path.name}`"
    )


def full(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [row for row in rows if row["what"] not in (*NOTES, "kernel")]
    body = [f"| {row['part']} | {row['what']} | {result(row)} |" for row in shown]
    return "\n".join([origin(path, rows), "", "| part | what | result |", "|---|---|---|", *body])


def short(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The step, against padded transformers and TRL; the 8b shape; the contrastive loss; the tests."""
    ours = latest(rows, "step", shape="100/225", **{"tokens per pack": 16_384})
    naive = max((row for row in rows if row["what"] == "padded" and "pairs/s" in row), key=speed, default=None)
    trl = latest(rows, "TRL", **{"as shipped": True})
    wide = latest(rows, "8b shape, 8 layers")
    loss = latest(rows, "contrastive: ours", N=512, states="rows")
    tests = latest(rows, "tests")
    said = []
    if ours:
        others = {"padded transformers at its best": naive, "TRL as shipped": trl}
        against = [f"{speed(ours) / speed(row):.1f} times {name}" for name, row in others.items() if row]
        said.append(f"- step, 1b shape: {speed(ours):.0f} pairs/s, MFU {ours['MFU %']:.0f}%; {', '.join(against)}")
    if wide:
        said.append(f"- step, 8b shape with 8 of its 32 layers: {speed(wide):.0f} pairs/s, MFU {wide['MFU %']:.0f}%")
    if loss:
        said.append(f"- contrastive loss, N=512 S=16 H=4096: {loss['forward+backward ms']:.2f} ms, "
                    f"{loss['x naive']:.0f} times naive, {loss['% of copy']:.0f}% of the rate of a copy")  # fmt: skip
    if tests and "passed" in tests:
        said.append("- tests on the GPU: {passed} passed, {failed} failed, {skipped} skipped".format(**tests))
    return "\n".join([*said, f"- {origin(path, rows)}"])


def latest(rows: Sequence[Mapping[str, Any]], what: str, **values: Any) -> Mapping[str, Any] | None:
    fitting = (row for row in reversed(rows) if row["what"] == what)
    return next((row for row in fitting if all(row.get(key) == value for key, value in values.items())), None)


def speed(row: Mapping[str, Any]) -> float:
    return row["pairs/s"]
