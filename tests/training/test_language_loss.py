"""The language-model loss on chosen completions (GRM): its value, its memory, and whole runs with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from gcrm_fast.common.torch_compat import TorchDispatchMode
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model import language_model
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.train import main
from gcrm_fast.training.accounting import work
from gcrm_fast.training.memory import parameter_counts, predicted_memory
from gcrm_fast.training.objectives import Objective, losses
from support.folders import llama, trunk
from support.small import memory_shape, small_config, small_model
from support.training_runs import TIMES, Gcrm, arguments, assert_same, end_in_step_9, rows, torchrun

OBJECTIVE = Objective(contrastive_weight=0.0, term_weights={"sft": 1.0})
WEIGHT = ("--sft-weight", "0.5")


def pack_of(pairs: list[TokenizedPair]) -> Pack:
    return build_pack([pairs[:2], pairs[2:5], [pairs[5]], [pairs[6]]], Sampling(samples=3, predict=True), 0)


def gradients(model: LlamaRewardModel, pack: Pack) -> dict[str, Tensor]:
    model.zero_grad()
    losses(model(pack), pack.pairs, OBJECTIVE)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_equal_those_of_transformers(pairs: list[TokenizedPair]) -> None:
    """Chosen completion by chosen completion; the first token of a text without a prompt has none before. transformers
    computes norms and the loss in float32."""
    config = small_config()
    model = small_model(config, lm_head=True)
    raw = {name: value for name, value in vars(config).items() if name != "rope_scaling"}
    theirs = LlamaForCausalLM(LlamaConfig(**raw)).double().eval()
    theirs.model.rotary_emb.inv_freq = model.model.inv_freq.clone()
    theirs.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("score.")})
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        ids = torch.from_numpy(pair.chosen_ids).long()[None]
        labels = ids.clone()
        labels[:, : pair.chosen_start] = -100
        total += theirs(input_ids=ids, labels=labels).loss
    total.backward()
    pack = pack_of(pairs)
    sft = model(pack).terms["sft"].sum()
    model.zero_grad()
    sft.backward()
    torch.testing.assert_close(sft, total, rtol=1e-6, atol=0)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("model."):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert model.lm_head is not None
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("logits", [2**25, 5 * 50, 1])
def test_token_losses_equal_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    """In float64, all at once, five tokens at a time, and one by one."""
    monkeypatch.setattr(language_model, "LOGITS", logits)
    hidden, weight = torch.randn(13, 8).double().requires_grad_(), torch.randn(50, 8).double()
    tokens, upstream = torch.randint(50, (13,)), torch.randn(13).double()
    found = language_model.token_losses(hidden, weight, tokens)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, tokens, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, hidden, upstream)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    nothing = language_model.token_losses(hidden[:0], weight, tokens[:0])
    assert nothing.shape == (0,)


def test_the_logits_of_all_tokens_never_exist_together(
    pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pack = small_model(small_config(vocab_size=200), lm_head=True), pack_of(pairs)
    whole = gradients(model, pack)
    monkeypatch.setattr(language_model, "LOGITS", 5 * 200)
    rows: list[int] = []
    weight = model.lm_head.weight.untyped_storage().data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.shape[-1:] == (200,) and made.untyped_storage().data_ptr() != weight:
                rows.append(made.numel() // 200)
            return made

    with Watch():
        chunked = gradients(model, pack)
    assert max(rows) == 5 < len(pack.pairs.predictions.tokens_M)
    assert chunked.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-10, atol=1e-12)


def test_operations_and_memory_count_the_lm_head(pairs: list[TokenizedPair]) -> None:
    config, pack = small_config(), pack_of(pairs)
    plain = replace(pack, pairs=replace(pack.pairs, predictions=None))
    counted = []
    for one in (pack, plain):
        model = small_model(config, lm_head=True)
        with FlopCounterMode(display=False) as counter:
            losses(model(one), one.pairs, OBJECTIVE if one is pack else Objective())[0].backward()
        counted.append(counter.get_total_flops())
    done, without = (work(one, config, "none").model_flops for one in (pack, plain))
    assert done - without == counted[0] - counted[1] > 0

    size = config.vocab_size * config.hidden_size
    trained, held = parameter_counts(config, 3, None, cached_states=False)
    assert parameter_counts(config, 3, None, cached_states=False, lm_head=True) == (trained, held + size)
    shape = memory_shape(config, tokens=1000, keys=1000, read_rows=500)
    more = predicted_memory(replace(shape, predicted=100), "none", "step") - predicted_memory(shape, "none", "step")
    assert more == 8 * size + 4 * 100 * config.hidden_size  # weights, also gathered; gradients of the states


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose lm_head equals its embedding."""
    head = trunk()["model.embed_tokens.weight"].clone()
    return llama(tmp_path_factory.mktemp("sft") / "base", {**trunk(), "lm_head.weight": head})


def call(pair_file: Path, base: Path, output: Path, *more: str) -> list[str]:
    return arguments(pair_file, output, "--model", str(base), *WEIGHT, *more)


@pytest.fixture(scope="module")
def finished(pair_file: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sft") / "run"
    assert main(call(pair_file, base, output)) == 0
    return output


def test_a_run_logs_the_loss_and_learns_to_write(finished: Path) -> None:
    trained = [row for row in rows(finished) if "loss/sft" in row]
    assert len(trained) == 4
    for row in trained:
        expected = row["loss/ranking"] + 0.5 * row["loss/contrastive"] + 0.5 * row["loss/sft"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    held_out = [row["eval/loss/sft"] for row in rows(finished) if "eval/loss/sft" in row]
    assert held_out[-1] < 0.8 * held_out[0]
    saved = {name for path in (finished / "model").glob("*.safetensors") for name in load_file(path)}
    assert saved == {*trunk(), "score.weight", "default"}


def test_a_run_resumes_bit_for_bit(
    finished: Path, base: Path, pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_in_step_9(call(pair_file, base, tmp_path / "out"), monkeypatch)
    assert main(call(pair_file, base, tmp_path / "out")) == 0
    assert_same(finished, tmp_path / "out")


def test_a_tied_lm_head_is_the_embedding_of_the_checkpoint(
    finished: Path, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = llama(tmp_path / "tied", trunk(), tie_word_embeddings=True)
    assert main(call(pair_file, tied, tmp_path / "out")) == 0
    assert "lm_head.weight" not in capsys.readouterr().out
    assert_same(finished, tmp_path / "out")


def test_what_has_no_lm_head_is_refused(finished: Path, pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    classifier = llama(
        tmp_path / "tied",
        {**trunk(), "score.weight": torch.zeros(1, 32)},
        tie_word_embeddings=True,
        architectures=["LlamaForSequenceClassification"],
    )
    for folder in (finished / "model", classifier):
        result = gcrm("train", *call(pair_file, folder, tmp_path / "out"))
        assert result.returncode == 2
        assert f"{folder}: holds no lm_head: name a language model" in result.stderr
    result = gcrm("train", *arguments(pair_file, tmp_path / "out", *WEIGHT))
    assert "--sft-weight 0.5: must be 0 without --model, whose lm_head it uses" in result.stderr


def test_adapters_and_cached_states_have_the_same_lm_head(pair_file: Path, base: Path, tmp_path: Path) -> None:
    """With cached states the embeddings are absent; both runs train the same layer."""
    pytest.importorskip("peft", reason="pip install 'gcrm-fast[lora]'")
    two = {
        name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in trunk().items() if "layers.0" in name
    }
    tied = llama(tmp_path / "base", {**trunk(), **two}, tie_word_embeddings=True, num_hidden_layers=2)
    found = []
    for name, *options in (("plain",), ("cached", "--cache-states"), ("lora", "--lora-rank", "4")):
        assert main(call(pair_file, tied, tmp_path / name, "--train-layers", "1", *options)) == 0
        found.append([row["eval/loss/sft"] for row in rows(tmp_path / name) if "eval/loss/sft" in row])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[2][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[2][-1] < found[2][0]


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["block", "step"])
def test_two_processes_train_the_same(finished: Path, base: Path, pair_file: Path, tmp_path: Path, gather: str) -> None:
    result = torchrun(*call(pair_file, base, tmp_path, "--gather", gather, "--tokens-per-batch", "150"), processes=2)
    assert result.returncode == 0, result.stderr
    for a, b in zip(rows(finished), rows(tmp_path), strict=True):
        for name in (a.keys() & b.keys()) - TIMES:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["step"], name)
