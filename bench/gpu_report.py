"""Tables of what bench/gpu.py measured: everything for docs/performance.md, a few lines for README.md.

A file can hold several calls: where something was measured twice, the latest numbers count.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BEGIN, END = "<!-- gpu:begin (written by python bench/gpu.py --docs) -->", "<!-- gpu:end -->"
NOT_MEASURED = "Not yet measured on a GPU."
HIDDEN = ("t", "part", "what", "trace", "config", "parts", "right", "where", "begin")  # fields that the table omits
NOTES = ("began", "done", "begin")  # lines about the measuring itself
# Together with part and name these identify a measurement across calls.
SETTINGS = (
    *("shape", "tokens per pack", "tokens", "n", "N", "states", "dtype", "heads", "kv heads", "head size"),
    *("pairs per batch", "checkpointing", "as shipped", "batch", "block", "num_warps", "num_stages"),
)
STEP, WIDE, EVERY_PACK = "step", "8b shape, 8 layers", "variant: weights gathered for every pack"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(cell, value))
    return str(value)


def result(row: Mapping[str, Any]) -> str:
    """The numbers of a line as text."""
    shown = [f"{name} {cell(value)}" for name, value in row.items() if name not in HIDDEN]
    return ("" if row.get("right") is not False else "WRONG: ") + ", ".join(shown)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each result, for a terminal."""
    shown = [row for row in rows if row["what"] not in NOTES]
    width = max((len(row["what"]) for row in shown), default=0)
    return "\n".join(f"{row['part']:14} {row['what']:{width}}  {result(row)}" for row in shown)


def newest(results: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The lines of all files of the device that was measured last, oldest first, and the path or pattern of these."""
    dated = sorted(results.glob("gpu-*.jsonl"), key=lambda path: path.stem[-10:])  # names end in the date
    if not dated:
        return None
    device = dated[-1].stem[:-10]
    same = [path for path in dated if path.stem[:-10] == device]
    rows = [json.loads(line) for path in same for line in path.read_text(encoding="utf-8").splitlines()]
    return (same[0] if len(same) == 1 else results / f"{device}*.jsonl"), rows


def current(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the latest call for each measurement, part by part, each with its call's first line.

    A skipped part is listed unless some call finished it, a failed one unless a later call did.
    """
    kept: dict[tuple, list[dict[str, Any]]] = {}
    begin: Mapping[str, Any] = {}
    for row in rows:
        if row["what"] == "begin":
            begin = row
        elif row["what"] not in ("began", "done", "skipped", "failed"):
            lines = kept.setdefault((row["part"], row["what"], *map(row.get, SETTINGS)), [])
            if lines and lines[0]["begin"] is not begin:
                lines.clear()
            lines.append({**row, "begin": begin})
    for i, row in enumerate(rows):
        later = rows[i:] if row["what"] == "failed" else rows
        if row["what"] in ("skipped", "failed") and not any(
            r["part"] == row["part"] and r["what"] == "done" for r in later
        ):
            kept[row["part"], row["what"]] = [dict(row)]
    order = list(dict.fromkeys(row["part"] for row in rows))
    return sorted((row for lines in kept.values() for row in lines), key=lambda row: order.index(row["part"]))


def with_prediction(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each step that recomputes nothing the milliseconds that bench/step_model.py predicts from the rates in
    the same file."""
    product, copy = latest(rows, "matrix product", n=8192), latest(rows, "copy")
    if not product or not copy:
        return [dict(row) for row in rows]
    return [
        {**row, "predicted ms": predicted(row, product["tflops"], copy["tbps"])}
        if row["what"] in (STEP, WIDE, EVERY_PACK) and "ms" in row and row.get("recompute") == "none"
        else dict(row)
        for row in rows
    ]


def predicted(row: Mapping[str, Any], tflops: float, tbps: float) -> float:
    import step_model  # imports torch, which takes seconds

    begin = row["begin"]
    wide = replace(step_model.MODELS["8b"], num_hidden_layers=8)
    config = wide if row["what"] == WIDE else step_model.ModelConfig(**begin["config"])
    prompt, completion = map(int, row["shape"].split("/")) if "shape" in row else step_model.SHAPES[0]
    tokens, gather = row.get("tokens per pack", step_model.TOKENS), "block" if row["what"] == EVERY_PACK else "step"
    return step_model.predicted_ms(config, (prompt, completion), begin["pairs"], tokens, tflops, tbps, gather)


def write(root: Path, results: Path) -> None:
    """Replaces the text between the markers of README.md and docs/performance.md, and draws docs/speed.png."""
    found = newest(results)
    if found and (bars := contestants(found[1])):
        device = next(row["device"] for row in found[1] if row["what"] == "begin")
        chart(bars, root / "docs" / "speed.png", f"Training step, 1B shape, {device}")
    for path, part in ((root / "README.md", short), (root / "docs" / "performance.md", full)):
        text = path.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        path.write_text(f"{head}{BEGIN}\n{part(*found) if found else NOT_MEASURED}\n{END}{tail}", encoding="utf-8")


def contestants(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The training step of ours and of what people run, by name, as far as they were measured."""
    found = current(rows)
    named = {
        "ours": latest(found, STEP, shape="100/225", **{"tokens per pack": 16_384}),
        "padded transformers": max(
            (r for r in found if r["what"] == "padded" and "pairs/s" in r), key=speed, default=None
        ),
        "TRL, no checkpointing": latest(found, "TRL", **{"as shipped": False}),
        "TRL as shipped": latest(found, "TRL", **{"as shipped": True}),
    }
    return {name: row for name, row in named.items() if row and "pairs/s" in row}


def chart(bars: Mapping[str, Mapping[str, Any]], target: Path, title: str) -> None:
    """A bar of pairs/s for each contestant."""
    figure = Figure(figsize=(7, 1.9), layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(list(bars), [speed(row) for row in bars.values()], color=["C0", *["0.6"] * (len(bars) - 1)])
    axis.bar_label(drawn, fmt="%.0f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="pairs per second", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150, metadata={"Software": None})


def origin(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    calls = [row for row in rows if row["what"] == "begin"]
    device, torch, triton, date, commits, kernels = (
        ", ".join(dict.fromkeys(call[name] for call in calls))
        for name in ("device", "torch", "triton", "date", "commit", "kernels")
    )
    return (
        f"{device}, torch {torch}, triton {triton}, {date}, commit {commits}, kernels {kernels}; "
        f"`bench/results/{path.name}`"
    )


def full(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [row for row in with_prediction(current(rows)) if row["what"] != "kernel"]
    rows_of_docs = [{name: value for name, value in row.items() if name != "failing"} for row in shown]  # long names
    body = [f"| {row['part']} | {row['what']} | {result(row)} |" for row in rows_of_docs]
    return "\n".join([origin(path, rows), "", "| part | what | result |", "|---|---|---|", *body])


def short(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The step, against padded transformers and TRL; the 8b shape; the contrastive loss; the tests."""
    found = current(rows)
    steps = contestants(rows)
    ours, naive, trl = map(steps.get, ("ours", "padded transformers", "TRL as shipped"))
    wide = latest(found, WIDE)
    loss = latest(found, "contrastive: ours", N=512, states="rows")
    tests = latest(found, "tests")
    said = []
    if ours:
        others = {"padded transformers at its best": naive, "TRL as shipped": trl}
        against = [f"{speed(ours) / speed(row):.1f} times {name}" for name, row in others.items() if row]
        said.append(f"- step, 1b shape: {speed(ours):.0f} pairs/s, MFU {ours['MFU %']:.0f}%; {', '.join(against)}")
    if wide:
        said.append(f"- step, 8b shape with 8 of its 32 layers: {speed(wide):.0f} pairs/s, MFU {wide['MFU %']:.0f}%")
    if loss:
        said.append(
            f"- contrastive loss, N=512 S=16 H=4096: {loss['forward+backward ms']:.2f} ms, "
            f"{loss['x naive']:.0f} times naive, {loss['% of copy']:.0f}% of the rate of a copy"
        )
    if tests and "passed" in tests:
        said.append("- tests on the GPU: {passed} passed, {failed} failed, {skipped} skipped".format(**tests))
    return "\n".join([*said, f"- {origin(path, rows)}"])


def latest(rows: Sequence[Mapping[str, Any]], what: str, **values: Any) -> Mapping[str, Any] | None:
    fitting = (row for row in reversed(rows) if row["what"] == what)
    return next((row for row in fitting if all(row.get(key) == value for key, value in values.items())), None)


def speed(row: Mapping[str, Any]) -> float:
    return row["pairs/s"]
