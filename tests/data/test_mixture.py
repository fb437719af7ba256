"""--data-weights: shares of several sources, in each epoch and over epochs; as functions of (seed, epoch) alone."""

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gcrm_fast.data.batches import Budget, epoch_batches
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.mixture import Mixture
from gcrm_fast.data.sampling import Sampling, draw_samples
from gcrm_fast.train import main
from gcrm_fast.training.config import TrainConfig, parse, to_toml
from gcrm_fast.training.loader import Steps
from support.training_runs import TIMES, Gcrm, arguments, assert_same, end_in_step_9, rows, torchrun

SOURCES = np.repeat([0, 1, 2], [50, 7, 43])  # N is 100
WEIGHTS = (1.0, 3.0, 2.0)


def mixture(**changes: object) -> Mixture:
    return Mixture(**{"source_N": SOURCES, "weights": WEIGHTS} | changes)


def test_an_epoch_has_the_shares_and_as_many_pairs_as_the_data() -> None:
    assert mixture().counts() == [17, 50, 33]  # of 16.7, 50 and 33.3
    for epoch in range(4):
        sources = SOURCES[mixture().drawn(3, epoch) % 100]
        assert np.bincount(sources).tolist() == [17, 50, 33]
    assert mixture(weights=(10.0, 30.0, 20.0)).counts() == [17, 50, 33], "their sum does not matter"
    assert mixture(weights=(1.0, 1.0, 1.0)).counts() == [34, 33, 33], "of equal remainders the first gets the pair"


def test_the_pairs_of_a_source_are_drawn_equally_often_over_epochs() -> None:
    times: Counter[int] = Counter()
    for epoch in range(5):
        drawn = mixture().drawn(3, epoch)
        assert len(set(drawn.tolist())) == 100, "a repeated pair has another position"
        times.update((drawn % 100).tolist())
        for source in range(3):
            of_source = [times[int(i)] for i in np.flatnonzero(np.equal(SOURCES, source))]
            assert max(of_source) - min(of_source) <= 1, (epoch, source)
    assert sorted(times) == list(range(100)), "85 of the first source's 50: none is missing"


def test_what_is_drawn_depends_on_seed_and_epoch_alone() -> None:
    one, again = mixture().drawn(3, 2), mixture().drawn(3, 2)
    assert one.tolist() == again.tolist()
    assert one.tolist() != mixture().drawn(4, 2).tolist()
    first, second = (mixture().drawn(3, epoch)[:17] % 100 for epoch in (0, 1))
    assert set(first) & set(second) == set(), "34 of 50: the second epoch continues where the first ended"


def test_a_source_of_a_tiny_share_may_have_no_pair_in_an_epoch() -> None:
    tiny = mixture(weights=(1e-6, 1.0, 1.0))
    assert tiny.counts() == [0, 50, 50]
    assert set(SOURCES[tiny.drawn(0, 5) % 100]) == {1, 2}


@pytest.mark.parametrize("group_prompts", [1, 3])
def test_batches_have_the_pairs_that_were_drawn(group_prompts: int) -> None:
    keys = np.random.default_rng(0).integers(12, size=100)
    batches = list(epoch_batches(keys, 16, group_prompts, 3, 1, mixture()))
    assert [sum(map(len, batch)) for batch in batches] == [16] * 6 + [4]
    positions = [i for batch in batches for group in batch for i in group]
    assert sorted(positions) == sorted(mixture().drawn(3, 1).tolist())
    assert [SOURCES[i % 100] for i in positions] != sorted(SOURCES[i % 100] for i in positions), "shuffled"
    for group in (group for batch in batches for group in batch):
        assert len(group) <= group_prompts
        assert len({keys[i % 100] for i in group}) == 1


def test_ranks_and_packs_share_the_same_pairs_and_samples(pairs: list[TokenizedPair]) -> None:
    """Seven pairs, one of them five times per epoch: the same pairs and samples for any ranks and pack sizes, and other
    samples for each time a pair comes."""
    shares = Mixture(source_N=np.array([0, 0, 0, 0, 0, 0, 1]), weights=(2.0, 5.0))
    sampling = Sampling(samples=8)

    def ids(world_size: int, tokens: int) -> list[list[int]]:
        all_ranks = [
            Steps(
                pairs=pairs,
                budget=Budget(tokens, 32),
                sampling=sampling,
                global_batch_pairs=3,
                group_prompts=2,
                rank=rank,
                world_size=world_size,
                mixture=shares,
            )
            for rank in range(world_size)
        ]
        return [
            sorted(i for steps in all_ranks for pack in steps[step].packs for i in pack.pairs.pair_ids)
            for step in range(6)
        ]

    one = ids(1, 60)
    assert one == ids(2, 60) == ids(1, 400)
    assert [len(step) for step in one] == [3, 3, 1, 3, 3, 1]
    for epoch in (one[:3], one[3:]):
        drawn = [i for step in epoch for i in step]
        assert Counter(i % 7 == 6 for i in drawn) == {True: 5, False: 2}
        assert len(set(drawn)) == 7
        repeated = [replace(pairs[6], pair_id=i) for i in drawn if i % 7 == 6]
        assert len({draw_samples(pair, sampling, 0).tobytes() for pair in repeated}) == 5


@pytest.fixture
def two_sources(pair_file: Path, tmp_path: Path) -> list[str]:
    """Files of 15 pairs and of 6."""
    with gzip.open(pair_file, "rt") as file:
        lines = file.readlines()
    (tmp_path / "many.jsonl").write_text("".join(lines[:15]))
    (tmp_path / "few.jsonl").write_text("".join(lines[15:]))
    return [str(tmp_path / name) for name in ("many.jsonl", "few.jsonl")]


def mixed(sources: list[str], output: Path, weights: tuple[str, str] = ("1", "2")) -> list[str]:
    """A run of twelve steps, four epochs of 21 pairs."""
    more = ["--data", sources[1], "--data-weights", *weights, "--group-prompts", "2"]
    return arguments(Path(sources[0]), output, *more)


def test_a_run_resumes_bit_for_bit_and_other_weights_are_refused(
    two_sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert main(mixed(two_sources, undisturbed)) == 0
    said = f"{two_sources[1]}: 14 per epoch (66.7%), each of its 6 pairs 2.3 times"
    assert said in capsys.readouterr().out
    card = (undisturbed / "model" / "README.md").read_text()
    assert said in card
    assert "--data-weights 1.0 2.0" in card

    end_in_step_9(mixed(two_sources, killed), monkeypatch)
    assert main(mixed(two_sources, killed, ("1", "3"))) == 2
    assert "--data-weights was [1.0, 2.0] and is [1.0, 3.0]" in capsys.readouterr().err
    assert main(mixed(two_sources, killed)) == 0
    assert_same(undisturbed, killed)


def test_another_border_between_the_sources_is_other_data(
    two_sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end_in_step_9(mixed(two_sources, tmp_path / "out"), monkeypatch)
    many, few = map(Path, two_sources)
    *stay, moved = many.read_text().splitlines(keepends=True)
    few.write_text(moved + few.read_text())
    many.write_text("".join(stay))
    assert main(mixed(two_sources, tmp_path / "out")) == 2
    assert "the training data or its tokens have changed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_with_small_packs_train_the_same(two_sources: list[str], tmp_path: Path) -> None:
    logs = []
    for processes, tokens in ((1, "4000"), (2, "150")):
        output = tmp_path / str(processes)
        result = torchrun(*mixed(two_sources, output), "--tokens-per-batch", tokens, processes=processes)
        assert result.returncode == 0, result.stderr
        logs.append([row for row in rows(output) if "loss" in row])
    for one, two in zip(*logs, strict=True):
        for name in one.keys() - TIMES:
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-4), (one["step"], name)


def test_options_that_do_not_fit_are_one_line(two_sources: list[str], tmp_path: Path, gcrm: Gcrm) -> None:
    for more, message in (
        (["--data-weights", "1"], "--data-weights 1.0 2.0 1.0: must be one number per source of --data: 2"),
        (["--train-pairs", "15"], f"--data-weights: {two_sources[1]} has no pairs left"),
    ):
        result = gcrm("train", *mixed(two_sources, tmp_path / "out"), *more)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert "--data-weights -1.0: must be more than 0" in gcrm("train", "--data-weights", "-1").stderr


def test_a_configuration_file_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(TrainConfig(data=("a", "b"), data_weights=(0.7, 0.3))))
    assert parse(["--config", str(path)]).data_weights == (0.7, 0.3)
