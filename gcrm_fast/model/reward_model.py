"""A trunk with a reward head and, where there is one, a projection for cosines; and what a new one starts from.

Letters: R read rows, H hidden size, D width of the projection. Parameters carry the names of transformers'
``LlamaForSequenceClassification`` and its like so that a checkpoint needs no renaming.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.common.torch_compat import set_recompile_limit
from gcrm_fast.model import heads
from gcrm_fast.model.inputs import Pack, Predictions, ViewRows
from gcrm_fast.model.language_model import LlamaLanguageModel, token_losses
from gcrm_fast.model.llama import Llama, ModelConfig
from gcrm_fast.model.views import ViewLosses, Views
from gcrm_kernels import gather_rows

LM_HEAD = "lm_head.weight"
VIEWS = "views."  # start of the names of what the multi-view loss alone uses
RowReader = Callable[[str, torch.Size, slice], Tensor]  # (parameter name, its full shape, rows) -> those rows


class Output(NamedTuple):
    """reward [2, pairs] float32 at the end rows of chosen [0] and rejected [1]; z [R, D or H] what cosines compare;
    terms [pairs] by name: those of the reward head, see heads.Read, and with an lm_head ``sft``, the mean loss of the
    tokens of chosen. views: of the pack's pairs of views, None without them."""

    reward_2N: Tensor
    z_RD: Tensor
    terms: dict[str, Tensor]
    views: ViewLosses | None = None


def upcast(x: Tensor) -> Tensor:
    """x in float32; float64 stays (the tests' exact runs)."""
    return x if x.dtype == torch.float64 else x.float()


class LlamaRewardModel(nn.Module):
    """Trunk, reward head and optional projection.

    ``attention_backend``: see attention.py; ``auto`` by default. ``recompute``: see ``Block``; ``first``: ``Llama``.
    ``lm_head``: adds that of a policy, frozen, for a loss that keeps the states fit to write text from. ``views``: adds
    the networks of the multi-view loss, which training alone uses.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention_backend: str = "auto",
        recompute: str = "none",
        first: int = 0,
        *,
        lm_head: bool = False,
        views: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.gather = "block"  # see parallel.shard
        self.model = Llama(config, recompute, first)
        self.score = heads.KINDS[config.head](config)
        self.projection = (
            nn.Linear(config.hidden_size, config.projection_size, bias=False) if config.projection_size else None
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head else None
        if self.lm_head is not None:
            self.lm_head.requires_grad_(False)
        self.views = Views(config.hidden_size) if views else None

    def cast(self, dtype: torch.dtype) -> Self:
        """Stores all parameters but the reward head's in ``dtype``; RoPE's frequencies stay float32."""
        for name, parameter in self.named_parameters():
            if not name.startswith("score."):
                parameter.data = parameter.data.to(dtype)
        return self

    def compile_blocks(self) -> None:
        """Compiles the forward of every block, and with it the backward; sizes of packs stay symbols."""
        # Whole and pruned blocks, with and without gradient, of one token or row: more kinds than the default of 8.
        set_recompile_limit(32)
        for layer in self.model.blocks:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def forward(self, pack: Pack) -> Output:
        hidden_RH = self.model(pack, self.attention_backend)
        ends_EH = hidden_RH.index_select(0, pack.pairs.end_2N.flatten())
        reward_E, terms = self.score.read(upcast(ends_EH), pack.pairs.noise_2ND.flatten(0, 1))
        # A stack and not a view: FSDP's hooks must own the tensors that leave the module.
        reward_2N = torch.stack(reward_E.chunk(2))
        of_pairs = {name: term_E.view(2, -1).sum(0) for name, term_E in terms.items()}
        if pack.pairs.predictions is not None:
            of_pairs["sft"] = self.language_loss(hidden_RH, pack.pairs.predictions, reward_2N.shape[1])
        return Output(reward_2N, self.compared(hidden_RH), of_pairs, self.view_losses(hidden_RH, pack.views))

    def view_losses(self, hidden_RH: Tensor, rows: ViewRows | None) -> ViewLosses | None:
        """Of each pair of views; None where the pack has none."""
        if rows is None:
            return None
        assert self.views is not None
        ends_EH = hidden_RH.index_select(0, rows.end_2V.flatten())
        return self.views(torch.stack(upcast(ends_EH).chunk(2)), rows.noise_2VZ, rows.other_V)

    def language_loss(self, hidden_RH: Tensor, predictions: Predictions, pairs: int) -> Tensor:
        """Of each pair the mean loss of the tokens of chosen, [pairs] (GRM, arXiv 2406.10216, section 3.2: the SFT
        regularization); 0 where no token stands before them."""
        assert self.lm_head is not None
        before_MH = gather_rows(hidden_RH, predictions.rows_M, predictions.inverse)
        loss_M = token_losses(before_MH, self.lm_head.weight, predictions.tokens_M) / predictions.counts_M
        return loss_M.new_zeros(pairs).index_add(0, predictions.pairs_M, loss_M)

    def rewards(self, hidden_RH: Tensor) -> Tensor:
        """[R] float32. Rewards are differences of nearly equal numbers: the head runs in float32 whatever the trunk's
        dtype."""
        return self.score(upcast(hidden_RH)).squeeze(1)

    def compared(self, hidden_RH: Tensor) -> Tensor:
        """z [R, D or H], what cosines compare: the head's latents, projected states, or the states themselves."""
        if self.config.compare == "latents":
            return self.latents(hidden_RH)
        return hidden_RH if self.projection is None else self.projection(hidden_RH)

    def latents(self, hidden_RH: Tensor) -> Tensor:
        """[R, D or H]: the head's latents, or what cosines compare where the head has none."""
        own_RD = self.score.latents(upcast(hidden_RH))
        return self.compared(hidden_RH) if own_RD is None else own_RD


@torch.no_grad()
def load(
    network: LlamaRewardModel | LlamaLanguageModel,
    device: torch.device,
    value: RowReader,
    local_rows: Callable[[int], slice] = lambda rows: slice(0, rows),
) -> None:
    """Gives a network on the meta device its memory and its values, which are read in the order of their names.

    ``local_rows(n)``: which rows of a parameter of n rows a sharded network holds on this rank.
    """
    network.to_empty(device=device)
    network.model.reset_inv_freq()
    named, hidden = sorted(network.named_parameters()), processes.rank() > 0
    for name, parameter in progress_bar(named, desc="loading", brief=True, shown=not hidden, unit="tensor"):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(value(name, parameter.shape, local_rows(parameter.shape[0])))


@torch.no_grad()
def goal_state(end_states: Iterable[Tensor], completions: int, *, remedy: str, all_ranks: bool = False) -> Tensor:
    """A goal state: the mean [D] of z at the last token of preferred completions, float32 (GCRM, section 4.2).

    Args:
        end_states: z [n, D] at the last tokens, a pack at a time.
        completions: how many there are; with ``all_ranks`` those of every rank, whose states are added.
        remedy: end of the error message.

    Raises:
        UserError: a state is not finite.
    """
    total = sum(z_ND.double().sum(0) for z_ND in end_states)
    assert isinstance(total, Tensor)
    if all_ranks:
        dist.all_reduce(total)
    if not total.isfinite().all():
        raise UserError(f"hidden states are not finite: {remedy}")
    return (total / completions).float()


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Initial value of one parameter, float32 on the CPU: a function of (seed, name) alone, equal on all ranks.

    Norm weights are 1 and biases 0; embeddings have variance 1, linear layers variance 1 / fan-in; for the reward head
    see heads.py.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    normal = torch.randn(shape, generator=generator)
    if name == "model.embed_tokens.weight":
        return normal
    if name.startswith("score."):
        return heads.KINDS[config.head].initial_weight(normal)
    return normal / math.sqrt(shape[1])
