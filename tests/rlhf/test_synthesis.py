"""Synthetic pairs: clusters, which samples become a pair, and entailment by a small model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from gcrm_fast.common.errors import UserError
from gcrm_fast.rlhf.entailment import BATCH, Entailment
from gcrm_fast.rlhf.synthesis import AGREED, PAIR, SAME, TIE, UNSURE, accuracy, by_answer, by_entailment, synthesized
from support.folders import VOCAB, tokenizer

TEXTS = list("abcdefghij")


def outcome(answers: str, rewards: list[float], threshold: float = 0.5, seed: int = 0) -> tuple[str, int, int]:
    """Of samples with one-letter answers; '-' cannot be read."""
    clusters = by_answer([None if answer == "-" else answer for answer in answers])
    found = synthesized(clusters, rewards, TEXTS[: len(answers)], threshold, np.random.default_rng(seed))
    return found.kind, found.chosen, found.rejected


def test_unreadable_answers_are_clusters_of_their_own() -> None:
    assert by_answer(["4", None, "5", "4", None]) == [0, 1, 2, 0, 3]
    assert by_answer([None, "1", None]) == [0, 1, 2], "a number of a sample is not an answer"


def test_the_best_of_the_largest_cluster_against_another_at_random() -> None:
    rewards = [1.0, 3.0, 9.0, 2.0, 8.0]
    pairs = {outcome("xxyxz", rewards, seed=seed) for seed in range(30)}
    assert pairs == {(PAIR, 1, 2), (PAIR, 1, 4)}
    assert outcome("xxyxz", rewards, seed=5) == outcome("xxyxz", rewards, seed=5)


def test_each_sample_counts_also_an_identical_one() -> None:
    clusters = [0, 0, 0, 1, 2]
    found = synthesized(clusters, [0.0] * 5, ["a", "a", "a", "b", "c"], 0.5, np.random.default_rng(0))
    assert (found.kind, found.confidence, found.clusters, found.chosen) == (PAIR, 0.6, 3, 0)
    drawn = [
        synthesized(
            [0, 0, 0, 0, 0, 1, 1, 1, 2], [0.0] * 9, list("aaaaabbbc"), 0.5, np.random.default_rng(seed)
        ).rejected
        for seed in range(400)
    ]
    assert 250 < sum(5 <= i <= 7 for i in drawn) < 350, "three of four draws"


@pytest.mark.parametrize(
    ("answers", "threshold", "kind"),
    [
        ("xxxx", 0.5, AGREED),
        ("xxyz", 0.5, PAIR),
        ("xxyy", 0.5, TIE),
        ("xxyyz", 0.4, TIE),
        ("xxyyz", 0.5, UNSURE),
        ("xx---", 0.5, UNSURE),
        ("xx--", 0.5, PAIR),
        ("----", 0.25, TIE),
        ("xxxyyz", 0.51, UNSURE),
    ],
)
def test_which_records_give_a_pair(answers: str, threshold: float, kind: str) -> None:
    assert outcome(answers, [0.0] * len(answers), threshold)[0] == kind


def test_equal_texts_are_no_pair() -> None:
    found = synthesized([0, 0, 1], [1.0, 0.0, 0.0], ["a", "b", "a"], 0.5, np.random.default_rng(0))
    assert found.kind == SAME
    others = synthesized([0, 0, 1, 2], [1.0, 0.0, 0.0, 0.0], ["a", "b", "a", "c"], 0.5, np.random.default_rng(0))
    assert (others.chosen, others.rejected) == (0, 3)


def test_samples_without_text_count_but_are_in_no_pair() -> None:
    texts, rng = ["", "a", " b", [{"role": "assistant", "content": ""}], "c"], np.random.default_rng(0)
    rewards = [9.0, 1.0, 2.0, 0.0, 0.0]
    found = synthesized([0, 0, 0, 1, 2], rewards, texts, 0.5, rng)
    assert (found.kind, found.confidence, found.chosen, found.rejected) == (PAIR, 0.6, 2, 4)
    assert synthesized([0, 0, 0, 1, 2], rewards, [*texts[:4], ""], 0.5, rng).kind == SAME
    assert synthesized([0, 0, 0, 1, 2], rewards, ["", "", "", "d", "c"], 0.5, rng).kind == SAME


def test_accuracy_counts_pairs_that_differ() -> None:
    found = accuracy([(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    assert found == (2, 1, 1)
    assert found.share == pytest.approx(2 / 3)
    assert np.isnan(accuracy([(0.0, 0.0)]).share)


def test_entailment_must_hold_in_both_directions() -> None:
    both = {(0, 2), (2, 0), (0, 1), (1, 3), (3, 1)}  # 0 entails 1, not the other way
    assert by_entailment(4, lambda a, b: (a, b) in both) == [0, 1, 0, 1]
    # With the first of a cluster, not with any of it.
    chain = {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert by_entailment(3, lambda a, b: (a, b) in chain) == [0, 0, 1]


# ----------------------------------------------------------------------------------------------------- a small model

WORDS = ["one two", "three", " four, five", "six; seven, one two three", "two two two two", "five"]


def nli(folder: Path, labels: list[str]) -> Path:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    reader = tokenizer()
    reader.save_pretrained(folder)
    return folder


def test_a_model_in_batches_says_what_it_says_pair_by_pair(tmp_path: Path) -> None:
    entailment = Entailment(nli(tmp_path / "nli", ["contradiction", "neutral", "ENTAILMENT"]))
    one_by_one = {}
    with torch.inference_mode():
        for a in WORDS:
            for b in WORDS:
                ids = entailment.tokenizer(f"q {a}", f"q {b}", return_tensors="pt")
                one_by_one[a, b] = int(entailment.network(**ids).logits.argmax()) == 2
    pairs = [(f"q {a}", f"q {b}") for a in WORDS for b in WORDS]
    assert len(pairs) > BATCH
    found = entailment._entails(pairs)
    assert found == list(one_by_one.values())
    assert 0 < sum(found) < len(found)
    expected = by_entailment(len(WORDS), lambda a, b: one_by_one[WORDS[a], WORDS[b]])
    assert entailment.clusters("q", [*WORDS, WORDS[2]]) == [*expected, expected[2]]


def test_what_is_no_model_of_entailment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one label must be 'entailment', but its labels are good, bad"):
        Entailment(nli(tmp_path / "nli", ["good", "bad"]))
    with pytest.raises(UserError, match=r"--entailment .*none: cannot be loaded"):
        Entailment(tmp_path / "none")
