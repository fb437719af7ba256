"""Samples of a policy as pairs of views (RLP): which are drawn, the same loss whatever the packs, and whole runs."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gcrm_fast.data.batches import Budget
from gcrm_fast.data.encoding import TokenizedPair, TokenReport
from gcrm_fast.data.on_policy import OnPolicy, ViewPair, view_blocks
from gcrm_fast.data.packing import build_pack
from gcrm_fast.data.sampling import Sampling
from gcrm_fast.model.inputs import Pack
from gcrm_fast.model.reward_model import LlamaRewardModel
from gcrm_fast.model.views import WIDTH, Views
from gcrm_fast.train import main
from gcrm_fast.training.accounting import work
from gcrm_fast.training.loader import Steps
from gcrm_fast.training.memory import parameter_counts, predicted_memory
from gcrm_fast.training.objectives import Objective, losses
from support.small import SPECIAL, VOCAB, memory_shape, small_config, small_model
from support.training_runs import TIMES, Gcrm, arguments, assert_same, end_in_step_9, rows, torchrun

SAMPLING = Sampling(samples=3, seed=5, views=WIDTH)
OBJECTIVE = Objective(contrastive_weight=0.3, views_weight=0.7)
COUNTS = (5, 2, 3, 2, 4)  # samples of each record; the last has the prompt of the first


def sample(record: int, number: int) -> TokenizedPair:
    key = record % 4
    prompt = np.random.default_rng(key).integers(SPECIAL, VOCAB, size=3 + 2 * key)
    rng = np.random.default_rng([record, number])
    ids = np.concatenate([prompt, rng.integers(SPECIAL, VOCAB, size=rng.integers(1, 9))]).astype(np.int32)
    return TokenizedPair(
        pair_id=100 * record + number,
        chosen_ids=ids,
        rejected_ids=ids,
        chosen_start=len(prompt),
        rejected_start=len(prompt),
        prompt_key=key,
        where=f"samples:{record}",
        target=0.0,
    )


@pytest.fixture
def on_policy() -> OnPolicy:
    """Seven pairs of views per pass, of four prompts; two samples are identical."""
    report = TokenReport(key="", dropped=0, shortened=0, completions=[])
    records = [[sample(record, number) for number in range(n)] for record, n in enumerate(COUNTS)]
    records[1][1] = replace(records[1][0], pair_id=101)
    return OnPolicy(records=records, report=report, too_few=0, seed=5)


def steps(
    pairs: list[TokenizedPair], on_policy: OnPolicy, *, budget: int = 1000, rank: int = 0, ranks: int = 1
) -> Steps:
    """Of 4 and 3 pairs in turn."""
    return Steps(
        pairs=pairs,
        budget=Budget(budget, 32),
        sampling=SAMPLING,
        global_batch_pairs=4,
        group_prompts=1,
        rank=rank,
        world_size=ranks,
        on_policy=on_policy,
    )


# ------------------------------------------------------------------------------------------------------------- drawing


def test_a_pass_uses_every_sample_once_but_one_of_an_odd_number(on_policy: OnPolicy) -> None:
    drawn = [on_policy.views(epoch * 7, 7) for epoch in range(3)]
    for views in drawn:
        used = Counter(one.pair_id for view in views for one in view.samples)
        assert set(used.values()) == {1}
        assert [sum(i // 100 == record for i in used) for record in range(5)] == [4, 2, 2, 2, 4]
        assert all(one.where == two.where == view.where for view in views for one, two in [view.samples])
    assert len({str([[one.pair_id for one in view.samples] for view in views]) for views in drawn}) == 3


def test_the_views_of_a_step_depend_on_seed_and_step_alone(pairs: list[TokenizedPair], on_policy: OnPolicy) -> None:
    """As many as it has pairs, one pass after the other, whatever was read before."""
    forward = [steps(pairs, on_policy).views(step) for step in range(6)]
    assert [len(views) for views in forward] == [4, 3, 4, 3, 4, 3]
    assert [[*chain(*forward)][i].epoch for i in range(21)] == [0] * 7 + [1] * 7 + [2] * 7

    def named(views: list[ViewPair]) -> list[object]:
        return [([one.pair_id for one in view.samples], view.noise(5, 3).tolist()) for view in views]

    again = steps(pairs, replace(on_policy))
    assert [named(again.views(step)) for step in reversed(range(6))] == [named(views) for views in forward[::-1]]
    assert named(steps(pairs, replace(on_policy, seed=6)).views(0)) != named(forward[0])
    noise = [str(view.noise(5, 3)) for view in chain(*forward)]
    assert len(set(noise)) == len(noise)


def test_the_smaller_set_is_repeated(pairs: list[TokenizedPair], on_policy: OnPolicy) -> None:
    few = replace(on_policy, records=on_policy.records[1:3])
    seen = Counter(view.record for step in range(4) for view in steps(pairs, few).views(step))
    assert seen == {0: 7, 1: 7}


def test_blocks_hold_two_prompts_or_what_has_no_partner() -> None:
    def blocks(*keys: int) -> list[list[int]]:
        views = [
            ViewPair(record=i, number=0, epoch=0, samples=(replace(sample(0, 0), prompt_key=key),) * 2)
            for i, key in enumerate(keys)
        ]
        return [[view.prompt_key for view in block] for block in view_blocks(views)]

    assert blocks(1, 2, 3, 4) == [[1, 2], [3, 4]]
    assert blocks(1, 1, 2, 3, 1) == [[1, 2, 1], [1, 3]]
    assert blocks(1, 1, 1, 1, 2) == [[1, 2, 1], [1], [1]]
    assert blocks(1, 1) == [[1], [1]]


# ---------------------------------------------------------------------------------------------------------------- loss


def result(model: LlamaRewardModel, packs: list[Pack]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sums of the statistics, and gradients."""
    model.zero_grad()
    sums: Counter[str] = Counter()
    for pack in packs:
        loss, statistics = losses(model(pack), pack.pairs, OBJECTIVE)
        loss.backward()
        sums.update(dict(zip(statistics.names, statistics.sums_K.double().tolist(), strict=True)))
    return dict(sums), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(a: tuple[dict[str, float], dict[str, Tensor]], b: tuple[dict[str, float], dict[str, Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)  # float32
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-9, atol=1e-11)


def test_a_step_has_the_loss_of_its_sequences_one_by_one(pairs: list[TokenizedPair], on_policy: OnPolicy) -> None:
    """Each sample alone in a pack; the negative view is that of the next other prompt of the block, if it has any."""
    model, step = small_model(small_config(), views=True), steps(pairs, on_policy)
    assert model.views is not None
    epoch, groups = step.groups(0)
    views = step.views(0)
    blocks = view_blocks(views)
    (pack,) = step[0].packs
    found = result(model, [pack])

    model.zero_grad()
    alone = build_pack(groups, replace(SAMPLING, views=0), epoch)
    total = losses(model(alone), alone.pairs, OBJECTIVE)[0]
    ordered = [view for block in blocks for view in block]
    ends = []
    for one in (view.samples[side] for side in range(2) for view in ordered):
        own = build_pack([[one]], Sampling(samples=1), 0)
        ends.append(model.model(own, "eager")[own.pairs.end_2N[0]])
    others = []
    for block in blocks:
        for i, view in enumerate(block):
            circle = block[i + 1 :] + block[:i]
            others.append(ordered.index(next((one for one in circle if one.prompt_key != view.prompt_key), view)))
    noise = torch.stack([torch.from_numpy(view.noise(5, WIDTH)) for view in ordered], dim=1).double()
    of_views = model.views(torch.cat(ends).view(2, 4, -1), noise, torch.tensor(others))
    total = total + 0.7 * of_views.total().sum()
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert found[0]["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert found[0]["loss/views"] == pytest.approx(of_views.total().sum().item(), rel=1e-5)
    assert found[0]["views/kl"] == pytest.approx(of_views.divergence.sum().item(), rel=1e-5)
    above_chance = of_views.information.sum().item() + 4 * 2 * math.log(2)
    assert found[0]["views/i_js"] == pytest.approx(above_chance, rel=1e-4)
    assert found[1].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("step", range(4))
def test_any_packs_and_ranks_give_the_same_loss(
    pairs: list[TokenizedPair], on_policy: OnPolicy, ranks: int, step: int
) -> None:
    model = small_model(small_config(), views=True)
    whole = result(model, steps(pairs, on_policy)[step].packs)
    for budget in (80, 1000):
        parts = [steps(pairs, on_policy, budget=budget, rank=rank, ranks=ranks)[step] for rank in range(ranks)]
        assert len({len(part.packs) for part in parts}) == 1
        assert_alike(whole, result(model, [pack for part in parts for pack in part.packs]))


def test_the_prompt_of_two_views_is_computed_once(on_policy: OnPolicy) -> None:
    view = next(view for view in on_policy.views(0, 7) if view.record == 2)
    one, two = view.sequences
    pack = build_pack([[view]], SAMPLING, 0)
    assert len(pack.input_ids_T) <= len(one) + len(two) - view.samples[0].chosen_start
    assert len(pack.read_rows_R) == 2


def test_operations_and_memory_count_the_views(pairs: list[TokenizedPair], on_policy: OnPolicy) -> None:
    config, model = small_config(), small_model(small_config(), views=True)
    (pack,) = steps(pairs, on_policy)[0].packs
    counted = []
    for one in (pack, replace(pack, views=None)):
        with FlopCounterMode(display=False) as counter:
            losses(model(one), one.pairs, OBJECTIVE)[0].backward()
        counted.append(counter.get_total_flops())
    done, without = (work(one, config, "none") for one in (pack, replace(pack, views=None)))
    assert done.model_flops - without.model_flops == counted[0] - counted[1] > 0
    assert done.padded_tokens == 2 * without.padded_tokens

    size = sum(parameter.numel() for parameter in Views(config.hidden_size).parameters())
    trained, held = parameter_counts(config, 3, None, cached_states=False)
    assert parameter_counts(config, 3, None, cached_states=False, views=True) == (trained + size, held + size)
    shape = memory_shape(config, tokens=1000, keys=1000, read_rows=500)
    more = predicted_memory(replace(shape, views=True), "none", "step") - predicted_memory(shape, "none", "step")
    assert more >= (16 + 4 - 4) * size  # with moments, and gathered; the gradient while activations are kept


# ---------------------------------------------------------------------------------------------------------- whole runs


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words, rng = ["red", "green", "house", "tree", "river", "stone", "light"], np.random.default_rng(1)
    return write(
        tmp_path_factory.mktemp("samples") / "samples.jsonl",
        [
            {
                "prompt": f"Tell me {i}: " + " ".join(rng.choice(words, 4)),
                "completions": [" " + " ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(2 + i % 4)],
            }
            for i in range(9)
        ],
    )


@pytest.fixture(scope="module")
def finished(pair_file: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rlp") / "run"
    assert main(arguments(pair_file, output, "--on-policy", str(samples))) == 0
    return output


def test_a_run_logs_the_loss_and_saves_a_plain_reward_model(finished: Path, pair_file: Path, tmp_path: Path) -> None:
    trained = [row for row in rows(finished) if "loss/views" in row]
    assert len(trained) == 4
    for row in trained:
        expected = row["loss/ranking"] + 0.5 * row["loss/contrastive"] + 0.5 * row["loss/views"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        assert row["loss/views"] == pytest.approx(row["views/kl"] - row["views/i_js"] + 2 * math.log(2), rel=1e-4)
    assert trained[-1]["loss/views"] < trained[0]["loss/views"]
    assert main(arguments(pair_file, tmp_path)) == 0
    card = (finished / "model/README.md").read_text()
    assert "| samples of a policy, without labels |" in card
    assert "| on-policy samples | 30 of 9 prompts" in card
    plain, with_views = (saved(folder / "model") for folder in (tmp_path, finished))
    assert plain.keys() == with_views.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(plain[name], with_views[name])
    own = json.loads((tmp_path / "model/gcrm.json").read_text())
    assert own.keys() == json.loads((finished / "model/gcrm.json").read_text()).keys()


def test_the_weight_of_the_divergences_grows(samples: Path, pair_file: Path, tmp_path: Path) -> None:
    more = ("--on-policy", str(samples), "--views-ramp", "0.5", "--log-every", "1")
    assert main(arguments(pair_file, tmp_path, *more)) == 0
    logged = {row["step"]: row for row in rows(tmp_path) if "loss/views" in row}
    for step, weight in ((1, 0.001 ** (5 / 6)), (3, 0.001**0.5), (6, 1.0), (12, 1.0)):
        row = logged[step]
        expected = weight * row["views/kl"] - row["views/i_js"] + 2 * math.log(2)
        assert row["loss/views"] == pytest.approx(expected, rel=1e-4)


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors in all files of a model."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_run_resumes_bit_for_bit(
    finished: Path, samples: Path, pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(pair_file, tmp_path / "out", "--on-policy", str(samples))
    end_in_step_9(call, monkeypatch)
    assert main(call) == 0
    assert_same(finished, tmp_path / "out")


def test_other_samples_are_another_run(
    samples: Path, pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "samples.jsonl"
    own.write_bytes(samples.read_bytes())
    call = arguments(pair_file, tmp_path / "out", "--on-policy", str(own))
    end_in_step_9(call, monkeypatch)
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join(lines[:-1]))
    assert main(call) == 2
    assert "the training data or its tokens have changed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["block", "step"])
def test_two_processes_train_the_same(
    finished: Path, samples: Path, pair_file: Path, tmp_path: Path, gather: str
) -> None:
    more = ("--on-policy", str(samples), "--gather", gather, "--tokens-per-batch", "400")
    done = torchrun(*arguments(pair_file, tmp_path, *more), processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(finished), rows(tmp_path), strict=True):
        for name in (a.keys() & b.keys()) - TIMES:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["step"], name)


def test_adapters_train_with_the_views(samples: Path, pair_file: Path, tmp_path: Path, finished: Path) -> None:
    pytest.importorskip("peft", reason="pip install 'gcrm-fast[lora]'")
    more = ("--on-policy", str(samples), "--model", str(finished / "model"), "--lora-rank", "4")
    assert main(arguments(pair_file, tmp_path, *more)) == 0
    measured = [row["loss/views"] for row in rows(tmp_path) if "loss/views" in row]
    assert measured[-1] < measured[0]


def test_the_start_says_what_became_of_the_samples(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    records: list[dict[str, object]] = [{"prompt": f"q{i}", "completions": [" a b", " c", " d"]} for i in range(4)]
    records[1]["completions"] = [" a", " word" * 80]
    own = write(tmp_path / "samples.jsonl", records)
    call = arguments(pair_file, tmp_path / "out", "--on-policy", own, "--max-length", "60", "--dry-run")
    done = gcrm("train", *call)
    assert done.returncode == 0, done.stderr
    assert "9 of 3 prompts (1 dropped: longer than --max-length 60 tokens; 1 prompts with fewer than two left)" in (
        done.stdout
    )
    assert "3, about 32 times in this run" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--views-weight", "1"), "--views-weight 1.0: must be omitted without --on-policy"),
        (("--views-ramp", "0.1"), "--views-ramp 0.1: must be omitted without --on-policy"),
        (("--on-policy", "s", "--loss", "bce"), "--loss bce: must be ranking with --on-policy"),
        (("--on-policy", "s", "--global-batch-pairs", "1"), "--global-batch-pairs 1: must be 2 or more with"),
        (("--on-policy", "s", "--train-layers", "1", "--cache-states"), "--cache-states True: must be omitted with"),
        (("--on-policy", "s", "--views-weight", "0"), "--views-weight 0"),
        (("--on-policy", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_refused(
    pair_file: Path, tmp_path: Path, gcrm: Gcrm, more: tuple[str, ...], message: str
) -> None:
    done = gcrm("train", *arguments(pair_file, tmp_path / "out", *more))
    assert done.returncode == 2
    assert message in done.stderr


BAD = [
    ({"prompt": "q", "completions": [" a"]}, "field 'completions' has 1 entry"),
    ({"prompt": "q", "completions": []}, "field 'completions' has no entry"),
    ({"prompt": "q", "completions": [" a", " b<|im_end|>"]}, "which is not a token of the reward model's tokenizer"),
    ({"prompt": "q", "completions": [" a", ""], "completions_cut": [False, True]}, "is cut and has no token"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records_are_named_or_skipped(
    record: dict[str, object], message: str, samples: Path, pair_file: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    good = [json.loads(line) for line in samples.read_text().splitlines()]
    own = write(tmp_path / "samples.jsonl", [*good[:2], record, *good[2:]])
    call = arguments(pair_file, tmp_path / "out", "--on-policy", own, "--dry-run")
    done = gcrm("train", *call)
    assert done.returncode == 2
    assert f"{own}:3: " in done.stderr
    assert message in done.stderr
    done = gcrm("train", *call, "--on-bad-record", "skip")
    assert done.returncode == 0, done.stderr
    assert "1 skipped; the first: " in done.stdout


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([("q", 4), ("q", 4)], (), "they need two different prompts"),
        ([("q", 4), ("r", 4)], ("--tokens-per-batch", "90"), "three pairs of samples in one pack, up to"),
        ([("Question 0:", 4), ("r", 4)], (), ""),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(
    records: list[tuple[str, int]], more: tuple[str, ...], message: str, pair_file: Path, tmp_path: Path, gcrm: Gcrm
) -> None:
    texts = [f" word{i} and some more of them" for i in range(4)]
    own = write(tmp_path / "samples.jsonl", [{"prompt": q, "completions": texts[:n]} for q, n in records])
    done = gcrm("train", *arguments(pair_file, tmp_path / "out", "--on-policy", own, "--dry-run", *more))
    assert done.returncode == (2 if message else 0), done.stderr
    assert message in done.stderr


def test_prompts_that_are_held_out_are_refused(pair_file: Path, samples: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    first = json.loads(samples.read_text().splitlines()[0])
    held_out = write(tmp_path / "held.jsonl", [{"prompt": first["prompt"], "chosen": " a", "rejected": " b"}])
    call = [word for word in arguments(pair_file, tmp_path / "out") if word != "--allow-overlap"]
    call[call.index("--eval-data") + 1] = str(held_out)
    done = gcrm("train", *call, "--on-policy", samples, "--dry-run")
    assert done.returncode == 2
    assert "field 'prompt' is also in the training data" in done.stderr
