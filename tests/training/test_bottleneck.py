"""The information bottleneck: its loss, its noise, and whole runs with it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gcrm_fast import RewardModel
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling, draw_noise
from gcrm_fast.model.heads import BottleneckHead
from gcrm_fast.train import main
from gcrm_fast.training.config import parse, to_toml
from gcrm_fast.training.objectives import Objective, losses, statistics_of
from gcrm_fast.training.prepare import objective_of
from gcrm_fast.training.resume import differences
from support.small import small_config, small_model
from support.training_runs import TIMES, arguments, assert_same, end_in_step_9, rows, torchrun

SIZE = 6
OPTIONS = ["--head", "bottleneck", "--bottleneck-size", "8", "--compare", "latents"]


def test_loss_equals_its_transcription(pairs: list[TokenizedPair]) -> None:
    """SPEC section 2 with Python floats: the reward of a drawn latent, and the whole KL of both completions."""
    model = small_model(small_config(head="bottleneck", bottleneck_size=SIZE))
    pack = build_pack([[pair] for pair in pairs], Sampling(samples=3, noise=SIZE), 0)
    objective = Objective(contrastive_weight=0.0, term_weights={"kl": 0.1})
    loss, statistics = losses(model(pack), pack.pairs, objective)
    hidden = model.model(pack, "eager")
    assert isinstance(model.score, BottleneckHead)
    encoder, w = model.score.encoder.weight.tolist(), model.score.reward.weight[0].tolist()
    total = total_kl = 0.0
    for n, margin in enumerate(pack.pairs.margin_N.tolist()):
        rewards = []
        for side in (0, 1):
            h = hidden[pack.pairs.end_2N[side, n]].tolist()
            read = [sum(a * b for a, b in zip(row, h, strict=True)) for row in encoder]
            mu, log_variance = read[:SIZE], read[SIZE:]
            noise = pack.pairs.noise_2ND[side, n].tolist()
            s = [m + math.exp(v / 2) * e for m, v, e in zip(mu, log_variance, noise, strict=True)]
            rewards.append(sum(a * b for a, b in zip(w, s, strict=True)))
            total_kl += sum(0.5 * (m**2 + math.exp(v) - v - 1) for m, v in zip(mu, log_variance, strict=True))
        total += math.log1p(math.exp(-(rewards[0] - rewards[1] - margin)))
    assert loss.item() == pytest.approx(total + 0.1 * total_kl, rel=1e-9)
    assert statistics.names == statistics_of("bottleneck")
    assert float(statistics["loss/kl"]) == pytest.approx(total_kl, rel=1e-6)
    assert float(statistics["loss/kl_per_dimension"]) == pytest.approx(total_kl / (2 * SIZE), rel=1e-6)


def test_the_kl_of_a_distant_latent_is_not_that_of_its_mean() -> None:
    """mu = 5 and -5 in turn, variance 1: 12.5 per dimension, 0 in the released code, which averages mu first."""
    head = BottleneckHead(small_config(bottleneck_size=128, head="bottleneck"))
    with torch.no_grad():
        head.encoder.weight.zero_()
        head.encoder.weight[:128, 0] = torch.tensor([5.0, -5.0]).repeat(64)
    one = torch.zeros(1, 32)
    one[0, 0] = 1.0
    assert head.read(one, torch.zeros(1, 128)).terms["kl"].item() == pytest.approx(1600.0)


def test_noise_is_a_function_of_seed_epoch_and_pair(pairs: list[TokenizedPair]) -> None:
    a, b = pairs[:2]
    noise = Sampling(noise=500)
    first = draw_noise(a, noise, 0)
    np.testing.assert_array_equal(first, draw_noise(a, Sampling(noise=500, samples=3, positions="end"), 0))
    for other in (draw_noise(b, noise, 0), draw_noise(a, noise, 1), draw_noise(a, Sampling(noise=500, seed=1), 0)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(*first)[0, 1]) < 0.2
    assert first.mean() == pytest.approx(0, abs=0.15)
    assert first.std() == pytest.approx(1, abs=0.1)


def test_noise_in_training_and_the_mean_otherwise(pairs: list[TokenizedPair]) -> None:
    model = small_model(small_config(head="bottleneck", bottleneck_size=SIZE))
    pack = build_pack([pairs[:2]], Sampling(samples=3, noise=SIZE), 0)
    hidden = model.model(pack, "eager").index_select(0, pack.pairs.end_2N.flatten())
    mean = model.rewards(hidden).view(2, -1)
    assert not torch.allclose(model(pack).reward_2N, mean)
    torch.testing.assert_close(model.eval()(pack).reward_2N, mean)
    torch.testing.assert_close(model.score.reward(model.latents(hidden))[:, 0], model.rewards(hidden))


def test_the_weight_of_the_kl_reaches_the_objective_of_a_bottleneck_alone() -> None:
    assert objective_of(parse(["--head", "bottleneck", "--bottleneck-weight", "0.2"])).term_weights == {"kl": 0.2}
    assert objective_of(parse([])).term_weights == {}


def test_options_of_a_bottleneck_are_refused_without_one(tmp_path: Path) -> None:
    for option, value, default in (("size", "3", "128"), ("weight", "0.7", "0.1")):
        message = f"--bottleneck-{option} {value}: must be {default} or omitted without --head bottleneck"
        with pytest.raises(UserError, match=message):
            parse([f"--bottleneck-{option}", value])
        parse([f"--bottleneck-{option}", default])
        parse(["--head", "bottleneck", f"--bottleneck-{option}", value])
    (tmp_path / "c.toml").write_text(to_toml(parse(["--head", "bottleneck", "--bottleneck-size", "3"])))
    with pytest.raises(UserError, match="--bottleneck-size 3: must be 128 or omitted"):
        parse(["--config", str(tmp_path / "c.toml"), "--head", "linear"])
    parse(["--config", str(tmp_path / "c.toml"), "--head", "linear", "--bottleneck-size", "128"])


def test_a_run_that_was_given_them_without_one_resumes() -> None:
    for head, expected in (("linear", 0), ("bottleneck", 1)):
        config = parse(["--head", head])
        checkpoint: Any = SimpleNamespace(facts={"config": dataclasses.asdict(config), "data_key": "k"})
        checkpoint.facts["config"] |= {"bottleneck_size": 3, "lora_targets": list(config.lora_targets)}
        changed = differences(config, "k", checkpoint)
        assert len([one for one in changed if one.startswith("--bottleneck")]) == expected


@pytest.fixture(scope="module")
def finished(pair_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bottleneck")
    assert main(arguments(pair_file, output, *OPTIONS)) == 0
    return output


def test_a_run_logs_the_kl_and_learns(finished: Path) -> None:
    trained = [row for row in rows(finished) if "loss/kl" in row]
    for row in trained:
        assert row["loss/kl"] == pytest.approx(16 * row["loss/kl_per_dimension"], rel=1e-4)
        expected = row["loss/ranking"] + 0.5 * row["loss/contrastive"] + 0.1 * row["loss/kl"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    held_out = [row["eval/loss/kl"] for row in rows(finished) if "eval/loss/kl" in row]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]


def test_a_run_resumes_bit_for_bit(
    finished: Path, pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(pair_file, tmp_path / "out", *OPTIONS)
    end_in_step_9(call, monkeypatch)
    assert main(call) == 0
    assert_same(finished, tmp_path / "out")
    own, again = (load_file(run / "model" / "gcrm.safetensors") for run in (finished, tmp_path / "out"))
    assert own.keys() == again.keys() == {"score.encoder.weight", "score.reward.weight"}
    assert all(torch.equal(own[name], again[name]) for name in own)


def test_the_saved_model_scores_alike_in_transformers_and_has_its_latents_here(finished: Path) -> None:
    folder = finished / "model"
    prompt, completion = "Question 3: quick fox", " over the lazy dog"
    model = RewardModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")
    with torch.no_grad():
        assert theirs(**ids).logits.item() == pytest.approx(model.score(prompt, completion), rel=1e-5, abs=1e-6)
        hidden = theirs.model(**ids).last_hidden_state[0, -1]
    mu = load_file(folder / "gcrm.safetensors")["score.encoder.weight"][:8] @ hidden
    np.testing.assert_allclose(model.representations(prompt, completion)[-1], mu, rtol=1e-4, atol=1e-5)
    q = model.q_values(prompt, completion)
    assert q[-1] == pytest.approx(float(torch.cosine_similarity(mu, model.goal(), dim=0)), abs=1e-5)
    (tokens,) = model.encode([prompt], [completion])
    stream = model.stream(tokens.ids[: tokens.start].tolist(), 1)
    np.testing.assert_allclose(stream.push([tokens.ids[tokens.start : -1].tolist()])[0], q[:-1], rtol=1e-4, atol=1e-5)
    assert stream.close(0) == pytest.approx(model.score(prompt, completion), rel=1e-5, abs=1e-6)
    facts = json.loads((folder / "gcrm.json").read_text())
    assert (facts["head"], facts["bottleneck_size"], facts["compare"]) == ("bottleneck", 8, "latents")


def test_a_run_starts_from_a_bottleneck_and_a_linear_one_says_how(
    finished: Path, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--model", str(finished / "model"), "--lr", "1e-30", "--steps", "1"]
    call = [*arguments(pair_file, tmp_path / "a", *OPTIONS), *start]
    assert main([one for one in call if one not in ("--vocab-size", "300")]) == 0
    before, after = (load_file(run / "model" / "gcrm.safetensors") for run in (finished, tmp_path / "a"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert main([*arguments(pair_file, tmp_path / "b"), *start]) == 2
    assert "pass --head bottleneck --bottleneck-size 8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["block", "step"])
def test_two_processes_train_the_same(finished: Path, pair_file: Path, tmp_path: Path, gather: str) -> None:
    """FSDP2 gathers the head for each of its methods; noise does not depend on the process or the micro-batch."""
    more = ["--gather", gather, "--tokens-per-batch", "150"]
    result = torchrun(*arguments(pair_file, tmp_path, *OPTIONS, *more), processes=2)
    assert result.returncode == 0, result.stderr
    for a, b in zip(rows(finished), rows(tmp_path), strict=True):
        for name in (a.keys() & b.keys()) - TIMES:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["step"], name)
    own, other = (load_file(run / "model" / "gcrm.safetensors") for run in (finished, tmp_path))
    for name, tensor in own.items():
        torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-4)
