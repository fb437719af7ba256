"""Compiles every Triton kernel ahead of time and prints the resources it needs: no GPU is used.

    python bench/kernel_resources.py [--targets sm_80 sm_90] [--dtypes bf16 fp16 fp32] [--samples 16 32 64] [--json]

A row is one kernel in one specialization for one target: registers per thread, stack bytes per thread (a spill shows
here), shared memory per program, warps, and the number of instructions of each kind. For sm_100 and gfx942 compilation
stops after the assembler. Needs triton without TRITON_INTERPRET.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("TRITON_INTERPRET is set: unset it, since interpreted kernels cannot be compiled")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcrm_kernels import (
    contrastive,
    reference,
    triton_contrastive,
    triton_dense,
    triton_gather,
    triton_qvalues,
    triton_rms_norm,
    triton_rotary,
    triton_swiglu,
)
from gcrm_kernels.launch import LaunchConfig

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_90", "sm_100")} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # bytes per program
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
INSTRUCTIONS = {
    "tensor": r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA)",
    "fma": r"\bFFMA",
    "load": r"\bLDG",
    "async_load": r"\bLDGSTS",
    "store": r"\bSTG",
    "wide": r"\.128\b",
    "atomic": r"\b(?:ATOM|RED)\b",
}
# Arguments that are divisible by 16 for the usual shapes
DIVISIBLE = ("width", "row_stride", "columns", "count", "q_stride", "k_stride", "v_stride")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Specialization:
    """A kernel and everything that its compilation depends on."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]  # of the arguments that are not float32 tensors, int32 numbers or constants
    num_warps: int
    num_stages: int


@dataclass
class Resources:
    """The resources of one compiled specialization."""

    kernel: str
    target: str
    warps: int
    registers: int | None = None
    stack: int | None = None
    shared: int = 0
    shared_limit: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def specializations(dtype: str, samples: list[int], target: str) -> Iterator[Specialization]:
    """Every kernel as launched for states of ``dtype`` on ``target``."""
    itemsize = ITEMSIZE[dtype]
    rows = dict.fromkeys(("rows_ptr", "starts_ptr", "offsets_ptr", "units_ptr"), "*i64")
    types = {**rows, "hidden_ptr": "*" + dtype, "out_ptr": "*" + dtype, "has_term_ptr": "*i1"}
    for s in samples:
        padded = triton_contrastive._padded(s)
        for grid in (True, False):
            form = f"{'grid' if grid else 'paired'} {dtype} S={s}"
            config = triton_contrastive.forward_candidates(s, itemsize, grid)[0]
            constants: dict[str, Any] = {"S": s, "SP": padded, "BLOCK_H": config.block, "GRID": grid}
            for mean_then_log in (False, True):
                name = f"contrastive forward {form} {'mean_then_log' if mean_then_log else 'log_then_mean'}"
                more = {"EPS": reference.EPS, "MEAN_THEN_LOG": mean_then_log, "PARTS": 1, "partials_ptr": None}
                if s == samples[0]:
                    yield Specialization(
                        f"{name} N=1",
                        triton_contrastive._contrastive_forward_kernel,
                        constants | more | {"n_pairs": 1},
                        types,
                        config.num_warps,
                        config.num_stages,
                    )
                yield Specialization(
                    name,
                    triton_contrastive._contrastive_forward_kernel,
                    constants | more,
                    types,
                    config.num_warps,
                    config.num_stages,
                )
            yield from split_specializations(form, constants, types, config, one=s == samples[0])
            config = triton_contrastive.backward_candidates(s, itemsize)[0]
            constants |= {"TILE": contrastive.TILE_ROWS, "BLOCK_H": config.block}
            if s == samples[0]:  # a number that is 1 becomes a constant when a kernel is launched
                yield Specialization(
                    f"contrastive backward {form} N=1",
                    triton_contrastive._contrastive_backward_kernel,
                    constants | {"n_pairs": 1},
                    types,
                    config.num_warps,
                    config.num_stages,
                )
            yield Specialization(
                f"contrastive backward {form}",
                triton_contrastive._contrastive_backward_kernel,
                constants,
                types,
                config.num_warps,
                config.num_stages,
            )
    types = {"grad_ptr": "*" + dtype, "out_ptr": "*" + dtype, "order_ptr": "*i64", "offsets_ptr": "*i64"}
    yield Specialization(
        f"gather backward {dtype}", triton_gather._add_rows_kernel, {"BLOCK": triton_gather.BLOCK}, types, 4, 3
    )
    types = {"states_ptr": "*" + dtype, "high_ptr": "*" + dtype, "low_ptr": "*" + dtype}
    for goals in (1, 64):
        config = triton_qvalues.candidates(itemsize)[0]
        tokens = triton_qvalues.tokens_per_program(config.block, itemsize)
        constants = {"EPS": reference.EPS, "BLOCK_T": tokens, "GP": max(16, goals), "BLOCK_D": config.block}
        constants |= {"goals": 1} if goals == 1 else {}
        yield Specialization(
            f"q_values {dtype} G={goals}",
            triton_qvalues._q_kernel,
            constants,
            types,
            config.num_warps,
            config.num_stages,
        )
    types = {"states_ptr": "*" + dtype, "out_ptr": "*" + dtype, "cu_seqlens_ptr": "*i32"}
    config = triton_dense.cosine_config(itemsize)
    for backward in (False, True):
        name = f"dense cosine {'backward' if backward else 'forward'} {dtype}"
        constants = {"BACKWARD": backward, "TILE": triton_dense.TILE, "BLOCK_D": config.block}
        yield Specialization(name, triton_dense._cosine_kernel, constants, types, config.num_warps, config.num_stages)
    config = triton_dense.gradient_config(itemsize)
    constants = {"TILE": triton_dense.TILE, "BLOCK_D": config.block}
    yield Specialization(
        f"dense gradient {dtype}", triton_dense._gradient_kernel, constants, types, config.num_warps, config.num_stages
    )

    yield from elementwise_specializations(dtype, TARGETS[target].warp_size)
    yield from rotary_specializations(dtype, TARGETS[target].warp_size)


def split_specializations(
    form: str, constants: dict[str, Any], types: dict[str, str], config: LaunchConfig, one: bool
) -> Iterator[Specialization]:
    """The forward of few pairs at H = 4096, in parts and then their sum; if ``one``, of one pair too."""
    launch = config.num_warps, config.num_stages
    parts, _ = triton_contrastive.column_parts(1, constants["S"], 4096)
    name = f"contrastive forward {form} of {parts} fp32 partials"
    cases: list[tuple[str, dict[str, Any]]] = [("", {}), (" N=1", {"n_pairs": 1})]
    for pairs, more in cases[: 1 + one]:
        kernel = triton_contrastive._contrastive_partial_kernel
        yield Specialization(f"contrastive forward {form} partial{pairs}", kernel, constants | more, types, *launch)
        for reduce in contrastive.REDUCTIONS:
            more = more | {"EPS": reference.EPS, "MEAN_THEN_LOG": reduce == "mean_then_log", "PARTS": parts}
            kernel = triton_contrastive._contrastive_forward_kernel
            yield Specialization(f"{name} {reduce}{pairs}", kernel, constants | more, types, *launch)


def elementwise_specializations(dtype: str, lanes: int) -> Iterator[Specialization]:
    """RMSNorm of the widths of a small, an 8B and a 405B Llama, in the forms that a model uses, and SwiGLU."""
    element = "*" + dtype
    types = dict.fromkeys(
        (
            "x_ptr",
            "residual_ptr",
            "weight_ptr",
            "y_ptr",
            "s_ptr",
            "grad_y_ptr",
            "grad_s_ptr",
            "out_ptr",
            "gate_ptr",
            "up_ptr",
            "grad_ptr",
            "dgate_ptr",
            "dup_ptr",
        ),
        element,
    )
    for width in (256, 4096, 16384):
        config = triton_rms_norm.candidates(width, lanes)[0]
        for residual in (False, True):
            form = f"{dtype} H={width}{' residual' if residual else ''}"
            constants = {"RESIDUAL": residual, "BLOCK_H": config.block}
            yield Specialization(
                f"rms_norm forward {form}",
                triton_rms_norm._rms_norm_forward_kernel,
                constants,
                types,
                config.num_warps,
                config.num_stages,
            )
            yield Specialization(
                f"rms_norm backward {form}",
                triton_rms_norm._rms_norm_backward_kernel,
                constants | {"WEIGHT": True},
                types,
                config.num_warps,
                config.num_stages,
            )
    config = triton_rms_norm.candidates(1, lanes)[0]  # a number that is 1 becomes a constant when a kernel is launched
    constants = {"RESIDUAL": False, "BLOCK_H": config.block, "width": 1}
    yield Specialization(
        f"rms_norm forward {dtype} H=1",
        triton_rms_norm._rms_norm_forward_kernel,
        constants,
        types,
        config.num_warps,
        config.num_stages,
    )
    constants = constants | {"WEIGHT": False, "tokens": 1, "rows": 1}
    yield Specialization(
        f"rms_norm backward {dtype} H=1 T=1",
        triton_rms_norm._rms_norm_backward_kernel,
        constants,
        types,
        config.num_warps,
        config.num_stages,
    )
    config = triton_swiglu.candidates()[0]
    for name, kernel in (
        ("forward", triton_swiglu._swiglu_forward_kernel),
        ("backward", triton_swiglu._swiglu_backward_kernel),
    ):
        for one in (False, True):
            constants = {"BLOCK": config.block} | ({"count": 1} if one else {})
            yield Specialization(
                f"swiglu {name} {dtype}{' of one element' if one else ''}",
                kernel,
                constants,
                types,
                config.num_warps,
                config.num_stages,
            )


def rotary_specializations(dtype: str, lanes: int) -> Iterator[Specialization]:
    """The heads of a 1B, an 8B and a 405B Llama, equally many key and query heads, and one head with an odd half."""
    floats = ("q", "k", "v", "cos", "sin", "out_q", "out_k", "out_v", "grad_q", "grad_k", "grad_v", "dq", "dk", "dv")
    types = {f"{name}_ptr": "*" + dtype for name in floats}
    types |= dict.fromkeys(("index_ptr", "order_ptr", "offsets_ptr"), "*i64")
    forward, backward = triton_rotary._rotary_forward_kernel, triton_rotary._rotary_backward_kernel
    for n, g, d in ((32, 8, 64), (32, 8, 128), (128, 8, 128), (32, 32, 128), (1, 1, 10)):
        config = triton_rotary.candidates(max(n, g), d // 2, lanes)[0]
        ones = {name: 1 for name, heads in (("q_heads", n), ("kv_heads", g)) if heads == 1}
        constants = triton_rotary.blocks(n, g, d // 2) | ones
        for name, kernel in (("forward", forward), ("backward", backward)):
            form = f"rotary {name} {dtype} N={n} G={g} D={d}"
            yield Specialization(form, kernel, constants, types, config.num_warps, config.num_stages)


def argument_type(name: str, given: Specialization) -> str:
    if name in given.constants:
        return "constexpr"
    default = "*fp32" if name.endswith("_ptr") else "fp32" if name in ("inverse_temperature", "eps") else "i32"
    return given.types.get(name, default)


def compile_one(given: Specialization, target: str) -> Resources:
    """Compiles with pointers, widths and row strides divisible by 16, as they are for the usual shapes."""
    names = given.kernel.arg_names
    signature = {name: argument_type(name, given) for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name in DIVISIBLE)
    }
    constants = {(names.index(name),): value for name, value in given.constants.items()}
    source = ASTSource(given.kernel, signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(
        source, target=TARGETS[target], options={"num_warps": given.num_warps, "num_stages": given.num_stages}
    )
    row = Resources(
        given.name, target, given.num_warps, shared=compiled.metadata.shared, shared_limit=SHARED_LIMIT[target]
    )
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "-res-usage", file.name)
            machine_code = tool("nvdisasm", file.name)
        row.registers, row.stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
        row.instructions = {what: len(re.findall(pattern, machine_code)) for what, pattern in INSTRUCTIONS.items()}
    elif "amdgcn" in compiled.asm:  # the assembler writes its count into the text
        row.registers, row.stack = (
            int(re.findall(rf"\.{what}:\s*(\d+)", compiled.asm["amdgcn"])[0])
            for what in ("vgpr_count", "private_segment_fixed_size")
        )
    return row


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_at(dtype: str, samples: list[int], target: str, index: int) -> Resources:
    return compile_one(list(specializations(dtype, samples, target))[index], target)


def table(rows: list[Resources]) -> str:
    header = ["kernel", "target", "warps", "regs", "stack", "shared B", *INSTRUCTIONS]
    lines = [header] + [
        [
            r.kernel,
            r.target,
            str(r.warps),
            str(r.registers),
            str(r.stack),
            str(r.shared),
            *(str(r.instructions.get(what, "-")) for what in INSTRUCTIONS),
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    parser.add_argument("--dtypes", nargs="+", choices=ITEMSIZE, default=list(ITEMSIZE))
    parser.add_argument("--samples", nargs="+", type=int, default=[16, 32, 64], help="S, 1 to 64")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per row")
    options = parser.parse_args()
    jobs = [
        (dtype, options.samples, target, index)
        for target in options.targets
        for dtype in options.dtypes
        for index in range(len(list(specializations(dtype, options.samples, target))))
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compile_at, *zip(*jobs, strict=True)))
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"triton {triton.__version__}\n{table(rows)}")
    spilled = [row.kernel for row in rows if row.stack]
    print(f"\n{len(rows)} compiled; " + (f"SPILLS: {', '.join(spilled)}" if spilled else "no spills"))


if __name__ == "__main__":
    main()
