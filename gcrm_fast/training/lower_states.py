"""States that enter the trained layers, computed once per data set and kept on disk (``--cache-states``).

The layers below never change, and a token's state depends only on the tokens up to it: it is the same in every epoch,
pack and run. A file holds the states of up to CHUNK pairs, each as its own pack: [chosen, rejected from where they
differ], one after the other. Its name is a fingerprint of the layers, the dtype and the tokens. Files may be deleted
between runs.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from gcrm_fast.checkpoints.saving import add_tensor
from gcrm_fast.checkpoints.weights import Weights, parameter_shapes
from gcrm_fast.common import processes
from gcrm_fast.common.errors import UserError, kept_if_interrupted
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.progress import progress_bar
from gcrm_fast.data.batches import Budget, plan_packs
from gcrm_fast.data.encoding import PairStates, TokenizedPair, common_prefix
from gcrm_fast.data.packing import build_pack, distinct_sequences, group_size
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.data.token_cache import cache_folder
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.model.reward_model import LlamaRewardModel, load
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.prepare import Prepared

CHUNK = 32  # pairs per file


@dataclass(frozen=True, kw_only=True)
class LowerLayers:
    """The layers below the trained ones; ``config`` is the shape of a model of these alone."""

    config: ModelConfig
    weights: Weights
    attention: str
    budget: Budget
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def network(self) -> LlamaRewardModel:
        with torch.device("meta"):
            network = LlamaRewardModel(self.config, self.attention).cast(self.dtype)
        load(network, self.device, self.weights.rows)
        return network

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights that the states depend on, and of all else but the tokens."""
        trunk = replace(self.config, head="linear", bottleneck_size=0, projection_size=0, compare="states")
        digest = hashlib.sha256(f"{trunk} {self.dtype}".encode())
        for name, shape in sorted(parameter_shapes(self.config).items()):
            if name.startswith(("model.embed_tokens.", "model.layers.")):
                add_tensor(digest.update, name, self.weights.whole(name, shape))
        return digest.hexdigest()

    @torch.no_grad()
    def states(self, pairs: Sequence[TokenizedPair]) -> np.ndarray:
        """[rows, H] of the pairs, one after the other; bfloat16 as int16."""
        bounds = np.cumsum([0, *map(_rows, pairs)])
        place = {id(pair): bounds[i : i + 2] for i, pair in enumerate(pairs)}
        states = torch.empty(int(bounds[-1]), self.config.hidden_size, dtype=self.dtype)
        for groups in plan_packs([[pair] for pair in pairs], self.budget, 1):
            pack = build_pack(groups, Sampling(samples=1), 0).to(self.device)
            of_pack = self.network.model.before_norm(pack, self.attention).cpu()
            done = 0
            for (pair,) in groups:
                start, end = place[id(pair)]
                states[start:end] = of_pack[done : done + end - start]
                done += end - start
        return _stored(states)


def _stored(states: Tensor) -> np.ndarray:
    return (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()


def _rows(pair: TokenizedPair) -> int:
    return group_size([pair]).tokens


def _path(folder: Path, layers: LowerLayers, pairs: Sequence[TokenizedPair]) -> Path:
    digest = hashlib.sha256(layers.fingerprint.encode())
    for pair in pairs:
        for ids in pair.sequences:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype(np.int32).tobytes())
    return folder / f"states-{digest.hexdigest()[:32]}.npy"


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The states in a file, which stay on the disk until they are used; None without a whole file of that shape."""
    try:
        states = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return states if states.shape == shape else None


def pair_states(folder: Path, layers: LowerLayers, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs with their states; those that no file holds are computed and written first.

    Processes that start together share the work: each begins elsewhere and skips the files that another is computing.

    Raises:
        UserError: the folder cannot be written.
    """
    chunks = [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]
    paths = [_path(folder, layers, chunk) for chunk in chunks]
    shapes = [(sum(map(_rows, chunk)), layers.config.hidden_size) for chunk in chunks]
    start = processes.local_rank() * len(chunks) // processes.local_world_size()
    order = [*range(start, len(chunks)), *range(start)]
    todo = [i for i in order if _read(paths[i], shapes[i]) is None]
    bar = progress_bar(
        total=sum(shapes[i][0] for i in todo),
        desc="states below the trained layers",
        brief=True,
        shown=processes.rank() == 0,
        unit="token",
        unit_scale=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with kept_if_interrupted(lambda: f"computed states are kept in {folder}: the same command continues with them"):
            for blocking in (False, True):
                for i in todo:
                    if _read(paths[i], shapes[i]) is None:
                        _write(paths[i], shapes[i], layers, chunks[i], blocking)
                    bar.update(0 if blocking else shapes[i][0])
    except OSError as error:
        raise UserError(f"--cache {folder}: states cannot be written ({error.strerror}): omit --cache-states") from None
    bar.close()
    with_states: list[TokenizedPair] = []
    for path, shape, chunk in zip(paths, shapes, chunks, strict=True):
        states = _read(path, shape)
        if states is None:
            raise UserError(f"{path}: was removed or damaged while it was needed: start the run again")
        bounds = np.cumsum([0, *map(_rows, chunk)])
        with_states += [_with(pair, states[a:b]) for pair, a, b in zip(chunk, bounds[:-1], bounds[1:], strict=True)]
    return with_states


def _write(
    path: Path, shape: tuple[int, int], layers: LowerLayers, pairs: Sequence[TokenizedPair], blocking: bool
) -> None:
    """Computes and writes one file, unless another process has or, without ``blocking``, is about to."""
    try:
        with FileLock(f"{path}.lock", blocking=blocking):
            if _read(path, shape) is None:
                with written_aside(path) as partial, partial.open("wb") as file:
                    np.save(file, layers.states(pairs))
            Path(f"{path}.lock").unlink(missing_ok=True)
    except Timeout:
        pass


def _with(pair: TokenizedPair, states: np.ndarray) -> TokenizedPair:
    (sequences,) = distinct_sequences([pair])
    shared = common_prefix([*sequences.values()]) if len(sequences) == 2 else len(pair.rejected_ids)
    length = len(pair.chosen_ids)
    return replace(pair, states=PairStates(states[:length], states[length:], shared))


def with_lower_states(
    prepared: Prepared, config: TrainConfig, below: int, dtype: torch.dtype, device: torch.device
) -> Prepared:
    """The same data with the states that enter layer ``below`` (from 0) in compute dtype. Raises UserError."""
    folder = cache_folder(config.cache)
    assert folder is not None  # config.check
    layers = LowerLayers(
        config=replace(prepared.model_config, num_hidden_layers=below),
        weights=prepared.weights,
        attention=config.attention,
        budget=prepared.budget,
        dtype=dtype,
        device=device,
    )
    return replace(
        prepared,
        train=pair_states(folder, layers, prepared.train),
        held_out=pair_states(folder, layers, prepared.held_out),
    )
