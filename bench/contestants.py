"""What bench/train_step.py compares: ours, a naive padded loop and TRL; and whether they compute the same."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import measure
import padded
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training import accounting
from our_step import LEVERS, RECOMPUTING, Groups, Ours, Work, flat, packed_work

PAIRS = 8  # per micro-batch, as people run it
SIZES = (4, 8, 16, 32)  # micro-batches from which the padded reference takes its fastest
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the loss, and of each parameter's gradient, by its norm
NAIVE, TRL, TRL_SHIPPED, OURS = f"naive, {PAIRS} pairs", "TRL, no checkpointing", "TRL, as shipped", "ours"


def padded_work(config: ModelConfig, micro_batches: Sequence[Sequence[TokenizedPair]]) -> Work:
    tokens, flops = 0, 0.0
    for pairs in micro_batches:
        sequences, length = 2 * len(pairs), max(map(padded.longest, pairs))
        tokens += sequences * length
        flops += 3 * accounting.forward_flops(
            config, sequences * length, sequences * length * (length + 1) // 2, sequences * length
        )
    return Work(tokens, flops)


# --------------------------------------------------------------------------------------- equal before they are timed


Gradients = dict[str, Tensor]  # on the CPU


def take_gradients(model: torch.nn.Module) -> Gradients:
    """The model's whole gradients on the CPU; removes them from the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        taken[name] = grad.detach().float().cpu()
    model.zero_grad()
    return taken


def agrees(name: str, found: tuple[float, Gradients], expected: tuple[float, Gradients], tolerance: float) -> bool:
    """Prints the errors of the loss and of the least accurate gradient, relative to their norms."""
    loss_error = abs(found[0] - expected[0]) / abs(expected[0])
    errors = {n: float((found[1][n] - g).norm() / g.norm()) for n, g in expected[1].items()}
    worst = max(errors, key=lambda n: errors[n])
    ok = loss_error <= tolerance and errors[worst] <= tolerance  # false for NaN
    print(
        f"equal to the padded reference within {tolerance:g}? {name}: loss {loss_error:.1e}, "
        f"gradients {errors[worst]:.1e} ({worst}): {'yes' if ok else 'NO'}",
        flush=True,
    )
    return ok


def references(model: padded.Padded, pairs: list[TokenizedPair]) -> dict[str, tuple[float, Gradients]]:
    """(mean loss, gradients) of the padded reference, the same with checkpointing, and of TRL's ranking loss."""
    found = {}
    for name, checkpointing in (("naive", False), ("naive, checkpointing", True)):
        model.checkpointing(checkpointing)
        loss = model.loss(pairs) / len(pairs)
        loss.backward()
        found[name] = float(loss.detach()), take_gradients(model.model)
    model.checkpointing(False)
    alike = agrees("naive, checkpointing", found.pop("naive, checkpointing"), found["naive"], TOLERANCE[model.dtype])
    if not alike and model.dtype == torch.float32:
        refuse()
    if not padded.trl_missing():
        loss = padded.trl_gradients(model, pairs)
        found["TRL"] = float(loss), take_gradients(model.model)
    return found


def check(ours: Ours, expected: dict[str, tuple[float, Gradients]], batch: Groups, tolerance: float) -> bool:
    """Compares every form of ours with the padded reference, and its ranking loss alone with TRL's."""

    def run(without: str = "") -> tuple[float, Gradients]:
        sums = ours.accumulate(ours.packs(batch, without), len(flat(batch)), without)
        return sums["loss"].item() / len(flat(batch)), take_gradients(ours.model)

    # One after the other: the gradients of a large model fill the host's memory.
    results = [agrees(OURS, run(), expected["naive"], tolerance)]
    results += [agrees(f"ours without {lever}", run(lever), expected["naive"], tolerance) for lever in LEVERS]
    results += [agrees(f"ours, {form}", run(form), expected["naive"], tolerance) for form in RECOMPUTING]
    if "TRL" in expected:
        with mock.patch.object(ours, "objective", replace(ours.objective, contrastive_weight=0.0)):
            results.append(agrees("ranking loss, against TRL", run(), expected["TRL"], tolerance))
    return all(results)


def refuse() -> NoReturn:
    print("error: the contestants disagree (see above), so nothing is timed", file=sys.stderr)
    sys.exit(1)


# -------------------------------------------------------------------------------------------------- the contestants


@dataclass(frozen=True)
class Contestant:
    """One way to run optimizer steps on global batches."""

    name: str
    batches: list[Groups]
    run: Callable[[list[Groups]], list[float]]  # seconds of each step
    peak: Callable[[Groups], int]  # bytes of one step
    work: Callable[[Groups], Work]
    notes: dict[str, Any]


def timed(step: Callable[[Groups], None], device: torch.device) -> Callable[[list[Groups]], list[float]]:
    def run(batches: list[Groups]) -> list[float]:
        clock = [measure.now(device)]
        for batch in batches:
            step(batch)
            clock.append(measure.now(device))
        return np.diff(clock).tolist()

    return run


def weighed(step: Callable[[Groups], None], device: torch.device) -> Callable[[Groups], int]:
    def peak(batch: Groups) -> int:
        with measure.recorded_peak(device) as found:
            step(batch)
        return found.bytes

    return peak


def our_contestants(ours: Ours, batches: dict[int, list[Groups]]) -> Iterator[Contestant]:
    """Ours, ours without each lever, and with each number of pairs per prompt in ``batches`` above one."""
    config, device = ours.model.config, ours.device
    forms = [(OURS, "", 1)] + [(f"ours without {lever}", lever, 1) for lever in LEVERS]
    forms += [(f"ours, {form}", form, 1) for form in RECOMPUTING]
    forms += [(f"ours, up to {size} pairs per prompt", "", size) for size in batches if size > 1]
    for name, without, group in forms:
        # On a GPU workers build packs ahead, into pinned memory; on a CPU the trainer builds them between steps.
        ahead = {
            id(b): [p.pin_memory() for p in ours.packs(b, without)] for b in batches[group] if device.type == "cuda"
        }

        def step(batch: Groups, without: str = without, ahead: dict[int, list[Pack]] = ahead) -> None:
            ours.step(ahead.get(id(batch)) or ours.packs(batch, without), len(flat(batch)), without)

        def work(batch: Groups, without: str = without) -> Work:
            return packed_work(config, ours.packs(batch, without))

        yield Contestant(name, batches[group], timed(step, device), weighed(step, device), work, {})


def naive_contestant(
    model: padded.Padded,
    config: ModelConfig,
    batches: list[Groups],
    name: str,
    size: int,
    bucketed: bool,
    checkpointing: bool,
) -> Contestant:
    def step(batch: Groups) -> None:
        model.checkpointing(checkpointing)
        model.step(flat(batch), size, bucketed)

    def work(batch: Groups) -> Work:
        return padded_work(config, padded.cut(flat(batch), size, bucketed))

    notes = {"micro-batch": size, "attention": model.attention}
    return Contestant(name, batches, timed(step, model.device), weighed(step, model.device), work, notes)


def trl_contestant(model: padded.Padded, config: ModelConfig, batches: list[Groups], as_shipped: bool) -> Contestant:
    def run(batches: list[Groups]) -> list[float]:
        return padded.trl_steps(model, [flat(b) for b in batches], PAIRS, as_shipped).seconds

    def peak(batch: Groups) -> int:
        return padded.trl_steps(model, [flat(batch)], PAIRS, as_shipped, with_memory=True).peaks[0].bytes

    def work(batch: Groups) -> Work:
        return padded_work(config, padded.cut(flat(batch), PAIRS, False))

    first = padded.trl_steps(model, [flat(batches[0])[:1]], PAIRS, as_shipped)
    notes = {"micro-batch": PAIRS, "attention": model.attention, "checkpointing": first.checkpointing}
    return Contestant(TRL_SHIPPED if as_shipped else TRL, batches, run, peak, work, notes)


def padded_contestants(model: padded.Padded, config: ModelConfig, batches: list[Groups]) -> Iterator[Contestant]:
    """What people run: naive at 8 pairs, with checkpointing, at its best; TRL in both settings."""
    yield naive_contestant(model, config, batches, NAIVE, PAIRS, False, False)
    yield naive_contestant(model, config, batches, f"{NAIVE}, checkpointing", PAIRS, False, True)
    sizes = [size for size in SIZES if size <= len(flat(batches[0]))]
    tried = {
        size: naive_contestant(model, config, batches, f"naive, by length, {size} pairs", size, True, False)
        for size in sizes
    }
    seconds = {size: attempt(partial(c.run, batches[:1]), model.device) for size, c in tried.items()}
    print("naive by length, seconds per step with n pairs per micro-batch:", seconds, flush=True)
    fitting = {size: taken for size, taken in seconds.items() if not isinstance(taken, str)}
    if fitting:
        yield tried[min(fitting, key=lambda size: fitting[size])]
    if not padded.trl_missing():
        yield trl_contestant(model, config, batches, as_shipped=False)
        yield trl_contestant(model, config, batches, as_shipped=True)


def attempt(function: Callable[[], Any], device: torch.device) -> Any:
    """The function's value, or 'out of memory'."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    if device.type == "cuda":  # outside the handler, whose frames keep the tensors alive
        torch.cuda.empty_cache()
    return "out of memory"
