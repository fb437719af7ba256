"""The Triton kernels compiled ahead of time, without a GPU: no spills, no atomics, tensor cores, shared memory."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from gcrm_kernels import launch
from support.training_runs import ROOT

pytestmark = [
    pytest.mark.skipif(not launch.HAS_TRITON, reason="triton is not installed"),
    pytest.mark.slow,
]


def resources(*options: str) -> list[dict[str, Any]]:
    """Rows of bench/kernel_resources.py, in a process of its own: interpreted and compiled kernels cannot share one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, str(ROOT / "bench" / "kernel_resources.py"), "--json", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("target", "dtypes", "samples"),
    [("sm_80", ["bf16"], [64]), ("sm_90", ["bf16", "fp32"], [16]), ("sm_90", ["fp16"], [64])],
)
def test_kernels_compile_without_spills_or_atomics(target: str, dtypes: list[str], samples: list[int]) -> None:
    rows = resources("--targets", target, "--dtypes", *dtypes, "--samples", *map(str, samples))
    names = {r["kernel"].split()[0] for r in rows}
    assert names == {"contrastive", "dense", "gather", "q_values", "rms_norm", "rotary", "swiglu"}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["instructions"]["atomic"] == 0, row
        # The others are sums of products, or elementwise.
        is_product = "forward paired" not in row["kernel"] and row["kernel"].split()[0] not in (
            "gather",
            "rms_norm",
            "rotary",
            "swiglu",
        )
        assert (row["instructions"]["tensor"] > 0) == ("fp32" not in row["kernel"] and is_product), row


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_kernels_compile_for_other_targets(target: str) -> None:
    rows = resources("--targets", target, "--dtypes", "bf16", "--samples", "16")
    assert rows
    assert all(row["shared"] <= row["shared_limit"] for row in rows)
    elementwise = [row for row in rows if row["kernel"].split()[0] in ("rms_norm", "rotary", "swiglu")]
    assert elementwise
    # At the widest row sm_100 spills two registers.
    assert all(row["stack"] <= (8 if "H=16384" in row["kernel"] else 0) for row in elementwise), elementwise
