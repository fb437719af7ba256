"""The memory that training takes, predicted, and the fastest way of training that fits.

Letters: T tokens of a pack, K gathered key rows, R read rows, H hidden size, F width of the MLP, L layers, Q and G
width of all query heads and of all key/value heads.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from gcrm_fast.common import processes
from gcrm_fast.common.devices import compute_dtype
from gcrm_fast.common.errors import UserError
from gcrm_fast.model.language_model import LOGITS
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.views import Views
from gcrm_fast.training.accounting import peak_memory
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.lora import Lora
from gcrm_fast.training.prepare import Prepared, lora_of, trained_layers
from gcrm_kernels.launch import HAS_TRITON

# Bytes per parameter: weights, gradient, two moments.
OPTIMIZER_BYTES = {"adamw": 16.0, "adamw-bf16": 8.0, "adamw-8bit": 10.1}
GRADIENT_BYTES = {"adamw": 4.0, "adamw-bf16": 2.0, "adamw-8bit": 4.0}  # of these
WEIGHT_BYTES = GRADIENT_BYTES
# Limits of a container, version 2 and 1 of Linux's control groups.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# (recomputation, when weights are gathered), fastest first: on one H100 at the 1b shape the product is about 2% of a
# step, gathering for every pack 7%, the MLP 15%.
PLANS = (
    ("none", "step"),
    ("product", "step"),
    ("none", "block"),
    ("product", "block"),
    ("mlp", "step"),
    ("mlp", "block"),
    ("block", "step"),
    ("block", "block"),
)


class MemoryPlan(NamedTuple):
    """What is recomputed, when weights are gathered, and the predicted memory of one process in bytes, for the largest
    pack that the budget allows."""

    recompute: str
    gather: str
    predicted: int

    def __str__(self) -> str:
        return f"{self.predicted / 2**30:.2f} GiB per process, --recompute {self.recompute}, --gather {self.gather}"


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """What the memory of one process depends on, apart from what is recomputed."""

    config: ModelConfig
    tokens: int  # of the largest pack
    keys: int
    read_rows: int
    optimizer: str
    width: int  # bytes per element of an activation
    kernels: bool  # Triton's
    world_size: int  # processes that share a copy of the weights
    several_packs: bool  # per step
    trained_layers: int | None = None  # the top ones; None for all, and the embeddings
    lora: Lora | None = None  # adapters, which are trained instead of these layers' weights
    cached_states: bool = False  # of the layers below, which are absent then
    evaluated_tokens: int = 0  # of the largest pack that runs without a backward
    views: bool = False  # whether there are the networks of the multi-view loss
    predicted: int = 0  # tokens of the largest pack that an lm_head predicts; 0 without one


def kept_for_backward(
    config: ModelConfig, tokens: int, keys: int, read_rows: int, recompute: str, width: int, kernels: bool
) -> int:
    """Bytes of activations that L layers keep until their backward, ``width`` bytes per element; the last one's MLP
    runs at the read rows alone. ``kernels``: whether the Triton kernels run, without which SwiGLU keeps silu(gate)."""
    h, f = config.hidden_size, config.intermediate_size
    q, g = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # The block's input and its norm, queries, output; gathered keys and values.
    attention = tokens * (2 * h + 2 * q) + keys * 2 * g
    if config.family.qk_norm:  # queries and keys before it
        attention += tokens * (q + g)
    # Residual and its norm; gate, up and their product.
    mlp = {"none": 2 * h + (3 if kernels else 4) * f, "product": 2 * h + 2 * f, "mlp": 2 * h}
    layers = config.num_hidden_layers
    if recompute == "block":
        return layers * tokens * h * width
    return (layers * attention + ((layers - 1) * tokens + read_rows) * mlp[recompute]) * width


def predicted_memory(shape: MemoryShape, recompute: str, gather: str) -> int:
    """Bytes of tensors of one process at its peak, in the backward of the largest pack or in an evaluation.

    Sharded weights and moments; weights whole, of the largest parts or with ``gather`` ``step`` of all; and either what
    the layers keep and what the backward of one block holds at a time, a recomputed part included, or, later, the
    sharded gradients, whichever is more. (One H100 at the 1b shape, 3 packs and 1 pack per step: 5% and 7% above what
    was measured.)
    """
    config, tokens, keys, width = shape.config, shape.tokens, shape.keys, shape.width
    h, f, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    # What FSDP holds whole: weights in the compute dtype, and gradients of the root and of two blocks; and, until the
    # last pack of a step, all gradients in float32.
    layers = shape.trained_layers or config.num_hidden_layers
    lm_head = shape.predicted > 0
    trained, whole = parameter_counts(
        config, layers, shape.lora, shape.cached_states, lm_head=lm_head, views=shape.views
    )
    of_views = Views.parameter_count(h) if shape.views else 0  # gathered in float32
    largest = vocabulary * h + 2 * config.parameters_per_layer()
    others = whole - of_views
    gathered = (others if gather == "step" else min(largest + lm_head * vocabulary * h, others)) * width + 4 * of_views
    gradients = min(largest, trained) * width + (4 * trained if shape.several_packs else 0)
    one_block = replace(config, num_hidden_layers=1)
    working = kept_for_backward(one_block, tokens, keys, tokens, "none", width, shape.kernels)
    logits = min(LOGITS, shape.predicted * vocabulary) * (width + 8)  # with those in float32 and their logarithms
    evaluation = max(working * shape.evaluated_tokens // tokens, logits)
    working += tokens * (2 * h + 3 * f) * width  # gradients on their way
    of_trained = replace(config, num_hidden_layers=layers)
    kept = kept_for_backward(of_trained, tokens, keys, shape.read_rows, recompute, width, shape.kernels)
    if shape.lora and recompute != "block":
        kept += shape.lora.kept_for_backward(config, tokens, width)
    kept += shape.predicted * h * width  # gradients of the states that the lm_head read
    gradient = trained / shape.world_size * GRADIENT_BYTES[shape.optimizer]
    held = int(held_bytes(trained, whole, shape.optimizer) / shape.world_size - gradient)
    training = gradients + max(kept + max(working, logits), int(gradient))
    return held + gathered + max(training, evaluation)


def parameter_counts(
    config: ModelConfig,
    layers: int,
    lora: Lora | None,
    cached_states: bool,
    *,
    lm_head: bool = False,
    views: bool = False,
) -> tuple[int, int]:
    """Number of parameters (trained, held), without the head and the projection, where the top ``layers`` are trained
    or get adapters, and with ``cached_states`` the others are absent; ``lm_head``: whether there is a frozen one;
    ``views``: whether there are the networks of the multi-view loss."""
    of_layers = config.trained_parameters(layers)
    held = (of_layers if cached_states else config.parameters()) + lm_head * config.vocab_size * config.hidden_size
    trained, more = (lora.parameters(config), lora.parameters(config)) if lora else (of_layers, 0)
    of_views = Views.parameter_count(config.hidden_size) if views else 0
    return trained + of_views, held + more + of_views


def held_bytes(trained: int, whole: int, optimizer: str) -> float:
    """Of the weights, and of the gradients and moments of those that are trained."""
    return trained * OPTIMIZER_BYTES[optimizer] + (whole - trained) * WEIGHT_BYTES[optimizer]


def choose_plan(limit: int, shape: MemoryShape, recompute: str = "auto", gather: str = "auto") -> MemoryPlan:
    """The fastest of PLANS, with what is given instead of ``auto``, whose predicted memory stays within nine tenths of
    ``limit``; else the one that takes the least."""
    plans = [
        MemoryPlan(*plan, predicted_memory(shape, *plan))
        for plan in PLANS
        if recompute in ("auto", plan[0]) and gather in ("auto", plan[1])
    ]
    return next((plan for plan in plans if plan.predicted < 0.9 * limit), plans[-1])


def memory_limit(device: torch.device) -> int:
    """Bytes that tensors may take: free memory of the GPU, or the rest of this process's share of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_memory() // processes.local_world_size() - in_use(device)


def machine_memory(container_limits: Sequence[Path] = CONTAINER_LIMITS) -> int:
    """Bytes of memory of the machine, or of the container where that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in container_limits:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text(encoding="ascii")))
    return min(limits)


def in_use(device: torch.device) -> int:
    """Bytes of this process before the model is built that count as memory of the device."""
    return peak_memory(device) if device.type == "cpu" else 0


def largest_pack(sizes: Sequence[int], budget: int, global_batch_pairs: int, world_size: int) -> int:
    """Upper bound of the size of a pack: pairs of ``sizes``, packs of up to ``budget``, steps of the largest pairs.

    Packs of several processes are balanced to within the largest pair.
    """
    ordered = sorted(sizes, reverse=True)
    share = -(-sum(ordered[:global_batch_pairs]) // world_size) + (ordered[0] if world_size > 1 else 0)
    return min(budget, share)


def check_model_fits(prepared: Prepared, config: TrainConfig, world_size: int, limit: int) -> None:
    """Raises UserError where weights, gradients and moments alone take more than ``limit`` bytes per process, before
    the system ends a process that allocates them."""
    model = prepared.model_config
    trained, parameters = parameter_counts(
        model,
        trained_layers(config, model),
        lora_of(config, model),
        config.cache_states,
        lm_head=config.sft_weight > 0,
        views=prepared.on_policy is not None,
    )
    needed = held_bytes(trained, parameters, config.optimizer) * config.replicas / world_size
    if needed > limit:
        raise UserError(
            f"{parameters / 1e6:.0f} M parameters take {needed / 2**30:.1f} GiB per process with --optimizer "
            f"{config.optimizer}, but {max(limit, 0) / 2**30:.1f} GiB are free: use a smaller model or more processes"
        )


def memory_plan(
    prepared: Prepared, config: TrainConfig, world_size: int, device: torch.device, limit: int
) -> MemoryPlan:
    """The fastest plan that ``limit`` bytes, the same on every rank, and the configuration allow."""
    budget = prepared.budget
    keys = [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in prepared.train]
    computed = [n - min(p.chosen_start, p.rejected_start) for n, p in zip(keys, prepared.train, strict=True)]
    if config.loss != "ranking":
        keys = computed = [len(one.chosen_ids) for one in prepared.train]
    views = prepared.on_policy.largest(config.global_batch_pairs) if prepared.on_policy else []

    def largest(own: list[int], of_views: list[int], maximum: int) -> int:
        sizes = [part for part in (own, of_views) if part]
        return min(maximum, sum(largest_pack(part, maximum, config.global_batch_pairs, world_size) for part in sizes))

    tokens = largest(computed, [size.tokens for size in views], budget.tokens)
    mean = sum(computed) / len(computed)
    per_step = mean * config.global_batch_pairs + sum(size.tokens for size in views)
    read_rows = (
        tokens if config.objective_variant == "dense" else int(tokens / mean * (4 * prepared.sampling.samples + 2))
    )
    chosen = [len(pair.chosen_ids) - pair.chosen_start for pair in prepared.train] if config.sft_weight else [0]
    predicted = largest_pack(chosen, budget.tokens, config.global_batch_pairs, world_size)
    shape = MemoryShape(
        config=prepared.model_config,
        tokens=tokens,
        keys=largest(keys, [size.keys for size in views], budget.keys),
        read_rows=min(read_rows + predicted, tokens),
        optimizer=config.optimizer,
        width=compute_dtype(config.dtype, device, training=True).itemsize,
        kernels=HAS_TRITON and device.type == "cuda",
        world_size=world_size // config.replicas,
        several_packs=per_step > budget.tokens * world_size,
        trained_layers=trained_layers(config, prepared.model_config),
        lora=lora_of(config, prepared.model_config),
        cached_states=config.cache_states,
        evaluated_tokens=largest_pack(computed, budget.tokens, len(computed), world_size),
        views=prepared.on_policy is not None,
        predicted=predicted,
    )
    plan = choose_plan(limit, shape, config.recompute, config.gather)
    return plan._replace(predicted=plan.predicted + in_use(device))
