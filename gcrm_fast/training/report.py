"""inspect.html of a run: held-out pairs token by token, those with the lowest margins first."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from gcrm_fast.data.encoding import OWN_END, Completion, TokenizedPair, prompt_text, token_texts
from gcrm_fast.evaluation.page import Column, Record, marks_of, page, selected
from gcrm_fast.training.describe import q_verdict
from gcrm_fast.training.held_out import Scores, TokenScores, metrics

WORST, RANDOM = 20, 10  # pairs shown
ERROR_FIELD = "error_step"  # of the generated pairs: number of the rejected side's wrong step, from 1


def shown_pairs(scores: Scores) -> dict[str, list[int]]:
    """Indices of the pairs to show by heading."""
    return selected((scores.reward_2N[0] - scores.reward_2N[1]).tolist(), WORST, RANDOM)


def _record(pair: TokenizedPair, values: TokenScores, tokenizer: PreTrainedTokenizerBase) -> Record:
    completions = [
        Completion(pair.chosen_ids, pair.chosen_start, OWN_END),
        Completion(pair.rejected_ids, pair.rejected_start, OWN_END),
    ]
    texts = [token_texts(tokenizer, completion) for completion in completions]
    step = pair.fields.get(ERROR_FIELD)
    marks = marks_of(completions, texts, [None, step - 1 if isinstance(step, int) else None])
    columns = [
        Column(title=title, text_n=text_n, reward_n=reward_n, q_n=q_n, right=title == "chosen", marks=marks_n)
        for title, text_n, (reward_n, q_n), marks_n in zip(("chosen", "rejected"), texts, values, marks, strict=True)
    ]
    title = f"Pair {pair.pair_id}" + (f" ({Path(pair.where).name})" if pair.where else "")
    return Record(title=title, prompt=prompt_text(tokenizer, pair), columns=columns)


def write_report(
    path: Path, run: str, scores: Scores, values: dict[int, TokenScores], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes the page. ``values``: by pair id, of all pairs of ``shown_pairs``."""
    won = int(np.sum(scores.reward_2N[0] > scores.reward_2N[1]))
    groups = {
        heading: [_record(scores.pairs[i], values[scores.pairs[i].pair_id], tokenizer) for i in indices]
        for heading, indices in shown_pairs(scores).items()
    }
    verdict = q_verdict(metrics(scores))
    about = [
        f"Run {run}, after its last step; chosen has the higher reward in {won} of {len(scores.pairs)} held-out pairs",
        verdict[0].upper() + verdict[1:],
    ]
    page(title="Held-out pairs, token by token", about=about, groups=groups).save(path)
