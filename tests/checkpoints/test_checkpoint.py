"""Checkpoints as people have them: heads by other names, shards, hub names, and how little of them a rank reads."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import torch.distributed as dist
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForSequenceClassification

from gcrm_fast.checkpoints import locating
from gcrm_fast.checkpoints.config_json import read_config
from gcrm_fast.checkpoints.locating import MODEL_FILES, OTHER_COPIES, TOKENIZER_FILES, locate
from gcrm_fast.checkpoints.weights import HEADS, open_weights
from gcrm_fast.common.errors import UserError
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.train import main
from gcrm_fast.training import parallel
from support.folders import CONFIG, VOCAB, llama, load, tokenizer, trunk
from support.small import small_config

H = CONFIG["hidden_size"]
LM_HEAD = {"lm_head.weight": torch.zeros(VOCAB, H)}
PAIR = '{"prompt": "one", "chosen": " two", "rejected": " six"}\n'


def behind(prefix: str) -> dict[str, Tensor]:
    """The trunk with ``prefix`` instead of ``model.``"""
    return {prefix + name.removeprefix("model."): tensor for name, tensor in trunk().items()}


def assert_trunk(model: LlamaRewardModel) -> None:
    for name, tensor in trunk().items():
        assert torch.equal(model.get_parameter(name), tensor), name


# ------------------------------------------------------------------------------------------------- heads and prefixes

# name: (prefix of the trunk, head, bias or None)
CONVENTIONS = {
    "transformers sequence classification": ("model.", "score", None),
    "transformers token classification, veRL": ("model.", "score", 0.25),
    "OpenRLHF": ("model.", "value_head", None),
    "TRL": ("model.", "v_head.summary", 0.25),
    "TRL, saved by a trainer": ("pretrained_model.model.", "v_head.summary", 0.0),
    "DeepSpeed-Chat": ("rwtranrsformer.", "v_head", None),
    "trlX": ("transformer.", "v_head", None),
    "safe-rlhf": ("model.", "score_head", 0.25),
    "MOSS-RLHF": ("model.", "reward_head", None),
    "UltraRM": ("model.", "regression_head", None),
    "TL;DR reproduction": ("lm_backbone.", "scalar_head", 0.25),
}


def test_every_name_of_a_head_is_tried() -> None:
    assert {head for _, head, _ in CONVENTIONS.values()} == set(HEADS)


@pytest.mark.parametrize(("prefix", "head", "bias"), CONVENTIONS.values(), ids=CONVENTIONS.keys())
def test_reward_heads_of_other_projects(prefix: str, head: str, bias: float | None, tmp_path: Path) -> None:
    weight = torch.randn(1, H)
    stored = behind(prefix) | {f"{head}.weight": weight}
    if bias is not None:
        stored[f"{head}.bias"] = torch.tensor([bias])
    notes = (
        []
        if bias is None
        else [f"1 tensor ('{head}.bias') skipped: it moves all rewards alike, so that no comparison changes"]
    )
    if head == "score_head":  # safe-rlhf keeps statistics of rewards
        stored |= {f"normalizer.{name}": torch.zeros(1) for name in ("mean", "var")}
        notes.insert(
            0, "2 tensors ('normalizer.mean', 'normalizer.var') skipped: it moves and scales all rewards alike"
        )
    model, weights, _ = load(llama(tmp_path, stored))
    assert_trunk(model)
    assert torch.equal(model.score.weight, weight)
    assert list(weights.notes) == [f"{tmp_path}: {note}" for note in notes]


def test_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    """LLaMA-Factory's value_head.safetensors next to a language model."""
    weight = torch.randn(1, H)
    llama(tmp_path)
    save_file(
        {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}, tmp_path / "value_head.safetensors"
    )
    model, weights, _ = load(tmp_path)
    assert torch.equal(model.score.weight, weight)
    assert [note.split("'")[1] for note in weights.notes] == ["lm_head.weight", "v_head.summary.bias"]


@pytest.mark.parametrize(("prefix", "more"), [("", {}), ("model.", LM_HEAD)], ids=["bare trunk", "language model"])
def test_without_a_head_a_new_one_starts_and_says_so(prefix: str, more: dict[str, Tensor], tmp_path: Path) -> None:
    tables = {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of transformers before 4.32
    model, weights, _ = load(llama(tmp_path, behind(prefix) | more | tables), projection_size=4)
    assert_trunk(model)
    assert 0 < model.score.weight.std() < 3 / (H + 1)  # normal with standard deviation 1 / (H + 1)
    notes = [
        "holds no reward head: a new one is initialized",
        "holds no projection: a new one is initialized",
        *(f"1 tensor ('{name}') skipped: a reward model has no use for it" for name in more),
        f"1 tensor ('{next(iter(tables))}') skipped: computed from config.json",
    ]
    assert list(weights.notes) == [f"{tmp_path}: {note}" for note in notes]


def test_notes_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "m")
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    assert main(["--data", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "m"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("('lm_head.weight') skipped") == 1


# ------------------------------------------------------------------------------------------------- shards and ranks


def shard(folder: Path, n: int) -> None:
    """Cuts model.safetensors into ``n`` shards with an index."""
    stored = load_file(folder / "model.safetensors")
    parts = [dict(list(stored.items())[i::n]) for i in range(n)]
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i:05}.safetensors")
    weight_map = {key: f"model-{i:05}.safetensors" for i, part in enumerate(parts) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is one rank and nobody else is there."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_a_rank_reads_its_own_rows_one_tensor_at_a_time(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path, trunk() | {"score.weight": torch.randn(1, H)})
    shard(tmp_path, 3)
    config = read_config(tmp_path, head="linear", projection_size=0)
    numbers = sum(p.numel() for p in LlamaRewardModel(config).parameters())
    opened: list[str] = []

    class Counting:
        """safe_open, noting what is read."""

        def __init__(self, path: Path, framework: str) -> None:
            self.file = safe_open(path, framework)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:  # keys, get_slice: headers and slices
            assert name != "get_tensor", "a whole tensor was read"
            return getattr(self.file, name)

    monkeypatch.setattr("gcrm_fast.checkpoints.weights.safe_open", Counting)
    weights = open_weights(tmp_path, config, seed=0)
    whole: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        read = 0

        def counting(name: str, shape: torch.Size, rows: slice) -> Tensor:
            nonlocal read
            opened.append(name)
            values = weights.rows(name, shape, rows)
            assert values.shape == (rows.stop - rows.start, *shape[1:])
            assert values.shape[0] <= -(-shape[0] // world_size)
            read += values.numel()
            whole.setdefault(name, []).append(values)
            return values

        with rank_of(rank, world_size):
            mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
            with torch.device("meta"):
                model = LlamaRewardModel(config)
            parallel.shard(model, mesh, torch.float32)
            parallel.materialize(model, mesh, torch.device("cpu"), counting)
        assert read <= numbers / world_size + 64 * H  # what rounding up adds, at most a few rows a tensor
    stored = trunk()
    for name, parts in whole.items():
        if name in stored:
            assert torch.equal(torch.cat(parts), stored[name]), name
    assert len(opened) == world_size * len(dict(LlamaRewardModel(config).named_parameters()))


def test_shards_and_one_file_give_the_same_model(tmp_path: Path) -> None:
    before, _, _ = load(llama(tmp_path))
    shard(tmp_path, 3)
    after, _, _ = load(tmp_path)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _, _ = load(llama(tmp_path, {name: tensor.to(dtype) for name, tensor in trunk().items()}))
    for name, tensor in trunk().items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype).float()), name


# --------------------------------------------------------------------------------------------- hub names, tokenizers


def test_a_hub_name_is_read_from_the_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--some--llama", "0" * 40
    llama(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = locate("some/llama", "--model", MODEL_FILES)
    assert folder == repository / "snapshots" / commit
    assert_trunk(load(folder)[0])


@pytest.mark.parametrize(
    ("error", "offline", "words"),
    [
        (LocalEntryNotFoundError, True, "not in the cache of the Hugging Face hub, and HF_HUB_OFFLINE is set"),
        (LocalEntryNotFoundError, False, "not in the cache of the Hugging Face hub, and the hub cannot be reached"),
        (RepositoryNotFoundError, False, "no repository of the Hugging Face hub that you may read: for a private one"),
        (GatedRepoError, False, "a repository of the Hugging Face hub that asks for access: request it there"),
    ],
)
def test_why_the_hub_has_no_model(
    error: type[Exception], offline: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: Any, **options: Any) -> str:
        raise error.__new__(error)  # the arguments of its initializer depend on the version of the hub's library

    monkeypatch.setattr(locating, "snapshot_download", fetched)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=f"--model some/llama: no such folder, and {words}"):
        locate("some/llama", "--model", MODEL_FILES)


def test_what_is_fetched_from_the_hub() -> None:
    there = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "original/model.safetensors",
    ]
    assert list(filter_repo_objects(there, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_COPIES)) == [
        *there[:3],
        *there[5:8],
    ]
    assert list(filter_repo_objects(there, allow_patterns=TOKENIZER_FILES, ignore_patterns=OTHER_COPIES)) == [
        there[0],
        *there[5:8],
    ]


def test_a_folder_comes_before_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "some" / "llama")
    assert locate("some/llama", "--model", MODEL_FILES) == Path("some/llama")


def test_tokenizer_of_another_folder_trains_and_is_saved(tmp_path: Path) -> None:
    """A checkpoint without a tokenizer, as value-head projects leave it, through the program and back."""
    llama(tmp_path / "m", trunk() | {"score.weight": torch.randn(1, H)})
    for path in (tmp_path / "m").glob("*token*"):
        path.unlink()
    tokenizer().save_pretrained(tmp_path / "t")
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    out = tmp_path / "out"
    assert (
        main(
            [
                "--data",
                str(tmp_path / "pairs.jsonl"),
                "--model",
                str(tmp_path / "m"),
                "--tokenizer",
                str(tmp_path / "t"),
                "--output",
                str(out),
                "--steps",
                "1",
            ]
        )
        == 0
    )
    trained, weights, config = load(out / "model")
    assert weights.notes == ()
    assert config == small_config(
        vocab_size=VOCAB, num_hidden_layers=1, rms_norm_eps=1e-5, max_position_embeddings=2048
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(out / "model", dtype=torch.float32)
    assert torch.equal(theirs.score.weight, trained.score.weight)
